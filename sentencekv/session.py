"""One sequence: its closed sentences, the tokens that stay on the GPU, and attention over both.

A session knows tensors and sentence ends. It knows nothing of models, tokenizers or text: a driver says which tokens
end a sentence (`expect`), brackets every forward pass with `begin` and `end`, and each layer in between calls `attend`
with the new tokens' queries, keys and values.

Token order of a layer that retrieves: sink, closed sentences (extents), recent. `recent` holds the window and the
unfinished sentence after it. A sentence closes once it lies outside the window: its KV goes to host memory, its
summary to the extent's table. Sliding-window layers keep their own last tokens and retrieve nothing.

A session that makes sparse passes keeps sink and recent tokens in its lane (`lane.py`), and goes back when it makes an
exact one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sentencekv.config import Config
from sentencekv.exact import attention_after, attention_in_parts, exact_attention
from sentencekv.lane import SessionLane
from sentencekv.memory import HostMemory
from sentencekv.policies import Policy
from sentencekv.store import Extent, Places, Run
from sentencekv.streaming import Stream
from sentencekv.transfer import to_device
from triton_ops.lanes import SHARE_UNITS
from triton_ops.positional_attention import positional_attention

ASSEMBLED_TOKENS = {"cuda": 2048, "cpu": 0}
"""Closed tokens up to which an exact pass brings a layer's KV together; more come in blocks (`streaming.py`)."""


class Traffic:
    """What sparse steps selected and fetched, over all layers and KV heads."""

    def __init__(self, device: torch.device) -> None:
        self.steps = 0
        self.sums = torch.zeros(3, dtype=torch.int64, device=device)
        """Sentences selected, sentences missed, tokens copied: ops add to it. Reading it waits for the device."""

    def reset(self) -> None:
        """Start to count anew."""
        self.steps = 0
        self.sums.zero_()

    @property
    def num_selected(self) -> int:
        """Sentences selected."""
        return int(self.sums[0])

    @property
    def num_missed(self) -> int:
        """Selected sentences that were not in the hot set."""
        return int(self.sums[1])

    @property
    def tokens_fetched(self) -> int:
        """Tokens of the sentences missed."""
        return int(self.sums[2])

    @property
    def hit_rate(self) -> float | None:
        """Share of selected sentences that were on the GPU already; None if none was selected."""
        selected, missed, _ = self.sums.tolist()
        return None if selected == 0 else 1.0 - missed / selected


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """All that a session goes on from, between two passes. Tensors are shared, not copied: nobody writes to them."""

    num_tokens: int
    closed_end: int
    """Position after the last closed sentence."""
    ends: list[int]
    """Where the sentences end that are known and not closed."""
    last_expected_end: int
    sink: dict[int, Tensor]
    """Per layer that retrieves, `[N, at most sink_tokens, 2, H]`."""
    recent: dict[int, Tensor]
    """Likewise, the tokens after the last closed sentence."""
    local: dict[int, Tensor]
    """Per sliding-window layer, its last tokens."""
    window_of: dict[int, int]
    dense_bytes_per_token: dict[int, int]
    extents: list[Extent]
    row_bytes: int


@dataclasses.dataclass(frozen=True)
class _Pass:
    """The forward pass under way: decided in `begin`, carried out by every layer."""

    num_new: int
    exact: bool
    closing: list[int]
    """Tokens of each sentence that it closes."""
    runs: list[Run]
    offsets: Tensor | None
    """Of `closing`, on the device: first token of each sentence, and the total. None if it closes none."""


