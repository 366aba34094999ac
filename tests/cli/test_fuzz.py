"""Fuzz test of the command line: any value and any file either works or is refused in a few lines."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.cli.mistyped import AGENTS, QUICK, VALUES, Outcome, attempt, leaf_keys, quick, refused

SEED = 20
SAMPLE = 110  # about a third of a second each
PARSERS: dict[type, Any] = {}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Give a working folder that is empty, in one that is not."""
    folder = tmp_path / "work"
    folder.mkdir()
    with quick(PARSERS):
        yield folder


def judged(commands: list[list[str]], folder: Path, capsys: pytest.CaptureFixture[str], what: str) -> list[Outcome]:
    """Run commands, say how many there were, and fail with all that are at fault."""
    outcomes = [attempt(command, folder) for command in commands]
    with capsys.disabled():
        print(f"\nfuzz: {what}, {len(outcomes)} commands, {refused(outcomes)} refused")
    faults = [f"{ascii(o.args)[:200]}: {ascii(o.fault)[:300]}" for o in outcomes if o.fault]
    assert not faults, f"{len(faults)} faults:\n" + "\n".join(faults)
    return outcomes


def of_keys(agents: tuple[str, ...]) -> tuple[list[list[str]], str]:
    """Return a command for each key and value of each agent; keys of trainer and data for the first agent alone."""
    commands, keys = [], 0
    for number, agent in enumerate(agents):
        chosen = [key for key in leaf_keys(agent) if not number or key.startswith("model")]
        keys += len(chosen)
        start = ["fit", f"--model={agent}", *QUICK]
        commands += [[*start, f"--{key}={value}"] for key in chosen for value in VALUES]
    return commands, f"{len(agents)} agents, {keys} keys, {len(VALUES)} values"


