"""A run that goes on with another number of workers, or under another strategy."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dcl_lightning.checkpoint.buffer_files import RowsFile
from tests.distributed.workers import environment, free_port

PROGRAM = """
import json, os, sys
from pathlib import Path
import lightning.pytorch as pl, torch
from lightning.pytorch.callbacks import ModelCheckpoint
from dcl_lightning import ContinualDataModule
from dcl_lightning.agents.short_names import nil
from dcl_lightning.backbones import MLP
from dcl_lightning.memory.config import RehearsalConfig

torch.set_num_threads(1)

class Watch(pl.Callback):
    def __init__(self):
        self.steps, self.ids = [], []

    def on_train_batch_start(self, trainer, agent, batch, index):
        buffer = agent.rehearsal.manager.buffer
        if not self.steps:
            rows = buffer.store.gather(buffer.slots_at(torch.arange(len(buffer))))
            self.ids = rows["sample_ids"].tolist()
        task = agent.clock.task_at(trainer.current_epoch)
        self.steps.append([task, trainer.current_epoch, index, len(batch.targets) - batch.num_new,
                           trainer.optimizers[0].param_groups[0]["lr"]])

def main(out, workers, strategy, stop, ckpt, scope):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(6).repeat(20)
    x = torch.randn(6, 1, 4, 4, generator=g)[y] * 2 + torch.randn(len(y), 1, 4, 4, generator=g)
    data = ContinualDataModule((x, y, x.clone(), y.clone()), increment=2, batch_size=2, seed=0)
    pl.seed_everything(0)
    agent = nil(MLP([8]), 6, epochs_per_task=2, lr=0.05, milestones=[1], input_spec=data.input_spec,
                rehearsal=RehearsalConfig(num_representatives=3, num_candidates=2, num_samples=4, scope=scope))
    watch = Watch()
    saver = ModelCheckpoint(out, every_n_train_steps=stop or 1000, save_top_k=-1, filename="{step}")
    trainer = pl.Trainer(strategy=strategy, devices=workers, accelerator="cpu", logger=False, default_root_dir=out,
                         callbacks=[watch, saver], enable_progress_bar=False, enable_model_summary=False,
                         num_sanity_val_steps=0, limit_val_batches=0, max_steps=stop or -1)
    trainer.fit(agent, datamodule=data, ckpt_path=ckpt or None)
    state = [trainer.global_rank, watch.ids, agent.rehearsal.manager.buffer.store.capacity, watch.steps,
             agent.clock.matrix.compute().nan_to_num(-1).tolist(),
             torch.nn.utils.parameters_to_vector(agent.parameters()).sum().item()]
    (Path(out) / f"{trainer.global_rank}.json").write_text(json.dumps(state))

if __name__ == "__main__":
    out, workers, strategy, stop, ckpt, scope = sys.argv[1:]
    main(out, int(workers), strategy, int(stop), ckpt, scope)
