"""Facts are distinct, reproducible, found where they were hidden, and judged strictly."""

from random import Random

import pytest

from sentencekv.needles import (
    KINDS,
    NOT_MENTIONED,
    Fact,
    absent_questions,
    hide,
    is_right,
    make_facts,
    sentence_ends,
)

TEXT = 'He came home. "Where have you been?" she asked. Nobody knew!\n\nThe rain fell for 3.5 days. ' * 30


def test_facts_are_distinct_and_reproducible():
    facts = make_facts(Random(1), 200)
    assert facts == make_facts(Random(1), 200)
    assert facts != make_facts(Random(2), 200)
    assert len({fact.key for fact in facts}) == len({fact.answer for fact in facts}) == 200
    assert {fact.kind for fact in facts} == set(KINDS)
    for fact in facts:
        assert fact.answer in fact.sentence
        assert fact.answer not in fact.question
        assert fact.sentence.endswith(".")
        assert fact.key[1].casefold() in fact.question.casefold()


def test_kinds_are_respected_and_checked():
    assert all(len(fact.answer) == 7 and fact.answer.isdigit() for fact in make_facts(Random(3), 20, ["number"]))
    with pytest.raises(ValueError, match="kinds must be chosen from number"):
        make_facts(Random(3), 1, ["colour"])


@pytest.mark.parametrize(
    "text", [TEXT, "", "word", "no sentence ends here at all", "  ", "\n\nEnd.\n", "長い文章。" * 50]
)
@pytest.mark.parametrize("count", [0, 1, 8, 40])
def test_hide_loses_nothing_and_returns_true_spans(text, count):
    facts = make_facts(Random(4), count)
    hidden = hide(text, facts, Random(5))
    assert [hidden.text[start:end] for start, end in hidden.spans] == [fact.sentence for fact in facts]
    rest, copied = "", 0
    for start, end in sorted(hidden.spans):
        rest += hidden.text[copied:start]
        copied = end
    rest += hidden.text[copied:]
    assert rest.replace(" ", "") == text.replace(" ", "")


def test_hide_spreads_facts_over_the_text_at_sentence_ends():
    facts = make_facts(Random(6), 10)
    hidden = hide(TEXT, facts, Random(7))
    starts = sorted(start / len(hidden.text) for start, _ in hidden.spans)
    assert all(abs(start - (place + 0.5) / 10) < 0.1 for place, start in enumerate(starts))
    for start, _ in hidden.spans:
        assert hidden.text[:start].rstrip()[-1] in '.!?"'


def test_absent_questions_ask_for_nothing_that_is_there():
    facts = make_facts(Random(8), 20)
    absent = absent_questions(Random(9), facts, 30)
    assert {fact.answer for fact in absent} == {NOT_MENTIONED}
    assert not {fact.key for fact in absent} & {fact.key for fact in facts}


@pytest.mark.parametrize(
    ("answer", "right"),
    [("4821973", True), (" It is 4821973.", True), ("48219731", False), ("14821973", False), ("", False)],
)
def test_answers_are_judged_by_whole_values(answer, right):
    fact = Fact("The magic number of Ada is 4821973.", "?", "4821973", "number", ("magic number", "Ada"))
    assert is_right(answer, fact) is right


def test_not_mentioned_is_right_only_for_absent_facts():
    present, absent = make_facts(Random(1), 1)[0], absent_questions(Random(1), (), 1)[0]
    assert is_right("Not mentioned.", absent)
    assert not is_right(present.answer, absent)
    assert not is_right(f"{present.answer} is not mentioned", present)


def test_no_sentence_ends_after_a_title_or_an_initial():
    text = 'I met Mr. Smith and Capt. Roe. J. B. Hill lives in St. Alban. "Go!" He went'
    assert [text[:end].split()[-1] for end in sentence_ends(text)] == ["Roe.", "Alban.", '"Go!"']
