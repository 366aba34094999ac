"""What the loss of a worker costs: the same job supervised, once left alone and once with worker 1 killed.

``dcl-lightning run -- fit ...`` on two Horovod workers, NIL with a small network on digits, saving every 50 steps. In
the second job worker 1 kills itself after step 125. A pair is the whole second job over the whole first; below stand
the seconds from the kill to the first new step (both workers end, the supervisor looks for the checkpoint, two
processes import everything, the memories are read) and the steps that are done twice.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import HEADER, report

EVERY, KILLED = 50, 125
_CALLBACK = """
import os, signal, time
from pathlib import Path
import lightning.pytorch as pl

class Watched(pl.Callback):
    def __init__(self, killed: int) -> None:
        self.killed = killed

    def on_train_batch_end(self, trainer, *args) -> None:
        step = trainer.global_step
        if trainer.global_rank == 0:
            with open("steps.txt", "a") as file:
                file.write(f"{step} {time.time()}\\n")
        elif step == self.killed and not Path("killed.txt").exists():
            Path("killed.txt").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
"""
_JOB = [
    *("fit", "--model", "nil", "--data.dataset", "digits", "--data.increment", "5", "--data.batch_size", "8"),
    *("--model.epochs_per_task", "3", "--trainer.limit_train_batches", "40", "--trainer.accelerator", "cpu"),
    *("--trainer.strategy", "horovod", "--trainer.devices", "2"),
    *("--trainer.callbacks", "ModelCheckpoint", "--trainer.callbacks.every_n_train_steps", str(EVERY)),
    *("--trainer.callbacks+=watched.Watched", "--trainer.callbacks.killed"),
]


def job(killed: int) -> tuple[float, float, int]:
    """Return the seconds of a job, those from the kill to the first step after it, and the steps done twice.

    Args:
        killed: step after which worker 1 kills itself; 0 for none.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "watched.py").write_text(_CALLBACK)
        command = [sys.executable, "-m", "dcl_lightning", "run", "--", *_JOB, str(killed)]
        env = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        began = time.perf_counter()
        subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True)
        seconds = time.perf_counter() - began
        if not killed:
            return seconds, 0.0, 0
        at = float(Path(folder, "killed.txt").read_text())
        lines = [line.split() for line in Path(folder, "steps.txt").read_text().splitlines()]
        steps = [(int(step), float(when)) for step, when in lines]
    again = next(when for (before, _), (step, when) in itertools.pairwise(steps) if step <= before)
    return seconds, again - at, len(steps) - len({step for step, _ in steps})


def main() -> None:
    """Run the pairs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print(HEADER)
    whole, lost, waits, twice = [], [], [], []
    for _ in range(rounds):
        whole.append(job(0)[0])
        seconds, wait, steps = job(KILLED)
        lost.append(seconds)
        waits.append(wait)
        twice.append(steps)
    report("a worker lost, whole job", "s", lost, whole, "")
    print(f"from the kill to the next step: {statistics.median(waits):.1f} s ({min(waits):.1f} to {max(waits):.1f})")
    print(f"steps done twice: {statistics.median(twice):.0f}, a checkpoint every {EVERY}")


if __name__ == "__main__":
    main()
