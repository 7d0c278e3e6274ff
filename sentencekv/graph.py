"""One token for every session of a batch, replayed as one CUDA graph.

The model's whole forward pass is recorded once for each batch size in use (powers of two) and replayed from then on.
What changes from token to token is read from device memory: token ids, positions, and the lanes' tables. A graph is
recorded again only if a lane outgrows those tables. Between two replays sessions come and go, and close sentences.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sentencekv.attention import forward, run_model
from sentencekv.batch import LaneBatch
from sentencekv.fused import FusedLayers
from sentencekv.policies import Policy
from sentencekv.session import Session
from triton_ops.lanes import Mirrored

_LOG = logging.getLogger(__name__)

_WARMUP_RUNS = 2
"""Passes before recording: kernels are compiled, libraries make their workspaces."""


@dataclasses.dataclass
class _Recording:
    """A graph for one number of lanes, with the tensors that it reads and writes."""

    batch: LaneBatch
    inputs: Mirrored
    """int64 `[2, B]`: token ids, positions."""
    graph: torch.cuda.CUDAGraph | None = None
    logits_BV: Tensor | None = None


class Stepper:
    """Makes sparse steps of sessions of one model and policy, by graph where that is possible.

    Not thread-safe. A model that cannot be recorded (one that asks the device for a decision within its forward pass,
    as some mixtures of experts do) is run eagerly, and a warning says so once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        *,
        graph: bool = True,
        fuse: bool = True,
        layers: FusedLayers | None = None,
        run_ahead: bool | None = None,
    ) -> None:
        """
        Args:
            graph: False runs every step eagerly, as where there is no GPU.
            fuse: False leaves the model's own layers as they are.
            layers: those of the model, if they were looked at already.
            run_ahead: see `runs_ahead`; None: where steps are replayed graphs. Not where everything is read.
        """
        self._model = model
        self._policy = policy
        self._fuse = fuse
        self._recording_of: dict[int, _Recording] = {}
        self._fused = layers
        self._side: torch.cuda.Stream | None = None
        self.num_recorded = 0
        """Graphs recorded so far, those recorded again included."""
        self.records = graph and model.device.type == "cuda" and policy.reads != "everything"
        """Whether steps are replayed graphs."""
        self.runs_ahead = (self.records if run_ahead is None else run_ahead) and policy.reads != "everything"
        """Whether generation may launch a step before the host has seen the token that it starts from."""

    @property
    def num_fused(self) -> int:
        """Layers that run as fused kernels in recorded steps."""
        return 0 if self._fused is None else self._fused.num_fused

    @torch.inference_mode()
    def step(self, sessions: Sequence[Session], token_ids: Sequence[int]) -> Tensor:
        """Append one token to each session; returns float32 logits `[B, vocabulary]`, valid until the next step."""
        if not self.records:
            return forward(self._model, [[token] for token in token_ids], sessions, exact=False)
        logits_BV = self.launch(sessions, token_ids)
        for session in sessions:
            session.end()
        return logits_BV

    @torch.inference_mode()
    def launch(self, sessions: Sequence[Session], token_ids: Sequence[int] | Tensor) -> Tensor:
        """As `step`, but the sessions' passes stay open: `end` or `cancel` each one. Does not wait for the device.

        `token_ids`: also int64 `[B]` on the device, of tokens that the host has not seen.
        """
        if not self.records:
            return self._launch_eagerly(sessions, token_ids)
        num_lanes = 1 << (len(sessions) - 1).bit_length()
        recording = self._recording_of.get(num_lanes)
        if recording is None:
            inputs_of = Mirrored((2, num_lanes), torch.int64, self._model.device)
            batch = LaneBatch(self._policy)
            recording = _Recording(batch, inputs_of)
            self._recording_of[num_lanes] = recording
        for session in sessions:
            session.begin(1, exact=False)
        try:
            if recording.batch.seat(sessions, num_lanes) or recording.graph is None:
                recording.batch.vacate()
                self._record(recording)
                recording.batch.seat(sessions, num_lanes)
            with recording.inputs.writing() as inputs:
                inputs[0, : len(sessions)] = 0 if isinstance(token_ids, Tensor) else torch.tensor(token_ids)
                inputs[1, : len(sessions)] = torch.tensor([session.num_tokens for session in sessions])
            if isinstance(token_ids, Tensor):
                recording.inputs.on_device[0, : len(sessions)] = token_ids
            if recording.graph is None:
                logits_BV = self._run(recording)
            else:
                recording.graph.replay()
                assert recording.logits_BV is not None
                logits_BV = recording.logits_BV
        finally:
            # Also after an interrupt: a session that nobody continues gives its memory back.
            recording.batch.forget()
        return logits_BV[: len(sessions)]

    def _launch_eagerly(self, sessions: Sequence[Session], token_ids: Sequence[int] | Tensor) -> Tensor:
        for session in sessions:
            session.begin(1, exact=False)
        batch = LaneBatch(self._policy)
        batch.seat(sessions)
        device = self._model.device
        ids = token_ids if isinstance(token_ids, Tensor) else torch.tensor(token_ids, device=device)
        positions = torch.tensor([session.num_tokens for session in sessions], device=device)
        return run_model(self._model, ids, positions, batch)

    def _run(self, recording: _Recording) -> Tensor:
        if self._fused is None and self._fuse:
            self._fused = FusedLayers(self._model)
        with self._fused.active() if self._fused is not None else contextlib.nullcontext():
            return run_model(self._model, recording.inputs.on_device[0], recording.inputs.on_device[1], recording.batch)

    def _record(self, recording: _Recording) -> None:
        """Record the pass over lanes that hold nothing, so that running it for warm-up leaves no trace."""
        # A memory pool goes with the last graph that uses it, and callers may still hold logits in it: so the graph
        # before this one stays until this one is there.
        graphs = [each.graph for each in self._recording_of.values() if each.graph is not None]
        recording.graph = recording.logits_BV = None
        # The same one each time: libraries keep a workspace for every stream that they have seen.
        side = self._side = self._side or torch.cuda.Stream(self._model.device)
        side.wait_stream(torch.cuda.current_stream(self._model.device))
        with torch.cuda.stream(side):
            for _ in range(_WARMUP_RUNS):
                self._run(recording)
        current = torch.cuda.current_stream(self._model.device)
        current.wait_stream(side)
        torch.cuda.synchronize(self._model.device)
        graph = torch.cuda.CUDAGraph()
        pool = graphs[0].pool() if graphs else None
        try:
            # The outer context brings the stream back where recording fails.
            with torch.cuda.stream(current), torch.cuda.graph(graph, pool=pool):
                recording.logits_BV = self._run(recording)
        except RuntimeError as error:
            self.records = False
            _LOG.warning(
                "%s cannot be recorded as a CUDA graph and is run eagerly, which is slower: %s",
                type(self._model).__name__,
                str(error).partition("\n")[0],
            )
            _record_nothing(self._model.device)
            return
        recording.graph = graph
        self.num_recorded += 1


def _record_nothing(device: torch.device) -> None:
    """A recording that failed leaves torch's random generator waiting for its end, and whoever draws from it next gets
    an internal error; one that succeeds ends the wait."""
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device=device)
