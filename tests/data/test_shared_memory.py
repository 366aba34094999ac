"""Arrays of a data set are in memory once, for any number of workers of a host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dcl_lightning.data import ContinualDataModule
from dcl_lightning.data.sources import table as sources
from dcl_lightning.data.sources.cache import VARIABLE
from tests.data import small_sets

SETS = {"cifar10": "train.npy", "mnist": "train-images-idx3-ubyte"}
READ = """
from tests.data.test_shared_memory import SETS, kilobytes, touched
kept = {name: touched(name, ROOT) for name in SETS}
print(*[f"{kilobytes(file, what)}" for file in SETS.values() for what in ("Rss", "Pss")], flush=True)
"""


def touched(name: str, root: str) -> torch.Tensor:
    """Read each pixel the way training does, a batch at a time."""
    data = ContinualDataModule(name, root=root, batch_size=64, scenario="none")
    data.prepare_data()
    data.setup()
    assert sum(int(batch.inputs.sum()) for batch in data.train_dataloader()) > 0
    return data.train_inputs


def kilobytes(file: str, what: str) -> int:
    """Return a figure of this process's mappings of a file."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(f"/{file}")
        elif inside and line.startswith(f"{what}:"):
            found += int(line.split()[1])
    return found


def test_two_processes_share_what_they_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    small_sets.cifar(tmp_path, 10, per_file=400)
    small_sets.mnist(tmp_path, rows=4000)
    kept = [touched(name, str(tmp_path)) for name in SETS]
    sizes = [tensor.numel() // 1024 for tensor in kept]
    for file, size in zip(SETS.values(), sizes, strict=True):
        assert kilobytes(file, "Rss") >= size
        assert kilobytes(file, "Anonymous") == 0, "there is a copy"
    source = f"ROOT = {str(tmp_path)!r}\n{READ}"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    other = subprocess.run([sys.executable, "-c", source], env=env, capture_output=True, text=True, check=True)
    figures = [int(word) for word in other.stdout.split()]
    for size, resident, share in zip(sizes, figures[0::2], figures[1::2], strict=True):
        assert resident >= size
        # Of each page that both have it counts half.
        assert share <= 0.6 * resident


def test_where_no_cache_can_be_written_cifar_is_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_sets.cifar(tmp_path, 100)
    expected = sources.load("cifar100", str(tmp_path), False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "cache"))
    again = sources.load("cifar100", str(tmp_path), False)
    assert torch.equal(again.train_inputs, expected.train_inputs)
    assert (again.test_labels == expected.test_labels).all()


def test_other_pickles_make_another_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    small_sets.cifar(tmp_path, 100)
    first = sources.load("cifar100", str(tmp_path), False).train_inputs.clone()
    small_sets.cifar(tmp_path, 100)
    assert not torch.equal(sources.load("cifar100", str(tmp_path), False).train_inputs, first)
    assert os.path.isdir(tmp_path / "CIFAR100" / ".dcl_lightning")
