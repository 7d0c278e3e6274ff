"""Documents as files: what a session goes on from, with the text, its tokens, and whose they are.

A document is opened by reading what stays on the device: summaries, sink, recent tokens. The KV of its sentences comes
to host memory when it is first needed, layer after layer, as attention needs it, by threads that read ahead.

Knows sessions, prompts and what tells models and tokenizers apart; nothing of how documents are asked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sentencekv import policies
from sentencekv.config import Config
from sentencekv.disk import Pieces, SavedFile, SavedFileError, Written, write_file
from sentencekv.memory import HostMemory
from sentencekv.policies import Policy
from sentencekv.prompts import Frame, Prompt
from sentencekv.session import Session, State
from sentencekv.slabs import Layout, Slab
from sentencekv.store import Extent

_KIND, _VERSION = "sentencekv document", 3
_READERS = min(os.cpu_count() or 4, 16)
"""Threads that read: a checksum takes one of them longer than the disk, or the machine's cache, takes for the bytes."""
_SAMPLED_NUMBERS = 64
"""Of each of the model's weights, for its fingerprint."""
_SUFFIXES = ("", ".scales")
"""Of the tensors that hold a slab's rows: KV, or codes and their scales."""
_ON_DEVICE = ("sink.", "recent.", "local.")
"""How names of tensors begin that stay on the device, and what others are called:"""
_OF_EXTENTS = (".summaries", ".value_sum.")
_FIXED = ("policy", "policy_options", "sink_tokens", "window_tokens", "max_sentence_tokens", "kv_dtype")
"""Settings under which a document was read, and which cannot be others afterwards."""


class Contents(NamedTuple):
    """What a document is made of."""

    text: str
    prompt: Prompt
    frame: Frame
    session: Session


@dataclasses.dataclass(frozen=True)
class Owner:
    """What a document belongs to: KV means nothing to another model, and tokens nothing to another tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @functools.cached_property
    def weights(self) -> str:
        """A hash of names, shapes and some numbers of all weights, whatever their dtype."""
        digest = hashlib.sha256()
        samples = []
        for name, parameter in self.model.named_parameters():
            digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
            flat = parameter.detach().reshape(-1)
            samples.append(flat[:: max(flat.numel() // _SAMPLED_NUMBERS, 1)][:_SAMPLED_NUMBERS].float())
        digest.update(torch.cat(samples).cpu().numpy().tobytes())
        return digest.hexdigest()

    @functools.cached_property
    def rotary(self) -> Tensor:
        """Frequencies and scales of the model's rotary embeddings, as they are in force: float32, one dimension."""
        found = [buffer.float().reshape(-1) for name, buffer in self.model.named_buffers() if "inv_freq" in name]
        scales = [getattr(module, "attention_scaling", None) for module in self.model.modules()]
        return torch.cat([*(each.cpu() for each in found), torch.tensor([each for each in scales if each is not None])])

    @functools.cached_property
    def vocabulary(self) -> str:
        """A hash of all tokens and their ids."""
        tokens = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        return hashlib.sha256(repr(tokens).encode()).hexdigest()


