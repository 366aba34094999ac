"""A long run in short: many tasks and epochs on two workers with a memory in the background, and nothing piles up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.workers import assert_ended_well, run_workers

PROGRAM = """
import json, os, sys, time
import lightning.pytorch as pl, torch
from lightning.pytorch.callbacks import ModelCheckpoint
from pathlib import Path
from dcl_lightning import ContinualDataModule
from dcl_lightning.agents.short_names import nil_global
from dcl_lightning.backbones import MLP
from dcl_lightning.memory.config import RehearsalConfig

torch.set_num_threads(1)
OUT, TASKS, EPOCHS = Path(FOLDER), 20, 10

class Watch(pl.Callback):
    def __init__(self):
        self.tasks, self.times, self.mark = [], [], None

    def on_train_batch_start(self, *args):
        self.mark = time.perf_counter()

    def on_train_batch_end(self, *args):
        self.times.append(time.perf_counter() - self.mark)

    def on_task_evaluated(self, trainer, agent, task):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.tasks.append({"task": task.index, "rss": pages * os.sysconf("SC_PAGE_SIZE"),
                           "threads": len(os.listdir("/proc/self/task")), "files": len(os.listdir("/proc/self/fd")),
                           "step_ms": 1e3 * sorted(self.times)[len(self.times) // 10]})
        self.times = []

g = torch.Generator().manual_seed(0)
y = torch.arange(TASKS).repeat(512)
x = torch.randn(TASKS, 1, 8, 8, generator=g)[y] + torch.randn(len(y), 1, 8, 8, generator=g)
data = ContinualDataModule((x, y, x[:200], y[:200]), increment=1, batch_size=8, seed=0)
pl.seed_everything(0)
agent = nil_global(MLP([32]), TASKS, epochs_per_task=EPOCHS, lr=0.01, input_spec=data.input_spec,
                   rehearsal=RehearsalConfig(buffer_size=400, num_samples=8, scope="global", execution="blocking"))
watch = Watch()
saver = ModelCheckpoint(OUT / "c", every_n_train_steps=50, save_last=True)
trainer = pl.Trainer(strategy="horovod", accelerator="cpu", logger=False, default_root_dir=OUT,
                     callbacks=[watch, saver],
                     enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0)
shared = sorted(os.listdir("/dev/shm"))
trainer.fit(agent, datamodule=data)
left = sorted(set(os.listdir("/dev/shm")) - set(shared))
(OUT / f"{trainer.global_rank}.json").write_text(json.dumps({"tasks": watch.tasks, "shm": left}))
"""


@pytest.mark.exhaustive
@pytest.mark.timeout(1500)
def test_nothing_piles_up_over_twenty_tasks(tmp_path: Path) -> None:
    assert_ended_well(run_workers(f"FOLDER = {str(tmp_path)!r}\n{PROGRAM}", 2, deadline=1400))
    for rank in range(2):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        second, last = told["tasks"][1], told["tasks"][-1]
        # Times are printed, not tested: the tenth percentile of a task's steps, which other work delays the least.
        early, late = (sum(task["step_ms"] for task in tasks) / 5 for tasks in (told["tasks"][1:6], told["tasks"][-5:]))
        print(f"worker {rank}, task 1: {second}\nworker {rank}, task 19: {last}")
        print(f"worker {rank}: a step {early:.2f} ms in tasks 1 to 5, {late:.2f} ms in tasks 15 to 19")
        assert last["task"] == 19
        assert last["rss"] <= 1.05 * second["rss"]
        assert last["threads"] <= second["threads"]
        assert last["files"] <= second["files"]
        assert not told["shm"]
    # Two checkpoints with a file of each worker, and nothing half.
    assert len(list((tmp_path / "c").rglob("rank_*"))) == 4
    assert not (tmp_path / "c" / ".staging").exists()
