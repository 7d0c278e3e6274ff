"""The ops between a layer's queries and its attention output, for `benchmarks.ops`, over a context in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.forced import Schedule, force_ref, force_triton
from benchmarks.report import Op
from benchmarks.workload import Context, twin, with_budget
from sentencekv.batch import LaneBatch
from sentencekv.config import Config
from sentencekv.memory import HostMemory
from sentencekv.policies import load
from sentencekv.session import Session
from sentencekv.slabs import Layout
from sentencekv.store import Extent, Places
from triton_ops.gather_kv import gather_kv, gather_kv_ref
from triton_ops.lanes import STEP, Lanes
from triton_ops.offload_kv import offload_kv
from triton_ops.resolve_hot_set import Resolved, resolve_hot_set, resolve_hot_set_ref
from triton_ops.score_codes import score_codes, score_codes_ref
from triton_ops.score_sentences import Scores, score_sentences, score_sentences_ref
from triton_ops.select_sentences import select_sentences, select_sentences_ref
from triton_ops.sparse_decode import sparse_decode, sparse_decode_ref

_LIMIT = 2e-2
"""Largest relative difference of kernels that multiply 16-bit numbers; copies and integers must be equal."""
_SELECTIONS = 8
"""Through which resolving goes, each overlapping the one before: together more than the hot set has slots."""
_MOMENTS: dict[str, Any] = {"spread": "square", "log_length": True}


class Picked(NamedTuple):
    """What `gather_kv` is to fetch, with its bytes."""

    selected_BNK: Tensor
    slot_BNK: Tensor
    miss_BNK: Tensor
    num_bytes: int


class RetrievalOps:
    """Ops over all layers of one context. Mutates its sessions' hot sets, as the ops do."""

    def __init__(self, context: Context, memory: HostMemory, budget: int, batch: int) -> None:
        self._context, self._memory, self._budget, self._batch = context, memory, budget, batch
        self._config = Config(policy="moments", budget_tokens=budget)
        self._session = context.session(self._config, memory)
        self._scale = context.head_dim**-0.5
        self._depth = context.num_layers
        model = context.model
        torch.manual_seed(context.seed)

        def normal(num_heads: int) -> list[Tensor]:
            shape = (batch, num_heads, context.head_dim)
            return [torch.randn(shape, device=model.device, dtype=model.dtype) for _ in range(self._depth)]

        self._q = normal(model.config.num_attention_heads)
        self._k, self._v = normal(context.num_kv_heads), normal(context.num_kv_heads)

    def ops(self, gather_mib: Sequence[float]) -> Iterator[Op]:
        """In the order of a step; each op's tensors are gone when the next is made."""
        yield from self._scores_and_selection()
        yield self._score_codes()
        yield from self._hot_set_and_attention()
        for mib in gather_mib:
            yield from self._gather_of(mib)
        for num_sentences in (1, 16):
            yield self._offload(num_sentences)

    def _seat(self, session: Session) -> Lanes:
        """Lanes of forks with summaries of their own; nothing is in the hot set."""
        sessions = [session.fork()] + [twin(session) for _ in range(self._batch - 1)]
        batch = LaneBatch(session.policy)
        batch.seat(sessions)
        assert batch._lanes is not None
        return batch._lanes

    def _layers(self, call: Callable[[int], object]) -> Callable[[], object]:
        return lambda: [call(layer) for layer in range(self._depth)]

    def _op(
        self, name: str, detail: str, launch: Callable[[int], object], check: Callable[[], float], **facts: Any
    ) -> Op:
        return Op(name=name, detail=detail, launch=self._layers(launch), check=check, launches=self._depth, **facts)

    def _scores_and_selection(self) -> Iterator[Op]:
        lanes = self._seat(self._session)
        num_sentences, room = self._session.num_sentences, self._config.room_tokens
        logit_bytes = self._batch * len(self._q[0][0]) * num_sentences * 4

        def score(layer: int) -> Scores:
            return score_sentences(self._q[layer], lanes, layer, scale=self._scale, **_MOMENTS)

        def check_score() -> float:
            want = score_sentences_ref(self._q[0], lanes, 0, scale=self._scale, **_MOMENTS)
            return difference(score(0).logit_BNGS, want.logit_BNGS, num_sentences)

        detail = f"moments of {num_sentences:,} sentences"
        table_bytes = self._batch * self._session.summary_bytes
        yield self._op(
            "score_sentences",
            detail,
            score,
            check_score,
            limit=_LIMIT,
            num_bytes=table_bytes + self._depth * logit_bytes,
        )
        scores = [score(layer) for layer in range(self._depth)]

        def check_select() -> float:
            got = select_sentences(scores[0], lanes, group="max", room_tokens=room)
            # The reference looks at the logits alone; what is no sentence must not be looked at.
            want = select_sentences_ref(scores[0], lanes, group="max", room_tokens=room)
            return share_of_others(got, want, lanes.capacity)

        yield self._op(
            "select_sentences",
            f"{room:,} tokens of {num_sentences:,} sentences",
            lambda layer: select_sentences(scores[layer], lanes, group="max", room_tokens=room),
            check_select,
            limit=_LIMIT,
            num_bytes=self._depth * logit_bytes,
        )
        if self._q[0].is_cuda:
            schedule = Schedule.of(self._session)
            schedule.set_hit_rate(0.85)
            selected = [select_sentences(scores[0], lanes, group="max", room_tokens=room) for _ in range(2)]

            def check_force() -> float:
                force_triton(selected[0], lanes, schedule)
                force_ref(selected[1], lanes, schedule)
                return float((selected[0] != selected[1]).sum())

            yield self._op(
                "force",
                "the benchmark's own schedule, no part of a real step",
                lambda layer: force_triton(selected[0], lanes, schedule),
                check_force,
                limit=0.0,
                num_bytes=None,
            )

    def _score_codes(self) -> Op:
        session = twin(self._session, load("codes"))
        lanes = self._seat(session)
        num_sentences = session.num_sentences

        def score(layer: int) -> Scores:
            return score_codes(self._q[layer], lanes, layer, scale=self._scale, bits=2)

        def check() -> float:
            want = score_codes_ref(self._q[0], lanes, 0, scale=self._scale, bits=2)
            return difference(score(0).logit_BNGS, want.logit_BNGS, num_sentences)

        num_bytes = self._batch * (session.summary_bytes + self._depth * len(self._q[0][0]) * num_sentences * 4)
        detail = f"codes of {num_sentences:,} sentences"
        return self._op("score_codes", detail, score, check, limit=_LIMIT, num_bytes=num_bytes)

    def _hot_set_and_attention(self) -> Iterator[Op]:
        lanes, other = self._seat(self._session), self._seat(self._session)
        room = self._config.room_tokens
        selections = [
            [self._pick(lanes, room, shift, 16 * layer).selected_BNK for layer in range(self._depth)]
            for shift in (0.15 * step for step in range(_SELECTIONS))
        ]

        def check_resolve() -> float:
            wrong = 0.0
            for step, selected in enumerate((selections[0][0], selections[1][0], selections[0][0])):
                for there in (lanes, other):
                    for lane in there.lanes:
                        lane.step = step
                    there.count()
                got, want = resolve_hot_set(selected, lanes, 0), resolve_hot_set_ref(selected, other, 0)
                wrong += sum(float((a != b).sum()) for a, b in zip(got, want, strict=True))
            return wrong

        def resolve_all() -> object:
            made = []
            for selected in selections:
                # Slots of a step's own selection are never taken: a new selection needs a new step.
                lanes.count_of[:, STEP.value].add_(1)
                made.append([resolve_hot_set(selected[layer], lanes, layer) for layer in range(self._depth)])
            return made

        yield Op(
            name="resolve_hot_set",
            detail=f"15% misses in {_SELECTIONS - 1} of {_SELECTIONS} steps",
            launch=resolve_all,
            check=check_resolve,
            limit=0.0,
            num_bytes=None,
            launches=_SELECTIONS * self._depth,
        )
        for share in (0.05, 0.15, 0.4, 1.0):
            picked = [self._pick(lanes, room, 0.0, 16 * layer, share) for layer in range(self._depth)]
            yield self._gather(lanes, picked, f"{share:.0%} of {room:,} tokens")
        for lane in lanes.lanes:
            lane.step = 10**6
        lanes.count()
        resolved: list[Resolved] = []
        for layer, selected in enumerate(selections[0]):
            resolved.append(resolve_hot_set(selected, lanes, layer))
            gather_kv(selected, resolved[-1].slot_BNK, (selected >= 0).to(torch.int8), lanes, layer)

        def with_misses(each: Resolved, share: float) -> Resolved:
            """So large a share of the selection is to be fetched, though it is there."""
            missed = torch.zeros_like(each.miss_BNK)
            missed[..., : round(share * int(each.count_BN.min()))] = 1
            return each._replace(miss_BNK=missed)

        def attend(op: Callable[..., Tensor], layer: int, where: Sequence[Resolved]) -> Tensor:
            q, k, v = self._q[layer], self._k[layer], self._v[layer]
            return op(q, k, v, lanes, layer, selections[0][layer], where[layer], scale=self._scale, fetch=True)

        num_tokens = sum(int(each.length_BNK.sum()) for each in resolved)
        num_resident = sum(lane.num_resident + 1 for lane in lanes.lanes) * self._depth * self._context.num_kv_heads
        for share in (0.0, 0.15):
            where = [with_misses(each, share) for each in resolved]
            yield self._op(
                "sparse_decode",
                f"{room:,} tokens and what is resident, {share:.0%} fetched",
                lambda layer, where=where: attend(sparse_decode, layer, where),  # type: ignore[misc]
                lambda where=where: relative(  # type: ignore[misc]
                    attend(sparse_decode, 0, where), attend(sparse_decode_ref, 0, where)
                ),
                limit=_LIMIT,
                num_bytes=(num_tokens + num_resident) * self._context.row_bytes,
            )

    def _gather_of(self, mib: float) -> Iterator[Op]:
        """So many bytes by one launch, and as many by one pinned copy."""
        heads = self._batch * self._context.num_kv_heads
        per_head = int(mib * 2**20) // (heads * self._context.row_bytes)
        detail = f"{mib:g} MiB"
        if per_head + 128 > self._session.num_tokens:
            return
        lanes = self._seat(with_budget(self._session, max(per_head + per_head // 8, 128) + 80))
        picked = [self._pick(lanes, per_head, 0.0, 16 * layer) for layer in range(self._depth)]
        yield self._gather(lanes, picked, detail)
        size = picked[0].num_bytes
        device = self._q[0].device
        source = torch.ones((self._depth, size), dtype=torch.int8, pin_memory=device.type == "cuda")
        target = torch.zeros(size, dtype=torch.int8, device=device)

        def check() -> float:
            target.copy_(source[0], non_blocking=True)
            return float((target != 1).sum())

        yield self._op(
            "pinned copy",
            detail,
            lambda layer: target.copy_(source[layer], non_blocking=True),
            check,
            limit=0.0,
            num_bytes=size * self._depth,
            limited_by="host",
            # Copies from pinned memory are only queued: their events are no part of a graph.
            graph=False,
        )

    def _gather(self, lanes: Lanes, picked: list[Picked], detail: str) -> Op:
        def gathered(op: Callable[..., None]) -> list[Tensor]:
            for lane in lanes.lanes:
                lane.hot_kv[0].zero_()
            op(picked[0].selected_BNK, picked[0].slot_BNK, picked[0].miss_BNK, lanes, 0)
            return [lane.hot_kv[0].clone() for lane in lanes.lanes]

        def check() -> float:
            pairs = zip(gathered(gather_kv), gathered(gather_kv_ref), strict=True)
            return sum(float((a != b).sum()) for a, b in pairs)

        return self._op(
            "gather_kv",
            detail,
            lambda layer: gather_kv(*picked[layer][:3], lanes, layer),
            check,
            limit=0.0,
            num_bytes=sum(each.num_bytes for each in picked),
            limited_by="host",
        )

    def _pick(self, lanes: Lanes, num_tokens: int, shift: float, seed: int, share: float = 1.0) -> Picked:
        """Random sentences of that many tokens for each lane and KV head; of them, `share` is missing.

        `shift`: with the same seed, so much of the selection is another.
        """
        shape = (self._batch, self._context.num_kv_heads, lanes.most_selected)
        selected = torch.full(shape, -1, dtype=torch.int32)
        slot, miss = torch.full_like(selected, -1), torch.zeros(shape, dtype=torch.int8)
        length_S = torch.tensor([stop - start for start, stop in self._session.sentence_spans()])
        num_missed_tokens = 0
        for b, lane in enumerate(lanes.lanes):
            for n in range(shape[1]):
                generator = torch.Generator().manual_seed(seed + 1009 * (b * shape[1] + n))
                order = torch.randperm(length_S.numel(), generator=generator)
                order = order.roll(-int(shift * num_tokens / length_S.float().mean()))
                count = int((length_S[order].cumsum(0) <= num_tokens).sum())
                count = min(count, lane.max_selected, lane.num_slots)
                selected[b, n, :count] = order[:count].sort().values.int()
                slot[b, n, :count] = torch.arange(count, dtype=torch.int32)
                missed = torch.rand(count, generator=generator) < share
                miss[b, n, :count] = missed.to(torch.int8)
                num_missed_tokens += int(length_S[selected[b, n, :count].long()][missed].sum())
        device, num_bytes = self._q[0].device, num_missed_tokens * self._context.row_bytes
        return Picked(selected.to(device), slot.to(device), miss.to(device), num_bytes)

    def _offload(self, num_sentences: int) -> Op:
        """Sentences of 20 tokens, all layers in one launch."""
        context, device = self._context, self._q[0].device
        lengths = [20] * num_sentences
        extent = Extent(self._memory, device)
        runs = extent.place(0, lengths, 20 * num_sentences)
        for layer in range(self._depth):
            extent.allocate(layer, runs, Layout(context.num_kv_heads, context.head_dim, context.model.dtype))
        places = Places([extent], device)
        layers = range(self._depth)
        slabs_of = [[slab.rows(layer) for slab in places.slabs] for layer in layers]
        slab_of_D = places.slab_addresses(layers)
        shape = (self._depth, context.num_kv_heads, 20 * num_sentences, 2, context.head_dim)
        kv_DNTH = torch.randn(shape, device=device, dtype=context.model.dtype)

        def launch() -> None:
            offload_kv(kv_DNTH, slabs_of, slab_of_D, places.place_S4, 20)

        def check() -> float:
            launch()
            want = kv_DNTH.cpu()  # waits for the launch
            rows = [
                torch.cat([slab.rows(layer)[:, :used] for slab, used in places.filled()], dim=1) for layer in layers
            ]
            return sum(float((got != kv).sum()) for got, kv in zip(rows, want, strict=True))

        return Op(
            name="offload_kv",
            detail=f"{num_sentences} of 20 tokens, all layers",
            launch=launch,
            check=check,
            limit=0.0,
            num_bytes=kv_DNTH.nbytes,
            launches=1,
            limited_by="host",
        )


def relative(got: Tensor, want: Tensor) -> float:
    """Difference as a share of the norm."""
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def difference(got_BNGS: Tensor, want_BNGS: Tensor, num_sentences: int) -> float:
    """Relative difference of the columns that are sentences."""
    return relative(got_BNGS[..., :num_sentences], want_BNGS[..., :num_sentences])


def share_of_others(got_BNK: Tensor, want_BNK: Tensor, capacity: int) -> float:
    """Of two selections, the share that is in one of them only; ties may be ranked by how sums were rounded."""

    def marked(selected_BNK: Tensor) -> Tensor:
        marks = torch.zeros((*selected_BNK.shape[:2], capacity + 1), dtype=torch.bool, device=selected_BNK.device)
        return marks.scatter_(2, selected_BNK.long() % (capacity + 1), True)[..., :capacity]

    got, want = marked(got_BNK), marked(want_BNK)
    return ((got != want).sum() / (2 * want.sum())).item()
