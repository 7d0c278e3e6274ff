"""Where sentences end: in characters of a text, and in tokens of whatever tokenizer read it.

Boundaries come from the text, never from token ids: byte-level BPE fuses full stops with quotes and newlines. The
default splitter asks NLTK's Punkt, with parameters trained by `training/punkt.py`, where a full stop ends a sentence,
and adds line breaks, blank lines and the stops of scripts that write no spaces. Nothing is lost on any input: the
offsets always cover all tokens. This module knows nothing of models, caches or the rest of the package.
"""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

_PUNKT_FOLDER = Path(__file__).parent / "punkt"
_MAX_REMEMBERED = 1 << 16
_MAX_WORD = 64
_MAX_INDENT = 16
_WRAPPED_WIDTHS = (40, 120)

_OPENERS = "\"'“‘«‹(<[{*_—–-¿¡"
_CLOSERS = "\"'”’»›)]}*_"
_ENDS = re.compile(
    rf"(?<![.!?…])([.!?…]+)[{re.escape(_CLOSERS)}]*(?:[\[(]\d{{1,4}}[\])])*(?=\s+(\S{{0,{_MAX_WORD}}})|[“«])"
)
"""End marks, the closing marks and note numbers after them, the next word. The look-behind keeps long runs linear."""
_WIDE_ENDS = re.compile(r"[。！？｡।॥؟۔։።။។]+[」』）”’】》〉\]\"']*")
"""Ends in scripts whose stops need no space after them."""
_INITIAL = re.compile(r"[^\W\d_]\.|[OD]['’][^\W\d_]")
_UPPER_INSIDE = (1 << 2) | (1 << 3)
"""Punkt's flags for a capital in the middle of a sentence, and where it might be one: a name, as after a title."""
_NUMBER = re.compile(r"\d|[IVXLCDM]{2,}\b|[VX]\b|[ivxlc]+\b")


class Splitter(Protocol):
    """Anything that finds the ends of sentences in a text."""

    def __call__(self, text: str, /) -> Sequence[int] | np.ndarray:
        """Character offsets at which sentences end: `text[:offset]` holds the end mark and its closing quotes.

        Offsets lie in 0..len(text), in any order, repeats allowed; white space after an end may fall on either side.
        """
        ...


class _Orthography(dict[str, int]):
    """What Punkt knows of a word's cases. Unlike a defaultdict it does not grow with every unknown word it is asked."""

    def __missing__(self, word: str) -> int:
        return 0


class Abbreviations:
    """The hand-written list, read from `abbreviations.txt`.

    Attributes:
        plain: Punkt decides by the next word whether one of these also ends a sentence.
        titles: written before names, they never end a sentence (marked `+` in the file).
        before_numbers: abbreviations only where a number follows (marked `#`): "No. 5", but "He said no."
    """

    def __init__(self, text: str) -> None:
        entries = [line.split() for line in text.splitlines() if line.strip() and not line.startswith(";")]
        marks: dict[str, set[str]] = {"": set(), "+": set(), "#": set()}
        for word, *mark in entries:
            marks["".join(mark)].add(word.rstrip("."))
        self.plain = frozenset(marks[""])
        self.titles = frozenset(marks["+"])
        self.before_numbers = frozenset(marks["#"])


