"""Minutes with a GPU: everything that only a GPU can show, the most important first.

Each part is a command of its own with a limit of time; what it prints and measures is in the folder as it goes, so that
a call that is ended early leaves what it has found. ``--only`` repeats parts. Parts that end before their limit leave
their time to the later ones. ``--small`` runs the same commands in small, on a CPU as well, to see that they run.

- step: a ResNet-18 in bfloat16, 64 new and 64 rehearsed images of 32 pixels, eager and compiled, and plain training;
- icarl: ``configs/icarl_cifar100.yaml`` to its end, compiled, in bfloat16; a run that was cut off goes on;
- waits: whether the host waits for the GPU within a step, from a profile;
- tests: the tests that need a GPU;
- convnet: whole fits and steps beside Avalanche and a loop by hand;
- online: the published numbers of online learning (``reproduce.py``), several runs at once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
# Rows of configs/reproduce that take about a minute each.
ONLINE = ("aml_joint_cifar10", "aml_er_cifar10_m100", "aml_er_ace_cifar10_m100", "aml_agem_cifar10_m100",
          "aml_derpp_cifar10_m100", "mammoth_er_ace_cifar10", "avalanche_online_replay_cifar10")  # fmt: skip


class Part(NamedTuple):
    """One thing to show.

    Args:
        name: for ``--only``.
        seconds: that it may take.
        commands: arguments of Python, run side by side.
        small: the same in small.
    """

    name: str
    seconds: float
    commands: list[list[str]]
    small: list[list[str]]


def parts(folder: Path) -> list[Part]:
    """Return what is to be shown, the most important first; results go to a folder."""
    icarl = ["cli.py", "fit", "--config", "configs/icarl_cifar100.yaml", "--config", "configs/gpu.yaml"]
    icarl += ["--trainer.logger.save_dir", str(folder), "--trainer.enable_progress_bar", "false"]
    if any(folder.glob("icarl_cifar100/*/checkpoints/*.ckpt")):
        icarl += ["--ckpt_path", "last"]
    tiny = ["--data.dataset", "synthetic", "--data.source_options", "{num_classes: 100, size: 32, per_class: 4}"]
    tiny += ["--data.class_order", "null", "--model.epochs_per_task", "1", "--model.milestones", "[]"]
    tiny += ["--model.backbone.depth", "20", "--trainer.accelerator", "auto", "--model.compile", "{backend: aot_eager}"]
    tiny += ["--model.lr", "0.1", "--trainer.max_steps", "4"]

    def benchmark(name: str, *options: str) -> list[str]:
        return [f"benchmarks/{name}.py", "--gpu", *options, "--json", str(folder / f"{name}.json")]

    overlap = ["benchmarks/overlap.py", "--json", str(folder / "overlap.json")]
    tests = ["-m", "pytest", "-q", "-m", "exhaustive", "tests/conformance/test_on_gpu.py"]
    step, reproduce = ("--only", "a"), ["benchmarks/reproduce.py", "--list"]
    return [
        Part("step", 120, [benchmark("rehearsal", *step, "--rounds", "5")], [benchmark("rehearsal", *step, "--quick")]),
        Part("icarl", 400, [icarl], [[*icarl, *tiny]]),
        Part("waits", 60, [overlap], []),
        Part("tests", 90, [tests], [[*tests, "--collect-only"]]),
        Part("convnet", 200, [benchmark("convnet", "--only", "s")], []),
        Part("online", 400, [["benchmarks/reproduce.py", "--only", name] for name in ONLINE], [reproduce]),
    ]


def show(part: Part, folder: Path, seconds: float, small: bool) -> dict[str, object]:
    """Run a part's commands for at most so many seconds; return how they ended."""
    started, commands = time.monotonic(), part.small if small else part.commands
    logs = [folder / f"{part.name}{f'-{k}' * (len(commands) > 1)}.log" for k in range(len(commands))]
    running = []
    for command, log in zip(commands, logs, strict=True):
        with log.open("a") as out:
            running.append(subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=out, stderr=out))
    for process in running:
        try:
            process.wait(max(0.0, started + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()  # checkpoints are written then
    for process in running:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
    return {
        "part": part.name,
        "seconds": round(time.monotonic() - started, 1),
        "codes": [process.wait() for process in running],
        "logs": [log.name for log in logs],
    }


def main(args: Sequence[str] | None = None) -> int:
    """Show everything that the time allows; return whether a part has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="for all parts (default: 9)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="in place of all")
    parser.add_argument("--small", action="store_true", help="whether everything runs; no figures")
    parser.add_argument("--folder", type=Path, default=Path(os.environ.get("OUT", "runs")) / "gpu_day")
    options = parser.parse_args(args)
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    known = parts(folder)
    if unknown := set(options.only or ()) - {part.name for part in known}:
        parser.error(f"--only {' '.join(sorted(unknown))}: give {', '.join(part.name for part in known)}")
    end, shown = time.monotonic() + 60 * options.minutes, []
    for part in known:
        left = end - time.monotonic()
        if (options.only and part.name not in options.only) or left < 10:
            continue
        shown.append(show(part, folder, min(part.seconds * (5 if options.small else 1), left), options.small))
        print(json.dumps(shown[-1]), flush=True)
        (folder / "parts.json").write_text(json.dumps(shown, indent=1) + "\n")
        if part.name == "online":
            shutil.copytree(ROOT / "benchmarks" / "reproduced", folder / "reproduced", dirs_exist_ok=True)
    return int(any(any(codes) for codes in (part["codes"] for part in shown)))


if __name__ == "__main__":
    raise SystemExit(main())
