"""Readable help, and mistakes reported in one line before anything slow starts."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from dcl_lightning import __version__, cli
from dcl_lightning.cli.messages import in_one_line
from dcl_lightning.cli.program import AGENTS, BACKBONES
from dcl_lightning.errors import suggestion


def shown(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(args)
    out, err = capsys.readouterr()
    assert end.value.code == 0, err
    return out


def sentences(text: str) -> dict[str, str]:
    """Return each option's sentence, without type, default and choices."""
    options = text[re.search(r"^  -", text, re.MULTILINE).start() :]  # type: ignore[union-attr]
    found = {}
    for block in re.split(r"\n(?=  -)", options):
        head, *rest = re.split(r"\n| {2,}", block.strip("\n "), maxsplit=1)
        words = " ".join(" ".join(rest).split())
        found[head] = re.split(r"\((?:type|required|default)", words)[0].strip()
    return found


@pytest.mark.parametrize(
    "args",
    [["fit", "--help"], ["validate", "--help"], ["test", "--help"], ["predict", "--help"], ["fit", "--data.help"]]
    + [["fit", "--model.help", name] for name in AGENTS]
    + [["fit", "--model", "base", "--model.backbone.help", name] for name in BACKBONES]
    + [["fit", "--model", "nil", "--model.rehearsal.help"], ["fit", "--model", "icarl", "--model.rehearsal.help"]]
    + [["compare", "--help"], ["repeat", "--help"], ["sweep", "--help"], ["cite", "--help"], ["run", "--help"]]
    + [["profile", "--help"], ["report", "--help"], ["new", "--help"], ["data", "--help"]],
    ids=" ".join,
)
def test_every_option_has_a_sentence(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(args, capsys)
    said = sentences(text)
    assert said
    assert not [option for option, sentence in said.items() if len(sentence.split()) < 3]
    assert len(text.splitlines()) < 700


def test_help_lists_short_names_and_no_class_of_torch(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(shown(["fit", "--help"], capsys).split())
    assert f"short names: {', '.join(sorted(AGENTS))}; or any class path" in text
    of_agent = shown(["fit", "--model.help", "nil"], capsys)
    assert "torch.nn.Bilinear" not in of_agent
    assert all(name in of_agent for name in BACKBONES)
    commands = ("fit", "predict", "compare", "report", "repeat", "sweep", "run", "profile", "data", "new", "cite")
    assert all(name in shown(["--help"], capsys) for name in commands)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("fit --model icrl", ["--model=icrl", "'icarl'"]),
        ("fit --model lightning.pytorch.demos.boring_classes.BoringModel", ["no agent", "dcl_lightning.Rehearsal"]),
        ("fit --model.learning_rat 1", ["--model.learning_rat", "'lr'"]),
        ("fit --model.memory_size 9", ["--model.memory_size", "'buffer_size'"]),
        ("fit --data.datasett digits", ["--data.datasett", "'dataset'"]),
        ("fit --data.dataset cifar1000", ["cifar1000", "'cifar100'"]),
        ("fit --data.scenario clas", ["'clas'", "did you mean 'class'"]),
        ("fit --data.class_order icarl_1994", ["icarl_1994", "did you mean 'icarl_1993'"]),
        ("fit --model nil --model.rehearsal.policy resrvoir", ["--model.rehearsal.policy=resrvoir", "'reservoir'"]),
        ("fit --model nil --model.rehearsal.bufer_size 3", ["--model.rehearsal.bufer_size", "'buffer_size'"]),
        ("fit --model.backbone resnt", ["--model.backbone=resnt", "'resnet'"]),
        ("fit --model.backbone resnet --model.backbone.depht 50", ["--model.backbone.depht", "'depth'"]),
        ("fit --model.scale_lr lineer", ["--model.scale_lr=lineer", "'linear'"]),
        ("fit --model.epochs_per_task x", ["--model.epochs_per_task=x", "int or list[int]"]),
        ("fit --trainer.acelerator cpu", ["--trainer.acelerator", "'--trainer.accelerator'"]),
        ("fit --trainer.accelerator cup", ["trainer.accelerator=cup", "'cpu'"]),
        ("fit --trainer.strategy horovd", ["trainer.strategy=horovd", "'horovod'"]),
        ("fit --trainer.callbacks+=LerningRateMonitor", ["LerningRateMonitor", "'LearningRateMonitor'"]),
        ("fit --trainer.logger CSVLoger", ["--trainer.logger=CSVLoger", "'CSVLogger'"]),
        ("fit --model nil --model.rehearsal.store rows", ["--model.rehearsal.store", "'row_format'"]),
        ("fit --model nil --model.rehearsal.prefetch assemble", ["assemble", "'device'"]),
        ("fit --model.logits seen", ["--model.logits", "'train_classes'"]),
        ("fit --data.shard fixed", ["--data.shard", "'sharding'"]),
        ("fti", ["fti", "'fit'", "profile"]),
        ("comapre a b", ["comapre", "'compare'"]),
    ],
)
def test_a_typo_is_one_line_with_the_nearest_right_word(
    args: str, words: list[str], capsys: pytest.CaptureFixture[str], tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main(args.split())
    except SystemExit as end:
        code = end.code
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Seed set")]
    assert code == 2
    assert lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words), lines[0]
    assert len(lines) <= 3
    assert not list(tmp_path.iterdir())  # before anything was made


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (
            "model: {class_path: icarl, init_args: {memroy_size: 5}}",
            "memroy_size: no such key; did you mean 'buffer_size'",
        ),
        ("data: {init_args: {incremnet: 5}}", "incremnet: no such key; did you mean 'increment'"),
        ("model: icrl", "did you mean 'icarl'"),
        ("data: {init_args: {dataset: [}}", "line 1"),
    ],
)
def test_a_typo_in_a_file(content: str, word: str, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(SystemExit) as end:
        cli.main(["fit", "--config", str(tmp_path / "a.yaml")])
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert word in lines[0]
    assert len(lines) <= 3
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", str(tmp_path / "b.yaml")])
    assert "did you mean 'a.yaml'?" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_the_version(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([flag]) == 0
    assert capsys.readouterr().out == f"dcl_lightning {__version__}\n"


def test_no_subcommand_is_said_to_be_missing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([])
    assert end.value.code == 2
    assert "subcommand" in capsys.readouterr().err.splitlines()[0]


def test_nothing_is_suggested_for_what_is_right_or_far_from_all() -> None:
    assert suggestion("icarl", ["icarl", "icarl_v1"]) == ""
    assert suggestion("zzz", ["icarl"]) == ""
    assert in_one_line("a\n  b", [], [], [], []) == "a b"
    assert len(in_one_line("x" * 2000, [], [], [], [])) < 800


def test_without_horovod_asking_for_it_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("horovod", "horovod.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["fit", "--trainer.strategy", "horovod", "--trainer.accelerator", "cpu"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "python -m dcl_lightning.tools.install_horovod" in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["[0,1,2,3,4,5,6,7,8,9]", '["0","1","2","3","4","5","6","7","8","9"]'])
def test_lists_of_numbers_may_be_quoted_and_a_rate_may_be_written_as_a_power(
    value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["fit", "--data.class_order", value, "--model.lr", "1e-2", "--print_config"])
    assert end.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert [int(y) for y in config["data"]["init_args"]["class_order"]] == list(range(10))
    assert config["model"]["init_args"]["lr"] == 0.01
