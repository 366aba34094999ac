"""Real kills: ``killed_fits.py FOLDER KILLS SEED AGENT ...`` fits each agent, kills it at random moments, and resumes.

Each fit is a process of its own, forked from one that has imported everything, and saves two checkpoints at every step,
so that most kills come during a save. After each kill all checkpoints must be whole, and the latest must resume; at the
end weights, matrix and memory must be those of a run without kills. Prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from dcl_lightning.checkpoint.directory import latest_checkpoint, problem_of
from tests.conformance.agents import STREAMS, make
from tests.conformance.rehearsal_runs import memory_state, same
from tests.conformance.small_stream import make_data, make_trainer, matrix, weights

PATIENCE_S = 120


class Began(pl.Callback):
    """Tells the process that kills when training begins."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        os.write(self.pipe, b"x")


def fit(name: str, folder: Path, pipe: int, ckpt: Path | None) -> None:
    """Fit an agent, saving at every step; leave what it ended with in ``end.pt``."""
    data = make_data(batch_size=7, **STREAMS.get(name, {}))
    agent = make(name, data)
    saver = ModelCheckpoint(
        folder / "checkpoints", every_n_train_steps=1, save_top_k=1, save_last=True, filename="{step}"
    )
    began = time.monotonic()
    trainer = make_trainer(folder, [Began(pipe), saver], limit_val_batches=0)
    trainer.fit(agent, datamodule=data, ckpt_path=ckpt)
    # None where there is no memory, or nothing was left to train.
    manager = getattr(getattr(agent, "rehearsal", None), "manager", None)
    memory = None if manager is None else memory_state(manager)
    end = {"weights": weights(agent), "matrix": matrix(agent).nan_to_num(-1), "memory": memory}
    torch.save({**end, "seconds": time.monotonic() - began}, folder / "end.pt")


def forked(name: str, folder: Path, ckpt: Path | None, kill_after: float | None) -> bool:
    """Fit in a process of its own; return whether it came to its end before it was killed."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            quiet = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            fit(name, folder, write, ckpt)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(write)
    os.read(read, 1)  # nothing if it ended before
    os.close(read)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    code = os.waitpid(pid, 0)[1]
    if code not in (0, signal.SIGKILL):
        raise SystemExit(f"{name}: ended with {code}\n{(folder / 'log').read_text()[-3000:]}")
    return code == 0


def main(root: Path, kills: int, seed: int, names: list[str]) -> dict[str, Any]:
    """Run it all; return the counts."""
    draw = random.Random(seed)
    counts: dict[str, Any] = {"kills": 0, "runs": 0, "resumed": 0, "later": 0}
    for name in names:
        folder = root / f"{name}_{seed}"
        (folder / "whole").mkdir(parents=True)
        forked(name, folder / "whole", None, None)
        whole = torch.load(folder / "whole" / "end.pt")
        left = kills // len(names)
        for number in range(10 * kills):  # a run can come to its end before it is killed
            if left <= 0:
                break
            run = folder / f"killed_{number}"
            run.mkdir()
            counts["runs"] += 1
            ended = False
            while not ended:
                path, problems = latest_checkpoint((run / "checkpoints").glob("*.ckpt"))
                # At every moment all that is there under its name is whole.
                assert not problems, problems
                if path is not None:
                    counts["resumed"] += 1
                    counts["later"] += int(torch.load(path)["global_step"] > 0)
                wait = draw.uniform(0, whole["seconds"]) if left > 0 else None
                ended = forked(name, run, path, wait)
                if not ended:
                    left -= 1
                    counts["kills"] += 1
                for file in (run / "checkpoints").glob("*.ckpt"):
                    assert not problem_of(file), problem_of(file)
            end = torch.load(run / "end.pt")
            assert torch.equal(end["weights"], whole["weights"]), f"{name}: other weights"
            assert torch.equal(end["matrix"], whole["matrix"]), f"{name}: another matrix"
            assert end["memory"] is None or same(end["memory"], whole["memory"]), f"{name}: another memory"
        shutil.rmtree(folder)
    return counts


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])))
