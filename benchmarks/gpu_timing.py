"""Times work on a GPU: of the device without the host, and of the host without the device."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", torch.cuda.current_device()) if GPU else torch.device("cpu")


def synchronize() -> None:
    """Waits until the GPU has finished its work; does nothing without one."""
    if GPU:
        torch.cuda.synchronize()


def device_seconds(step: Callable[[Any], Any], inputs: Sequence, repeats: int = 20) -> float:
    """Returns the median seconds of ``step`` on the device, by replays of a CUDA graph.

    A graph has one call per input, so no time goes to launches. Several inputs keep a GPU from
    finding them in its cache. Without a GPU it returns the seconds of one call.
    """
    if not GPU:
        start = time.perf_counter()
        for one in inputs:
            step(one)
        return (time.perf_counter() - start) / len(inputs)
    for one in inputs[:2]:
        step(one)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Kept, so that no two calls write to the same memory, which the cache would hold.
        results = [step(one) for one in inputs]
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e-3 * begin.elapsed_time(end) / len(inputs))
    del results
    return statistics.median(times)


def host_seconds(step: Callable[[], Any], calls: int = 10, repeats: int = 10) -> float:
    """Returns the least seconds that the host takes for ``step``, without waiting for the device.

    Args:
        calls: calls between two waits. Their launches must fit into the device's queue (1,024),
            or the host waits for the device.
    """
    best = float("inf")
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            step()
        best = min(best, (time.perf_counter() - start) / calls)
    synchronize()
    return best


def device_events(step: Callable[[], Any]) -> list[tuple[str, float]]:
    """Returns name and seconds of what ``step`` runs on the GPU, by torch's profiler."""
    if not GPU:
        step()
        return []
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA
    return [
        (event.name, 1e-6 * event.time_range.elapsed_us())
        for event in profile.events()
        if event.device_type == kind
    ]


class Record:
    """A JSON file of results, written again with every row, so that a stop loses none.

    Args:
        path: the file.
        about: what holds for all rows.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {**about, "rows": []}

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row and writes the file."""
        self.content["rows"].append(row)
        self.path.write_text(json.dumps(self.content, indent=1, ensure_ascii=False) + "\n")
