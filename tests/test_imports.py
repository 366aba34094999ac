"""Which part of the package may import which, and that ``import dcl_lightning`` imports nothing heavy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest

import dcl_lightning

PACKAGE = Path(__file__).parent.parent / "dcl_lightning"
# Each may import those that stand before it.
ORDER = [
    "_version", "types", "errors", "paths", "screen", "stopwatch", "_lightning", "comm", "functional", "metrics",
    "backbones", "memory", "checkpoint", "distributed", "data", "report", "callbacks", "agents", "tools", "cli",
    "studies", "__init__", "__main__",
]  # fmt: skip
WITHOUT_LIGHTNING = {
    "types", "errors", "paths", "stopwatch", "comm", "functional", "metrics", "backbones", "memory", "studies",
}  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(file: Path) -> set[str]:
    """Return the full names of all that a file imports, wherever it does so."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file.name}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part_of(name: str) -> str:
    """Return the part of the package that an imported name is from: what is no part is a name of ``__init__``."""
    word = name.split(".")[1] if "." in name else "__init__"
    return word if (PACKAGE / word).is_dir() or (PACKAGE / f"{word}.py").exists() else "__init__"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_downwards(file: Path) -> None:
    part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    names = imported(file)
    for name in names:
        if name.split(".")[0] == "dcl_lightning":
            assert ORDER.index(part_of(name)) <= ORDER.index(part), f"{file.name} imports {name}"
    if part in WITHOUT_LIGHTNING:
        assert not any(name.split(".")[0] in ("lightning", "horovod") for name in names)


@pytest.mark.parametrize(
    ("statement", "part"),
    [
        ("import dcl_lightning", "__init__"),
        ("from dcl_lightning import TaskClock", "__init__"),
        ("from dcl_lightning import paths", "paths"),
        ("import dcl_lightning.cli.parser", "cli"),
        ("from dcl_lightning.agents.nil import NIL", "agents"),
        ("def f():\n    from dcl_lightning.comm import Comm", "comm"),
    ],
)
def test_every_way_to_import_is_seen(statement: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text(statement)
    assert {part_of(name) for name in imported(tmp_path / "file.py")} == {part}


# What methods share; the short names stand for them all.
SHARED = {"base", "computation", "nearest_mean", "optimization", "prediction", "replay", "strategies", "teacher"}
AGENTS = sorted({f.stem for f in (PACKAGE / "agents").glob("*.py")} - {"__init__", "short_names"})


@pytest.mark.parametrize("module", AGENTS)
def test_no_method_is_imported_by_another_or_by_what_they_share(module: str) -> None:
    of_agents = [n.split(".") for n in imported(PACKAGE / "agents" / f"{module}.py") if n.startswith("dcl_lightning.a")]
    assert [".".join(words) for words in of_agents if words[2] not in SHARED | {module}] == []


@pytest.mark.parametrize(
    ("first", "second"), [("dcl_lightning", "lightning.pytorch"), ("lightning.pytorch", "dcl_lightning")]
)
def test_strategies_have_their_names_whichever_import_comes_first(first: str, second: str) -> None:
    code = (
        f"import {first}\n"
        f"import {second}\n"
        "from inspect import getsource\n"
        "from lightning.pytorch.strategies import StrategyRegistry\n"
        "print(*StrategyRegistry.available_strategies())\n"
        "assert getsource(lightning.pytorch)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"ddp", "fsdp2", "horovod"} <= set(done.stdout.split())


def test_commands_that_compute_nothing_import_no_torch() -> None:
    code = (
        "import sys\n"
        "from dcl_lightning.cli import main\n"
        "assert main(['--version']) == 0\n"
        "assert main(['fti']) == 2\n"
        "assert main(['run', '--max-restarts', '-1', '--', 'fit']) == 2\n"
        "assert not {'torch', 'numpy', 'lightning'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_brings_nothing_heavy_and_shows_its_names() -> None:
    code = (
        "import sys, dcl_lightning\n"
        "print(*sys.modules)\n"
        "print(*dir(dcl_lightning))\n"
        "assert dcl_lightning.agents.ER is dcl_lightning.ER\n"
        "from dcl_lightning.backbones import MLP\n"
        "assert dcl_lightning.backbones.MLP is MLP\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded, shown = (set(line.split()) for line in done.stdout.splitlines())
    assert not {"torch", "lightning", "horovod", "dcl_lightning.agents", "dcl_lightning.backbones"} & loaded
    assert set(dcl_lightning.__all__) | {"agents", "backbones", "data", "functional", "metrics"} <= shown
    assert not {name for name in shown if name.startswith("_") and not name.endswith("__")}
    assert not {"importlib", "Any"} & shown


# Private names that are used and are not Lightning's: of named tuples, Python, torch, Horovod and continuum.
FOREIGN = {
    "_replace", "_fields", "_exit", "_current_frames", "_actions", "_buffers", "_last_lr", "_execution_engine",
    "_foreach_copy_", "_handle_map",
}  # fmt: skip


def test_private_names_of_lightning_stand_in_one_file() -> None:
    """Of others' attributes: a class that derives from one of Lightning's overrides names as it has to."""
    trees = {file: ast.parse(file.read_text()) for file in FILES if file.name != "_lightning.py"}
    ours, used = set(FOREIGN), {}
    for file, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                ours.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                ours.add(node.id)
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
                if getattr(node.value, "id", "") in ("self", "cls") and isinstance(node.ctx, ast.Store):
                    ours.add(node.attr)
                elif getattr(node.value, "id", "") not in ("self", "cls") and "super" not in ast.unparse(node.value):
                    used[node.attr] = file.name
            elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("lightning"):
                assert not any(a.name.startswith("_") for a in node.names), f"{file.name} imports a private name"
    assert {name: file for name, file in used.items() if name not in ours} == {}


def test_requirements_name_what_continuum_imports_without_declaring_it() -> None:
    needed = {re.split(r"[^\w-]", line)[0] for line in requires("dcl-lightning") or [] if "extra ==" not in line}
    assert {"continuum", "six"} <= needed
    assert not {"horovod", "optuna", "matplotlib", "tensorboard", "timm", "rich"} & needed
