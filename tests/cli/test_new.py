"""``new agent|experiment NAME``: what it writes is the guide's, runs as it is, and is written whole or not at all."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dcl_lightning import cli
from dcl_lightning.cli.new import names_of
from dcl_lightning.studies import repeat
from tests.documents import ROOT, blocks

FEW = ["--model.epochs_per_task", "1", "--trainer.limit_train_batches", "2", "--data.increment", "5"]


def new(kind: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.chdir(folder)
    return cli.main(["new", kind, name])


def of_guide(file: str) -> str:
    (text,) = (block.text for block in blocks(ROOT / "docs/guides/agent.md") if block.file == file)
    return text.split("\n", 1)[1]


def test_the_agent_is_that_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert new("agent", "Fading", tmp_path, monkeypatch) == 0
    folder = tmp_path / "fading"
    assert sorted(os.listdir(folder)) == ["fading.py", "fading_digits.yaml", "test_fading.py"]
    assert (folder / "fading.py").read_text() == of_guide("fading.py")
    config = yaml.safe_load((folder / "fading_digits.yaml").read_text())
    config["model"]["class_path"] = "fading"
    assert config == yaml.safe_load(of_guide("configs/fading_digits.yaml"))
    lines = of_guide("tests/agents/test_fading.py").replace("from dcl_lightning.agents import", "from fading import")
    assert sorted((folder / "test_fading.py").read_text().splitlines()) == sorted(lines.splitlines())
    assert os.listdir(tmp_path) == ["fading"]


def test_its_fit_and_its_test_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert new("agent", "SmoothReplay", tmp_path, monkeypatch) == 0
    assert "cd smooth_replay\n" in capsys.readouterr().out
    monkeypatch.chdir("smooth_replay")
    monkeypatch.syspath_prepend(".")
    assert cli.main(["fit", "--config", "smooth_replay_digits.yaml", *FEW, "--model.keep", "0.5"]) == 0
    summary = Path("runs/smooth_replay_digits/version_0/report/summary.md").read_text()
    assert summary.startswith("# SmoothReplay on digits")
    code = Path("test_smooth_replay.py").read_text()
    found: dict[str, object] = {}
    exec(code, found)
    (test,) = (value for name, value in found.items() if name.startswith("test_"))
    test()  # type: ignore[operator]  # whatever the file has under this name


def test_the_experiment_compares_its_agents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert new("experiment", "forgetting", tmp_path, monkeypatch) == 0
    assert "cd forgetting\n  sh run.sh\n" in capsys.readouterr().out
    monkeypatch.chdir("forgetting")
    assert Path("README.md").read_text().startswith("# forgetting\n")
    lines = [shlex.split(line) for line in Path("run.sh").read_text().splitlines() if line.startswith("dcl-")]
    studies, compare = [line[1:] for line in lines[:-1]], lines[-1][1:]
    assert [study[0] for study in studies] == ["repeat"] * 3
    for study in studies:
        assert study[2:4] == ["--seeds", "0..2"]
        study[3] = "0"
        assert repeat.main(study[1:], fit=lambda fit: cli.main([*fit, *FEW])) == 0
    capsys.readouterr()
    assert cli.main(compare) == 0
    shown = capsys.readouterr().out
    assert all(agent in shown for agent in ("base", "er", "derpp"))
    assert Path("comparison/comparison.csv").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize(("kind", "name"), [("agent", "Smooth"), ("experiment", "forgetting")])
def test_every_step_that_is_printed_runs_as_it_stands(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert new(kind, name, tmp_path, monkeypatch) == 0
    _, change, *steps = capsys.readouterr().out.splitlines()
    programs = tmp_path / "bin"
    programs.mkdir()
    # That of pip, beside the interpreter, which has another path than `python -m`.
    for program, words in (("python", ""), ("dcl-lightning", Path(sys.executable).parent / "dcl-lightning")):
        (programs / program).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (programs / program).chmod(0o755)
    env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for step in steps:
        done = subprocess.run(["sh", "-ec", f"{change}\n{step}"], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ("agent class", "'class' is a word of Python"),
        ("agent None", "'None' is a word of Python"),
        ("agent 2fast", "'2fast': give letters"),
        ("agent my-agent", "'my-agent': give letters"),
        ("agent ../x", "'../x': give letters"),
        ("agent _x", "'_x': give letters"),
        ("agent é", "give letters"),
        ("agent er", "there is an agent 'er'"),
        ("agent Icarl", "there is an agent 'icarl'"),
        ("agent Nearest_mean", "there is an agent 'NearestMean'"),
        ("agent Torch", "'Torch' would hide"),
        ("agent Random", "'Random' would hide"),
        ("agent Batch", "'Batch' would hide"),
        ("agent there", "there is there"),
        ("experiment there", "there is there"),
        ("experiment derpp", "there is an agent 'derpp'"),
        (f"experiment {'y' * 300}", "cannot be written"),
        ("agnt Smooth", "invalid choice: 'agnt'"),
        ("agent", "required: NAME"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    args: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main(["new", *args.split()])
    except SystemExit as end:
        code = int(end.code or 0)
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2
    assert word in line
    assert os.listdir(tmp_path) == ["there"]


def test_nothing_is_left_where_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, *_: object, **__: object) -> int:
        if path.name.startswith("test_"):
            raise OSError(28, "No space left on device")
        return write(path, *_, **__)  # type: ignore[arg-type]  # passed on as they came

    write = Path.write_text
    monkeypatch.setattr(Path, "write_text", full)
    assert new("agent", "Smooth", tmp_path, monkeypatch) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_names() -> None:
    assert names_of("Smooth") == names_of("smooth") == ("Smooth", "smooth")
    assert names_of("Unfading") == ("Unfading", "unfading")
    assert names_of("DERPlus") == ("DERPlus", "der_plus")
    assert names_of("der_plus_2") == ("DerPlus2", "der_plus2")
