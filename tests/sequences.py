"""Random sequences for tests of sessions: queries, keys and values without a model, and what dense attention gives."""

import dataclasses
import threading
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sentencekv import Config, policies
from sentencekv.batch import LaneBatch
from sentencekv.exact import exact_attention_ref
from sentencekv.memory import HostMemory
from sentencekv.policies import Policy, Selection
from sentencekv.session import Session
from triton_ops import Lanes

CPU = torch.device("cpu")
HEADS, GROUPS, DIM, SCALE = 2, 3, 16, 0.25
CONFIG = Config(budget_tokens=64, sink_tokens=5, window_tokens=12, max_sentence_tokens=8, min_sentence_tokens=2)
LENGTHS = [3, 8, 1, 5, 8, 2, 7, 4]


class PinnedForNobody(HostMemory):
    """Host memory that is treated as pinned where no device is, and knows which threads asked for it."""

    def __init__(self, limit_bytes: int | None) -> None:
        super().__init__(limit_bytes, pinned=False)
        self.pinned = True
        self.threads: list[str] = []

    def _new(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self.threads.append(threading.current_thread().name.split("_")[0])
        return torch.empty(tuple(shape), dtype=dtype)

    def wait(self) -> None:
        """Until the background has done all that was ordered."""
        if self._background is not None:
            self._background.submit(int).result()


def sentence_ends(num_tokens: int, after: int = 0) -> list[int]:
    """Where the sentences of a sequence end; those beyond `after`."""
    ends, at = [], 0
    while at < num_tokens:
        at = min(at + LENGTHS[len(ends) % len(LENGTHS)], num_tokens)
        ends.append(at)
    return [end for end in ends if end > after]


@dataclasses.dataclass
class Tokens:
    """Random queries, keys and values of a sequence, for two layers."""

    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def random(cls, num_tokens: int, device: torch.device, seed: int = 0) -> "Tokens":
        generator = torch.Generator().manual_seed(seed)

        def draw(heads: int) -> Tensor:
            return torch.randn(2, heads, num_tokens, DIM, generator=generator).to(device)

        return cls(2 * draw(HEADS * GROUPS), draw(HEADS), draw(HEADS))

    def kv(self, layer: int, first: int, stop: int) -> Tensor:
        """`[N, stop - first, 2, H]`."""
        return torch.stack([self.k[layer, :, first:stop], self.v[layer, :, first:stop]], dim=2)

    def dense(self, layer: int, first: int, stop: int, **options) -> Tensor:
        """Dense attention of tokens `[first, stop)` over all up to them."""
        return exact_attention_ref(self.q[layer, :, first:stop], self.kv(layer, 0, stop), scale=SCALE, **options)

    def masked(self, layer: int, seen_NT: Tensor) -> Tensor:
        """Attention of token T - 1 over the tokens that each KV head sees, `[A, 1, H]`."""
        stop = seen_NT.shape[1]
        outputs = []
        for head in range(HEADS):
            seen = seen_NT[head]
            q = self.q[layer, head * GROUPS : (head + 1) * GROUPS, stop - 1]
            weight = (SCALE * q @ self.k[layer, head, :stop][seen].T).softmax(-1)
            outputs.append(weight @ self.v[layer, head, :stop][seen])
        return torch.cat(outputs)[:, None]


def new_session(device: torch.device, policy: Policy | None = None, config: Config = CONFIG) -> Session:
    memory = HostMemory(None, pinned=device.type == "cuda")
    return Session(config, policy or policies.load("moments"), memory, device)


def run(
    session: Session, tokens: Tokens, stop: int, *, exact: bool, sliding: Mapping[int, int] | None = None, **options
) -> list[Tensor]:
    """One pass of both layers up to token `stop`; `sliding`: the windows of layers that have one."""
    first = session.num_tokens
    session.begin(stop - first, exact=exact)
    attend = session.attend
    if session.is_sparse:
        lanes = LaneBatch(session.policy)
        lanes.seat([session])
        attend = lanes.attend
    rows = slice(first, stop)
    outputs = [
        attend(
            layer,
            *(source[layer, :, rows] for source in (tokens.q, tokens.k, tokens.v)),
            scale=SCALE,
            sliding_window=(sliding or {}).get(layer),
            **options,
        )
        for layer in (0, 1)
    ]
    session.end()
    return outputs


def step(
    batch: LaneBatch, sessions: Sequence[Session], all_tokens: Sequence[Tokens], num_lanes: int | None = None
) -> tuple[bool, list[list[Tensor]]]:
    """One sparse pass of all sessions: whether launches changed, and each session's outputs of both layers."""
    for session in sessions:
        session.begin(1, exact=False)
    changed = batch.seat(sessions, num_lanes)
    spare = max((num_lanes or 0) - len(sessions), 0)
    outputs: list[list[Tensor]] = [[] for _ in sessions]
    for layer in (0, 1):
        rows = []
        for name in ("q", "k", "v"):
            new = [
                getattr(tokens, name)[layer, :, session.num_tokens][:, None]
                for session, tokens in zip(sessions, all_tokens, strict=True)
            ]
            rows.append(torch.cat([*new, *[torch.zeros_like(new[0])] * spare], dim=1))
        output = batch.attend(layer, *rows, scale=SCALE)
        for i in range(len(sessions)):
            outputs[i].append(output[:, i : i + 1])
    for session in sessions:
        session.end()
    return changed, outputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scripted(Policy):
    """Selects what the test says (rising ids for each lane and head), after checking what it was given."""

    script: list[list[list[list[int]]]] = dataclasses.field(default_factory=list)

    def summarize(self, key_TNH: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
        return key_TNH[offsets[:-1]], key_TNH

    def select(self, q_BAH: Tensor, lanes: Lanes, layer: int, *, scale: float, room_tokens: int) -> Selection:
        for lane in lanes.lanes:
            lengths = lane.place_S4[:, 0].tolist()
            assert [part.first for part in lane.parts] == [
                sum(part.num_sentences for part in lane.parts[:i]) for i in range(len(lane.parts))
            ]
            assert sum(part.num_sentences for part in lane.parts) == len(lengths) == lane.num_sentences
            for part in lane.parts:
                starts, keys = part.tables[layer]
                assert starts.shape[0] == part.num_sentences
                assert keys.shape[0] == sum(lengths[part.first : part.first + part.num_sentences])
        selected = torch.full((q_BAH.shape[0], lanes.num_kv_heads, lanes.most_selected), -1, dtype=torch.int32)
        for b, heads in enumerate(self.script[0]):
            for n, ids in enumerate(heads):
                assert ids == sorted(ids)
                selected[b, n, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        return Selection(selected.to(q_BAH.device))


def scripted_step(session: Session, tokens: Tokens, choose: list[list[int]]) -> None:
    """A sparse pass that selects these sentences for each head; asserts that the output is dense attention, masked to
    sink, selection and all that is not closed."""
    assert isinstance(session.policy, Scripted)
    session.policy.script[:] = [[choose]]
    spans = session.sentence_spans()
    stop = session.num_tokens + 1
    seen = torch.zeros(HEADS, stop, dtype=torch.bool, device=session.device)
    seen[:, : session.config.sink_tokens] = True
    seen[:, spans[-1][1] if spans else 0 :] = True
    for head, ids in enumerate(choose):
        for s in ids:
            seen[head, spans[s][0] : spans[s][1]] = True
    for layer, output in enumerate(run(session, tokens, stop, exact=False)):
        close(output, tokens.masked(layer, seen))


def random_choice(num_sentences: int, counts: Sequence[int], generator: torch.Generator) -> list[list[int]]:
    """Rising ids, so many for each head."""
    return [torch.randperm(num_sentences, generator=generator)[:count].sort().values.tolist() for count in counts]


def closed_kv(session: Session, layer: int) -> Tensor:
    """KV of all closed sentences as host memory has it, in order."""
    layout = session._places.slabs[0].layout(layer)
    shape = (layout.num_heads, session._places.num_tokens, 2, layout.head_dim)
    into = torch.full(shape, torch.nan, dtype=layout.dtype, device=session.device)
    session._places.read(layer, into)
    return into


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
