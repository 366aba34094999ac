"""Combinations of ``tests/distributed/cells.py`` on two workers, against one process with the double batch."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dcl_lightning import ContinualDataModule
from dcl_lightning.agents import short_names
from dcl_lightning.callbacks import TaskReport
from dcl_lightning.comm import whole
from dcl_lightning.errors import ConfigurationError
from tests.distributed.cells import Cell
from tests.distributed.programs.place import elastic_ddp, elastic_fsdp2, rank

# How far weights may be from those of one process, as a share of the way from the initial ones.
TOLERANCES = {"32-true": 1e-4, "bf16-mixed": 0.05, "16-mixed": 0.01}
WORKERS = 2


class Smooth(nn.Sequential):
    """Has no ReLU, at whose kink a rounding error decides on the whole gradient of a sample."""

    feature_dim = 8

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(16, self.feature_dim), nn.Tanh())


def run(folder: Path, given: Sequence[Sequence[Any]], repeated: bool = False) -> None:
    """Run combinations; worker 0 writes a line for each into ``found.json``, with what is wrong with it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # torch.distributed once started, there is no one process any more.
    order = ("auto", "horovod", "ddp", "fsdp2")
    cells = sorted((Cell(*values) for values in given), key=lambda cell: order.index(cell.strategy))
    eager = [cell._replace(strategy="auto", compile=False) for cell in cells if cell.reason is None]
    alone = [cell for cell in cells if cell.strategy == "auto"]
    for number, cell in enumerate(dict.fromkeys([*eager, *alone])):
        if number % WORKERS == rank():
            file = _file(folder, cell)
            torch.save(fit(folder, cell), file.with_suffix(".part"))
            file.with_suffix(".part").rename(file)
    for cell in cells:
        start = time.monotonic()
        fault, apart = _examine(folder, cell)
        if rank() == 0:
            with (folder / "found.json").open("a") as found:
                line = {"cell": cell, "fault": fault, "apart": apart, "seconds": round(time.monotonic() - start, 1)}
                found.write(json.dumps(line) + "\n")


def _file(folder: Path, cell: Cell) -> Path:
    return folder / ("-".join(map(str, cell)) + ".pt")


def _alone(folder: Path, cell: Cell) -> tuple[Tensor, Tensor, Tensor]:
    end = time.monotonic() + 120
    while not _file(folder, cell).exists() and time.monotonic() < end:
        time.sleep(0.05)
    found: tuple[Tensor, Tensor, Tensor] = torch.load(_file(folder, cell), weights_only=True)
    return found


# Of these no one process has the same draws: they are compared with the first strategy that ran on two workers.
_ACROSS_WORKERS: dict[Cell, tuple[Tensor, Tensor, Tensor]] = {}


def _examine(folder: Path, cell: Cell) -> tuple[str | None, float | None]:
    """Return what is wrong, None if nothing is; and how far the weights are from one process's."""
    if cell.reason is not None:
        try:
            fit(folder, cell)
        except ConfigurationError as error:
            return None if str(error) == cell.reason else f"refused by: {error}", None
        return "not refused", None
    reference = cell._replace(strategy="auto", compile=False)
    found = _alone(folder, cell) if cell.strategy == "auto" else fit(folder, cell)
    expected = _alone(folder, reference)
    if cell.agent == "nil_global" and cell.strategy != "auto":
        expected = _ACROSS_WORKERS.setdefault(reference, found)
    initial, weights, matrix = found
    if not torch.equal(initial, expected[0]):
        return "other initial weights", None
    way = float((expected[1] - initial).norm())
    apart = float((weights - expected[1]).norm()) / way
    if cell.agent == "nil_v2":  # whether the memory was ready in time differs from run to run
        return None if way > 0.1 and bool(weights.isfinite().all()) else "no training", None
    tolerance = TOLERANCES[cell.precision]
    if cell.agent == "mir" and cell.precision != "32-true":  # rounding decides between samples of nearly equal loss
        tolerance = 0.1
    if not apart <= tolerance:
        return f"{apart:.2g} of the way from the weights of one process", apart
    if cell.precision == "32-true" and not torch.equal(matrix.nan_to_num(-1), expected[2].nan_to_num(-1)):
        return "another accuracy matrix", apart
    return None, apart


def _strategy(name: str) -> str | Strategy:
    return elastic_ddp() if name == "ddp" else elastic_fsdp2() if name == "fsdp2" else name


def fit(folder: Path, cell: Cell) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights before and after, and the matrix."""
    pl.seed_everything(0, verbose=False)
    workers = 1 if cell.strategy == "auto" else WORKERS
    g = torch.Generator().manual_seed(0)
    y = torch.cat([torch.arange(6).repeat(9), torch.tensor([0])])
    x = torch.randn(6, 1, 4, 4, generator=g)[y] * 2 + torch.randn(len(y), 1, 4, 4, generator=g)
    name = cell.agent
    data = ContinualDataModule(
        (x, y, x.clone(), y.clone()), increment=2, batch_size=8 // workers, seed=0, augment=name in ("scr", "pcr"),
        concatenate_tasksets=name == "cumulative", scenario="none" if name == "joint" else "class",
    )  # fmt: skip
    kind = getattr(short_names, name)
    options: dict[str, Any] = {"epochs_per_task": 2}
    if hasattr(kind, "memory"):
        # Room for every sample, and all are drawn; in one epoch each comes once.
        memory: dict[str, Any] = {"buffer_size": 216, "num_samples": 108}
        if name.startswith("nil"):
            memory["num_candidates"] = 8 // workers
        options = {"epochs_per_task": 1, "rehearsal": memory}
    elif kind.rehearses:
        options["rehearsal"] = {"buffer_size": 216}
    if name == "mir":
        options["num_rehearsed"] = 6 // workers
    if name == "ranpac":
        options["projection_dim"] = 12
    compile = {"backend": "aot_eager"} if cell.compile else False
    torch.compiler.reset()  # after some networks PyTorch gives up, and computes without compilation
    counters.clear()
    agent = kind(Smooth(), data.num_classes, lr=0.05, input_spec=data.input_spec, compile=compile, **options)
    before = weights_of(agent)
    precision: dict[str, Any] = {"precision": cell.precision}
    if cell.precision == "16-mixed":  # as on a GPU; Lightning's own choice on a CPU is bf16-mixed
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        precision = {"plugins": MixedPrecision("16-mixed", "cpu", scaler)}
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0, devices=workers,
        callbacks=[TaskReport(show_table=False)], default_root_dir=folder, strategy=_strategy(cell.strategy),
        accumulate_grad_batches=2 if cell.accumulate else 1, **precision,
    )  # fmt: skip
    trainer.fit(agent, datamodule=data)
    assert trainer.world_size == workers
    assert bool(counters["frames"]["ok"]) == cell.compile
    return before, weights_of(agent), agent.clock.matrix.compute()


def weights_of(agent: Any) -> Tensor:
    """Return all weights that are trained, or computed at the ends of tasks, as one vector."""
    found = [p for p in agent.parameters() if p.requires_grad]
    found += [b for n, b in agent.named_buffers() if n in ("coefficients", "offsets")]
    return torch.cat([whole(value.detach()).flatten().float().clone() for value in found])
