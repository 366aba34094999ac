"""Which part of the package may import which, and that the package imports nothing heavy of its own accord."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dcl_lightning"
# Each may import those that stand before it.
ORDER = [
    "types", "errors", "paths", "screen", "_lightning", "comm", "functional", "metrics", "backbones", "memory",
    "checkpoint", "distributed", "data", "report", "callbacks", "agents", "tools", "cli", "studies", "__init__",
    "__main__",
]  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_downwards(file: Path) -> None:
    part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imported(file):
        words = name.split(".")
        if words[0] == "dcl_lightning" and len(words) > 1 and words[1] in ORDER:
            assert ORDER.index(words[1]) <= ORDER.index(part), f"{file.name} imports {name}"
    if part == "memory":
        assert not any(n.split(".")[0] in ("lightning", "horovod") for n in imported(file))


# What methods share; the short names stand for them all.
SHARED = {"__init__", "base", "optimization", "short_names", "replay", "teacher", "weights"}
METHODS = sorted({f.stem for f in (PACKAGE / "agents").glob("*.py")} - SHARED)


@pytest.mark.parametrize("method", METHODS)
def test_no_method_imports_another(method: str) -> None:
    others = set(METHODS) - {method}
    names = imported(PACKAGE / "agents" / f"{method}.py")
    assert not any(name.split(".")[1:3] == ["agents", other] for name in names for other in others)


def test_importing_the_package_brings_nothing_heavy() -> None:
    code = "import sys, dcl_lightning; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    # matplotlib is not in the list: torchmetrics, and so Lightning, imports it where it is installed.
    assert not {"horovod", "continuum", "sklearn"} & set(loaded)


# Private names that are used and are not Lightning's: of named tuples, Python, torch, Horovod and continuum.
FOREIGN = {
    "_replace", "_fields", "_exit", "_current_frames", "_actions", "_buffers", "_last_lr", "_execution_engine",
    "_handle_map",
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
