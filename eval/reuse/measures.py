"""From what a model would say after two readings of one prompt to figures: how far apart are they?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Compared(NamedTuple):
    """A reading beside the full one, over the tokens with which full reading goes on."""

    kl: list[float]
    """KL(full || other) of the distributions before each of these tokens, in nats."""
    agreement: float
    """Share of the tokens that greedy decoding would choose at their place as well, after the ones before them as
    full reading has them: one slip counts once."""
    first_divergence: int
    """Tokens before the first that it would not choose, so that greedy decoding by itself is the same up to there; all
    of them if there is none."""


def compare(full_LV: Tensor, other_LV: Tensor, token_ids: Sequence[int]) -> Compared:
    """Logits before each of `token_ids`, the greedy continuation of full reading, after either reading."""
    assert full_LV.shape == other_LV.shape == (len(token_ids), full_LV.shape[1])
    # Differences of small KL are lost in single precision.
    full_LV, other_LV = full_LV.double().log_softmax(-1), other_LV.double().log_softmax(-1)
    kl_L = (full_LV.exp() * (full_LV - other_LV)).sum(-1).clamp_min(0)
    same_L = other_LV.argmax(-1) == torch.tensor(token_ids, device=other_LV.device)
    return Compared(kl_L.tolist(), float(same_L.double().mean()), _first(same_L.tolist()))


def same_tokens(full_ids: Sequence[int], other_ids: Sequence[int]) -> int:
    """First divergence of a continuation that has no distributions: how many tokens both begin with."""
    return _first([at < len(other_ids) and other_ids[at] == token for at, token in enumerate(full_ids)])


def _first(same: Sequence[bool]) -> int:
    return next((at for at, equal in enumerate(same) if not equal), len(same))


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """F of ROUGE-L by `rouge-score`, the best of the references; 1 for the same text, even an empty one.

    For English: words are runs of ASCII letters and digits, without their endings (Porter's stemmer). Raises
    ImportError where the package is missing.
    """
    if prediction in references:
        return 1.0
    try:
        from rouge_score import rouge_scorer  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError as error:
        raise ImportError("ROUGE-L needs rouge-score: pip install 'sentencekv[eval]'") from error
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    return float(scorer.score_multi(list(references), prediction)["rougeL"].fmeasure)


def chrf(prediction: str, references: Sequence[str]) -> float:
    """F of n-grams of characters by `sacrebleu`, from 0 to 1, the best of the references: for any language.

    1 for the same text, even an empty one. Raises ImportError where the package is missing.
    """
    if prediction in references:
        return 1.0
    return float(_sacrebleu("chrF").CHRF().sentence_score(prediction, list(references)).score) / 100


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {"rouge_l": rouge_l, "chrf": chrf}
"""Of one answer; by the name of a row's metric."""


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU of all predictions together by `sacrebleu`, from 0 to 1; each has as many references as all others.

    Where all are shorter than four words, only the n-grams that there are count. Raises ImportError where the package
    is missing.
    """
    streams = [list(stream) for stream in zip(*references, strict=True)]
    scorer = _sacrebleu("BLEU").BLEU(effective_order=True)
    return float(scorer.corpus_score(list(predictions), streams).score) / 100


def _sacrebleu(what: str) -> Any:
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError(f"{what} needs sacrebleu: pip install 'sentencekv[eval]'") from error
    return sacrebleu
