"""The engine's own variants of a decoding step, and what its sessions hold and read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from benchmarks.baselines import Step
from benchmarks.workload import Context
from sentencekv.attention import forward
from sentencekv.config import Config
from sentencekv.fused import FusedLayers
from sentencekv.graph import Stepper
from sentencekv.session import Session


def eager_step(model: PreTrainedModel, sessions: Sequence[Session]) -> Step:
    """One token for each session, launched kernel by kernel, the model's modules as they are."""
    return lambda tokens: forward(model, [[token] for token in tokens], sessions, exact=False)


def make_stepper(
    model: PreTrainedModel, session: Session, layers: FusedLayers | None, *, run_ahead: bool | None = False
) -> Stepper:
    """A stepper for the session's policy with these layers, which are then looked at once and not for every graph.

    `layers` None: the model's layers as they are.
    """
    fuse = layers is not None
    return Stepper(model, session.policy, fuse=fuse, layers=layers, run_ahead=run_ahead)


def graph_step(stepper: Stepper, sessions: Sequence[Session]) -> Step:
    """One token for each session, as a recorded graph."""
    return lambda tokens: stepper.step(sessions, tokens)


def resident_config(context: Context) -> Config:
    """Everything stays on the device and is read by every step."""
    num_tokens = context.num_tokens + context.num_new
    return Config(policy="window", window_tokens=num_tokens, budget_tokens=2 * num_tokens + 64)


def holdings(sessions: Sequence[Session]) -> dict[str, Any]:
    """Bytes on the device and in host memory, and what was fetched; sums over sessions but host memory, shared."""
    lanes = [session.lane() for session in sessions]
    hot_bytes = sum(kv.nbytes for lane in lanes for kv in lane.hot_kv.values())
    resident_bytes = sum(kv.nbytes for lane in lanes for kv in lane.resident_kv.values())
    summary_bytes = sum(session.summary_bytes for session in sessions)
    gpu_bytes = sum(session.device_bytes for session in sessions)
    selected, missed, fetched = (sum(int(s.traffic.sums[i]) for s in sessions) for i in range(3))
    return {
        "sentences": sessions[0].num_sentences,
        "kv_gpu_bytes": gpu_bytes,
        "hot_bytes": hot_bytes,
        "summary_bytes": summary_bytes,
        "resident_bytes": resident_bytes,
        "table_bytes": gpu_bytes - hot_bytes - summary_bytes - resident_bytes,
        "kv_host_bytes": max(session.host_bytes for session in sessions),
        "kv_dense_bytes": sum(session.dense_bytes for session in sessions),
        "hit_rate": 1 - missed / selected if selected else None,
        "tokens_fetched": fetched,
    }
