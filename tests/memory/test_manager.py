"""The manager: the order of a step's work, and its names in a profile."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from dcl_lightning.agents import NIL
from dcl_lightning.comm import SingleProcessComm
from dcl_lightning.memory.buffer import RehearsalBuffer
from dcl_lightning.memory.config import RehearsalConfig, resolve
from dcl_lightning.memory.manager import MemoryManager
from dcl_lightning.memory.rows import Candidates
from dcl_lightning.memory.storage import RowStore


def manager_of(scope: str, device: str = "cpu") -> MemoryManager:
    config = resolve(RehearsalConfig.of({"buffer_size": 4, "num_samples": 3, "scope": scope}), NIL.memory)
    example = torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)
    buffer = RehearsalBuffer(2, 4, "nil", "fixed", 2, RowStore(example[0], 4))
    return MemoryManager(config, buffer, SingleProcessComm(), 2, example, torch.device(device))


def offer(value: float) -> Candidates:
    return Candidates(torch.full((2, 2), float(value)), torch.tensor([0, 1]), torch.tensor([-1, -1]))


@pytest.mark.parametrize(("scope", "drawn"), [("local", [2, 3, 3]), ("global", [0, 0, 2])])
def test_what_a_step_can_draw(scope: str, drawn: list[int]) -> None:
    """Candidates enter before a local draw; a global one is of what was there when the exchange before began."""
    manager = manager_of(scope)
    found = [manager.advance(offer(step), draw=True) for step in range(3)]
    assert [len(representatives.labels) for representatives in found if representatives] == drawn
    assert manager.advance(offer(9), draw=False) is None


@pytest.mark.parametrize(
    ("scope", "names"),
    [
        ("local", ["rehearsal.insert", "rehearsal.draw"]),
        ("global", ["rehearsal.draw", "rehearsal.insert", "rehearsal.exchange"]),
    ],
)
def test_stages_have_names_in_a_profile_of_a_gpu(scope: str, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range", lambda name: seen.append(name) or nullcontext())
    manager_of(scope).advance(offer(0), draw=True)
    assert seen == []
    manager_of(scope, "cuda").advance(offer(0), draw=True)
    assert seen == names


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types_do_not_depend_on_the_default_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ``bf16-true`` a step sets that for all threads, also for the one that draws meanwhile."""
    manager = manager_of("local")
    monkeypatch.setattr(manager, "config", resolve(RehearsalConfig(buffer_size=4, num_samples=3)))
    rows = offer(1)
    torch.set_default_dtype(dtype)
    try:
        drawn = manager.advance(rows, draw=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert drawn is not None
    assert drawn.weights.dtype == torch.float32
    assert drawn.weight_share == len(drawn.weights) == 2
