"""Measure a pocket model: `python -m training.evaluate MODEL_DIR --books DIR`, the books being held-out ones.

Everything goes through plain transformers (`AutoModelForCausalLM`), dense attention, greedy choice. An answer counts
when every one of its tokens and the end-of-turn token is the model's first choice, which is exactly when greedy
decoding writes it and stops; so one forward pass checks many questions. A sample of them is also really generated.

Tasks with several values (RULER's multi-value and multi-query needles, variables, words) are also generated and
scored as RULER does: the share of the expected values that the answer contains.

Prints Markdown tables and, last, one JSON line. With `--tables`, MODEL is
the JSON of an earlier run and only its tables are printed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sentencekv.needles import NOT_MENTIONED, Fact, absent_questions, hide, is_right, make_facts
from sentencekv.prose import generate_prose
from training.corpus import Corpus, prepare, read_books
from training.samples import DEFAULT_MIX, NIAH_VARIANTS, TASKS, Piece, RowMaker, ruler_niah
from training.tokenizer import ASSISTANT, BEGIN, END, USER

LENGTHS = (1024, 4096, 16_384, 32_768)


class Reader:
    """A model folder and what is asked of it."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.device = device
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @torch.inference_mode()
    def right_spans(self, ids: Sequence[int] | np.ndarray, spans: Sequence[tuple[int, int]]) -> list[bool]:
        """For each (start, end) of `ids`: is every token there the first choice after those before it?"""
        tokens = torch.as_tensor(np.asarray(ids, dtype=np.int64), device=self.device)
        places = torch.cat([torch.arange(start - 1, end - 1, device=self.device) for start, end in spans])
        logits = self.model(tokens[None], logits_to_keep=places, use_cache=False).logits[0]
        right = (logits.argmax(-1) == tokens[places + 1]).tolist()
        found, at = [], 0
        for start, end in spans:
            found.append(all(right[at : at + end - start]))
            at += end - start
        return found

    @torch.inference_mode()
    def heldout_loss(self, corpus: Corpus, length: int, last: int, rows: int) -> float:
        total = 0.0
        for end in np.linspace(40_000, len(corpus.tokens) - 2, rows).astype(int):
            ids = np.concatenate(([1], np.asarray(corpus.tokens[end - length + 1 : end + 1]).astype(np.int64)))
            tokens = torch.as_tensor(ids, device=self.device)
            logits = self.model(tokens[None, :-1], logits_to_keep=last, use_cache=False).logits[0].float()
            total += F.cross_entropy(logits, tokens[-last:]).item()
        return total / rows

    @torch.inference_mode()
    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int = 48) -> list[str]:
        """Greedy answers to prompts, batched with padding on the left."""
        batch = self.tokenizer.pad({"input_ids": list(prompts)}, return_tensors="pt").to(self.device)
        out = self.model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        return self.tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def haystack(books: Sequence[str], rng: Random, num_tokens: int, prose: bool) -> str:
    """Held-out text of about `num_tokens` tokens, cut at the end of a sentence."""
    if prose:
        return generate_prose(int(num_tokens * 0.66), rng.randrange(1000, 100_000))
    book = rng.choice(books)
    start = rng.randrange(len(book) - num_tokens * 5)
    start = book.index(". ", start) + 2
    return book[start : book.index(". ", start + int(num_tokens * 3.45)) + 1]


def document_with(reader: Reader, books: Sequence[str], rng: Random, length: int, count: int, prose: bool) -> Any:
    """`count` facts hidden in a text of about `length` tokens, and the ids of the prompt up to the document's end."""
    facts = make_facts(rng, count)
    hidden = hide(haystack(books, rng, length - 40 * count - 40, prose), facts, rng)
    ids = reader.encode(f"{BEGIN}{USER}{hidden.text}")
    return facts, hidden, ids


def ask(reader: Reader, head: list[int], fact: Fact) -> tuple[list[int], tuple[int, int]]:
    question = reader.encode(f"\n\n{fact.question}{END}{ASSISTANT}")
    answer = reader.encode(f"{fact.answer}{END}")
    start = len(head) + len(question)
    return [*head, *question, *answer], (start, start + len(answer))


