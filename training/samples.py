"""Training rows: book text, and texts with something in them to find, each followed by questions and answers.

A row is `length` token ids with one code per token that says how its prediction counts (`NONE` .. `ANSWER`). Every
sample begins with the begin token; short samples share a row. Documents and questions are tokenised separately, as
someone who reads a document once and asks many questions has to.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

import numpy as np

from sentencekv.needles import KINDS, NOT_MENTIONED, absent_questions, make_facts
from training.corpus import Corpus
from training.tokenizer import ASSISTANT_ID, BEGIN_ID, END_ID, PAD_ID, USER_ID

NONE, PLAIN, HAYSTACK, LOW, ANSWER = range(5)

_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_JOIN = ", "


@dataclass
class Piece:
    """Tokens in order, with their codes; `spans` are the answers' (start, end) places."""

    parts: list[np.ndarray] = field(default_factory=list)
    codes: list[np.ndarray] = field(default_factory=list)
    size: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)

    def add(self, tokens: Sequence[int] | np.ndarray, code: int) -> None:
        array = np.asarray(tokens, dtype=np.uint16)
        if code == ANSWER:
            self.spans.append((self.size, self.size + len(array)))
        self.parts.append(array)
        self.codes.append(np.full(len(array), code, dtype=np.uint8))
        self.size += len(array)

    def extend(self, other: Piece) -> None:
        self.spans += [(start + self.size, end + self.size) for start, end in other.spans]
        self.parts += other.parts
        self.codes += other.codes
        self.size += other.size


@dataclass(frozen=True)
class Turn:
    """A question and its answer; `prefix` is what the assistant's turn is made to begin with."""

    question: str
    answer: str
    prefix: str = ""


