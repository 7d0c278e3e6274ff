"""Train the parameters of sentence splitting that ship in `sentencekv/punkt/`: Punkt, on public-domain books.

    python training/punkt.py BOOKS_FOLDER

BOOKS_FOLDER holds plain text, one book per file, `.txt` or `.txt.gz`. What Punkt learns (abbreviations, collocations,
sentence starters, the cases in which words occur) is pruned to what can change a decision and written as JSON.
`abbreviations.txt` beside it is written by hand and merged in when the parameters are loaded.
"""

import argparse
import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from nltk.tokenize.punkt import PunktParameters, PunktTrainer

_OUTPUT = Path(__file__).resolve().parents[1] / "sentencekv" / "punkt" / "english.json"
_LOWER_CASE_FLAGS = (1 << 4) | (1 << 5) | (1 << 6)
"""Punkt's flags for a word seen in lower case at the beginning, the middle, or an unknown place of a sentence."""
_INSIDE_UPPER_CASE = 1 << 2
_QUOTES = re.compile(r"[“”\"«»_*]|(?<!\w)[‘']")
_DASHES = re.compile(r"--+|—")


class CountingParameters(PunktParameters):
    """Parameters that count how often a word occurs in each case and place, where Punkt remembers only that it did.

    One misprint among 80 MB would otherwise set a flag for good.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ortho_counts: Counter[tuple[str, int]] = Counter()

    def add_ortho_context(self, typ: str, flag: int) -> None:
        self.ortho_counts[typ, flag] += 1

    def set_frequent_contexts(self, min_share: float) -> None:
        """Set a word's flag where at least `min_share` of its occurrences are of that kind."""
        totals: Counter[str] = Counter()
        for (word, _), count in self.ortho_counts.items():
            totals[word] += count
        for (word, flag), count in self.ortho_counts.items():
            if count >= min_share * totals[word]:
                self.ortho_context[word] |= flag


def read_books(folder: Path, max_characters: int) -> Iterator[tuple[str, str]]:
    """Name and text of each book, at most `max_characters` from its middle (the beginning holds the contents).

    Quotation marks go, as the splitter judges the words that stand behind them.
    """
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
        start = max(0, (len(text) - max_characters) // 2)
        text = _DASHES.sub(" -- ", _QUOTES.sub("", text[start : start + max_characters]))
        yield path.name, text


def pruned(trainer: PunktTrainer, *, min_abbreviation_count: int, min_word_count: int) -> dict[str, object]:
    """What can change a decision: a word never seen in lower case decides as an unknown word does, so it is left out.

    Sentence starters that are never in lower case, or often capitalised inside a sentence, are names: "St. Louis" would
    pass for two sentences.
    """
    parameters: PunktParameters = trainer.get_params()
    counts = trainer._type_fdist
    words: dict[int, list[str]] = defaultdict(list)
    for word, flags in parameters.ortho_context.items():
        if flags & _LOWER_CASE_FLAGS and counts[word] >= min_word_count and word.isalpha():
            words[flags].append(word)
    starters = {
        word
        for word in parameters.sent_starters
        if parameters.ortho_context[word] & _LOWER_CASE_FLAGS
        and not parameters.ortho_context[word] & _INSIDE_UPPER_CASE
    }
    abbreviations = {
        word
        for word in parameters.abbrev_types
        if counts[word + "."] >= min_abbreviation_count and re.fullmatch(r"[^\W\d_]([^\W\d_]|\.)+", word)
    }
    return {
        "abbreviations": sorted(abbreviations),
        "collocations": sorted(list(pair) for pair in parameters.collocations),
        "sentence_starters": sorted(starters),
        "orthography": {str(flags): " ".join(sorted(words[flags])) for flags in sorted(words)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path, help="folder of .txt or .txt.gz files")
    parser.add_argument("--max-characters", type=int, default=2_000_000, help="taken from each book")
    parser.add_argument("--min-abbreviation-count", type=int, default=4)
    parser.add_argument("--min-word-count", type=int, default=20)
    parser.add_argument("--min-share", type=float, default=0.05, help="of a word's occurrences, to set a flag")
    parser.add_argument("--output", type=Path, default=_OUTPUT)
    arguments = parser.parse_args()
    trainer = PunktTrainer()
    parameters = trainer._params = CountingParameters()
    for name, text in read_books(arguments.books, arguments.max_characters):
        trainer.train(text, finalize=False)
        print(f"{name}: {len(trainer._params.abbrev_types)} abbreviations", flush=True)
    trainer.finalize_training()
    parameters.set_frequent_contexts(arguments.min_share)
    result = pruned(
        trainer,
        min_abbreviation_count=arguments.min_abbreviation_count,
        min_word_count=arguments.min_word_count,
    )
    arguments.output.write_text(json.dumps(result, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    print(f"{arguments.output}: {arguments.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