def retrieval(reader: Reader, books: Sequence[str], length: int, rows: int, prose: bool) -> dict[str, Any]:
    """Eight facts a text, each asked alone in a first turn; shares right by depth and by kind; absent ones too."""
    rng = Random(f"retrieval {length} {prose}")
    depth: dict[int, list[bool]] = {}
    kind: dict[str, list[bool]] = {}
    absent: list[bool] = []
    for _ in range(rows):
        facts, hidden, head = document_with(reader, books, rng, length, 8, prose)
        for fact, (start, _) in zip(facts, hidden.spans, strict=True):
            ids, span = ask(reader, head, fact)
            right = reader.right_spans(ids, [span])[0]
            depth.setdefault(min(4, start * 5 // len(hidden.text)), []).append(right)
            kind.setdefault(fact.kind, []).append(right)
        for fact in absent_questions(rng, facts, 4):
            ids, span = ask(reader, head, fact)
            absent.append(reader.right_spans(ids, [span])[0])
    every = [right for found in depth.values() for right in found]
    return {
        "right": share(every), "of": len(every),
        "by_depth": {f"{20 * place}-{20 * place + 20}%": share(depth[place]) for place in sorted(depth)},
        "by_kind": {name: share(found) for name, found in sorted(kind.items())},
        "absent_right": share(absent), "absent_of": len(absent),
    }  # fmt: skip


def follow_ups(reader: Reader, books: Sequence[str], length: int, rows: int) -> dict[str, Any]:
    """Eight facts and two absent ones asked in successive turns of one chat; shares right by turn, false absences."""
    rng = Random(f"turns {length}")
    by_turn: list[list[bool]] = [[] for _ in range(10)]
    for _ in range(rows):
        facts, _, ids = document_with(reader, books, rng, length, 8, prose=False)
        asked = [*facts, *absent_questions(rng, facts, 2)]
        rng.shuffle(asked)
        spans = []
        for number, fact in enumerate(asked):
            ids += reader.encode(("\n\n" if number == 0 else USER) + f"{fact.question}{END}{ASSISTANT}")
            answer = reader.encode(f"{fact.answer}{END}")
            spans.append((len(ids), len(ids) + len(answer)))
            ids += answer
        for number, right in enumerate(reader.right_spans(ids, spans)):
            by_turn[number].append(right)
    return {"first_turn": share(by_turn[0]), "later_turns": share([r for found in by_turn[1:] for r in found])}


def generated(reader: Reader, books: Sequence[str], length: int, rows: int, prose: bool) -> dict[str, Any]:
    """The same as `retrieval`, really generated; also how often a present fact is called not mentioned."""
    rng = Random(f"generate {length} {prose}")
    right, denied, of = 0, 0, 0
    for _ in range(rows):
        facts, _, head = document_with(reader, books, rng, length, 8, prose)
        prompts = [[*head, *reader.encode(f"\n\n{fact.question}{END}{ASSISTANT}")] for fact in facts]
        for fact, answer in zip(facts, reader.generate(prompts), strict=True):
            right += is_right(answer, fact)
            denied += NOT_MENTIONED in answer
            of += 1
    return {"right": right, "denied": denied, "of": of}


def share(found: Sequence[bool]) -> float:
    return round(sum(found) / max(1, len(found)), 4)


def task_scores(reader: Reader, corpus: Corpus, length: int, rows: int) -> dict[str, float]:
    """Share of wholly right answers, by task, on rows made from held-out books."""
    scores: dict[str, float] = {}
    names = [name for name in TASKS if name not in ("plain", "repeats", "niah")] + [f"niah_{v}" for v in NIAH_VARIANTS]
    for name in names:
        make = RowMaker(corpus, None, Random(f"{name} {length}"), DEFAULT_MIX)
        found: list[bool] = []
        tries = 0
        while tries < rows:
            tries += 1
            if name.startswith("niah_"):
                piece: Piece | None = ruler_niah(make, length, name.removeprefix("niah_"))
            else:
                piece = TASKS[name](make, length)
            if piece is None or not piece.spans:
                continue
            found += reader.right_spans(np.concatenate(piece.parts), piece.spans)
        scores[name] = share(found)
    return scores


def contained(reader: Reader, corpus: Corpus, length: int, rows: int) -> dict[str, float]:
    """Share of the expected values in generated answers, for tasks whose answer is a list."""
    scores: dict[str, float] = {}
    for name in ("niah_multivalue", "niah_multiquery", "variables", "words"):
        make = RowMaker(corpus, None, Random(f"contained {name} {length}"), DEFAULT_MIX)
        found: list[float] = []
        for _ in range(rows):
            variant = name.removeprefix("niah_")
            piece = ruler_niah(make, length, variant) if variant != name else TASKS[name](make, length)
            if piece is None or not piece.spans:
                continue
            ids = np.concatenate(piece.parts)
            start, end = piece.spans[0]
            expected = reader.tokenizer.decode(ids[start:end].tolist(), skip_special_tokens=True).strip().split(", ")
            answer = reader.generate([ids[:start].tolist()], max_new_tokens=100)[0]
            found.append(sum(value in answer for value in expected) / len(expected))
        scores[name] = round(sum(found) / max(1, len(found)), 4)
    return scores


def tables(result: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    lengths = sorted({int(name.split()[-1]) for name in result if name.startswith("tasks ")})
    head = "| context tokens | " + " | ".join(f"{length:,}" for length in lengths) + " |"
    rule = "|---" * (len(lengths) + 1) + "|"

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.0f}%"

    def row(name: str, values: list[float | None]) -> str:
        return f"| {name} | " + " | ".join(map(percent, values)) + " |"

    lines = ["| context tokens | " + " | ".join(f"{int(size):,}" for size in result["perplexity"]) + " |"]
    lines.append("|---" * (len(result["perplexity"]) + 1) + "|")
    lines.append("| held-out perplexity | " + " | ".join(str(value) for value in result["perplexity"].values()) + " |")
    for text in ("books", "prose"):
        found = [result[f"retrieval {text} {length}"] for length in lengths]
        lines += ["", head.replace("context tokens", f"facts in {text}, by depth"), rule]
        for depth in found[0]["by_depth"]:
            lines.append(row(depth, [one["by_depth"].get(depth) for one in found]))
        lines.append(row(f"all {found[0]['of']}", [one["right"] for one in found]))
        for kind in sorted({kind for one in found for kind in one["by_kind"]}):
            lines.append(row(f"kind: {kind}", [one["by_kind"].get(kind) for one in found]))
        lines.append(row(f"'not mentioned' of {found[0]['absent_of']} absent", [one["absent_right"] for one in found]))
    turns = [result[f"turns {length}"] for length in lengths]
    tasks = [result[f"tasks {length}"] for length in lengths]
    lines += ["", head.replace("context tokens", "exact answers, by task"), rule]
    lines.append(row("chat, first turn", [one["first_turn"] for one in turns]))
    lines.append(row("chat, later turns", [one["later_turns"] for one in turns]))
    lines += [row(name, [one.get(name) for one in tasks]) for name in tasks[0]]
    if any(f"contained {length}" in result for length in lengths):
        parts = [result.get(f"contained {length}", {}) for length in lengths]
        names = next(part for part in parts if part)
        lines += ["", head.replace("context tokens", "share of the values named"), rule]
        lines += [row(name, [part.get(name) for part in parts]) for name in names]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--books", type=Path, help="folder of held-out *.txt.gz")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--rows", type=int, default=24, help="texts per length and table")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--tables", action="store_true", help="MODEL is an earlier run's JSON: print its tables")
    args = parser.parse_args()
    if args.tables:
        print(tables(json.loads(args.model.read_text())))
        return
    if args.books is None:
        parser.error("--books is needed: the folder of held-out *.txt.gz")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.time()
    reader = Reader(args.model, device)
    books = read_books(args.books)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        (folder / "tokenizer.json").write_text((args.model / "tokenizer.json").read_text())
        prepare(books, folder, "heldout")
        corpus = Corpus(folder, "heldout")
        result: dict[str, Any] = {}
        last = 512
        windows = 4 * args.rows
        result["perplexity"] = {
            length: round(float(np.exp(reader.heldout_loss(corpus, length, last, windows))), 3)
            for length in sorted({1024, 2048, 4096, 8192, 16_384, 32_768} & set(range(max(args.lengths) + 1)))
        }
        print(f"held-out perplexity of the same {last} tokens by context: {result['perplexity']}", flush=True)
        for length in args.lengths:
            for prose in (False, True):
                found = retrieval(reader, books, length, max(2, args.rows // (2 if prose else 1)), prose)
                result[f"retrieval {'prose' if prose else 'books'} {length}"] = found
                print(length, "prose" if prose else "books", found, flush=True)
            result[f"turns {length}"] = follow_ups(reader, books, length, args.rows)
            result[f"tasks {length}"] = task_scores(reader, corpus, length, args.rows)
            print(length, result[f"turns {length}"], result[f"tasks {length}"], flush=True)
            if length <= 16_384:
                result[f"generated {length}"] = generated(reader, books, length, max(1, args.rows // 8), prose=True)
                print(length, "generated", result[f"generated {length}"], f"{time.time() - began:.0f} s", flush=True)
            if length <= 4096:
                result[f"contained {length}"] = contained(reader, corpus, length, args.rows)
                print(length, "contained", result[f"contained {length}"], flush=True)
    result["seconds"] = round(time.time() - began)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))
    result = json.loads(json.dumps(result))
    print(tables(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