class RowMaker:
    """Makes rows from corpora with one random stream; `mix` weighs the tasks by their names in `TASKS`."""

    def __init__(self, books: Corpus, prose: Corpus | None, rng: Random, mix: dict[str, float]) -> None:
        self.books, self.prose, self.rng, self.mix = books, prose, rng, mix
        self.words = books.words
        self._encode = books.tokenizer.encode
        self._noise = np.array(self.encode(_NOISE.replace("again.", "again.\n")), dtype=np.uint16)

    def encode(self, text: str) -> list[int]:
        return self._encode(text, add_special_tokens=False).ids

    def row(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """One row: a single sample as long as the row, or several shorter ones."""
        row = Piece()
        whole = length <= 2048 or self.rng.random() < 0.6
        while length - row.size > 160:
            room = length - row.size
            size = room if whole else min(room, int(512 * (length / 512) ** self.rng.random()))
            if room - size < 512:
                size = room
            task = self.rng.choices(list(self.mix), weights=list(self.mix.values()))[0]
            row.extend(self.sample(task, size))
        ids = np.concatenate(row.parts)[:length]
        codes = np.concatenate(row.codes)[:length]
        if len(ids) < length:
            ids = np.append(ids, np.full(length - len(ids), PAD_ID, dtype=np.uint16))
            codes = np.append(codes, np.zeros(length - len(codes), dtype=np.uint8))
        return ids, codes

    def sample(self, task: str, size: int) -> Piece:
        """A sample of `task` with about `size` tokens; one that cannot be so short becomes plain text."""
        piece = TASKS[task](self, size)
        if piece is None or piece.size > size:
            piece = self.plain(size)
        return piece

    def plain(self, size: int) -> Piece:
        piece = Piece()
        start = int(self.rng.random() * max(1, len(self.books.tokens) - size))
        piece.add([BEGIN_ID], NONE)
        piece.add(np.asarray(self.books.tokens[start : start + size - 1]), PLAIN)
        return piece

    def haystack(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and the places in them where a sentence may be put."""
        kind = self.rng.random()
        if kind < 0.25 and self.prose is not None:
            return self.prose.window(self.rng.random(), size)
        if kind < 0.32:
            tokens = np.resize(self._noise, max(1, size))
            return tokens, np.flatnonzero(tokens == self._noise[-1]) + 1
        if kind < 0.40:
            sentence = np.array(self.encode(" " + self.decode(self.books.window(self.rng.random(), 40)[0]).strip()))
            repeats = max(1, size // max(1, len(sentence)))
            return np.tile(sentence, repeats), np.arange(1, repeats + 1) * len(sentence)
        if kind < 0.50 and size > 600:
            first, ends = self.books.window(self.rng.random(), size // 2)
            second, more = self.books.window(self.rng.random(), size - len(first) - 1)
            return np.concatenate((first, self.encode("\n\n"), second)), np.concatenate((ends, more + len(first) + 1))
        return self.books.window(self.rng.random(), size)

    def decode(self, tokens: np.ndarray) -> str:
        return self.books.tokenizer.decode(tokens.tolist(), skip_special_tokens=False)

    def converse(self, document: Piece, turns: Sequence[Turn], glue: str = "\n\n") -> Piece:
        """The chat form, or (one time in twelve) a plain form with `Question:` and `Answer:`."""
        piece = Piece()
        raw = self.rng.random() < 1 / 12
        piece.add([BEGIN_ID] if raw else [BEGIN_ID, USER_ID], NONE)
        piece.extend(document)
        for number, turn in enumerate(turns):
            if raw:
                piece.add(self.encode(f"\n\nQuestion: {turn.question}\nAnswer:"), LOW)
                piece.add([*self.encode(" " + turn.answer), *self.encode("\n\n")[:1]], ANSWER)
                continue
            if number:
                piece.add([USER_ID], LOW)
            piece.add([*self.encode((glue if number == 0 else "") + turn.question), END_ID], LOW)
            piece.add([ASSISTANT_ID], LOW)
            if turn.prefix:
                piece.add(self.encode(turn.prefix), LOW)
                piece.add([*self.encode(" " + turn.answer), END_ID], ANSWER)
            else:
                piece.add([*self.encode(turn.answer), END_ID], ANSWER)
        return piece

    def cost(self, turns: Sequence[Turn]) -> int:
        """Tokens that the turns take beside the document, at most."""
        texts = [turn.question + " " + turn.prefix + " " + turn.answer for turn in turns]
        return 4 + sum(len(self.encode(text)) + 10 for text in texts)

    def scatter(self, sentences: Sequence[str], size: int, lead: str = "", in_order: bool = False) -> Piece | None:
        """A haystack of `size` tokens with the sentences put in at random sentence ends; None if they do not fit."""
        encoded = [self.encode(" " + sentence) for sentence in sentences]
        heading = self.encode(lead) if lead else []
        room = size - len(heading) - sum(map(len, encoded)) - 2
        if room < 8:
            return None
        tokens, ends = self.haystack(room)
        if not len(ends):
            ends = np.array([len(tokens)])
        places = self.rng.choices([0, *ends.tolist()], k=len(encoded))
        if self.rng.random() < 0.5:
            places = [
                min(ends.tolist(), key=lambda end: abs(end - target))
                if len(ends) < 64
                else int(ends[min(len(ends) - 1, int(np.searchsorted(ends, target)))])
                for target in ((i + self.rng.random()) / len(encoded) * len(tokens) for i in range(len(encoded)))
            ]
            if not in_order:
                self.rng.shuffle(places)
        if in_order:
            places.sort()
        document = Piece()
        if heading:
            document.add(heading, LOW)
        copied = 0
        for place, fact in sorted(enumerate(places), key=lambda item: item[1]):
            document.add(tokens[copied:fact], HAYSTACK)
            text = encoded[place]
            if document.size == 0:
                text = self.encode(sentences[place])
            document.add(text, LOW)
            if fact == 0:
                document.add(self.encode(" ") if self.rng.random() < 0.3 else self.encode("\n"), LOW)
            copied = fact
        document.add(tokens[copied:], HAYSTACK)
        return document

    def num_questions(self, size: int, tokens_each: int = 40, most: int = 16) -> int:
        return self.rng.randint(1, max(1, min(most, size // (2 * tokens_each))))


def _facts(make: RowMaker, size: int) -> Piece | None:
    rng = make.rng
    kinds = KINDS if rng.random() < 0.6 else [rng.choice(("number", "number", "word", "passkey", "uuid", *KINDS))]
    facts = make_facts(rng, rng.randint(1, max(1, min(24, size // 120))), kinds)
    asked = rng.sample(facts, min(len(facts), make.num_questions(size)))
    turns = [Turn(fact.question, fact.answer) for fact in asked]
    absent = sum(rng.random() < 0.22 for _ in range(len(turns) + 1))
    turns += [Turn(fact.question, fact.answer) for fact in absent_questions(rng, facts, absent, kinds)]
    rng.shuffle(turns)
    turns = turns[:16]
    document = make.scatter([fact.sentence for fact in facts], size - make.cost(turns))
    return None if document is None else make.converse(document, turns)


def _word_key(make: RowMaker) -> str:
    return f"{make.rng.choice(make.words)}-{make.rng.choice(make.words)}"


def _uuid_value(make: RowMaker) -> str:
    digits = f"{make.rng.getrandbits(128):032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _number_value(make: RowMaker) -> str:
    digits = make.rng.choice((3, 4, 5, 6, 7, 7, 9))
    return str(make.rng.randint(10 ** (digits - 1), 10**digits - 1))


def _single_word(make: RowMaker) -> str:
    return make.rng.choice(make.words)


_VALUES: list[Callable[[RowMaker], str]] = [_word_key, _uuid_value, _number_value, _single_word]

_LIST_FORMS: list[tuple[str, str, str, str, list[str]]] = [
    (
        "{{",
        '"{key}": "{value}"',
        ",\n ",
        "}}",
        ['What is the value of "{key}"?', "What is the value for the key {key}?"],
    ),
    ("", "{key}: {value}", "\n", "", ["What is the value of {key}?", "{key}?", "What stands after {key}?"]),
    ("", "{key} = {value}", "\n", "", ["What is {key} set to?", "What is the value of {key}?"]),
    ("", "The value of {key} is {value}.", " ", "", ["What is the value of {key}?", "Tell me the value of {key}."]),
    ("", "| {key} | {value} |", "\n", "", ["What is in the row of {key}?", "What is the value of {key}?"]),
    ("", "{key},{value}", "\n", "", ["What is the value of {key}?", "Look up {key}."]),
]
_LITM = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
_LONGEVAL = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its corresponding "
    "<REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding <REGISTER_CONTENT> of "
    "a certain line index. Now the record start:\n\n"
)
_LONGEVAL_END = "Now the record is over. Tell me what is the <REGISTER_CONTENT> in line {key}? I need the number."


def _pairs(make: RowMaker, size: int) -> Piece | None:
    rng = make.rng
    make_key = rng.choice((_word_key, _uuid_value, _single_word, _word_key))
    make_value = rng.choice(_VALUES)
    lead, form, between, end, questions = rng.choice(_LIST_FORMS)
    glue, longeval, litm = "\n\n", False, False
    if (special := rng.random()) < 0.2:
        longeval, make_key, make_value = True, _word_key, _number_value
        lead, form, between, end = _LONGEVAL, "line {key}: REGISTER_CONTENT is <{value}>", "\n", ""
        questions = [_LONGEVAL_END]
    elif special < 0.35:
        litm, make_key, make_value = True, _uuid_value, _uuid_value
        lead, form, between, end, _ = _LIST_FORMS[0]
        lead, questions = _LITM + lead, ['Key: "{key}"\nCorresponding value:']
    num_turns = make.num_questions(size, 60)
    keys: dict[str, str] = {}
    probe = [form.format(key=make_key(make), value=make_value(make)) + between for _ in range(4)]
    each = sum(len(make.encode(text)) for text in probe) / 4 + 0.5
    turn_cost = each + len(make.encode(questions[0])) + 14
    room = size - len(make.encode(lead)) - 12 - num_turns * turn_cost * 1.25
    count = int(room / each * 0.96)
    if count < 2:
        return None
    while len(keys) < count:
        keys.setdefault(make_key(make), make_value(make))
    if longeval:
        questions = [rng.choice((_LONGEVAL_END, "Tell me what is the <REGISTER_CONTENT> in line {key}?"))]
    items = between.join(form.format(key=key, value=value) for key, value in keys.items())
    text = lead.replace("{{", "{") + items + end.replace("}}", "}")
    turns = []
    for key in rng.sample(list(keys), min(num_turns, count)):
        if rng.random() < 0.1 and not litm:
            turns.append(Turn(rng.choice(questions).format(key=make_key(make)), NOT_MENTIONED))
        else:
            turns.append(Turn(rng.choice(questions).format(key=key), keys[key]))
    document = Piece()
    document.add(make.encode(text), LOW)
    return make.converse(document, turns, glue)


def _repeats(make: RowMaker, size: int) -> Piece | None:
    """Book text in which passages come back word for word later, and runs of random tokens that do too."""
    rng = make.rng
    piece = Piece()
    piece.add([BEGIN_ID], NONE)
    passages: list[np.ndarray] = []
    while piece.size < size - 1:
        room = size - piece.size
        if passages and rng.random() < 0.5:
            passage = rng.choice(passages)
            piece.add(passage[:room], PLAIN)
            continue
        if rng.random() < 0.25:
            tokens = np.array([rng.randrange(5, 4096) for _ in range(rng.randint(4, 40))])
            piece.add(tokens[:room], NONE)
        else:
            tokens, _ = make.books.window(rng.random(), min(room, rng.randint(30, 60 + size // 4)))
            piece.add(tokens[:room], HAYSTACK)
        start = rng.randrange(max(1, len(tokens) - 20))
        passages.append(tokens[start : start + rng.randint(8, 120)])
    return piece


def _quotes(make: RowMaker, size: int) -> Piece | None:
    """Continue a sentence of the text, given how it begins."""
    rng = make.rng
    num_turns = make.num_questions(size, 50, most=8)
    tokens, ends = make.haystack(size - num_turns * 56 - 8)
    if len(ends) < 3:
        return None
    form = rng.choice(('Continue the quotation: "{begin}"', 'How does the sentence go on that begins with "{begin}"?'))
    turns: list[Turn] = []
    for end in rng.sample(ends.tolist()[:-1], min(num_turns * 2, len(ends) - 1)):
        following = int(ends[int(np.searchsorted(ends, end)) + 1])
        text = make.decode(tokens[end : min(following, end + 40)]).strip()
        words = text.split(" ")
        if len(words) < 12 or "\n" in text or "\ufffd" in text:
            continue
        turns.append(Turn(form.format(begin=" ".join(words[:7])), " ".join(words[7:12])))
    if not turns:
        return None
    document = Piece()
    document.add(tokens, HAYSTACK)
    return make.converse(document, turns[:num_turns])


_NIAH_LEAD = (
    "{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the {kind} afterwards.\n"
)


def ruler_niah(make: RowMaker, size: int, variant: str) -> Piece | None:
    """The needle tasks of RULER by their names (`single_1` .. `multiquery`), in RULER's words."""
    rng = make.rng
    key = _uuid_value if variant == "multikey_3" else _word_key
    uuids = variant in ("single_3", "multikey_3")
    kind = "uuid" if uuids else rng.choice(("number", "number", "number", "word"))
    values = {"uuid": _uuid_value, "word": _word_key}.get(kind, lambda m: str(m.rng.randint(1_000_000, 9_999_999)))
    num_keys = {"multikey_1": 4, "multiquery": 4}.get(variant, 1)
    num_values = 4 if variant == "multivalue" else 1
    needles: list[tuple[str, list[str]]] = [
        (key(make), [values(make) for _ in range(num_values)]) for _ in range(num_keys)
    ]

    def line(name: str, value: str) -> str:
        return f"One of the special magic {kind}s for {name} is: {value}."

    several = variant in ("multivalue", "multiquery")
    asked = needles if variant == "multiquery" else [rng.choice(needles)]
    names = [name for name, _ in asked]
    query = names[0] if len(names) == 1 else ", ".join(names[:-1]) + ", and " + names[-1]
    if several:
        question = f"What are all the special magic {kind}s for {query} mentioned in the provided text?"
        prefix = f" The special magic {kind}s for {query} mentioned in the provided text are"
        lead = _NIAH_LEAD.format(some="Some", kind=f"{kind}s", are="are")
    else:
        question = f"What is the special magic {kind} for {query} mentioned in the provided text?"
        prefix = f" The special magic {kind} for {query} mentioned in the provided text is"
        lead = _NIAH_LEAD.format(some="A", kind=kind, are="is")
    answer = _JOIN.join(value for _, found in asked for value in found)
    turn = Turn(question, answer, prefix if rng.random() < 0.4 else "")
    sentences = [line(name, value) for name, found in needles for value in found]
    order = list(range(len(sentences)))
    if variant != "multivalue":
        rng.shuffle(order)
    turns = [turn]
    if variant in ("multikey_1", "multikey_2", "multikey_3") and rng.random() < 0.5:
        turns += [
            Turn(f"What is the special magic {kind} for {name} mentioned in the provided text?", found[0])
            for name, found in needles
            if name not in names
        ]
    if variant in ("multikey_2", "multikey_3"):
        more = min(rng.randint(0, 6), size // 400)
        extra = [(key(make), values(make)) for _ in range(more)]
        question_one = "What is the special magic {} for {} mentioned in the provided text?"
        turns += [Turn(question_one.format(kind, name), value) for name, value in extra]
        room = size - make.cost(turns) - len(make.encode(lead))
        lines = [*sentences, *(line(name, value) for name, value in extra)]
        each = len(make.encode(lines[0])) + 3
        while (len(lines) + 1) * each < room * 0.97:
            lines.append(line(key(make), values(make)))
        rng.shuffle(lines)
        tokens = make.encode(lead + "\n".join(lines))
        if len(tokens) > room:
            return None
        document = Piece()
        document.add(tokens, LOW)
    else:
        found = make.scatter([sentences[i] for i in order], size - make.cost(turns), lead, variant == "multivalue")
        if found is None:
            return None
        document = found
    return make.converse(document, turns, rng.choice(("\n", "\n\n")))


NIAH_VARIANTS = (
    "single_1",
    "single_2",
    "single_3",
    "multikey_1",
    "multikey_2",
    "multikey_3",
    "multivalue",
    "multiquery",
)


def _niah(make: RowMaker, size: int) -> Piece | None:
    return ruler_niah(make, size, make.rng.choice(NIAH_VARIANTS))


def _variables(make: RowMaker, size: int) -> Piece | None:
    """RULER's variable tracking: chains of assignments in a haystack."""
    rng = make.rng
    chains = []
    for _ in range(rng.choice((1, 1, 2, 3)) if size > 600 else 1):
        names = ["".join(rng.choices(string.ascii_uppercase, k=5)) for _ in range(rng.randint(2, 5))]
        chains.append((str(rng.randint(10_000, 99_999)), names))
    sentences = []
    waiting = [[f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in pairwise(names))]
               for value, names in chains]  # fmt: skip
    while any(waiting):
        sentences.append(rng.choice([chain for chain in waiting if chain]).pop(0) + rng.choice(("\n", "")))
    turns = []
    for value, names in rng.sample(chains, rng.randint(1, len(chains))):
        question = f"Question: Find all variables that are assigned the value {value} in the text above."
        prefix = (
            f" Answer: According to the chain(s) of variable assignment in the text above, {len(names)} variables are "
            f"assigned the value {value}, they are:"
        )
        turns.append(Turn(question, _JOIN.join(names), prefix if rng.random() < 0.4 else ""))
    lead = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    document = make.scatter(sentences, size - make.cost(turns), lead, in_order=True)
    return None if document is None else make.converse(document, turns, rng.choice(("\n", "\n\n")))


def _common_words(make: RowMaker, size: int) -> Piece | None:
    """RULER's common words (a numbered list) or frequent words (coded text)."""
    rng = make.rng
    if coded := rng.random() < 0.4:
        vocabulary = ["".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(max(8, size // 50))]
        lead = (
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            "appeared coded words. "
        )
        question = (
            "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
            "frequently appeared words in the above coded text?"
        )
        prefix = " Answer: According to the coded text above, the three most frequently appeared words are:"
    else:
        lead = (
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
            "that appear most often.\n"
        )
        question = "Question: What are the 10 most common words in the above list?"
        prefix = " Answer: The top 10 words that appear most often in the list are:"
    room = size - len(make.encode(lead + question + prefix)) - 90
    if room < 300:
        return None
    if coded:
        num_words = int(room / 5.2)
        ranks = np.arange(1, len(vocabulary) + 1, dtype=np.float64) ** -2.0
        counts = (num_words * ranks / 1.645).astype(int)
        vocabulary[0] = "..."
        words = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
        answer = vocabulary[1:4]
        rng.shuffle(words)
        text = lead + " ".join(words)
    else:
        num_words = int(room / 6.6)
        frequent = 30 if num_words > 600 else max(4, num_words // 20)
        rare = max(1, frequent // 10)
        chosen = rng.sample(make.words, min(len(make.words), 10 + max(0, num_words - 10 * frequent) // rare))
        answer = chosen[:10]
        words = [word for word in answer for _ in range(frequent)]
        words += [word for word in chosen[10:] for _ in range(rare)]
        rng.shuffle(words)
        text = lead + " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
    document = Piece()
    document.add(make.encode(text), LOW)
    turn = Turn(question, _JOIN.join(answer), prefix if rng.random() < 0.4 else "")
    return make.converse(document, [turn], rng.choice(("\n", "\n\n")))


TASKS: dict[str, Callable[[RowMaker, int], Piece | None]] = {
    "plain": RowMaker.plain,
    "facts": _facts,
    "pairs": _pairs,
    "repeats": _repeats,
    "quotes": _quotes,
    "niah": _niah,
    "variables": _variables,
    "words": _common_words,
}
"""Name of a task -> what makes one sample of at most the given size, or None where the size is too small for it."""

DEFAULT_MIX = {
    "plain": 0.36, "facts": 0.30, "pairs": 0.10, "repeats": 0.04, "quotes": 0.04, "niah": 0.11, "variables": 0.03,
    "words": 0.02,
}  # fmt: skip


def describe(make: RowMaker, piece: Piece) -> str:
    """A sample as JSON text with its answers, for a look by eye."""
    ids = np.concatenate(piece.parts)
    answers = [make.decode(ids[start:end]) for start, end in piece.spans]
    return json.dumps({"text": make.decode(ids), "answers": answers}, ensure_ascii=False)
