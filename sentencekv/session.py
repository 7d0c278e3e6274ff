"""One sequence: its closed sentences, the tokens that stay on the GPU, and attention over both.

A session knows tensors and sentence ends. It knows nothing of models, tokenizers or text: a driver says which tokens
end a sentence (`expect`), brackets every forward pass with `begin` and `end`, and each layer in between calls `attend`
with the new tokens' queries, keys and values.

Token order of a layer that retrieves: sink, closed sentences (extents), recent. `recent` holds the window and the
unfinished sentence after it. A sentence closes once it lies outside the window: its KV goes to host memory, its
summary to the extent's table. Sliding-window layers keep their own last tokens and retrieve nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sentencekv.config import Config
from sentencekv.exact import exact_attention
from sentencekv.policies import Policy
from sentencekv.store import Extent, HostMemory, HotSet, Places, Run
from triton_ops import sparse_decode


@dataclasses.dataclass
class Traffic:
    """What sparse steps selected and fetched, over all layers and KV heads."""

    steps: int = 0
    num_missed: int = 0
    tokens_fetched: int = 0
    num_selected: int | Tensor = 0

    @property
    def hit_rate(self) -> float | None:
        """Share of selected sentences that were on the GPU already; None if none was selected."""
        selected = int(self.num_selected)
        return None if selected == 0 else 1.0 - self.num_missed / selected


@dataclasses.dataclass(frozen=True)
class _Pass:
    """The forward pass under way: decided in `begin`, carried out by every layer."""

    num_new: int
    exact: bool
    closing: list[int]
    runs: list[Run]


class Session:
    """One sequence's KV and the attention over it. Not thread-safe.

    After an exception inside a pass the session is unusable; the extents that it shares with others are not affected.
    """

    def __init__(self, config: Config, policy: Policy, memory: HostMemory, device: torch.device) -> None:
        self.config = config
        self.policy = policy
        self.memory = memory
        self.device = device
        self.num_tokens = 0
        self.traffic = Traffic()
        self._closed_end = config.sink_tokens
        self._ends: list[int] = []
        self.last_expected_end = 0
        self._extents: list[Extent] = []
        self._own: Extent | None = None
        self._places = Places([], device)
        self._sink: dict[int, Tensor] = {}
        self._recent: dict[int, Tensor] = {}
        self._local: dict[int, Tensor] = {}
        self._hot: dict[int, HotSet] = {}
        self._share_S = torch.zeros(0, device=device)
        self._pass: _Pass | None = None
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
        limit = self.num_tokens + num_new - self.config.window_tokens
        num_closing = next((i for i, end in enumerate(self._ends) if end > limit), len(self._ends))
        starts = [self._closed_end, *self._ends[: num_closing - 1]] if num_closing else []
        closing = [end - start for start, end in zip(starts, self._ends, strict=False)]
        runs: list[Run] = []
        if closing:
            if self._own is None:
                self._own = Extent(self.memory, self.device)
                self._extents.append(self._own)
            recent_tokens = max(self.num_tokens - self._closed_end, 0)
            runs = self._own.place(self._closed_end, closing, expected_tokens + recent_tokens)
        if not exact and self._own is not None:
            self._own.flush()
        self._pass = _Pass(num_new, exact, closing, runs)

    def end(self) -> None:
        """Finish the pass: its tokens are part of the context, its closed sentences can be selected."""
        assert self._pass is not None
        self.num_tokens += self._pass.num_new
        self.traffic.steps += not self._pass.exact
        if self._pass.closing:
            self._closed_end += sum(self._pass.closing)
            self._ends = self._ends[len(self._pass.closing) :]
            self._places = Places(self._extents, self.device)
            missing = self._places.num_sentences - self._share_S.numel()
            self._share_S = torch.cat([self._share_S, self._share_S.new_zeros(missing)])
        self._pass = None

    def fork(self) -> Session:
        """A session that goes on from here by itself; KV and summaries so far are shared, not copied."""
        assert self._pass is None
        child = Session(self.config, self.policy, self.memory, self.device)
        child.num_tokens = self.num_tokens
        child._closed_end = self._closed_end
        child._ends, child.last_expected_end = list(self._ends), self.last_expected_end
        child._extents = list(self._extents)
        child._places = self._places
        # Tensors of the GPU tier are replaced, never written to: sharing them is safe.
        child._sink, child._recent, child._local = dict(self._sink), dict(self._recent), dict(self._local)
        child._dense_bytes_per_token = dict(self._dense_bytes_per_token)
        child._share_S = torch.zeros_like(self._share_S)
        if self._own is not None:
            self._own.flush()
            self._own = None
        return child

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
        """Attention output `[A, L, H]` of the pass's L new tokens; appends their KV.

        Args:
            layer: the model's layer number.
            q_ALH, k_NLH, v_NLH: post-RoPE queries of all `A = N * G` heads, keys and values of the new tokens.
            scale, sliding_window, softcap: as in `exact_attention`.
        """
        assert self._pass is not None
        assert q_ALH.shape[1] == self._pass.num_new
        new_NLH = torch.stack([k_NLH, v_NLH], dim=2)
        self._dense_bytes_per_token[layer] = new_NLH.nbytes // new_NLH.shape[1]
        if sliding_window is not None:
            return self._attend_local(layer, q_ALH, new_NLH, scale, sliding_window, softcap)
        if layer not in self._recent:
            self._sink[layer] = self._recent[layer] = _no_tokens(new_NLH)
        if self._pass.exact or self.policy.reads == "everything":
            output = exact_attention(q_ALH, self._everything(layer, new_NLH), scale=scale, softcap=softcap)
        else:
            output = self._attend_sparse(layer, q_ALH, new_NLH, scale, softcap)
        self._append(layer, new_NLH)
        return output

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

    def append_context(self, layer: int, kv_NLH: Tensor) -> None:
        """Append KV `[N, L, 2, H]` that the pass's new tokens already have, without attention: `attend`'s other half.

        For a context whose KV was computed elsewhere; the layer must be one that retrieves (no sliding window).
        """
        assert self._pass is not None
        assert kv_NLH.shape[1] == self._pass.num_new
        self._dense_bytes_per_token[layer] = kv_NLH.nbytes // kv_NLH.shape[1]
        if layer not in self._recent:
            self._sink[layer] = self._recent[layer] = _no_tokens(kv_NLH)
        self._append(layer, kv_NLH)

    def _attend_local(
        self, layer: int, q_ALH: Tensor, new_NLH: Tensor, scale: float, sliding_window: int, softcap: float | None
    ) -> Tensor:
        kv_NTH = torch.cat([self._local[layer], new_NLH], dim=1) if layer in self._local else new_NLH
        self._local[layer] = kv_NTH[:, -(sliding_window - 1) :].clone() if sliding_window > 1 else _no_tokens(new_NLH)
        return exact_attention(q_ALH, kv_NTH, scale=scale, sliding_window=sliding_window, softcap=softcap)

    def _attend_sparse(self, layer: int, q_ALH: Tensor, new_NLH: Tensor, scale: float, softcap: float | None) -> Tensor:
        num_heads, _, _, head_dim = new_NLH.shape
        q_NGH = q_ALH.view(num_heads, -1, head_dim)
        places = self._places
        selected_NK = self._select(layer, q_NGH, places, scale)
        hot = self._hot_set(layer, selected_NK.shape[1], new_NLH)
        slot_NK, num_missed, tokens_fetched = hot.fetch(layer, selected_NK, places)
        self.traffic.num_missed += num_missed
        self.traffic.tokens_fetched += tokens_fetched
        self.traffic.num_selected = self.traffic.num_selected + (selected_NK >= 0).sum()
        resident = torch.cat([self._sink[layer], self._recent[layer], new_NLH], dim=1)
        picked = selected_NK.clamp(min=0)
        length_NK = places.length_on_device[picked] if places.num_sentences else picked
        output_NGH, share_NGK = sparse_decode(q_NGH, hot.kv, slot_NK, length_NK, resident, scale=scale, softcap=softcap)
        # Padding has share 0, so adding it to sentence 0 changes nothing.
        self._share_S.index_add_(0, picked.flatten(), share_NGK.mean(dim=1).flatten() / num_heads)
        return output_NGH.reshape(-1, 1, head_dim)

    def _select(self, layer: int, q_NGH: Tensor, places: Places, scale: float) -> Tensor:
        num_heads = q_NGH.shape[0]
        if self.policy.reads == "recent" or places.num_sentences == 0:
            return torch.empty((num_heads, 0), dtype=torch.int64, device=self.device)
        if places.num_tokens <= self.config.room_tokens:
            return torch.arange(places.num_sentences, device=self.device).expand(num_heads, -1)
        return self.policy.select(
            q_NGH,
            [extent.summaries(layer) for extent in places.extents],
            places.length_on_device,
            scale=scale,
            longest=places.longest,
            room_tokens=self.config.room_tokens,
            max_selected=self._max_selected(),
        )

    def _hot_set(self, layer: int, num_selected: int, like: Tensor) -> HotSet:
        hot = self._hot.get(layer)
        if hot is None or hot.num_slots < num_selected:
            # No more slots than there are sentences; when sentences are added, room to grow.
            wanted = max(self._places.num_sentences, 2 * hot.num_slots if hot else 0)
            wanted = 0 if self.policy.reads == "recent" else wanted
            num_slots = max(num_selected, min(self.config.num_slots, wanted))
            if hot is None:
                hot = HotSet(like.shape[0], like.shape[3], num_slots, self.config.max_sentence_tokens, like)
            else:
                hot = hot.grown(num_slots)
            self._hot[layer] = hot
        return hot

    def _max_selected(self) -> int:
        """Sentences that one step may select: half as many again as the budget holds of average ones.

        Between that and the shortest possible ones lies mostly empty space in the slots.
        """
        average = self._places.num_tokens / max(self._places.num_sentences, 1)
        return min(self.config.max_selected, math.ceil(1.5 * self.config.room_tokens / average))

    def _append(self, layer: int, new_NLH: Tensor) -> None:
        assert self._pass is not None
        pending = torch.cat([self._recent[layer], new_NLH], dim=1)
        missing = self.config.sink_tokens - self._sink[layer].shape[1]
        if missing > 0:
            self._sink[layer] = torch.cat([self._sink[layer], pending[:, :missing]], dim=1)
            pending = pending[:, missing:]
        num_closing = sum(self._pass.closing)
        if num_closing:
            assert self._own is not None
            closed = pending[:, :num_closing]
            self._own.write(layer, self._pass.runs, closed)
            if self.policy.reads == "selected":
                offsets = torch.tensor([0, *self._pass.closing], device=self.device).cumsum(0)
                tables = self.policy.summarize(closed[:, :, 0].transpose(0, 1), offsets)
                self._own.add_summaries(layer, [_in_dtype(table, closed.dtype) for table in tables])
        # A clone, lest a view of a long chunk keeps all of it alive.
        self._recent[layer] = pending[:, num_closing:].clone() if num_closing or missing > 0 else pending

    # What it holds and what it read

    def shares(self) -> list[float]:
        """Attention that each closed sentence got, averaged over steps, heads and layers; sums to less than 1."""
        layers = max(len(self._hot), 1)
        return (self._share_S / max(self.traffic.steps * layers, 1)).tolist()

    def sentence_spans(self) -> list[tuple[int, int]]:
        """First and one-past-last token position of each closed sentence."""
        starts, lengths = self._places.start_of.tolist(), self._places.length_of.tolist()
        return [(start, start + length) for start, length in zip(starts, lengths, strict=True)]

    @property
    def sliding_layers(self) -> set[int]:
        """Layers that were run with a sliding window so far."""
        return set(self._local)

    @property
    def num_sentences(self) -> int:
        """Closed sentences."""
        return self._places.num_sentences

    @property
    def device_bytes(self) -> int:
        """KV, summaries and hot set on the device (the GPU tier), shared parts included."""
        kept = sum(t.nbytes for tier in (self._sink, self._recent, self._local) for t in tier.values())
        return kept + self.summary_bytes + sum(hot.device_bytes for hot in self._hot.values())

    @property
    def summary_bytes(self) -> int:
        """Summaries on the device, shared parts included."""
        return sum(extent.summary_bytes for extent in self._extents)

    @property
    def host_bytes(self) -> int:
        """KV of closed sentences in host memory, unused rows and shared parts included."""
        return sum(extent.host_bytes for extent in self._extents)

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


class SessionBatch:
    """Several sessions whose new tokens are packed into one row, one after another, without padding.

    Packing is exact because only attention looks across tokens; it is what lets sequences of any lengths, some reading
    and some decoding, share one forward pass.
    """

    def __init__(self, sessions: Sequence[Session], lengths: Sequence[int]) -> None:
        assert len(sessions) == len(lengths) > 0
        self.sessions = list(sessions)
        self.lengths = list(lengths)

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
        """Each session's attention over its own tokens; shapes as in `Session.attend`, L summed over the sessions."""
        outputs = []
        start = 0
        for session, length in zip(self.sessions, self.lengths, strict=True):
            rows = slice(start, start + length)
            outputs.append(
                session.attend(
                    layer,
                    q_ALH[:, rows],
                    k_NLH[:, rows],
                    v_NLH[:, rows],
                    scale=scale,
                    sliding_window=sliding_window,
                    softcap=softcap,
                )
            )
            start += length
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
