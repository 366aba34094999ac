"""Every command in README and documents is run or at least parsed; one table has the reasons."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml

from dcl_lightning import cli
from dcl_lightning.studies import repeat, sweep
from tests.data import small_sets
from tests.documents import LANGUAGES, PAGES, ROOT, Command, blocks, commands, write_files
from tests.test_configs import shrunk

# What is not run here, by how the command begins, and why; beside it how it is looked at all the same. What is of
# neither kind, nor a command of ours that can be run, fails.
Check = Callable[[tuple[str, ...]], None]


def a_target(words: tuple[str, ...]) -> None:
    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words


def a_script_with_these_options(words: tuple[str, ...]) -> None:
    name = words[1] if words[1] != "-m" else words[2].replace(".", "/") + ".py"
    text = (ROOT / name).read_text(encoding="utf-8")
    assert all(f'"{word}"' in text for word in words[2:] if word.startswith("--")), words


def existing_tests(words: tuple[str, ...]) -> None:
    paths = [word for word in words if word.startswith("tests/")]
    assert paths
    assert all((ROOT / path).exists() or path in OF_THE_GUIDES for path in paths), words


def a_test_module(words: tuple[str, ...]) -> None:
    assert (ROOT / words[2].replace(".", "/")).with_suffix(".py").exists(), words


# Files that the guides create.
OF_THE_GUIDES = {
    "tests/agents/test_fading.py", "tests/memory/test_window.py", "tests/data/test_stripes.py",
    "dcl_lightning/agents/fading.py", "dcl_lightning/data/sources/stripes.py",
}  # fmt: skip


def an_extra(words: tuple[str, ...]) -> None:
    extra = re.search(r"\[(\w+)\]", words[2])
    if extra:
        assert re.search(rf"^{extra[1]} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE), words


def parsed_behind(words: tuple[str, ...]) -> None:
    """Parse the command of ours that another program starts."""
    ours = words[words.index("python") :] if "python" in words else ()
    if ours:
        parse(Command(PAGES[0], ours))


def parsed(words: tuple[str, ...]) -> None:
    parse(Command(PAGES[0], words))


def nothing(words: tuple[str, ...]) -> None:
    """Nothing of ours is in it."""


NOT_RUN: list[tuple[str, str, Check]] = [
    (r"make ", "the suite runs within `make test`, and the others take minutes", a_target),
    (r"python benchmarks/", "minutes, a quiet machine, a GPU", a_script_with_these_options),
    (r"python -m dcl_lightning\.tools\.install_horovod", "builds Horovod", a_script_with_these_options),
    (r"(python -m |\w+=\w+ )?pytest ", "the suite itself, or a GPU's", existing_tests),
    (
        r"python -m tests\.conformance\.lightning_support\.page",
        "writes the page, which tests/conformance/test_lightning_support.py compares",
        a_test_module,
    ),
    (r"pip install", "the network", an_extra),
    (r"(horovodrun|mpirun) ", "several hosts, Open MPI", parsed_behind),
    (r"dcl-lightning new ", "writes a folder: tests/cli/test_new.py does", nothing),
    (r"dcl-lightning run(?!.* fit)", "named in a sentence, without a job", nothing),
    (r"dcl-lightning fit .*backbone\.pretrained", "weights of a hub", parsed),
    (r"nsys ", "a GPU", parsed_behind),
    (r"py-spy ", "not among the packages of the set-up", parsed_behind),
    (r"'hosts=\$\(scontrol' ", "SLURM", nothing),
    (r"docker run", "a container", nothing),
    (r"pre-commit install", "changes the checkout", nothing),
    (r"python main\.py", "the original program's", nothing),
    (
        r"mv fading\.py |python cli\.py fit (--config configs/fading_digits|--model er --model\.rehearsal\.policy w)",
        "tests/test_guide.py runs the guides",
        nothing,
    ),
]
# Each once, wherever it stands.
ALL = [*{command.line: command for page in reversed(PAGES) for command in reversed(commands(page))}.values()][::-1]
# Words that stand for something, and places that are not here.
MEANT = {"FILE": "configs/icarl_digits.yaml", "configs/NAME.yaml": "configs/nil_digits.yaml", "RUN": "runs/nil_digits"}
MISTAKE = "passt"  # on purpose
MEANT |= {"/local/scratch": "scratch", "$hosts": "localhost"}


def of_ours(command: Command) -> list[str] | None:
    """Return the arguments behind ``dcl-lightning``, with words that stand for others replaced; None if it is none."""
    words = [word for word in command.words if word not in ("exec", "srun") and not re.match(r"[A-Z_]+=", word)]
    if words[:2] == ["python", "cli.py"] or words[0] == "dcl-lightning":
        words = words[2 if words[0] == "python" else 1 :]
    elif words[0] not in ("fit", "validate", "test", "predict"):
        return None
    args: list[str] = []
    for word in words:
        if word == "...":
            args += ["--config", "configs/nil_digits.yaml"]
        elif word == "NAME":
            args.append("icarl" if args[-1] == "--model" else "digits")
        else:
            args.append(MEANT.get(word, word))
    return args


def called(args: list[str]) -> tuple[int, str]:
    """Return exit code and output of the command line in this process."""
    out = io.StringIO()
    try:
        with redirect_stdout(out):
            code = cli.main(args)
    except SystemExit as end:
        code = int(end.code or 0)
    return code, out.getvalue()


def parse(command: Command) -> dict[str, Any]:
    """Parse a command as far as it goes without training; return the configuration of a fit."""
    args = of_ours(command)
    assert args, command.line
    alone = ("cite", "compare", "report", "data")
    if any(word.endswith(("help", "--print_config")) for word in args) or args[0] in alone:
        assert called(args)[0] == 0, command.line
        return {}
    if args[0] in ("repeat", "sweep"):
        fits: list[list[str]] = []
        study = repeat if args[0] == "repeat" else sweep
        # As a fit that was stopped by hand: the study ends with its first one.
        with tempfile.TemporaryDirectory() as folder:
            assert study.main([*args[1:], "--out", folder], lambda fit: fits.append(fit) or 130) == 130
        args = fits[0]
    if args[0] in ("run", "profile"):
        args = args[args.index("fit") :]
    if args[:2] == ["fit", "--config"] and len(args) == 3 and args[2].startswith("configs/"):
        assert (ROOT / args[2]).is_file(), command.line  # tests/test_configs.py runs it
        return {}
    code, out = called([*args, "--print_config"])
    assert code == 0, command.line
    return yaml.safe_load(out)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that has what the documents speak of: configurations, files, data sets, runs, a checkpoint."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "configs").symlink_to(ROOT / "configs")
    for page in PAGES:
        write_files(folder, page)
    (folder / "parts").mkdir()
    parts: dict[str, dict[str, Any]] = {
        "nil": {"class_path": "nil", "init_args": {"backbone": "mlp"}},
        "digits": {"class_path": "ContinualDataModule", "init_args": {"dataset": "digits"}},
        "two_workers": {"strategy": "horovod", "devices": 2, "accelerator": "cpu"},
    }
    keys = dict(zip(parts, ("model", "data", "trainer"), strict=True))
    for name, part in parts.items():
        (folder / "parts" / f"{name}.yaml").write_text(yaml.safe_dump(part))
    for name, file in (("nil", "agent"), ("digits", "data"), ("two_workers", "trainer")):
        (folder / f"{file}.yaml").write_text(yaml.safe_dump({keys[name]: parts[name]}))
    (folder / "all.yaml").write_text(yaml.safe_dump({key: f"parts/{name}.yaml" for name, key in keys.items()}))
    small_sets.class_folders(folder / "pictures", "train", "test", [f"class_{i}" for i in range(5)], ending="jpg")
    few = ["--model.epochs_per_task", "1", "--trainer.limit_train_batches", "2", "--trainer.callbacks", "TaskReport"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # With --trainer.callbacks no checkpoint is left out: the default one comes besides.
        for name in ("nil_digits", "icarl_digits"):
            flags = [*few, "--trainer.callbacks.pictures=false"]
            assert called(["fit", "--config", f"configs/{name}.yaml", *flags])[0] == 0
        for name in ("base_digits", "derpp_digits", "er_digits", "er_50", "er_200"):
            shutil.copytree("runs/nil_digits", f"runs/{name}")
    last = folder / "runs/icarl_digits/version_0/checkpoints/last.ckpt"
    shutil.copy(last, folder / "x.ckpt")
    return folder


@pytest.fixture
def here(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(workplace)
    return workplace


def reason(command: Command) -> tuple[str, Check] | None:
    return next(((why, check) for start, why, check in NOT_RUN if re.match(start, command.line)), None)


@pytest.mark.parametrize("command", ALL, ids=lambda command: f"{command.page.stem}: {command.line[:60]}")
def test_every_command_is_one_that_there_is(command: Command, here: Path) -> None:
    if MISTAKE in command.line:
        return  # what is printed of it is looked at below
    found = reason(command)
    if found is not None:
        found[1](command.words)
    elif command.words[0] == "mkdir":
        subprocess.run(command.words, check=True)
    elif command.words[0] == "test" or "predict" in command.words:
        assert called(of_ours(command) or [])[0] == 0, command.line
    else:
        parse(command)


def test_every_reason_is_needed() -> None:
    assert len(ALL) > 90
    for start, _, _ in NOT_RUN:
        assert any(re.match(start, command.line) for command in ALL), start


def test_every_block_says_what_it_is() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert block.language in LANGUAGES, f"{page.name}: {block.text.splitlines()[0]}"


def test_what_consoles_show_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    shown = [block.text for page in PAGES for block in blocks(page) if block.language == "console"]
    assert shown
    for text in shown:
        line, *printed = text.splitlines()
        with pytest.raises(SystemExit) as end:
            cli.main(shlex.split(line)[2:])
        assert end.value.code == 2
        assert capsys.readouterr().err.splitlines()[: len(printed)] == printed


def test_every_file_that_a_document_names_exists() -> None:
    for page in PAGES:
        named = re.findall(r"`([a-z_0-9]+(?:/[a-z_0-9]+)+\.py)`", page.read_text(encoding="utf-8"))
        missing = {name for name in named if not any((ROOT / top / name).is_file() for top in (".", "dcl_lightning"))}
        assert missing <= OF_THE_GUIDES, page.name


def test_every_benchmark_is_in_the_table_of_what_was_measured() -> None:
    page = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py")} - {
        "common.py",
        "plain.py",
        "reproduce_peer.py",
    }
    assert {name for name in scripts if f"`python benchmarks/{name}`" not in page} == set()


FITS = [
    command for command in ALL if reason(command) is None and "fit" in command.words and MISTAKE not in command.line
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("command", FITS, ids=lambda command: command.line[:70])
def test_every_fit_that_can_be_run_here_is_run(command: Command, here: Path, tmp_path: Path) -> None:
    args = of_ours(command) or []
    printed = {} if MISTAKE in args else parse(command)
    if not printed:
        return
    (tmp_path / "printed.yaml").write_text(yaml.safe_dump(printed))
    data = printed["data"]["init_args"]
    if data["dataset"] in ("folder", "my_data.Stripes"):
        flags = ["--model.epochs_per_task", "1", "--trainer.limit_train_batches", "2", "--trainer.accelerator", "cpu"]
    else:
        flags = [*shrunk(tmp_path / "printed.yaml", tmp_path / "datasets"), "--data.root", str(tmp_path / "datasets")]
        if isinstance(data["scenario"], dict):
            flags = [flag for flag in flags if flag != "--data.increment"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *args, *flags], cwd=here, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
