"""``profile -- fit ...``: a table of a step, one line for a mistake, nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcl_lightning import cli
from dcl_lightning.callbacks.step_profile import PARTS

DIGITS = [
    "--data.dataset",
    "digits",
    "--data.increment",
    "5",
    "--data.batch_size",
    "32",
    "--trainer.accelerator",
    "cpu",
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_parts_of_a_step_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profile", "--steps", "4", "--", "fit", "--model", "er", *DIGITS]) == 0
    out = capsys.readouterr().out
    head, table, words = out[out.index("4 steps of task 2 of 2") :].strip().split("\n\n")
    assert "er with mlp" in head
    assert "32 new + " in head
    rows = {line[:34].strip(): line[34:].split() for line in table.splitlines()[1:]}
    assert [*rows] == [*PARTS.values(), "total"]
    for place, total in enumerate(rows.pop("total")):
        assert sum(float(row[place]) for row in rows.values()) == pytest.approx(float(total), abs=0.1 + 0.3 * place)
    assert float(rows[PARTS["forward"]][0]) > 0
    assert words.startswith("Largest part: ")
    assert len(words.splitlines()) <= 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("", ["got nothing", "profile -- fit"]),
        ("--", ["got nothing", "profile -- fit"]),
        ("--steps 3", ["got nothing"]),
        ("-- validate --model er", ["got validate", "profile -- fit"]),
        ("-- horovodrun -np 2 fit", ["got horovodrun", "horovodrun ... dcl-lightning profile"]),
        ("--steps 0 -- fit", ["--steps=0", "1 or more"]),
        ("--steps x -- fit", ["--steps", "'x'"]),
        ("--steps 3 -- fit --trainer.profiler simple", ["trainer.profiler=simple", "leave it out"]),
        ("-- fit --trainer.profiler SimpleProfiler", ["trainer.profiler=", "SimpleProfiler", "leave it out"]),
        ("-- fit --trainer.fast_dev_run 3", ["trainer.fast_dev_run=3", "leave it out"]),
        ("-- fit --ckpt_path last", ["ckpt_path=last", "leave it out"]),
        ("-- fit --model icrl", ["--model=icrl", "'icarl'"]),
        ("-- fit --data.dataset digits --data.batch_size 2000", ["task 2 has one step", "data.batch_size"]),
    ],
)
def test_a_mistake_is_one_line(args: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main(["profile", *args.split()])
    except SystemExit as end:
        code = int(str(end.code))
    assert code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert all(word in line for word in words), line