@lru_cache(maxsize=1)
def _shipped_abbreviations() -> Abbreviations:
    return Abbreviations((_PUNKT_FOLDER / "abbreviations.txt").read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def _shipped_parameters() -> PunktParameters:
    data = json.loads((_PUNKT_FOLDER / "english.json").read_text(encoding="utf-8"))
    parameters = PunktParameters()
    parameters.abbrev_types = set(data["abbreviations"])
    parameters.collocations = {(first, second) for first, second in data["collocations"]}
    parameters.sent_starters = set(data["sentence_starters"])
    parameters.ortho_context = _Orthography(
        (word, int(flags)) for flags, words in data["orthography"].items() for word in words.split()
    )
    abbreviations = _shipped_abbreviations()
    parameters.abbrev_types |= abbreviations.plain | abbreviations.titles
    parameters.abbrev_types -= abbreviations.before_numbers
    return parameters


class PunktSplitter:
    """Ends of sentences by Punkt's rules, at line breaks that are meant, and at stops of other scripts.

    Linear in the length of any text. Punkt's own classification is asked only where a word might be an abbreviation,
    an initial or a number, or where an ellipsis stands; every other mark is decided as Punkt would, without asking.
    It differs from NLTK's tokenizer on purpose: closing marks stay with their sentence, `"Why?" said he` goes on,
    the word that decides is the first one after the closing marks, and blank lines always end a sentence.

    Args:
        parameters: trained elsewhere with `nltk.tokenize.punkt.PunktTrainer`; by default those that are shipped.
    """

    def __init__(self, parameters: PunktParameters | None = None) -> None:
        self._parameters = _shipped_parameters() if parameters is None else parameters
        abbreviations = _shipped_abbreviations() if parameters is None else Abbreviations("")
        self._titles, self._before_numbers = abbreviations.titles, abbreviations.before_numbers
        self._punkt = PunktSentenceTokenizer(self._parameters)
        self._doubtful = {first for first, _ in self._parameters.collocations} | self._parameters.abbrev_types
        self._doubtful |= self._before_numbers
        self._remembered: dict[str, bool] = {}

    def __call__(self, text: str, /) -> np.ndarray:
        """Offsets at which sentences end, ascending, without 0 and `len(text)`, int64."""
        characters = _Characters(text)
        wide = [match.end() for match in _WIDE_ENDS.finditer(text)]
        ends = np.concatenate(
            [np.asarray(self._marked_ends(text), np.int64), np.asarray(wide, np.int64), characters.line_ends()]
        )
        ends = np.unique(ends)
        return ends[(ends > 0) & (ends < len(text))]

    def _marked_ends(self, text: str) -> list[int]:
        ends: list[int] = []
        doubtful = self._doubtful
        previous = 0
        for match in _ENDS.finditer(text):
            marks, following = match.groups()
            start, end = match.span()
            is_closed = end - start > len(marks)
            next_word = following.lstrip(_OPENERS) if following else ""
            if is_closed and next_word[:1].islower():
                previous = end
                continue
            if marks == ".":
                word = _last_word(text[max(previous, start - _MAX_WORD) : start])
                certain = len(word) > 1 and word.isalpha() and word.lower() not in doubtful
                is_end = certain or self._is_end(text, word, start, next_word)
            else:
                is_end = is_closed or "!" in marks or "?" in marks or self._ask_punkt(f"... {next_word}")
            if is_end:
                ends.append(end)
            previous = end
        return ends

    def _is_end(self, text: str, word: str, mark: int, next_word: str) -> bool:
        """Whether the full stop at `mark`, after a word that is not plainly a word, ends a sentence."""
        if not word:
            return False
        first = mark - len(word)
        if len(word) == 1 or word.isdigit():
            indent = text[max(0, first - _MAX_INDENT) : first].rstrip(" \t(")
            if indent[-1:] in ("", "\n", "\r") and (indent or first <= _MAX_INDENT):
                return False  # the number or letter of an item
        lower = word.lower()
        if lower in self._titles:
            return False
        if lower in self._before_numbers and _NUMBER.match(next_word):
            return False
        if not next_word:
            return lower not in self._parameters.abbrev_types
        if len(word) == 1 and word.isupper():
            is_name = self._parameters.ortho_context[next_word.rstrip(".,;:!?").lower()] & _UPPER_INSIDE
            if is_name or _INITIAL.match(next_word):
                return False
        return self._ask_punkt(f"{word}. {next_word}")

    def _ask_punkt(self, context: str) -> bool:
        known = self._remembered.get(context)
        if known is None:
            if len(self._remembered) >= _MAX_REMEMBERED:
                self._remembered.clear()
            known = self._remembered[context] = self._punkt.text_contains_sentbreak(context)
        return known


def _last_word(before: str) -> str:
    """The word that `before` ends with, without the dashes, quotes and brackets in front of it."""
    if not before or before[-1].isspace():
        return ""
    word = before.rsplit(None, 1)[-1]
    if not word.isalpha():
        word = word.rpartition("—")[2].rpartition("--")[2].lstrip(_OPENERS)
    return word


@lru_cache(maxsize=1)
def default_splitter() -> PunktSplitter:
    """The splitter used where none is given; loaded once."""
    return PunktSplitter()


def no_ends(text: str, /) -> tuple[int, ...]:
    """A splitter that finds none: all is cut by length alone, in pages where the limits are the same."""
    return ()


_SPACES = np.zeros(1 << 16, bool)
_SPACES[[*range(9, 14), *range(28, 33), 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B)]] = True
_SPACES[[0x2028, 0x2029, 0x202F, 0x205F, 0x3000]] = True
_NEWLINES = np.zeros(1 << 16, bool)
_NEWLINES[[0x0A, 0x0B, 0x0C, 0x0D, 0x85, 0x2028, 0x2029]] = True
_LINE_STARTERS = np.zeros(1 << 16, bool)
_LINE_STARTERS[[ord(character) for character in "-*•#|>+~=`/\\{}<@$%&;:.,·–‣◦"]] = True
"""Characters that no line of wrapped prose begins with, but items, table rows, code and rules do."""
_MARK_LEVELS = np.zeros(1 << 16, np.int8)
_MARK_LEVELS[[ord(character) for character in ",)]}\"'”’»›、，）」』"]] = 1
_MARK_LEVELS[[ord(character) for character in ";:—–；：؛"]] = 2
_MARK_LEVELS[[ord(character) for character in ".!?…。！？｡।॥؟۔։።။។"]] = 3
_NEEDS_NO_SPACE = np.zeros(1 << 16, bool)
_NEEDS_NO_SPACE[[ord(character) for character in "—、，；：）」』。！？｡।॥"]] = True
_QUOTES = np.zeros(1 << 16, bool)
_QUOTES[[ord("'"), ord('"')]] = True
_STOP, _STRONGEST_CUT = 3, 7