def test_any_value_of_any_key_works_or_is_refused_in_three_lines(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands, what = of_keys(("base", "nil", "icarl", "derpp"))
    judged(random.Random(SEED).sample(commands, SAMPLE), place, capsys, f"a sample of {what}")


@pytest.mark.exhaustive
@pytest.mark.timeout(6 * 3600)
@pytest.mark.parametrize("agents", [("base",), *(("base", name) for name in AGENTS if name != "base")], ids="-".join)
def test_every_value_of_every_key(agents: tuple[str, ...], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands, what = of_keys(agents)
    if len(agents) > 1:
        commands = [command for command in commands if command[1] == f"--model={agents[1]}"]
    judged(commands, place, capsys, what)


GOOD = "model: {class_path: base, init_args: {backbone: mlp, lr: 0.02}}\n"
FILES = {
    "utf16.yaml": GOOD.encode("utf-16"),
    "latin1.yaml": "# Größe\n".encode("latin-1") + GOOD.encode(),
    "mark.yaml": b"\xef\xbb\xbf" + GOOD.encode(),
    "cut.yaml": GOOD.encode()[:-8],
    "empty.yaml": b"",
    "blank.yaml": b"\n\n",
    "binary.yaml": bytes(range(256)),
    "list.yaml": b"- 1\n- {a: b}\n",
    "number.yaml": b"5\n",
    "twice.yaml": GOOD.encode() + GOOD.encode(),
    "tabs.yaml": b"model:\n\tclass_path: base\n",
    "documents.yaml": b"a: 1\n---\nb: 2\n",
    "deep.yaml": b"[" * 2000,
    "alias.yaml": b"a: &a [*a]\n",
    "tag.yaml": b"a: !!python/object/apply:os.system ['false']\n",
    "keys.yaml": b"{1: 2, null: 3, [a]: 4}\n",
    "strings.yaml": b"model: 5\ndata: [1]\ntrainer: x\n",
    "nulls.yaml": b"model:\ndata:\ntrainer:\nseed_everything:\n",
    "zeros.yaml": b"\0" * 100,
    "name \xc3\xa9 \xff.yaml": GOOD.encode(),
}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Make files that users could give, beside the working folder."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / os.fsdecode(name.encode("latin-1"))).write_bytes(content)
    (folder / "folder.yaml").mkdir()
    (folder / "loop.yaml").symlink_to(folder / "loop.yaml")
    os.mkfifo(folder / "unused.fifo")
    whole = {"state_dict": {}, "hyper_parameters": {"lr": 0.1}, "epoch": 0, "global_step": 0}
    for name, value in {"foreign": whole, "tensor": torch.zeros(3), "list": [1], "none": None}.items():
        torch.save(value, folder / f"{name}.ckpt")
    (folder / "cut.ckpt").write_bytes((folder / "foreign.ckpt").read_bytes()[:-50])
    (folder / "empty.ckpt").touch()
    return folder


def test_files_of_any_content_work_or_are_refused_in_three_lines(
    files: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = [str(path) for path in sorted(files.glob("*.yaml"))] + [str(files / "missing.yaml"), str(files)]
    commands = [["fit", *QUICK, f"--config={path}"] for path in configs]
    commands += [["fit", *QUICK, f"--{key}={path}"] for key in ("model", "data", "trainer") for path in configs[::3]]
    commands += [[command, path] for command in ("sweep", "compare") for path in configs]
    commands += [["report", path, "--html", "page.html"] for path in configs]
    commands += [["repeat", path, "--slurm-array"] for path in configs]
    saved = [str(path) for path in sorted(files.glob("*.ckpt"))] + [str(files / "deep.yaml"), str(files)]
    commands += [["fit", *QUICK, f"--ckpt_path={path}"] for path in saved]
    commands += [[command, *QUICK, f"--ckpt_path={path}"] for command in ("validate", "predict") for path in saved]
    commands += [["test", "--model=base", *QUICK, f"--ckpt_path={path}"] for path in saved]
    sets = ["folder", "mnist", "cifar10", "cifar100", "tinyimagenet", "imagenet", "candle", "core50"]
    commands += [["fit", *QUICK, f"--data.dataset={name}", f"--data.root={files}"] for name in sets]
    judged(commands, place, capsys, f"{len(configs) + len(saved)} files")


def test_a_byte_order_mark_changes_nothing(files: Path, place: Path) -> None:
    assert attempt(["fit", *QUICK, f"--config={files / 'mark.yaml'}"], place).code == 0


ODD = [
    "",
    "-1",
    "nan",
    "x",
    "é\u202e",
    "\udc80",
    "0..",
    "..",
    "4..0",
    "0..99999999999999999999",
    "y" * 3000,
    "[",
    "--",
    "-",
]


def test_odd_arguments_of_every_command_are_refused_in_three_lines(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = place.parent / "c.yaml"
    config.write_text(yaml.safe_dump({"model": {"class_path": "base", "init_args": {"backbone": "mlp"}}}))
    commands = [[command, word] for command in ("fit", "validate", "test", "predict", "fti") for word in ODD]
    commands += [["compare", word] for word in ODD] + [["compare", f"--out={word}", "."] for word in ODD]
    commands += [["report", word, "--html", "page.html"] for word in ODD] + [
        ["report", ".", f"--html={word}"] for word in ODD
    ]
    commands += [["repeat", str(config), "--slurm-array", f"--seeds={word}"] for word in ODD]
    commands += [["repeat", str(config), "--slurm-array", f"--orders={word}"] for word in ODD]
    commands += [["sweep", word] for word in ODD] + [["cite", f"--model={word}"] for word in ODD]
    commands += [["cite", f"--data.dataset={word}"] for word in ODD]
    commands += [["data", f"--check={word}"] for word in ODD]
    commands += [["new", kind, word] for kind in ("agent", "experiment") for word in ODD if word != "x"]
    commands += [["run", f"--max-restarts={word}", "--", "fit"] for word in ODD]
    commands += [["run", f"--min-workers={word}", "--", "fit"] for word in ODD]
    commands += [["profile", f"--steps={word}", "--", "fit", "--trainer.fast_dev_run=1"] for word in ODD]
    commands += [["test", *QUICK, f"--ckpt_path={word}"] for word in ("best", "last", "hpc", "registry", "registry:x")]
    outcomes = judged(commands, place, capsys, f"{len(ODD)} words")
    assert refused(outcomes) >= 0.9 * len(outcomes)
