"""The report of two Horovod workers with uneven test shards: all samples, all memories, written once."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from tests.distributed.programs import reports
from tests.distributed.workers import assert_ended_well, run_workers


def test_report_of_two_workers(tmp_path: Path) -> None:
    workers = run_workers(reports.own_memories, 2, tmp_path)
    assert_ended_well(workers)
    # Worker 0 trains once more alone.
    assert [w.output.count("Report: ") for w in workers] == [2, 0]
    assert [w.output.count("Accuracy in % after ") for w in workers] == [4, 0]
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
    printed = {k: int(w.output.split("HELD ")[1].split()[0]) for k, w in zip("01", workers, strict=True)}
    assert held == printed
    assert both["buffer_rows"]["nominal"] == 12
    assert both["buffer_rows"]["stored"] == sum(held.values())
    distinct = {int(i) for w in workers for i in w.output.split("IDS ")[1].split("\n")[0].split()}
    assert both["buffer_rows"]["distinct"] == len(distinct)


def test_exemplars_that_all_workers_share_are_counted_once(tmp_path: Path) -> None:
    assert_ended_well(run_workers(reports.shared_exemplars, 2, tmp_path))
    report = json.loads((tmp_path / "report/accuracy_matrix.json").read_text())
    assert report["buffer_rows"] == {"nominal": 12, "stored": 12, "distinct": 12}
    assert report["buffer_bytes"] == 12 * 8 + 6 * 8 * 4  # ids, and the means of six classes' features
    with (tmp_path / "report/buffer.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["task"] == "1"]
    assert [(line["worker"], line["rows"]) for line in lines] == [("all", "2")] * 6