class _Characters:
    """A text as arrays: which characters are white space, where lines break, where the rest stands."""

    def __init__(self, text: str) -> None:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        self.codes = np.minimum(codes, 0xFFFF).astype(np.uint16)
        self.is_space = _SPACES[self.codes]
        self.solid = np.flatnonzero(~self.is_space)
        """Positions of the characters that are not white space."""
        is_newline = _NEWLINES[self.codes]
        if len(codes):
            is_newline[:-1] &= ~((self.codes[:-1] == 0x0D) & (self.codes[1:] == 0x0A))
        self.newlines = np.flatnonzero(is_newline)

    def line_ends(self) -> np.ndarray:
        """Offsets of the line breaks that are meant: all but those of prose wrapped at a margin.

        A break counts as wrapping when both lines hold text, the next line's first word would not have fitted on this
        one (the longest line of the paragraph gives the width), and the next line begins as prose does.
        """
        if not len(self.newlines) or not len(self.solid):
            return self.newlines[:0]
        # One break per run of blank lines, so that every line but the first and the last holds text.
        num_before = np.searchsorted(self.solid, self.newlines)
        run_starts = np.flatnonzero(np.diff(num_before, prepend=-1))
        breaks, num_before = self.newlines[run_starts], num_before[run_starts]
        last_breaks = self.newlines[np.append(run_starts[1:], len(self.newlines)) - 1]
        is_blank_between = (breaks != last_breaks) | (num_before == 0) | (num_before == len(self.solid))
        starts = np.append(0, last_breaks + 1)
        first = np.append(self.solid, len(self.codes))[np.append(0, num_before)]
        last = self.solid[np.maximum(np.append(num_before, len(self.solid)) - 1, 0)]
        lengths = np.maximum(last + 1 - starts, 0)
        spaces = np.append(np.flatnonzero(self.is_space), len(self.codes))
        words = spaces[np.searchsorted(spaces, first)] - first
        paragraph = np.append(0, np.cumsum(is_blank_between))
        widths = np.maximum.reduceat(lengths, np.flatnonzero(np.diff(paragraph, prepend=-1)))[paragraph]
        following = np.append(self.codes, 0)[first[1:]]
        is_wrapped = (
            ~is_blank_between
            & (lengths[:-1] + 1 + words[1:] > widths[:-1])
            & (words[1:] < lengths[1:])
            & (widths[:-1] >= _WRAPPED_WIDTHS[0])
            & (widths[:-1] <= _WRAPPED_WIDTHS[1])
            & ~_LINE_STARTERS[following]
        )
        return breaks[~is_wrapped]


