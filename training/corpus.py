"""Books as one long array of tokens, with the places where sentences begin.

`prepare` reads a folder of `*.txt.gz`, trains the tokenizer on it unless there is one, and writes `tokenizer.json`,
`{name}.tokens.npy` (uint16), `{name}.books.npy` (where each book begins, and the end) and `{name}.words.txt` (common
lower-case words, the raw material of word tasks). `Corpus` memory-maps them, so many worker processes share one copy.
"""

from __future__ import annotations

import gzip
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from training.tokenizer import train_tokenizer

_TOKENIZER_CHARS_PER_BOOK = 200_000


def read_books(folder: Path) -> list[str]:
    """The text of every `*.txt.gz` of `folder`, by file name."""
    paths = sorted(folder.glob("*.txt.gz"))
    if not paths:
        raise ValueError(f"no *.txt.gz in {folder}; give the folder that holds the books")
    return [gzip.open(path, "rt", encoding="utf-8").read() for path in paths]


def _encode(job: tuple[str, str]) -> np.ndarray:
    tokenizer_path, text = job
    return np.array(Tokenizer.from_file(tokenizer_path).encode(text, add_special_tokens=False).ids, dtype=np.uint16)


def prepare(texts: Sequence[str], folder: Path, name: str) -> None:
    """Tokenise `texts` into `folder` under `name`, on all CPU cores; an existing tokenizer.json is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_path = folder / "tokenizer.json"
    if not tokenizer_path.exists():
        train_tokenizer(text[:_TOKENIZER_CHARS_PER_BOOK] for text in texts).save(str(tokenizer_path))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with multiprocessing.get_context("fork").Pool(min(len(texts), os.cpu_count() or 1)) as pool:
        arrays = pool.map(_encode, [(str(tokenizer_path), text) for text in texts], chunksize=1)
    np.save(folder / f"{name}.tokens.npy", np.concatenate(arrays))
    np.save(folder / f"{name}.books.npy", np.cumsum([0, *map(len, arrays)]))
    counts = Counter(word for text in texts for word in text.split() if word.isascii() and word.isalpha())
    words = sorted(word for word, n in counts.items() if n >= 12 and word.islower() and 4 <= len(word) <= 10)
    (folder / f"{name}.words.txt").write_text("\n".join(words))


class Corpus:
    """Read-only view of what `prepare` wrote; windows of it begin and end where sentences do."""

    def __init__(self, folder: Path, name: str) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokens = np.load(folder / f"{name}.tokens.npy", mmap_mode="r")
        self.books = np.load(folder / f"{name}.books.npy")
        self.words = (folder / f"{name}.words.txt").read_text().split()
        starts_path = folder / f"{name}.starts.npy"
        if not starts_path.exists():
            np.save(starts_path, self._sentence_starts())
        self.starts = np.load(starts_path, mmap_mode="r")
        self._without_space = self._strip_table()

    def _per_token(self, test: Callable[[str], bool]) -> np.ndarray:
        size = self.tokenizer.get_vocab_size()
        return np.array([test(self.tokenizer.decode([token], skip_special_tokens=False)) for token in range(size)])

    def _sentence_starts(self) -> np.ndarray:
        """Positions of tokens that begin with white space and a capital, right after a full stop or its like."""
        closing = "\"'”’)]"
        ends = self._per_token(lambda text: text.rstrip(closing)[-1:] in (".", "!", "?") and text[-1:] != " ")
        begins = self._per_token(lambda text: text.startswith("\n\n") or (text[:1] == " " and text[1:2].isupper()))
        quotes = self._per_token(lambda text: text in (' "', " “"))
        tokens = np.asarray(self.tokens)
        found = ends[tokens[:-1]] & (begins | quotes)[tokens[1:]]
        return np.flatnonzero(found) + 1

    def _strip_table(self) -> np.ndarray:
        vocabulary = self.tokenizer.get_vocab()
        table = np.arange(self.tokenizer.get_vocab_size())
        for text, token in vocabulary.items():
            if text.startswith("Ġ") and len(text) > 1 and text[1:] in vocabulary:
                table[token] = vocabulary[text[1:]]
        return table

    def window(self, book_seed: float, size: int) -> tuple[np.ndarray, np.ndarray]:
        """At most `size` tokens from the place `book_seed` (0 to 1) of the corpus, whole sentences where it can.

        Returns the tokens and the positions in them where a sentence begins (0 excluded, the end included).
        """
        start = int(book_seed * max(1, len(self.tokens) - size - 1))
        first = int(np.searchsorted(self.starts, start))
        if first < len(self.starts) and self.starts[first] < start + size // 2:
            start = int(self.starts[first])
        last = int(np.searchsorted(self.starts, start + size, side="right"))
        inside = np.asarray(self.starts[first + 1 : last], dtype=np.int64) - start
        end = int(inside[-1]) if len(inside) and inside[-1] > 0.8 * size else min(size, len(self.tokens) - start)
        tokens = np.asarray(self.tokens[start : start + end]).copy()
        if len(tokens):
            tokens[0] = self._without_space[tokens[0]]
        inside = inside[inside <= end]
        if not len(inside) or inside[-1] != end:
            inside = np.append(inside, end)
        return tokens, inside