def save(path: str | os.PathLike[str], owner: Owner, contents: Contents, progress: Written | None = None) -> int:
    """Write a document to a file; returns its bytes. Raises OSError if it cannot be written, as `disk.write_file`."""
    text, prompt, frame, session = contents
    state = session.state()
    tensors = {
        "text": Pieces.of(torch.frombuffer(bytearray(prompt.text.encode()), dtype=torch.uint8)),
        "token_ids": Pieces.of(torch.tensor(prompt.token_ids, dtype=torch.int32)),
        "spans": Pieces.of(torch.from_numpy(np.ascontiguousarray(prompt.spans))),
        "ends": Pieces.of(torch.tensor(prompt.ends, dtype=torch.int64)),
        "rotary": Pieces.of(owner.rotary),
    }
    for kind in ("sink", "recent", "local"):
        for layer, kv in getattr(state, kind).items():
            tensors[f"{kind}.layer{layer}"] = Pieces.of(kv.contiguous())
    for e, extent in enumerate(state.extents):
        tensors[f"extent{e}.places"] = Pieces.of(extent.place_of)
        for layer in state.recent if extent.num_sentences else ():
            tensors[f"extent{e}.value_sum.layer{layer}"] = Pieces.of(extent.value_sum(layer))
        for layer in state.recent:
            for i, table in enumerate(extent.summaries(layer)):
                tensors[f"extent{e}.summaries{i}.layer{layer}"] = Pieces.of(table)
    for layer, layout in _layouts(state.recent, session.config).items():
        for e, extent in enumerate(state.extents):
            for s, slab in enumerate(extent.slabs):
                for i, (dtype, shape) in enumerate(layout.shapes(slab.used_tokens)):
                    parts = functools.partial(_heads, slab, layer, i)
                    tensors[_slab_name(e, s, layer) + _SUFFIXES[i]] = Pieces(dtype, shape, parts)
    description = {
        "model": {"type": type(owner.model).__name__, "weights": owner.weights, "dtype": str(owner.model.dtype)},
        "vocabulary": owner.vocabulary,
        "settings": _settings(session.config, session.policy),
        "frame": dataclasses.asdict(frame),
        "first_char": len(prompt.text) - len(text),
        "session": {
            "num_tokens": state.num_tokens,
            "closed_end": state.closed_end,
            "ends": state.ends,
            "last_expected_end": state.last_expected_end,
            "window_of": _by_number(state.window_of),
            "dense_bytes_per_token": _by_number(state.dense_bytes_per_token),
            "layers": list(state.recent),
            "local_layers": list(state.local),
            "slabs": [[[slab.capacity_tokens, slab.used_tokens] for slab in e.slabs] for e in state.extents],
        },
    }
    return write_file(path, {"kind": _KIND, "version": _VERSION, **description}, tensors, progress)


