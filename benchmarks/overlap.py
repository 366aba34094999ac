"""Where the memory's work lies on a GPU: on its own stream, under the backward pass, and nobody waits.

A fit of a ResNet-18 in bfloat16 with rehearsal (blocking, assembled on the device) is profiled over some steps after
a warm-up. From the trace: how often the host waited for the GPU within a step, what ran on another stream than the
network's, how much of that while the network's kernels ran, and how much between the first and the last kernel of a
backward pass. Without a GPU there is nothing to see.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from common import CLASSES, quiet_trainer, stream

from dcl_lightning import NIL
from dcl_lightning.backbones import ResNet
from dcl_lightning.memory.config import RehearsalConfig
from dcl_lightning.types import InputSpec

NEW, DRAWN, WARM_UP, STEPS = 64, 64, 20, 20
_WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_STEP, _BACKWARD = "benchmark.step", "benchmark.backward"

Event = dict[str, Any]
Spans = list[tuple[float, float]]


class Profile(pl.Callback):
    """Profiles some steps, each from the start of its batch to that of the next, and writes their trace.

    It acts at no end of a batch: of a callback that does, agents suppose that it reads the step's values.

    Args:
        file: of the trace, in Chrome's format.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._profile: Any = None
        self._marks: list[Any] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Begin with the first step after the warm-up; write the trace after the last."""
        step = trainer.global_step - WARM_UP
        if step == 0:
            torch.cuda.synchronize()
            activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            self._profile = torch.profiler.profile(activities=activities)
            self._profile.__enter__()
        if 0 < step <= STEPS:
            self._unmark()
        if step == STEPS:
            torch.cuda.synchronize()
            self._profile.__exit__(None, None, None)
            self._profile.export_chrome_trace(str(self.file))
        if 0 <= step < STEPS:
            self._mark(_STEP)

    def on_before_backward(self, *args: Any) -> None:
        """Mark the backward pass on the host."""
        self._mark(_BACKWARD)

    def on_after_backward(self, *args: Any) -> None:
        """End the mark."""
        self._unmark()

    def _mark(self, name: str) -> None:
        self._marks.append(torch.profiler.record_function(name))
        self._marks[-1].__enter__()

    def _unmark(self) -> None:
        self._marks.pop().__exit__(None, None, None)


def trace_of(storage: str, pixels: int, file: Path) -> list[Event]:
    """Return the events of a profiled fit.

    Args:
        storage: where the memory lies, ``cpu`` or ``cuda``.
        pixels: side of an image.
        file: where the trace is kept.
    """
    config = RehearsalConfig(
        buffer_size=20 * CLASSES, num_samples=DRAWN, execution="blocking", prefetch="device", storage=storage
    )
    data = stream((WARM_UP + STEPS + 3) * NEW, pixels, NEW)
    agent = NIL(ResNet(18), CLASSES, config, input_spec=InputSpec(3, pixels, pixels))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        options: dict[str, Any] = {"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed"}
        quiet_trainer(folder, Profile(file), max_steps=WARM_UP + STEPS + 1, **options).fit(agent, datamodule=data)
    return json.loads(file.read_text())["traceEvents"]


def _spans(events: list[Event]) -> Spans:
    return sorted((e["ts"], e["ts"] + e["dur"]) for e in events)


def _common(some: Spans, others: Spans) -> float:
    """Return for how long one of ``some`` and one of ``others`` ran together; the spans of each are disjoint."""
    return sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in some for b in others)


def figures_of(events: list[Event]) -> dict[str, float]:
    """Return what a trace says; times in microseconds a step."""
    timed = [e for e in events if e.get("ph") == "X"]
    steps = _spans([e for e in timed if e["name"] == _STEP and e["cat"] == "user_annotation"])
    within = [e for e in timed if any(low <= e["ts"] < high for low, high in steps)]
    calls = {e["args"]["correlation"]: e for e in timed if e["cat"] in ("cuda_runtime", "cuda_driver")}
    device = [e for e in timed if e["cat"] in _DEVICE]
    kernels = [e for e in device if e["cat"] == "kernel"]
    streams = [e["args"]["stream"] for e in kernels]
    training = max(set(streams), key=streams.count)
    memory = [e for e in device if e["args"]["stream"] != training]
    network = [e for e in device if e["args"]["stream"] == training]
    main = next(e["tid"] for e in timed if e["name"] == _STEP)

    # The backward pass is launched by autograd's own thread.
    launched = [(calls.get(e["args"].get("correlation"), {}), e) for e in network]
    backward: Spans = []
    for low, high in _spans([e for e in timed if e["name"] == _BACKWARD and e["cat"] == "user_annotation"]):
        its = [e for call, e in launched if call and call["tid"] != main and low <= call["ts"] < high]
        if its:
            backward.append((min(e["ts"] for e in its), max(e["ts"] + e["dur"] for e in its)))
    busy = sum(e["dur"] for e in memory) or 1.0
    figures = {f"{name} calls": sum(e["name"] == name for e in within) / len(steps) for name in _WAITS}
    waits = [e for e in within if e["name"] in _WAITS and e["tid"] == main]
    return figures | {
        "waits of the training thread": len(waits) / len(steps),
        "memory's operations on its own stream": len(memory) / len(steps),
        "memory's time on the device, us": busy / len(steps),
        "of it beside the network's kernels, %": 100 * _common(_spans(memory), _spans(network)) / busy,
        "of it within a backward pass, %": 100 * _common(_spans(memory), backward) / busy,
    }


def main() -> None:
    """Print the table; with --json also write it, with --traces keep the traces."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--traces", type=Path, help="folder for the traces, for chrome://tracing")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if not torch.cuda.is_available():
        print("no GPU here: nothing to see")
        return
    rows = []
    print("| what, a step | memory | pixels | value |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        for storage in ("cpu", "cuda"):
            for pixels in (32, 224):
                file = (options.traces or Path(temporary)) / f"{storage}_{pixels}.json"
                for name, value in figures_of(trace_of(storage, pixels, file)).items():
                    print(f"| {name} | {storage} | {pixels} | {value:.2f} |", flush=True)
                    rows.append({"name": f"{name}, {storage}, {pixels} px", "value": value})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