"""


def run(folder: Path, name: str, workers: int, strategy: str, stop: int, ckpt: str, scope: str) -> list[Any]:
    script, out = folder / "run.py", folder / name
    script.write_text(PROGRAM)
    out.mkdir()
    args = [str(out), str(workers), strategy, str(stop), ckpt, scope]
    variables = environment() | {"MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, str(script), *args], env=variables, cwd=folder, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(workers)]


def stored(checkpoint: Path) -> Counter[int]:
    """Sample ids in the memories of a checkpoint, with how often each is stored."""
    counts: Counter[int] = Counter()
    for path in Path(f"{checkpoint}.memory").glob("*/rank_*"):
        file = RowsFile(path)
        names = [name for name, _, _ in file.header["columns"]]
        counts.update(list(file._columns())[names.index("sample_ids")].tolist())
    return counts


@pytest.mark.parametrize(
    ("scope", "jobs"),
    [
        ("local", [(2, "horovod", 13), (3, "ddp", 20), (1, "auto", 0)]),
        pytest.param("global", [(2, "horovod", 20), (2, "ddp", 33), (1, "auto", 0)], marks=pytest.mark.exhaustive),
    ],
)
def test_a_job_goes_on_with_other_workers(tmp_path: Path, scope: str, jobs: list[tuple[int, str, int]]) -> None:
    check_jobs(tmp_path, scope, jobs)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(20))
def test_from_two_to_three_workers_to_one(tmp_path: Path, seed: int) -> None:
    """At any step."""
    draw = random.Random(seed)
    first = draw.randint(12, 34)
    second = first + draw.randint(1, 12)
    scope, strategy = draw.choice(["local", "global"]), draw.choice(["horovod", "ddp"])
    print(f"seed {seed}: {scope}, two workers to step {first}, three ({strategy}) to step {second}, then one")
    check_jobs(tmp_path, scope, [(2, "horovod", first), (3, strategy, second), (1, "auto", 0)])


def check_jobs(tmp_path: Path, scope: str, jobs: list[tuple[int, str, int]]) -> None:
    """Run jobs of so many workers, each up to a step, one after another: each goes on where the last one stopped.

    Tasks of 40 samples, two a step and worker: 10 steps an epoch of two workers, 7 of three, 20 of one.
    """
    ckpt, before, capacity, size, done = "", Counter(), None, None, 0
    for number, (workers, strategy, stop) in enumerate(jobs):
        ran = run(tmp_path, str(number), workers, strategy, stop, ckpt, scope)
        held = Counter(i for _, ids, *_ in ran for i in ids)
        assert held == before
        capacities = [c for _, _, c, *_ in ran]
        assert max(capacities) - min(capacities) <= 1
        capacity = capacity or sum(capacities)
        assert sum(capacities) == capacity == 3 * 6 * 2
        steps = ran[0][3]
        assert len({json.dumps(worker[4:]) for worker in ran}) == 1
        if ckpt:
            # Not a sample of the epoch is left out, and less than a step comes again.
            task, epoch, index, rehearsed, rate = steps[0]
            seen = done * size * 2
            assert epoch * 40 + index * workers * 2 <= seen < epoch * 40 + (index + 1) * workers * 2
            assert task == epoch // 2
            assert rehearsed == 4
        per_epoch = -(-40 // (2 * workers))
        for _, epoch, index, _, rate in steps:
            assert index < per_epoch
            # The rate falls after the first epoch of each task, whoever computes it.
            assert rate == pytest.approx(0.05 if epoch % 2 == 0 else 0.005), steps
        if stop:
            ckpt = str(tmp_path / str(number) / f"step={stop}.ckpt")
            before = stored(Path(ckpt))
            assert sum(before.values()) > 6
            last = steps[-1]
            # Steps of the stream as this job counts them, for the samples that were trained on.
            done, size = last[1] * (40 // (2 * workers)) + last[2] + 1, workers
            if workers == 3:
                done, size = (last[1] * 40 + min((last[2] + 1) * 6, 40)) / 2, 1
        else:
            assert [s[1:3] for s in steps][-1] == [5, per_epoch - 1]
            assert all(min(row[: i + 1]) >= 0 for i, row in enumerate(ran[0][4]))
    shutil.rmtree(tmp_path / "0")


def test_what_one_worker_cannot_write_no_worker_saves(tmp_path: Path) -> None:
    """All workers raise the same error, and nothing half is left."""
    from tests.distributed.workers import assert_ended_well, run_workers

    source = f"""
import os, resource
from pathlib import Path
import horovod.torch as hvd
hvd.init()
from dcl_lightning.distributed.horovod.comm import HorovodComm
from dcl_lightning.checkpoint.io import check_files, stage_files
from dcl_lightning.errors import CheckpointError
comm, root = HorovodComm(), Path({str(tmp_path)!r})
told = stage_files(comm, root / "good", lambda file: file.write(bytes([comm.rank]) * (100 + comm.rank)))
assert [f["bytes"] for f in told["files"]] == [100, 101]
assert not check_files(Path(told["staged"]), told["files"], [0, 1])
import signal
if comm.rank == 1:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    stage_files(comm, root / "bad", lambda file: file.write(bytes(20_000)))
    raise SystemExit("saved")
except CheckpointError as error:
    assert "rank_1 cannot be written (File too large)" in str(error), error
assert not any((root / "bad").iterdir()) if comm.rank == 0 else True
"""
    assert_ended_well(run_workers(source, 2))
