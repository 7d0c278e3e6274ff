"""Where the time of one step goes: kernels by name, and whether the host waits for the device on the way."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import report

_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""Runtime calls in which the host waits, by their whole names: `cudaMemcpyAsync` is none."""


def profile_step(step: Callable[[], object], device: torch.device, num_layers: int) -> dict[str, Any]:
    """Kernels of one replayed graph, grouped by name, and host synchronisations before, while and after it runs.

    `while` is between the call that launches the graph and the end of its last kernel on the device; the profiler's own
    wait for the step's end is not counted. Of a step without a graph, all kernels are grouped and all waits are
    `before`. Times of kernels that start before the one in front ends include their waiting, so that shares are of
    their sum and not of the step.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    report.synchronize(device)
    with profile(activities=activities) as recorded:
        with record_function("benchmark_step"):
            step()
        report.synchronize(device)
    events = recorded.events()
    assert events is not None
    whole = next(e for e in events if e.name == "benchmark_step" and e.device_type == DeviceType.CPU)
    calls = [e for e in events if e.device_type == DeviceType.CPU and whole.time_range.start <= e.time_range.start]
    calls = [e for e in calls if e.time_range.end <= whole.time_range.end]
    launched_at = max((e.time_range.start for e in calls if e.name == "cudaGraphLaunch"), default=float("inf"))
    kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.name.startswith("benchmark_step")]
    if launched_at < float("inf"):
        kernels = [e for e in kernels if e.time_range.start >= launched_at]
    ended_at = max((e.time_range.end for e in kernels), default=float("inf"))
    waits = {"before": 0, "while": 0, "after": 0}
    for event in calls:
        if event.name in _WAITS:
            at = event.time_range.start
            waits["before" if at < launched_at else "while" if at < ended_at else "after"] += 1
    grouped: dict[str, list[float]] = {}
    for event in kernels:
        grouped.setdefault(_short(event.name), []).append(event.time_range.elapsed_us())
    total_us = sum(map(sum, grouped.values()))
    first_at = min((e.time_range.start for e in kernels), default=0.0)
    return {
        "host_waits": waits,
        "graph_launches": sum(e.name == "cudaGraphLaunch" for e in calls),
        "device_span_us": ended_at - first_at if kernels else None,
        "device_sum_us": total_us,
        "kernels": [
            {
                "name": name,
                "count": len(us),
                "count_per_layer": len(us) / num_layers,
                "us_each": sum(us) / len(us),
                "share": sum(us) / total_us,
            }
            for name, us in sorted(grouped.items(), key=lambda item: -sum(item[1]))
        ],
    }


def _short(name: str) -> str:
    """A kernel's name without its arguments and template parameters."""
    name = re.sub(r"^void ", "", name)
    return re.split(r"[<(]", name, maxsplit=1)[0][:60] or name[:60]


def table(profiled: dict[str, Any]) -> str:
    """The kernels for people."""
    cells = [
        [
            kernel["name"],
            str(kernel["count"]),
            f"{kernel['count_per_layer']:.2f}",
            f"{kernel['us_each']:.2f}",
            report.share_text(kernel["share"]),
        ]
        for kernel in profiled["kernels"]
    ]
    waits = ", ".join(f"{count} {when}" for when, count in profiled["host_waits"].items())
    span = profiled["device_span_us"]
    return "\n".join(
        [
            f"host synchronisations around the replay: {waits}; kernels span {report.number_text(span, 0)} us",
            "",
            report.markdown_table(["kernel", "count", "per layer", "us each", "share"], cells),
        ]
    )
