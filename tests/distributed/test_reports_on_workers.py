"""The report of two Horovod workers with uneven test shards: of all samples and all memories, written by one."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from tests.distributed.workers import assert_ended_well, run_workers


def test_report_of_two_workers(tmp_path: Path) -> None:
    workers = run_workers(f"FOLDER = {str(tmp_path)!r}\n{SOURCE}", 2)
    assert_ended_well(workers)
    # Worker 0 trains once more alone.
    assert [w.output.count("Report: ") for w in workers] == [2, 0]
    assert [w.output.count("Accuracy in % after task") for w in workers] == [4, 0]
    both, alone = (json.loads((tmp_path / run / "report/accuracy_matrix.json").read_text()) for run in ("two", "one"))
    # The network that two workers trained, evaluated by one process, is as good as they say.
    assert both["matrix"][-1] == alone["matrix"][-1]
    assert both["matrix_task_aware"][-1] == alone["matrix_task_aware"][-1]
    assert both["top5"]["matrix"][-1] == alone["top5"]["matrix"][-1]
    assert both["task_test_samples"] == [7, 3]
    confusion = (tmp_path / "two/report/confusion_matrix.csv").read_text()
    assert confusion == (tmp_path / "one/report/confusion_matrix.csv").read_text()
    # 13 and 14 samples, twice: what pads the shard of worker 1 is none.
    assert both["samples_seen"]["new"] == 2 * (13 + 14)
    with (tmp_path / "two/report/buffer.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["task"] == "1"]
    held = {k: sum(int(line["rows"]) for line in lines if line["worker"] == k) for k in ("0", "1")}
    told = {k: int(w.output.split("HELD ")[1].split()[0]) for k, w in zip("01", workers, strict=True)}
    assert held == told
    assert both["buffer_rows"]["nominal"] == 12
    assert both["buffer_rows"]["stored"] == sum(held.values())
    distinct = {int(i) for w in workers for i in w.output.split("IDS ")[1].split("\n")[0].split()}
    assert both["buffer_rows"]["distinct"] == len(distinct)


SOURCE = """
import torch
from pathlib import Path
from tests.distributed.toy import trainer
from dcl_lightning import NIL, ContinualDataModule, RehearsalConfig, TaskReport
from dcl_lightning.backbones import MLP

train = torch.tensor([0] * 5 + [1] * 4 + [2] * 4 + [3] * 5 + [4] * 5 + [5] * 4)
test = torch.tensor([0, 1, 2, 2, 1, 0, 0, 3, 4, 5])
x = torch.randn(len(train) + len(test), 1, 2, 2, generator=torch.Generator().manual_seed(1))
x[:, 0, 0, 0] += 3 * torch.cat([train, test])


def fit(strategy, folder, weights=None):
    n = len(train)
    data = ContinualDataModule((x[:n], train, x[n:], test), increment=3, batch_size=3, seed=0)
    memory = RehearsalConfig(buffer_size=12, num_candidates=3, num_samples=2)
    torch.manual_seed(0)
    agent = NIL(MLP([8]), 6, memory, input_spec=data.input_spec, epochs_per_task=2, task_aware=True)
    if weights is not None:  # evaluate these after each task, whatever is trained
        agent.evaluate = lambda batch: weights.evaluate(batch)
    options = {"limit_val_batches": 0, "callbacks": [TaskReport(pictures=False)]}
    job = trainer(strategy, max_epochs=-1, default_root_dir=Path(FOLDER) / folder, **options)
    job.fit(agent, datamodule=data)
    return agent, job


agent, job = fit("horovod", "two")
rows = agent.rehearsal.manager.memory_rows()
print("HELD", len(rows.sample_ids))
print("IDS", *rows.sample_ids.tolist())
if job.global_rank == 0:
    fit("auto", "one", agent)
"""


def test_exemplars_that_all_workers_share_are_counted_once(tmp_path: Path) -> None:
    assert_ended_well(run_workers(f"FOLDER = {str(tmp_path)!r}\n{SHARED}", 2))
    report = json.loads((tmp_path / "report/accuracy_matrix.json").read_text())
    assert report["buffer_rows"] == {"nominal": 12, "stored": 12, "distinct": 12}
    assert report["buffer_bytes"] == 12 * 8 + 6 * 8 * 4  # ids, and the means of six classes' features
    with (tmp_path / "report/buffer.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["task"] == "1"]
    assert [(line["worker"], line["rows"]) for line in lines] == [("all", "2")] * 6


SHARED = """
import torch
from tests.distributed.toy import trainer
from dcl_lightning import ContinualDataModule, ICaRL, TaskReport
from dcl_lightning.backbones import MLP

y = torch.arange(6).repeat(4)
x = torch.randn(24, 1, 2, 2, generator=torch.Generator().manual_seed(1))
data = ContinualDataModule((x, y, x, y), increment=3, batch_size=3)
agent = ICaRL(MLP([8]), 6, {"buffer_size": 12}, input_spec=data.input_spec)
options = {"limit_val_batches": 0, "callbacks": [TaskReport(pictures=False)], "default_root_dir": FOLDER}
trainer("horovod", max_epochs=-1, **options).fit(agent, datamodule=data)
"""