class _Tokens:
    """Token spans seen beside their text: where each token starts, and how good a place each start is to cut."""

    def __init__(self, text: str, spans: np.ndarray) -> None:
        characters = _Characters(text)
        begins, ends = spans[:, 0], spans[:, 1]
        # An empty span (a special token) stands where the token before it stood.
        self.starts = np.maximum.accumulate(np.where(ends > begins, begins, 0))
        num_solid_before = np.concatenate([[0], np.cumsum(~characters.is_space)])
        is_blank = num_solid_before[ends] == num_solid_before[begins]
        self.visible = np.flatnonzero(~is_blank)
        """Tokens that hold more than white space."""
        solid = np.concatenate([[-1], characters.solid, [len(text)]])
        rank = num_solid_before[self.starts]
        before, after = solid[rank], solid[rank + 1]
        codes = np.append(characters.codes, 0)[before]
        self.mark_levels = np.where(before >= 0, _MARK_LEVELS[codes], 0)
        """Of the last visible character before each token: 0 none, 1 comma or closing mark, 2 semicolon, 3 stop."""
        self.num_newlines = np.searchsorted(characters.newlines, after) - np.searchsorted(characters.newlines, before)
        """Line breaks between the last visible character before each token and the next."""
        is_apart = (after - before > 1) | _NEEDS_NO_SPACE[codes]
        self.cut_strengths = np.where(
            is_apart,
            np.where(self.mark_levels > 0, 4 + self.mark_levels, 3 + (self.num_newlines > 0)),
            1 + ((self.mark_levels > 0) & ~_QUOTES[codes]),
        ).astype(np.int8)
        # A full stop that did not end a sentence stands after an abbreviation: the worst of the spaces.
        self.cut_strengths[is_apart & (codes == ord("."))] = 2
        self.cut_strengths[1:][np.diff(self.starts) == 0] = 0
        """0 inside a character, 1 inside a word, 2 at an unspaced mark, 3 space, 4 newline, 5 comma, 6 `;`, 7 stop."""

    def cuts(self, ends: np.ndarray) -> list[int]:
        """Token offsets, from 0 to the number of tokens, of sentences that end at the characters `ends`.

        A token belongs to the sentence in which it starts; white space alone stays with what came before it.
        """
        num_tokens = len(self.starts)
        cuts = np.searchsorted(self.starts, ends)
        cuts = np.append(self.visible, num_tokens)[np.searchsorted(self.visible, cuts)]
        inner = np.unique(cuts)
        return [0, *inner[(inner > 0) & (inner < num_tokens)].tolist(), num_tokens]

    def split_long(self, cuts: list[int], max_tokens: int, min_tokens: int) -> list[int]:
        """`cuts` with more of them where a sentence is too long: at its strongest inner mark, the last of equals."""
        strengths = self.cut_strengths
        least = max(min_tokens, max_tokens // 3, 1)
        result = [0]
        for start, end in pairwise(cuts):
            while end - start > max_tokens:
                high = start + max_tokens
                low = min(start + least, high)
                high = max(low, min(high, end - min_tokens))
                start = high - int(strengths[low : high + 1][::-1].argmax())
                result.append(start)
            result.append(end)
        return result

    def join_short(self, cuts: list[int], max_tokens: int, min_tokens: int) -> list[int]:
        """`cuts` with fewer of them where a sentence is too short: it joins the neighbour it stands nearer to.

        Nearer means fewer line breaks between. Where both are as near, what ends without a stop (a heading, a label)
        joins what follows; else the shorter neighbour takes it.
        """
        gaps = np.append(self.num_newlines, 2)[cuts].tolist()
        is_stopped = (np.append(self.mark_levels, _STOP)[cuts] % 2 == 1).tolist()
        starts: list[int] = []
        start, left_gap = 0, 2
        for index in range(1, len(cuts)):
            end, right_gap = cuts[index], gaps[index]
            if end - start < min_tokens:
                fits_left = bool(starts) and end - starts[-1] <= max_tokens
                fits_right = index + 1 < len(cuts) and cuts[index + 1] - start <= max_tokens
                if fits_left and fits_right:
                    left_size, right_size = start - starts[-1], cuts[index + 1] - end
                    if left_gap == right_gap:
                        fits_left = is_stopped[index] and left_size <= right_size
                    else:
                        fits_left = left_gap < right_gap
                if fits_left:
                    start = starts.pop()
                elif fits_right:
                    continue
            starts.append(start)
            start, left_gap = end, right_gap
        return [*starts, cuts[-1]]


def sentence_offsets(
    text: str,
    token_spans: np.ndarray,
    *,
    max_tokens: int,
    min_tokens: int,
    splitter: Splitter | None = None,
) -> np.ndarray:
    """Every token in exactly one sentence, and no sentence longer than `max_tokens`.

    A sentence that is too long is cut where the default splitter would, else at clause marks, else at white space, else
    anywhere.
    One shorter than `min_tokens` joins a neighbour, in its own line or paragraph if it can, unless the two together
    would be too long.

    Args:
        text: what was tokenized; any string, lone surrogates included.
        token_spans: `[T, 2]` integers, where each token begins and ends in `text`, as a fast tokenizer's offset mapping
            gives them. Spans may be empty (special tokens) or overlap (byte pieces of one character).
        max_tokens: most tokens of a sentence.
        min_tokens: fewest tokens of a sentence, as far as `max_tokens` allows; 1 to join nothing.
        splitter: finds where sentences end in `text`; by default `default_splitter()`.

    Returns:
        CSR offsets over tokens, int64 `[S + 1]`, strictly increasing from 0 to T; `[0]` for no tokens. Sentence `i` is
        tokens `offsets[i]` to `offsets[i + 1]`.

    Raises:
        TypeError: `text`, `token_spans` or what the splitter returned has a wrong type.
        ValueError: a limit, a span or an end is out of range.
    """
    spans = _checked_spans(text, token_spans)
    _check_limits(max_tokens, min_tokens)
    if not len(spans):
        return np.zeros(1, np.int64)
    tokens = _Tokens(text, spans)
    default_cuts = tokens.cuts(default_splitter()(text))
    cuts = default_cuts if splitter is None else tokens.cuts(_checked_ends(splitter(text), len(text)))
    tokens.cut_strengths[default_cuts[:-1]] = _STRONGEST_CUT
    cuts = tokens.split_long(cuts, max_tokens, min_tokens)
    return np.asarray(tokens.join_short(cuts, max_tokens, min_tokens), np.int64)


def token_sentence_offsets(
    pieces: Sequence[str],
    *,
    max_tokens: int,
    min_tokens: int,
    splitter: Splitter | None = None,
) -> np.ndarray:
    """`sentence_offsets` for tokens of which only the decoded texts are known, such as generated ones.

    Args:
        pieces: the text of each token; joined, they are the text. A piece may be empty.
        max_tokens: as for `sentence_offsets`, and so are `min_tokens`, `splitter`, the result and the errors.
    """
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    spans = np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1) if len(ends) else np.zeros((0, 2), np.int64)
    return sentence_offsets("".join(pieces), spans, max_tokens=max_tokens, min_tokens=min_tokens, splitter=splitter)


