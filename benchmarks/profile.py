"""Where the time of one step goes: kernels, copies and synchronisations, counted."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.report import synchronize
from sentencekv import policies, session, store

_SYNCHRONIZING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")

_STAGES: dict[str, object] = {
    "select": policies.Policy,
    "resolve_hot_set": store,
    "gather_kv": store,
    "sparse_decode": session,
}
"""The stages of one layer's sparse step, and where each is looked up; `select` is scoring and choosing."""


def _named(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(op)
    def run(*arguments: Any, **options: Any) -> Any:
        with record_function(name):
            return op(*arguments, **options)

    return run


def profile_step(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Counts and times of one step.

    `device_ms` is the time that kernels and copies took on the GPU, one after another; a GPU that had nothing to wait
    for would need only that. The profiler slows the host down, so compare `device_ms` with the unprofiled time.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    synchronize(device)
    with contextlib.ExitStack() as stack:
        for name, place in _STAGES.items():
            stack.enter_context(mock.patch.object(place, name, _named(name, getattr(place, name))))
        recorded = stack.enter_context(profile(activities=activities))
        started_at = time.perf_counter()
        step()
        synchronize(device)
        wall_ms = (time.perf_counter() - started_at) * 1e3
    runtime_calls: Counter[str] = Counter()
    kernel_us: Counter[str] = Counter()
    kernel_count: Counter[str] = Counter()
    operator_us: Counter[str] = Counter()
    stages: dict[str, dict[str, float]] = {}
    for event in recorded.key_averages():
        if event.key in _STAGES:
            if event.device_type == DeviceType.CPU:
                host_ms, device_ms = event.cpu_time_total / 1e3, event.device_time_total / 1e3
                stages[event.key] = {"calls": event.count, "host_ms": host_ms, "device_ms": device_ms}
        elif event.device_type == DeviceType.CPU:
            if event.key.startswith(("cuda", "cu")):
                runtime_calls[event.key] += event.count
            operator_us[event.key] += int(event.self_cpu_time_total)
        else:
            kernel_us[event.key] += int(event.self_device_time_total)
            kernel_count[event.key] += event.count
    return {
        "profiled_wall_ms": wall_ms,
        "device_ms": sum(kernel_us.values()) / 1e3,
        "device_operations": sum(kernel_count.values()),
        "launches": sum(n for name, n in runtime_calls.items() if "Launch" in name),
        "copies": sum(n for name, n in runtime_calls.items() if "Memcpy" in name),
        # One is the profiler's own wait for the end of the step.
        "synchronizations": sum(runtime_calls[name] for name in _SYNCHRONIZING),
        "stages": stages,
        "top_device_us": dict(kernel_us.most_common(12)),
        "top_host_us": dict(operator_us.most_common(12)),
    }
