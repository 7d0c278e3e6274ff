"""Reading with a cache of prompts: what a new prompt shares with a cached one is not computed again.

In this order: the same prompt; the longest prefix of a cached one; and, if asked for, equal runs wherever they stand.
What is the cheapest wins, if it saves enough. Prompts that were read exactly are cached for all others of their
namespace; approximate ones for themselves alone.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sentencekv.attention import UnsupportedModelError, sliding_layers, text_config
from sentencekv.config import Config
from sentencekv.fused import FusedLayers
from sentencekv.memory import HostMemory
from sentencekv.prompts import Prompt
from sentencekv.reading import Progress, read
from sentencekv.reuse.catalog import Catalog, EntryGoneError, Payload, Record
from sentencekv.reuse.decide import LEAST_SHARED_TOKENS, Decision, Way, decide, make_reuse_options, recipe_of
from sentencekv.reuse.edit import CachedPrompt, derived, rebased
from sentencekv.reuse.index import shared_prefix
from sentencekv.reuse.kept import Kept, StateRows
from sentencekv.reuse.match import Alignment, Match, align
from sentencekv.reuse.recompute import Plan, Rebuilt, rebuild
from sentencekv.reuse.report import Reuse
from sentencekv.rope import Rotation, rotations
from sentencekv.session import Session

_LOG = logging.getLogger(__name__)

DEFAULT_NAMESPACE = "default"
_CANDIDATES = 3
"""Cached prompts that a new one is aligned with, the likeliest ones."""
_EMBEDDED_AT_ONCE = 4096
_PARENT_SHARE = 0.25
"""Of its rows that an exact prompt has to have from another to be kept as an edit of it."""


class Reading(NamedTuple):
    """A prompt that was read."""

    session: Session
    logits_V: Tensor
    """Float32, of the last token."""
    finish: Callable[[float], Reuse]
    """Caches the prompt, if that helps others, and says what was reused. Called once, better after the answer, with the
    seconds that reading took: what caching costs is not part of them."""


def _report_all(prompt: Prompt, progress: Progress | None) -> None:
    """What is reused is there at once."""
    if progress is not None:
        progress(len(prompt.token_ids), len(prompt.token_ids))


@contextlib.contextmanager
def _for_want_of_room() -> Iterator[None]:
    """An answer is not lost because its prompt cannot be cached."""
    try:
        yield
    except (MemoryError, OSError, EntryGoneError) as error:
        _LOG.warning("the prompt is not cached: %s", error)


_LOST = (EntryGoneError, MemoryError, OSError)
"""What keeps a cached prompt from being used, and no answer from being given."""


def _why_lost(error: Exception) -> str:
    """For the report. What an error says of memory or files may be about others' prompts."""
    _LOG.warning("a cached prompt cannot be used: %s", error)
    if isinstance(error, EntryGoneError):
        return str(error)
    return "there is no room for the cached prompt's KV" if isinstance(error, MemoryError) else "it cannot be read"


