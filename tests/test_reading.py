"""In which chunks prompts are read; what comes of it, test_models.py and test_lm.py compare with dense reading."""

from typing import Any

import numpy as np
import pytest
import torch

from sentencekv import reading
from sentencekv.prompts import Prompt


class FakeSession:
    """Takes note of what is expected of it."""

    num_tokens = 7
    has_ended = False

    def end_reading(self) -> None:
        self.has_ended = True

    def expect(self, ends: list[int]) -> None:
        self.ends = ends


@pytest.mark.parametrize(
    ("lengths", "passes"),
    [
        ([24], [[8], [8], [8]]),
        ([20], [[4], [8], [8]]),
        ([3], [[3]]),
        # The third prompt's first chunk no longer fits; the fourth's does.
        ([12, 3, 5, 1], [[4, 3, 1], [8], [5]]),
        ([9, 9, 6], [[1, 1, 6], [8], [8]]),
    ],
)
def test_first_chunks_are_the_short_ones(
    lengths: list[int], passes: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    tokens_of: dict[int, list[int]] = {}

    def forward(_model: object, chunks: list[list[int]], sessions: list[Any], **given: Any) -> torch.Tensor:
        assert given["exact"]
        seen.append([len(chunk) for chunk in chunks])
        for session, chunk, expected in zip(sessions, chunks, given["expected_tokens"], strict=True):
            tokens = tokens_of.setdefault(id(session), [])
            assert expected == lengths[all_sessions.index(session)] - len(tokens)
            tokens += chunk
        return torch.tensor([[float(chunk[-1])] for chunk in chunks])

    monkeypatch.setattr(reading, "forward", forward)
    all_sessions = [FakeSession() for _ in lengths]
    ids = [list(range(100 * i, 100 * i + length)) for i, length in enumerate(lengths)]
    prompts = [Prompt("", each, np.zeros((len(each), 2), dtype=np.int64), [2, len(each)]) for each in ids]
    progress: list[tuple[int, int]] = []
    logits = reading.read(
        None,  # type: ignore[arg-type]
        all_sessions,  # type: ignore[arg-type]
        prompts,
        chunk_tokens=8,
        progress=lambda done, total: progress.append((done, total)),
    )
    assert seen == passes
    assert [tokens_of[id(session)] for session in all_sessions] == ids
    assert logits.tolist() == [[float(each[-1])] for each in ids]
    assert all_sessions[0].ends == [9, 7 + lengths[0]]
    assert progress[-1] == (sum(lengths), sum(lengths))
    assert progress == sorted(progress)
    assert len(progress) == len(passes)
    assert all(session.has_ended for session in all_sessions)