def move_to_disk(path: str | os.PathLike[str], owner: Owner, contents: Contents) -> None:
    """Move the KV of a document's sentences to a file, which goes with the last that needs it. Raises OSError."""
    try:
        save(path, owner, contents)
        saved = SavedFile(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # what is open stays readable
    session = contents.session
    state = session.state()
    loading = _Loading(saved, session.memory, _layouts(state.recent, session.config))
    for e, extent in enumerate(state.extents):
        for s, slab in enumerate(extent.slabs):
            slab.unload(functools.partial(loading.rows, e, s))
            loading.add(e, s, slab)


def _layouts(recent: Mapping[int, Tensor], config: Config) -> dict[int, Layout]:
    """How the rows of each layer look, from its recent tokens."""
    return {layer: Layout(kv.shape[0], kv.shape[3], kv.dtype, config.kv_format) for layer, kv in recent.items()}


def _slab_name(extent: int, slab: int, layer: int) -> str:
    return f"extent{extent}.slab{slab}.layer{layer}"


def _heads(slab: Slab, layer: int, part: int) -> Iterator[Tensor]:
    """The used rows of each head, one after another."""
    return (head[: slab.used_tokens] for head in slab.parts(layer)[part])


def _by_number(values: Mapping[int, int]) -> dict[str, int]:
    return {str(number): value for number, value in values.items()}


def open_saved(
    path: str | os.PathLike[str], owner: Owner, config: Config, policy: Policy, memory: HostMemory
) -> Contents:
    """A document from its file. The KV of its sentences is read when it is first needed: the file has to stay.

    Raises SavedFileError if the file is damaged, or of another model, tokenizer, dtype or configuration.
    """
    saved = SavedFile(path, kind=_KIND, version=_VERSION)
    description = saved.description
    _check_owner(saved, owner)
    _check_settings(saved, _settings(config, policy))
    device = owner.model.device
    whole = bytes(saved.read("text").numpy()).decode()
    prompt = Prompt(whole, saved.read("token_ids").tolist(), saved.read("spans").numpy(), saved.read("ends").tolist())
    numbers = description["session"]
    layers = numbers["layers"]

    on_device = _read_for(device, saved)
    recent = {layer: on_device[f"recent.layer{layer}"] for layer in layers}
    extents: list[Extent] = []
    layout_of = _layouts(recent, config)
    row_bytes = next(iter(layout_of.values())).row_bytes if layout_of else 1
    state = State(
        num_tokens=numbers["num_tokens"],
        closed_end=numbers["closed_end"],
        ends=numbers["ends"],
        last_expected_end=numbers["last_expected_end"],
        sink={layer: on_device[f"sink.layer{layer}"] for layer in layers},
        recent=recent,
        local={layer: on_device[f"local.layer{layer}"] for layer in numbers["local_layers"]},
        window_of={int(layer): window for layer, window in numbers["window_of"].items()},
        dense_bytes_per_token={int(layer): count for layer, count in numbers["dense_bytes_per_token"].items()},
        extents=extents,
        row_bytes=row_bytes,
    )
    loading = _Loading(saved, memory, layout_of)
    for e, sizes in enumerate(numbers["slabs"]):
        slabs = []
        for s, (capacity, used) in enumerate(sizes):
            slabs.append(Slab(capacity, used, functools.partial(loading.rows, e, s), layout_of))
            loading.add(e, s, slabs[s])
        tables: dict[int, list[Tensor]] = {}
        for layer in layers:
            names = (f"extent{e}.summaries{i}.layer{layer}" for i in range(2))
            tables[layer] = [on_device[name] for name in names if name in on_device]
        places = saved.read(f"extent{e}.places")
        kept = {layer: each for layer, each in tables.items() if each}
        sums = {layer: on_device[f"extent{e}.value_sum.layer{layer}"] for layer in layers if len(places)}
        extents.append(Extent(memory, device, slabs, places, kept, row_bytes, sums))
    session = Session.from_state(config, policy, memory, device, state)
    return Contents(whole[description["first_char"] :], prompt, Frame(**description["frame"]), session)


def _read_for(device: torch.device, saved: SavedFile) -> dict[str, Tensor]:
    """All that stays on the device, by name, read by several threads."""
    names = [name for name in saved if name.startswith(_ON_DEVICE) or any(kind in name for kind in _OF_EXTENTS)]
    with ThreadPoolExecutor(_READERS, thread_name_prefix="sentencekv-read") as readers:
        return dict(zip(names, readers.map(lambda name: saved.read(name).to(device), names), strict=True))


def _check_owner(saved: SavedFile, owner: Owner) -> None:
    described = saved.description["model"]
    if described["dtype"] != str(owner.model.dtype):
        theirs, ours = (str(dtype).removeprefix("torch.") for dtype in (described["dtype"], owner.model.dtype))
        raise SavedFileError(
            f"{saved.name!r} holds KV in {theirs}, the model is in {ours}; load it with dtype={theirs!r}"
        )
    if described["weights"] != owner.weights:
        raise SavedFileError(
            f"{saved.name!r} was read by another model ({described['type']}, fingerprint {described['weights'][:12]}; "
            f"this one is a {type(owner.model).__name__}, {owner.weights[:12]}); open it with the model that read it"
        )
    rotary = saved.read("rotary")
    if rotary.shape != owner.rotary.shape or not torch.allclose(rotary, owner.rotary, rtol=1e-4, atol=0.0):
        raise SavedFileError(
            f"{saved.name!r} was read with other rotary position embeddings (RoPE); load the model with the "
            "configuration that it had"
        )
    if saved.description["vocabulary"] != owner.vocabulary:
        raise SavedFileError(f"{saved.name!r} was made with another tokenizer; open it with the tokenizer that read it")


def _settings(config: Config, policy: Policy) -> dict[str, Any]:
    """Those that shape what a document holds, options that were left out included; as JSON has them."""
    settings = {name: getattr(config, name) for name in _FIXED} | {"policy_options": policy.kept_options}
    return dict(json.loads(json.dumps(settings)))


def _check_settings(saved: SavedFile, ours: dict[str, Any]) -> None:
    theirs = saved.description["settings"]
    different = [name for name in _FIXED if theirs[name] != ours[name]]
    if different:
        brought = policies.policy_class(theirs["policy"]).settings if theirs["policy"] in policies.available() else {}
        different = [name for name in different if name not in brought] or different
        given, now = (", ".join(f"{name}={each[name]!r}" for name in different) for each in (theirs, ours))
        raise SavedFileError(
            f"{saved.name!r} was read under {given}, and this is {now}; open it under the same settings "
            f"(lm.with_config({given}), or the options of the command line), or read the document again"
        )


class _Loading:
    """The slabs of a file on their way to host memory: from when the first is asked for, layer after layer."""

    def __init__(self, saved: SavedFile, memory: HostMemory, layout_of: Mapping[int, Layout]) -> None:
        """`layout_of`: by layer, in the order in which they are needed."""
        self._saved, self._memory = saved, memory
        self._layout_of = layout_of
        self._missing: dict[tuple[int, int, int], tuple[int, int]] = {}
        """Layer, extent and slab of what was not handed over yet; capacity and used rows."""
        self._futures: dict[tuple[int, int, int], Future[Tensor]] = {}
        self._lock = threading.RLock()  # a slab may be given up while the same thread counts another

    def add(self, extent: int, slab_number: int, slab: Slab) -> None:
        """Have a slab loaded when it is needed, while anybody holds it."""
        for layer in self._layout_of:
            self._missing[layer, extent, slab_number] = (slab.capacity_tokens, slab.used_tokens)
        weakref.finalize(slab, self._forget, extent, slab_number)

    def _forget(self, extent: int, slab: int) -> None:
        with self._lock:
            for layer in self._layout_of:
                self._hand_over((layer, extent, slab))

    def _hand_over(self, key: tuple[int, int, int]) -> None:
        self._missing.pop(key, None)
        future = self._futures.pop(key, None)
        if future is not None:
            future.cancel()
        if not self._missing:
            self._saved.close()

    def rows(self, extent: int, slab: int, layer: int) -> Tensor:
        """Rows of one slab and layer, in host memory; waits until they are there. What was given once is not again."""
        key = (layer, extent, slab)
        with self._lock:
            if key not in self._futures:
                self._start()
            future = self._futures[key]
        try:
            rows = future.result()
        except BaseException:
            with self._lock:
                self._stop()
                self._futures = {}  # whoever asks next tries anew: memory may have become free
            raise
        with self._lock:
            self._hand_over(key)
        return rows

    def _start(self) -> None:
        wanted = sorted(self._missing)
        sizes = (self._layout_of[key[0]].num_bytes(self._missing[key][0]) for key in wanted)
        self._memory.check(sum(map(self._memory.taken_bytes, sizes)))
        executor = ThreadPoolExecutor(_READERS, thread_name_prefix="sentencekv-read")
        self._stop = weakref.finalize(self, executor.shutdown, wait=False, cancel_futures=True)
        for layer, extent, slab in wanted:
            key, name = (layer, extent, slab), _slab_name(extent, slab, layer)
            what = (self._layout_of[layer], *self._missing[key])
            self._futures[key] = executor.submit(_load, self._saved, self._memory, name, *what)
        executor.shutdown(wait=False)  # the threads end when all is read


def _load(saved: SavedFile, memory: HostMemory, name: str, layout: Layout, capacity: int, used: int) -> Tensor:
    rows = memory.allocate_checked(*layout.slab_shape(capacity))
    for suffix, part in zip(_SUFFIXES, layout.parts(rows, capacity), strict=False):
        saved.read_into(name + suffix, [head[:used] for head in part])
    return rows