class PromptCache:
    """Cached prompts of one model under one configuration. Not thread-safe.

    Raises ImportError without faiss; UnsupportedModelError for a model whose layers have sliding windows, or, for
    `similar`, whose keys cannot be moved.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: FusedLayers,
        config: Config,
        memory: HostMemory,
        new_session: Callable[[], Session],
        *,
        owner: str,
        chunk_tokens: int,
        embed: Callable[[str], Sequence[float]] | None = None,
    ) -> None:
        """
        Args:
            owner: what tells apart the models and settings whose KV means the same.
            chunk_tokens: of one forward pass.
            embed: a text to the numbers by which similar prompts are found; None: the mean of the model's own
                embeddings of its tokens.
        """
        if sliding_layers(text_config(model)):
            raise UnsupportedModelError(
                f"{type(model).__name__} has sliding-window layers, whose KV before the window is not kept; use "
                "reuse='off', or append to a Document"
            )
        self.options = make_reuse_options(config.reuse_options)
        self._model, self._layers, self._config, self._memory = model, layers, config, memory
        self._new_session, self._chunk_tokens, self._embed = new_session, chunk_tokens, embed
        self._rotations: dict[int, Rotation] | None = rotations(model) if config.reuse == "similar" else None
        embedding: Any = model.get_input_embeddings()
        self._embedding_VE: Tensor = embedding.weight
        self._embedding_size = self._embedding_VE.shape[1] if embed is None else len(embed("size"))
        self._seconds_per_token: dict[str, float] = {}
        """Of each namespace's last full reading."""
        self._closed = False
        limit = config.reuse_bytes
        if limit is None:
            limit = memory.room_bytes // 2
        self.catalog = Catalog(
            Path(config.reuse_folder) if config.reuse_folder is not None else None,
            owner=owner,
            load=self._load,
            limit_bytes=limit,
            disk_limit_bytes=config.reuse_disk_bytes,
            namespace_limit_bytes=config.reuse_namespace_bytes,
            namespace_disk_limit_bytes=config.reuse_namespace_bytes,
            embedding_size=self._embedding_size,
        )
        memory.on_shortage(self.catalog.make_room)

    @property
    def _recipe(self) -> str:
        return recipe_of(self.options)

    def close(self) -> None:
        """Write what is to be kept, and let go of all memory."""
        self._closed = True
        self.catalog.close()

    def _load(self, path: Path, record: Record, parent: Payload | None) -> Payload:
        assert parent is None or isinstance(parent, CachedPrompt)
        cached = CachedPrompt.load(path, parent, self._memory)
        cached.key = record.key
        return cached

    def read(self, prompt: Prompt, namespace: str, progress: Progress | None = None) -> Reading:
        """Read a prompt, with the help of what is cached in its namespace."""
        started_at = time.perf_counter()
        recipe = self._recipe if self._config.reuse == "similar" else None
        lost = ""
        ids = np.asarray(prompt.token_ids, np.int32)
        same = self.catalog.same(namespace, ids, recipe)
        if same is not None:
            try:
                reading = self._reopen(prompt, same, started_at)
                _report_all(prompt, progress)
                return reading
            except _LOST as error:
                lost = _why_lost(error)
        # Made after the answer where it is not needed to find a donor; but what may fail, before there is one to lose.
        early = self.options.fuzzy or self._embed is not None
        embedding = self._embedding(prompt) if early else None
        # A donor that is lost is not found again: the next best takes its place.
        for _ in range(_CANDIDATES):
            record, (way, reason) = self._find(ids, prompt.ends, namespace, embedding)
            seconds = time.perf_counter() - started_at
            if record is None or way is None:
                break
            try:
                reading = self._rebuild(prompt, namespace, embedding, record, way, reason, seconds)
                _report_all(prompt, progress)
                return reading
            except _LOST as error:
                lost = _why_lost(error)
                if not isinstance(error, EntryGoneError):
                    break
        return self._read_all(prompt, namespace, embedding, lost or reason, seconds, progress)

    def _read_all(
        self,
        prompt: Prompt,
        namespace: str,
        embedding: np.ndarray | None,
        reason: str,
        seconds_to_find: float,
        progress: Progress | None,
    ) -> Reading:
        session, num_tokens = self._new_session(), len(prompt.token_ids)
        with self._layers.active():
            logits_V = read(self._model, [session], [prompt], chunk_tokens=self._chunk_tokens, progress=progress)[0]

        def finish(seconds_to_read: float) -> Reuse:
            self._seconds_per_token[namespace] = (seconds_to_read - seconds_to_find) / num_tokens
            with _for_want_of_room():
                self._keep(prompt, namespace, embedding, session, logits_V)
            num_layers = len(session.state().recent)
            return self._report(
                prompt,
                namespace,
                "none",
                reason,
                seconds_to_find,
                seconds_to_read,
                computed_by_layer=(num_tokens,) * num_layers,
            )

        return Reading(session, logits_V, finish)

    def _reopen(self, prompt: Prompt, record: Record, started_at: float) -> Reading:
        """All of a prompt's KV from the cache, and its last logits."""
        num_tokens = len(prompt.token_ids)
        nothing = np.zeros(num_tokens, bool)
        planned = Plan(np.arange(num_tokens), nothing, nothing, nothing)
        seconds_to_find = time.perf_counter() - started_at
        with self._held(record) as cached:
            session, _ = self._restore(prompt, cached, planned, num_tokens)
            logits_V = cached.logits_V.to(session.device)
            num_layers = len(cached.rows.layers)

        def finish(seconds_to_read: float) -> Reuse:
            return self._report(
                prompt,
                record.namespace,
                "same",
                "",
                seconds_to_find,
                seconds_to_read,
                record=record,
                approximate=record.approximate,
                prefix_tokens=num_tokens,
                computed_by_layer=(0,) * num_layers,
            )

        return Reading(session, logits_V, finish)

    def _rebuild(
        self,
        prompt: Prompt,
        namespace: str,
        embedding: np.ndarray | None,
        record: Record,
        way: Way,
        reason: str,
        seconds_to_find: float,
    ) -> Reading:
        """Some of a prompt's KV from the cache, the rest computed."""
        alignment, planned, approximate = way.alignment, way.planned, way.approximate
        with self._held(record) as cached:
            session, rebuilt = self._restore(prompt, cached, planned, alignment.num_prefix)
        logits_V = rebuilt.logits_V
        assert logits_V is not None

        def finish(seconds_to_read: float) -> Reuse:
            computed_of_layer = {layer: at.cpu().numpy() for layer, at in rebuilt.computed_of_layer.items()}
            with _for_want_of_room():
                if approximate:
                    self._keep_edit(prompt, namespace, embedding, session, logits_V, record, planned, computed_of_layer)
                else:
                    self._keep(prompt, namespace, embedding, session, logits_V, record, alignment.num_prefix)
            first_layer = computed_of_layer[min(computed_of_layer)]
            num_again = int(np.count_nonzero(planned.source_T[first_layer] >= 0))
            return self._report(
                prompt,
                namespace,
                "similar" if approximate else "prefix",
                reason,
                seconds_to_find,
                seconds_to_read,
                record=record,
                approximate=approximate,
                prefix_tokens=alignment.num_prefix,
                kept_tokens=alignment.num_kept,
                moved_tokens=alignment.num_moved,
                fuzzy_tokens=alignment.num_fuzzy,
                recomputed_tokens=num_again,
                new_tokens=alignment.num_new,
                computed_by_layer=tuple(len(computed_of_layer[layer]) for layer in sorted(computed_of_layer)),
                error=rebuilt.error,
            )

        return Reading(session, logits_V, finish)

    def _restore(self, prompt: Prompt, cached: CachedPrompt, planned: Plan, num_prefix: int) -> tuple[Session, Rebuilt]:
        """A session with all of a prompt, from what is cached and what is computed."""
        session = self._new_session()
        kept = cached.kept
        if kept is not None and num_prefix >= LEAST_SHARED_TOKENS:
            reach = kept.reach(num_prefix, self._config.window_tokens)
            if reach:
                state = kept.upto(reach, session.device)
                session = Session.from_state(session.config, session.policy, session.memory, session.device, state)
        rebuilt = rebuild(
            self._model,
            self._layers,
            session,
            prompt.token_ids,
            prompt.ends,
            planned,
            cached.rows,
            self._rotations,
            self.options,
            chunk_tokens=self._chunk_tokens,
        )
        return session, rebuilt

    @contextlib.contextmanager
    def _held(self, record: Record) -> Iterator[CachedPrompt]:
        with self.catalog.held(record) as payload:
            assert isinstance(payload, CachedPrompt)
            yield payload

    def _find(
        self, ids: np.ndarray, ends: Sequence[int], namespace: str, embedding: np.ndarray | None
    ) -> tuple[Record | None, Decision]:
        """The cached prompt that leaves least to compute, and what to do with it."""
        if self._config.reuse == "exact":
            first = self.catalog.prefix_donor(namespace, ids)
            records = [] if first is None else [first]
        else:
            # Without fuzzy matches, prompts that share no tokens have nothing to give, whatever they mean.
            like = embedding if self.options.fuzzy else None
            records = self.catalog.donors(namespace, ids, like, _CANDIDATES)
        decision = decide(
            [self._align(record, ids, ends) for record in records],
            self.options,
            text_config(self._model).num_hidden_layers,
            moves=self._config.reuse == "similar",
        )
        return None if decision.way is None else records[decision.way.at], decision

    def _align(self, record: Record, ids: np.ndarray, ends: Sequence[int]) -> Alignment:
        if self._config.reuse == "exact":
            shared = shared_prefix(record.token_ids, ids)
            matches = (Match(0, 0, shared, "prefix"),) if shared else ()
            return Alignment(len(record.token_ids), len(ids), matches)
        fuzzy, embedding_VE = self.options.matching, self._embedding_VE
        return align(record.token_ids, ids, donor_ends=record.ends, ends=ends, fuzzy=fuzzy, embedding_VE=embedding_VE)

    def forget(self, namespace: str) -> int:
        """Let go of all that is cached in a namespace, in files as well; how many prompts that were."""
        entries = self.catalog.statistics(namespace).entries
        self.catalog.clear(namespace)
        return entries

    def _embedding(self, prompt: Prompt) -> np.ndarray:
        if self._embed is not None:
            found = np.asarray(self._embed(prompt.text), dtype=np.float32)
            if found.shape != (self._embedding_size,):
                raise ValueError(
                    f"reuse_embedding must give {self._embedding_size} numbers for every text, as it did at first; got "
                    f"shape {list(found.shape)}"
                )
            if not np.isfinite(found).all():
                raise ValueError(f"reuse_embedding must give finite numbers, got {found[~np.isfinite(found)][0]}")
            # Some embeddings know no word of a text. Then it is like no other, and found by its tokens alone.
            return found if found.any() else np.ones_like(found)
        ids = torch.tensor(prompt.token_ids, device=self._embedding_VE.device)
        total_E = sum(self._embedding_VE[part].sum(0, dtype=torch.float32) for part in ids.split(_EMBEDDED_AT_ONCE))
        assert isinstance(total_E, Tensor)
        return total_E.detach().cpu().numpy() / len(ids)

    def _keep(
        self,
        prompt: Prompt,
        namespace: str,
        embedding: np.ndarray | None,
        session: Session,
        logits_V: Tensor,
        donor: Record | None = None,
        num_prefix: int = 0,
    ) -> None:
        """Cache a prompt that was read exactly, for all that come."""
        num_tokens = len(prompt.token_ids)
        if self._closed or num_tokens < LEAST_SHARED_TOKENS:
            return
        if self.catalog.entry(namespace, prompt.token_ids, approximate=False) is not None:
            return
        with self._parent_of(donor if num_prefix >= _PARENT_SHARE * num_tokens else None) as parent:
            kept = Kept(session.state(), num_tokens, self._memory)
            sources: dict[int, np.ndarray] = {}
            if parent is not None:
                token_T = np.arange(num_tokens)
                shared_T = np.where(token_T < num_prefix, token_T, -1)
                sources, parent = rebased(dict.fromkeys(kept.rows.layers, shared_T), parent)
            cached = CachedPrompt(kept.rows, logits_V.cpu(), kept=kept, parent=parent, source_of_layer=sources)
            self._add(prompt, namespace, embedding, cached, recipe=None)

    def _keep_edit(
        self,
        prompt: Prompt,
        namespace: str,
        embedding: np.ndarray | None,
        session: Session,
        logits_V: Tensor,
        donor: Record,
        planned: Plan,
        computed_of_layer: Mapping[int, np.ndarray],
    ) -> None:
        """Cache an approximation, for this prompt alone, as an edit of the one that it was made from."""
        if self._closed or len(prompt.token_ids) < LEAST_SHARED_TOKENS:
            return
        cached_before = self.catalog.entry(namespace, prompt.token_ids, approximate=True)
        if cached_before is not None:
            if cached_before.recipe == self._recipe:
                return
            self.catalog.remove(cached_before)
        with self._parent_of(donor) as parent:
            if parent is None:
                return  # it has left meanwhile, and what is derived from it means nothing
            state, sources = session.state(), {}
            for extent in state.extents:
                extent.flush()
            source_T, last_L = planned.source_T, None
            for layer, token_L in computed_of_layer.items():
                # Layers that compute the same share one table.
                if last_L is None or not np.array_equal(token_L, last_L):
                    source_T, last_L = planned.source_T.copy(), token_L
                    source_T[token_L] = -1
                sources[layer] = source_T
            rows = StateRows(state, state.extents, len(prompt.token_ids))
            cached = derived(rows, sources, parent, logits_V.cpu(), self._memory)
            self._add(prompt, namespace, embedding, cached, recipe=self._recipe)

    @contextlib.contextmanager
    def _parent_of(self, record: Record | None) -> Iterator[CachedPrompt | None]:
        if record is None:
            yield None
            return
        with contextlib.ExitStack() as stack:
            parent = None
            with contextlib.suppress(EntryGoneError):
                parent = stack.enter_context(self._held(record))
            yield parent

    def _add(
        self,
        prompt: Prompt,
        namespace: str,
        embedding: np.ndarray | None,
        cached: CachedPrompt,
        *,
        recipe: str | None,
    ) -> None:
        """`recipe`: None for what is exact."""
        key = cached.parent.key if cached.parent is not None else None
        record = self.catalog.add(
            namespace,
            prompt.token_ids,
            prompt.ends,
            cached,
            self._embedding(prompt) if embedding is None else embedding,
            approximate=recipe is not None,
            recipe=recipe or "",
            parent=key,
        )
        if record is None:
            cached.drop()
        else:
            cached.key = record.key

    def _report(
        self,
        prompt: Prompt,
        namespace: str,
        kind: Literal["none", "same", "prefix", "similar"],
        reason: str,
        seconds_to_find: float,
        seconds_to_read: float,
        *,
        record: Record | None = None,
        approximate: bool = False,
        error: Tensor | None = None,
        **tokens: Any,
    ) -> Reuse:
        num_tokens = len(prompt.token_ids)
        rate = self._seconds_per_token.get(namespace)
        counts = dict.fromkeys(
            ("prefix_tokens", "kept_tokens", "moved_tokens", "fuzzy_tokens", "recomputed_tokens", "new_tokens"), 0
        )
        if kind == "none":
            counts["new_tokens"] = num_tokens
        return Reuse(
            kind=kind,
            approximate=approximate,
            reason=reason,
            donor=record.key if record is not None else None,
            prompt_tokens=num_tokens,
            seconds_to_find=seconds_to_find,
            seconds_to_read=seconds_to_read,
            seconds_saved=None if rate is None or kind == "none" else rate * num_tokens - seconds_to_read,
            estimated_error=0.0 if not approximate else None if error is None else float(error),
            **{**counts, **tokens},
        )
