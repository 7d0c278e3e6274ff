"""Where time goes on the device: kernels by name, and whether host and device wait for each other on the way."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import report

_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""Runtime calls in which the host waits, by their whole names: `cudaMemcpyAsync` is none."""

_GAPS_SHOWN = 8


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
    first_at = min((e.time_range.start for e in kernels), default=0.0)
    return {
        "host_waits": waits,
        "graph_launches": sum(e.name == "cudaGraphLaunch" for e in calls),
        "device_span_us": ended_at - first_at if kernels else None,
        **_by_name([(e.name, e.time_range.elapsed_us()) for e in kernels], num_layers),
    }


def profile_reading(read: Callable[[], object], device: torch.device, num_layers: int) -> dict[str, Any]:
    """Kernels of a reading, grouped by name, and the share of the time between its first and its last kernel in which
    none runs. Copies are no kernels: while only they run, the device is idle."""
    report.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        read()
        report.synchronize(device)
    events = [e for e in recorded.events() or [] if e.device_type == DeviceType.CUDA]
    kernels = [e for e in events if not e.name.startswith(("Memcpy", "Memset"))]
    spans = [(e.time_range.start, e.time_range.end) for e in kernels]
    start, end = min(first for first, _ in spans), max(last for _, last in spans)
    return {
        "device_span_us": end - start,
        "idle_share": 1 - covered(spans) / (end - start),
        "gaps": gaps([(e.name, *span) for e, span in zip(kernels, spans, strict=True)]),
        "copying_us": covered([(e.time_range.start, e.time_range.end) for e in events if e.name.startswith("Memcpy")]),
        **_by_name([(e.name, e.time_range.elapsed_us()) for e in kernels], num_layers),
    }


def gaps(kernels: Sequence[tuple[str, float, float]]) -> list[dict[str, Any]]:
    """Times in which no kernel runs, by the kernels before and after, longest in sum first.

    `kernels`: name, start and end in microseconds.
    """
    found: dict[tuple[str, str], list[float]] = {}
    last, reached = "", float("inf")
    for name, start, end in sorted(kernels, key=lambda kernel: kernel[1]):
        if start > reached:
            found.setdefault((_short(last), _short(name)), []).append(start - reached)
        if last == "" or end > reached:
            last, reached = name, end
    ordered = sorted(found.items(), key=lambda item: -sum(item[1]))
    return [
        {"after": after, "before": before, "count": len(us), "us_each": sum(us) / len(us), "us_longest": max(us)}
        for (after, before), us in ordered
    ]


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of spans `(start, end)`."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def _by_name(kernels: Sequence[tuple[str, float]], num_layers: int) -> dict[str, Any]:
    """`kernels`: names and microseconds."""
    grouped: dict[str, list[float]] = {}
    for name, us in kernels:
        grouped.setdefault(_short(name), []).append(us)
    total_us = sum(map(sum, grouped.values()))
    return {
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


def kernel_table(profiled: dict[str, Any]) -> str:
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
    return report.markdown_table(["kernel", "count", "per layer", "us each", "share"], cells)


def text_of_step(profiled: dict[str, Any]) -> str:
    """What `profile_step` found, for people."""
    waits = ", ".join(f"{count} {when}" for when, count in profiled["host_waits"].items())
    span = report.number_text(profiled["device_span_us"], 0)
    return f"host synchronisations around the replay: {waits}; kernels span {span} us\n\n{kernel_table(profiled)}"


def text_of_reading(profiled: dict[str, Any]) -> str:
    """What `profile_reading` found, for people."""
    span, copying = (profiled[key] / 1e6 for key in ("device_span_us", "copying_us"))
    return (
        f"no kernel runs in {report.share_text(profiled['idle_share'])} of {span:.2f} s; copies take {copying:.2f} s "
        f"beside them\n\n{kernel_table(profiled)}\n\n{gap_table(profiled)}"
    )


def gap_table(profiled: dict[str, Any]) -> str:
    """The largest times in which no kernel runs, for people."""
    cells = [
        [
            gap["after"],
            gap["before"],
            str(gap["count"]),
            f"{gap['us_each']:.1f}",
            f"{gap['us_longest']:.1f}",
            report.share_text(gap["count"] * gap["us_each"] / profiled["device_span_us"]),
        ]
        for gap in profiled["gaps"][:_GAPS_SHOWN]
    ]
    return report.markdown_table(["none runs after", "and before", "count", "us each", "us longest", "share"], cells)