class Session:
    """One sequence's KV and the attention over it. Not thread-safe.

    After an exception inside a pass the session is unusable; the extents that it shares with others are not affected.
    """

    def __init__(
        self, config: Config, policy: Policy, memory: HostMemory, device: torch.device, row_bytes: int = 1
    ) -> None:
        """`row_bytes`: as of an `Extent`."""
        self.config = config
        self._row_bytes = row_bytes
        self.policy = policy
        self.memory = memory
        self.device = device
        self.num_tokens = 0
        self.traffic = Traffic(device)
        self._closed_end = config.sink_tokens
        self._ends: list[int] = []
        self.last_expected_end = 0
        self._extents: list[Extent] = []
        self._own: Extent | None = None
        self._places = Places([], device)
        self._sink: dict[int, Tensor] = {}
        self._recent: dict[int, Tensor] = {}
        self._local: dict[int, Tensor] = {}
        self._window_of: dict[int, int] = {}
        self._lane: SessionLane | None = None
        self._share_S = torch.zeros(0, dtype=torch.int64, device=device)
        self._pass: _Pass | None = None
        self._unsettled: list[tuple[int, Tensor, _Pass]] = []
        """Of layers whose new tokens' KV is here and not where it belongs yet."""
        self._stream: Stream | None = None
        self._dense_bytes_per_token: dict[int, int] = {}

    # What the driver calls

    def expect(self, ends: Sequence[int]) -> None:
        """Say where the next sentences end: rising token positions, after all that were said before."""
        for end in ends:
            assert end > self.last_expected_end, "sentence ends must rise"
            self.last_expected_end = int(end)
            if end > self._closed_end:
                self._ends.append(int(end))

    def begin(self, num_new: int, *, exact: bool, expected_tokens: int = 0) -> None:
        """Start a pass of `num_new` tokens. `exact`: they attend to everything; else one token, sentences selected.

        `expected_tokens`: how many tokens will be read from here on, these included, if known; sizes host memory.
        """
        assert self._pass is None, "the previous pass was not ended"
        assert exact or num_new == 1, "sparse passes are one token long"
        self.settle()
        if not exact and self.policy.reads != "everything":
            self.lane()
            self._pass = _Pass(num_new, exact, [], [], None)
            return
        self._leave_lane()
        closing, runs = self._close(self.num_tokens + num_new, expected_tokens)
        if not exact and self._own is not None:
            self._own.flush()
        self._pass = _Pass(num_new, exact, closing, runs, self._offsets(closing) if closing else None)

    def _close(self, num_tokens: int, expected_tokens: int = 0) -> tuple[list[int], list[Run]]:
        """Give rows to the sentences that close once there are `num_tokens`: their lengths, and the runs of rows."""
        limit = num_tokens - self.config.window_tokens
        num_closing = next((i for i, end in enumerate(self._ends) if end > limit), len(self._ends))
        if not num_closing:
            return [], []
        starts = [self._closed_end, *self._ends[: num_closing - 1]]
        closing = [end - start for start, end in zip(starts, self._ends, strict=False)]
        if self._own is None:
            self._own = Extent(self.memory, self.device, row_bytes=self._row_bytes)
            self._extents.append(self._own)
        recent_tokens = max(self.num_tokens - self._closed_end, 0)
        return closing, self._own.place(self._closed_end, closing, expected_tokens + recent_tokens)

    def end(self) -> None:
        """Finish the pass: its tokens are part of the context, its closed sentences can be selected."""
        assert self._pass is not None
        done, self._pass, self._stream = self._pass, None, None
        self.num_tokens += done.num_new
        self.traffic.steps += not done.exact
        closing = done.closing
        if self._lane is not None:
            self._lane.advance()
            closing, runs = self._close(self.num_tokens)
            if closing:
                self._close_from_lane(closing, runs)
        if closing:
            self._closed_end += sum(closing)
            self._ends = self._ends[len(closing) :]
            if self._lane is None:
                self._places = Places(self._extents, self.device)

    def end_reading(self) -> None:
        """All tokens that were expected are here."""
        if self._own is not None:
            self._own.expect_nothing()

    def cancel(self) -> None:
        """Give up the sparse pass under way: its token is not part of the context. What it fetched stays."""
        assert self._pass is not None
        assert not self._pass.exact
        self._pass = None
        # Its slots would count as those of the next step, which may need them.
        self.lane().step += 1

    def _close_from_lane(self, closing: list[int], runs: list[Run]) -> None:
        """Summarise and offload sentences of all layers at once, and make them selectable."""
        lane, own = self._lane, self._own
        assert lane is not None
        assert own is not None
        self._places = Places(self._extents, self.device)
        if lane.layers:
            lane.offload(own, runs, self._places, closing)
            kv_DNTH = lane.take_out(sum(closing))
            lane.add_values(own.add_values(lane.layers, kv_DNTH[:, :, :, 1]))
            if self.policy.reads == "selected":
                depth, num_heads, num_tokens, _, head_dim = kv_DNTH.shape
                key_TNH = kv_DNTH[:, :, :, 0].permute(2, 0, 1, 3).reshape(num_tokens, depth * num_heads, head_dim)
                stacked = self._summarize(key_TNH, self._offsets(closing))
                of_layer = zip(*(table.unflatten(1, (depth, num_heads)).unbind(1) for table in stacked), strict=True)
                lane.forget_summaries()
                for layer, tables in zip(lane.layers, of_layer, strict=True):
                    own.add_summaries(layer, tables)
            lane.shift(sum(closing))
        lane.set_places(self._places)
        self._share_S = lane.share_S

    def lane(self) -> SessionLane:
        """What sparse passes read and write, current as of now; made when first asked for."""
        assert self.policy.reads != "everything"
        if self._lane is None:
            self.settle()
            if self._own is not None:
                self._own.flush()
            recent = {layer: torch.cat([self._sink[layer], self._recent[layer]], dim=1) for layer in self._recent}
            self._lane = SessionLane(
                self.config,
                self._places,
                recent,
                self._local,
                self._window_of,
                num_tokens=self.num_tokens,
                selects=self.policy.reads == "selected",
                share_S=self._share_S,
                traffic=self.traffic.sums,
            )
            self._share_S = self._lane.share_S
            self._sink, self._recent, self._local = {}, {}, {}
        return self._lane

    def _leave_lane(self) -> None:
        """Go back to tensors that are replaced, for passes that append many tokens; the hot set is given up."""
        if self._lane is None:
            return
        recent, self._local = self._lane.contents()
        num_sink = min(self.config.sink_tokens, self.num_tokens)
        self._sink = {layer: kv[:, :num_sink].clone() for layer, kv in recent.items()}
        self._recent = {layer: kv[:, num_sink:].clone() for layer, kv in recent.items()}
        self._lane = None

    def state(self) -> State:
        """All that another session can go on from, as `from_state` does. This one starts an extent of its own for what
        it closes from now on."""
        assert self._pass is None
        self.settle()
        self._leave_lane()
        if self._own is not None:
            self._own.flush()
            self._own = None
        return State(
            num_tokens=self.num_tokens,
            closed_end=self._closed_end,
            ends=list(self._ends),
            last_expected_end=self.last_expected_end,
            sink=dict(self._sink),
            recent=dict(self._recent),
            local=dict(self._local),
            window_of=dict(self._window_of),
            dense_bytes_per_token=dict(self._dense_bytes_per_token),
            extents=list(self._extents),
            row_bytes=self._row_bytes,
        )

    @classmethod
    def from_state(
        cls, config: Config, policy: Policy, memory: HostMemory, device: torch.device, state: State
    ) -> Session:
        """A session that goes on from there by itself."""
        made = cls(config, policy, memory, device, state.row_bytes)
        made.num_tokens = state.num_tokens
        made._closed_end = state.closed_end
        made._ends, made.last_expected_end = list(state.ends), state.last_expected_end
        made._sink, made._recent, made._local = dict(state.sink), dict(state.recent), dict(state.local)
        made._window_of = dict(state.window_of)
        made._dense_bytes_per_token = dict(state.dense_bytes_per_token)
        made._extents = list(state.extents)
        made._places = Places(made._extents, device)
        return made

    def fork(self) -> Session:
        """A session that goes on from here by itself; KV and summaries so far are shared, not copied."""
        return Session.from_state(self.config, self.policy, self.memory, self.device, self.state())

    def under(self, config: Config, policy: Policy) -> Session:
        """A fork under another policy: KV is shared, summaries are made anew. What shaped sentences, sink, window and
        the format of rows must be the same in both configurations."""
        state = self.state()
        made = Session(config, policy, self.memory, self.device, state.row_bytes)
        summarize = made._summarize if policy.reads == "selected" else None
        extents = state.extents
        if (type(policy), policy.kept_options) != (type(self.policy), self.policy.kept_options):
            extents = [extent.summarized_by(summarize) for extent in extents]
        return Session.from_state(config, policy, self.memory, self.device, dataclasses.replace(state, extents=extents))

    def join_extents(self) -> None:
        """Make few extents of many: each has at most half as many sentences as the one before it.

        A session that is forked, goes on, and is forked again would gather one for each time.
        """
        state = self.state()
        extents = state.extents
        while len(extents) > 1 and 2 * extents[-1].num_sentences > extents[-2].num_sentences:
            extents[-2:] = [Extent.joined(extents[-2:])]
        self._extents = extents
        self._places = Places(extents, self.device)

    # What each layer calls

    def attend(
        self,
        layer: int,
        q_ALH: Tensor,
        k_NLH: Tensor,
        v_NLH: Tensor,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Attention output `[A, L, H]` of an exact pass's L new tokens; appends their KV. Sparse passes are batched:
        see `batch.py`.

        Args:
            layer: the model's layer number.
            q_ALH, k_NLH, v_NLH: post-RoPE queries of all `A = N * G` heads, keys and values of the new tokens.
            scale, sliding_window, softcap: as in `exact_attention`.
        """
        assert self._pass is not None
        assert q_ALH.shape[1] == self._pass.num_new
        assert self._lane is None
        new_NLH = torch.stack([k_NLH, v_NLH], dim=2)
        self._dense_bytes_per_token[layer] = new_NLH.nbytes // new_NLH.shape[1]
        if sliding_window is not None:
            return self._attend_local(layer, q_ALH, new_NLH, scale, sliding_window, softcap)
        if layer not in self._recent:
            self._sink[layer] = self._recent[layer] = _no_tokens(new_NLH)
        output = self._attend_to_all(layer, q_ALH, new_NLH, scale, softcap)
        self._append(layer, new_NLH, self._pass)
        return output

    def _attend_to_all(self, layer: int, q_ALH: Tensor, new_NLH: Tensor, scale: float, softcap: float | None) -> Tensor:
        if self._places.num_tokens <= ASSEMBLED_TOKENS[self.device.type]:
            return exact_attention(q_ALH, self._everything(layer, new_NLH), scale=scale, softcap=softcap)
        if self._stream is None:
            self._stream = Stream(self._places, sorted(self._recent), self.device)
        first = torch.cat([self._sink[layer], self._recent[layer]], dim=1)
        earlier = itertools.chain([first], self._stream.blocks(layer))
        return attention_in_parts(q_ALH, new_NLH, earlier, scale=scale, softcap=softcap)

    def _everything(self, layer: int, new_NLH: Tensor) -> Tensor:
        """KV of all tokens of a layer in order, on the device: sink, closed sentences, recent, new."""
        parts = [self._sink[layer], self._recent[layer], new_NLH]
        if not self._places.num_sentences:
            return torch.cat(parts, dim=1)
        num_heads, _, _, head_dim = new_NLH.shape
        num_tokens = self._places.num_tokens + sum(part.shape[1] for part in parts)
        kv_NTH = new_NLH.new_empty((num_heads, num_tokens, 2, head_dim))
        first = parts[0].shape[1]
        stop = first + self._places.num_tokens
        kv_NTH[:, :first] = parts[0]
        self._places.read(layer, kv_NTH[:, first:stop])
        kv_NTH[:, stop : stop + parts[1].shape[1]] = parts[1]
        kv_NTH[:, stop + parts[1].shape[1] :] = new_NLH
        return kv_NTH

    def kv(self, layer: int) -> Tensor:
        """Keys and values of all tokens of a layer without a sliding window, in order, on the device: a copy,
        `[N, T, 2, H]`. For studies; attention does not need it."""
        self.settle()
        self._leave_lane()
        return self._everything(layer, _no_tokens(self._recent[layer]))

    def attend_some(
        self,
        layer: int,
        q_ALH: Tensor,
        new_NTH: Tensor,
        position_L: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        later: bool = False,
    ) -> Tensor:
        """As `attend` for a pass of T tokens of which only L are computed: attention output `[A, L, H]` of these;
        appends the KV of all. The layer must be one that retrieves (no sliding window).

        Args:
            new_NTH: `[N, T, 2, H]`, KV of all new tokens, computed here or elsewhere.
            position_L: int32 `[L]` on the device: which of the T tokens the queries are of, rising.
            later: append in `settle`, since the pass's output is waited for; `new_NTH` must stay as it is until then.
        """
        output, log_AL = positional_attention(q_ALH, new_NTH, position_L, scale=scale, softcap=softcap)
        if self.num_tokens:
            if self._stream is None:
                self._stream = Stream(self._places, sorted(self._recent), self.device)
            first = torch.cat([self._sink[layer], self._recent[layer]], dim=1)
            earlier = itertools.chain([first], self._stream.blocks(layer))
            output = attention_after(output, log_AL, q_ALH, earlier, scale=scale, softcap=softcap)
        self.append_context(layer, new_NTH, later=later)
        return output

    def append_context(self, layer: int, kv_NLH: Tensor, *, later: bool = False) -> None:
        """Append KV `[N, L, 2, H]` that the pass's new tokens already have, without attention: `attend`'s other half.

        For a context whose KV was computed elsewhere; the layer must be one that retrieves (no sliding window).
        `later`: as of `attend_some`.
        """
        assert self._pass is not None
        assert kv_NLH.shape[1] == self._pass.num_new
        self._dense_bytes_per_token[layer] = kv_NLH.nbytes // kv_NLH.shape[1]
        if layer not in self._recent:
            self._sink[layer] = self._recent[layer] = _no_tokens(kv_NLH)
        if later:
            self._unsettled.append((layer, kv_NLH, self._pass))
        else:
            self._append(layer, kv_NLH, self._pass)

    def settle(self) -> None:
        """Put KV where it belongs that was to be appended later. Whatever needs it there calls this first."""
        unsettled, self._unsettled = self._unsettled, []
        for layer, kv_NLH, appended in unsettled:
            self._append(layer, kv_NLH, appended)

    def _attend_local(
        self, layer: int, q_ALH: Tensor, new_NLH: Tensor, scale: float, sliding_window: int, softcap: float | None
    ) -> Tensor:
        kv_NTH = torch.cat([self._local[layer], new_NLH], dim=1) if layer in self._local else new_NLH
        self._window_of[layer] = sliding_window
        self._local[layer] = kv_NTH[:, -(sliding_window - 1) :].clone() if sliding_window > 1 else _no_tokens(new_NLH)
        return exact_attention(q_ALH, kv_NTH, scale=scale, sliding_window=sliding_window, softcap=softcap)

    def _append(self, layer: int, new_NLH: Tensor, its_pass: _Pass) -> None:
        pending = torch.cat([self._recent[layer], new_NLH], dim=1)
        missing = self.config.sink_tokens - self._sink[layer].shape[1]
        if missing > 0:
            self._sink[layer] = torch.cat([self._sink[layer], pending[:, :missing]], dim=1)
            pending = pending[:, missing:]
        num_closing = sum(its_pass.closing)
        if num_closing:
            assert self._own is not None
            closed = pending[:, :num_closing]
            self._own.write(layer, its_pass.runs, closed, self.config.kv_format)
            self._own.add_values([layer], closed[None, :, :, 1])
            if self.policy.reads == "selected":
                assert its_pass.offsets is not None
                tables = self._summarize(closed[:, :, 0].transpose(0, 1), its_pass.offsets)
                self._own.add_summaries(layer, tables)
        # A clone, lest a view of a long chunk keeps all of it alive.
        self._recent[layer] = pending[:, num_closing:].clone() if num_closing or missing > 0 else pending

    def _offsets(self, lengths: Sequence[int]) -> Tensor:
        return to_device([0, *itertools.accumulate(lengths)], self.device)

    def _summarize(self, key_TNH: Tensor, offsets: Tensor) -> list[Tensor]:
        return [_in_dtype(table, key_TNH.dtype) for table in self.policy.summarize(key_TNH, offsets)]

    # What it holds and what it read

    def shares(self) -> list[float]:
        """Attention that each closed sentence got, averaged over steps, heads and layers; sums to less than 1."""
        num_layers = len(self._lane.layers) if self._lane is not None else len(self._recent)
        share_S = torch.zeros(self.num_sentences, dtype=torch.float64, device=self.device)
        known = self._share_S[: self.num_sentences]
        share_S[: known.shape[0]] = known
        return (share_S / (SHARE_UNITS.value * max(self.traffic.steps * num_layers, 1))).tolist()

    def sentence_spans(self) -> list[tuple[int, int]]:
        """First and one-past-last token position of each closed sentence."""
        starts, lengths = self._places.start_of.tolist(), self._places.length_of.tolist()
        return [(start, start + length) for start, length in zip(starts, lengths, strict=True)]

    @property
    def sliding_layers(self) -> set[int]:
        """Layers that were run with a sliding window so far."""
        return set(self._window_of)

    @property
    def is_sparse(self) -> bool:
        """Whether the pass under way is a sparse one."""
        return self._pass is not None and self._lane is not None

    @property
    def num_sentences(self) -> int:
        """Closed sentences."""
        return self._places.num_sentences

    @property
    def device_bytes(self) -> int:
        """KV, summaries and hot set on the device (the GPU tier), shared parts included."""
        self.settle()
        kept = sum(t.nbytes for tier in (self._sink, self._recent, self._local) for t in tier.values())
        return kept + self.summary_bytes + (self._lane.device_bytes if self._lane is not None else 0)

    @property
    def summary_bytes(self) -> int:
        """Summaries on the device, shared parts included."""
        self.settle()
        return sum(extent.summary_bytes for extent in self._extents)

    @property
    def host_bytes(self) -> int:
        """KV of closed sentences in host memory, unused rows and shared parts included."""
        self.settle()
        return sum(extent.host_bytes for extent in self._extents)

    @contextlib.contextmanager
    def using_host_memory(self) -> Iterator[None]:
        """What is in host memory now stays there inside: nobody moves it to disk."""
        slabs = [slab for extent in self._extents for slab in extent.slabs]
        for slab in slabs:
            slab.num_uses += 1
        try:
            yield
        finally:
            for slab in slabs:
                slab.num_uses -= 1

    @property
    def can_move(self) -> bool:
        """Whether the KV of all closed sentences is in host memory, and nobody uses any of it."""
        slabs = [slab for extent in self._extents for slab in extent.slabs]
        return all(slab.is_loaded and not slab.num_uses for slab in slabs)

    @property
    def unloaded_bytes(self) -> int:
        """Host memory that KV in files will take when it is needed."""
        return sum(slab.unloaded_bytes(self.memory) for extent in self._extents for slab in extent.slabs)

    @property
    def dense_bytes(self) -> int:
        """What a dense KV cache of the same tokens takes on the device."""
        return self.num_tokens * sum(self._dense_bytes_per_token.values())


def _in_dtype(table: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating-point table in the keys' dtype, clamped to its range: float16 ends at 65,504."""
    if not table.is_floating_point():
        return table
    limits = torch.finfo(dtype)
    return table.clamp(limits.min, limits.max).to(dtype)


def _no_tokens(like_NLH: Tensor) -> Tensor:
    """KV of no tokens: storage of its own, where an empty view would keep a whole chunk alive."""
    return like_NLH.new_empty((like_NLH.shape[0], 0, *like_NLH.shape[2:]))