def _check_limits(max_tokens: int, min_tokens: int) -> None:
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}; raise it")
    if not 1 <= min_tokens <= max_tokens:
        raise ValueError(
            f"min_tokens must lie in 1..max_tokens ({max_tokens}), got {min_tokens}; use 1 to join no sentences"
        )


def _checked_spans(text: str, token_spans: np.ndarray) -> np.ndarray:
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, got {type(text).__name__}; decode bytes first")
    spans = np.asarray(token_spans)
    if spans.size == 0:
        return np.zeros((0, 2), np.int64)
    if spans.ndim != 2 or spans.shape[1] != 2:
        raise ValueError(f"token_spans must have shape [T, 2], got {list(spans.shape)}; pass the offset mapping")
    if spans.dtype.kind not in "iu":
        raise TypeError(
            f"token_spans must hold integers, got {spans.dtype}; pass the offset mapping of a fast tokenizer"
        )
    spans = spans.astype(np.int64)
    if spans.min() < 0 or spans.max() > len(text) or (spans[:, 1] < spans[:, 0]).any():
        raise ValueError(
            f"token_spans must be pairs start <= end within 0..{len(text)}, got {spans.min()}..{spans.max()}; "
            "pass the spans of this very text"
        )
    return spans


def _checked_ends(ends: object, num_characters: int) -> np.ndarray:
    """A user's splitter's answer as ascending offsets; errors name what is wrong with it."""
    remedy = "return the character offsets at which sentences end"
    try:
        array = np.asarray(ends if isinstance(ends, np.ndarray) else list(ends))  # type: ignore[call-overload]
    except (TypeError, ValueError):
        raise TypeError(f"a splitter must return a sequence of integers, got {type(ends).__name__}; {remedy}") from None
    if array.size == 0:
        return np.zeros(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(
            f"a splitter must return a flat sequence of integers, got {array.dtype} {list(array.shape)}; {remedy}"
        )
    if array.min() < 0 or array.max() > num_characters:
        wrong = array[(array < 0) | (array > num_characters)][0]
        raise ValueError(f"a splitter's offsets must lie in 0..{num_characters}, got {wrong}; {remedy}")
    return np.unique(array.astype(np.int64))
