"""Facts hidden in a text, of which some have another value than in the cached one: which value is answered?"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from transformers import PreTrainedTokenizerBase

from eval.reuse.pairs import Pair, Prompted, Source
from sentencekv.demo import ANSWER_TOKENS, DEMO_KINDS
from sentencekv.needles import Fact, hide, make_facts
from sentencekv.prompts import document_frame

TASKS = ("fact", "fact_after_other_question", "all_facts")


def facts(
    tokenizer: PreTrainedTokenizerBase, source: Source, *, tokens: int, cases: int, num_facts: int, seed: int = 0
) -> list[Pair]:
    """For each fact of each text three pairs, all asked for that fact, with a value that is new:

    * `fact`: the donor has the same question behind the same text with the old value. Its last tokens have seen the
      old value already, which a cache that takes them as they are gives away.
    * `all_facts`: the same, and all the donor's facts have old values.
    * `fact_after_other_question`: the donor asks for another fact.

    Raises ValueError for fewer than two facts.
    """
    if num_facts < 2:
        raise ValueError(f"facts must be at least 2, got {num_facts}: one is asked for after another")
    pairs: list[Pair] = []
    for number in range(cases):
        rng = Random(f"facts/{tokens}/{seed}/{number}")
        (passages,) = source.some(number, [tokens], rng)
        old = make_facts(rng, num_facts, DEMO_KINDS)
        new = [_with_other_value(fact, old, rng) for fact in old]
        # Where facts go depends on the text and the lot alone, so they stand in the same places each time.
        place = rng.random()

        def ask(given: Sequence[Fact], asked: Fact, passages: list[str] = passages, place: float = place) -> Prompted:
            return _asked(tokenizer, hide("\n\n".join(passages), given, Random(place)).text, asked.question)

        for i in range(num_facts):
            # The donor that asks for one fact serves those that ask for the next one, too: it is read once.
            later = (i + 1) % num_facts
            donor = ask(old, old[i])
            for task, at, given in (
                ("fact", i, [*old[:i], new[i], *old[i + 1 :]]),
                ("all_facts", i, new),
                ("fact_after_other_question", later, [*old[:later], new[later], *old[later + 1 :]]),
            ):
                pairs.append(
                    Pair(
                        task=task,
                        id=f"{seed}-{number}-{at}",
                        length=tokens,
                        text=f"{seed}-{number}",
                        donor=donor,
                        prompt=ask(given, new[at]),
                        max_new_tokens=ANSWER_TOKENS,
                        answers=(new[at].answer,),
                        donor_answers=(old[at].answer,),
                        extra={"value": old[at].kind},
                    )
                )
    return pairs


def _with_other_value(fact: Fact, others: Sequence[Fact], rng: Random) -> Fact:
    (drawn,) = make_facts(rng, 1, [fact.kind], avoid=others)
    assert fact.answer in fact.sentence
    sentence = fact.sentence.replace(fact.answer, drawn.answer)
    return Fact(sentence, fact.question, drawn.answer, fact.kind, fact.key)


def _asked(tokenizer: PreTrainedTokenizerBase, text: str, question: str) -> Prompted:
    if tokenizer.chat_template:
        return ({"role": "user", "content": f"{text}\n\n{question}"},)
    frame = document_frame(tokenizer, chat=False)
    return frame.before + text + frame.between + question + frame.after
