"""A blurry stream on two workers, with fixed shards and with shards of each epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from dcl_lightning import ER, NIL, ContinualDataModule, FineTuning
from dcl_lightning.backbones import MLP
from dcl_lightning.types import Batch
from tests.distributed.programs.place import flat, rank
from tests.distributed.toy import trainer


def shards(folder: Path) -> None:
    """Leave in ``RANK.pt`` what this worker met and stored for each way of sharding and of filling the memory."""
    torch.set_num_threads(1)
    ways = (("fixed", "step"), ("fixed", "task_end"), ("epoch", "step"))
    torch.save({way: run(folder, *way) for way in ways}, folder / f"{rank()}.pt")


def run(folder: Path, sharding: str, update: str) -> dict[str, Any]:
    """Fit, and return what is to be compared."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(6).repeat(8)[:-1]
    x = torch.randn(6, 1, 4, 4, generator=g)[y] * 2 + torch.randn(len(y), 1, 4, 4, generator=g)
    options: Any = {"sharding": sharding}
    data = ContinualDataModule(
        (x, y, x.clone(), y.clone()), scenario="blurry", blurriness=0.3, val_ratio=0.2, batch_size=3,
        class_order="random", seed=1, **options,
    )  # fmt: skip
    pl.seed_everything(0)
    config = {"buffer_size": 36, "num_samples": 2, "policy": "class_balanced", "update": update}
    agent = NIL(MLP([8]), 6, config, epochs_per_task=2, input_spec=data.input_spec)
    met: list[Tensor] = []
    inner = agent.training_loss

    def spy(batch: Batch) -> tuple[Tensor, Tensor]:
        new = batch.sample_ids[: batch.num_new]
        met.append(new[batch.weights[: batch.num_new] > 0])
        return inner(batch)

    agent.training_loss = spy  # type: ignore[method-assign]  # records what it is given
    job = pl.Trainer(
        strategy="horovod", devices=2, accelerator="cpu", logger=False, default_root_dir=folder,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    job.fit(agent, datamodule=data)
    manager: Any = agent.rehearsal.manager
    rows = manager.buffer.store.gather(manager.buffer.slots_at(torch.arange(len(manager.buffer))))
    stream: Any = data.stream
    return {
        "stored": rows["sample_ids"], "met": torch.cat(met), "parts": stream.train_parts,
        "held": torch.nonzero(stream.held).flatten(), "labels": data.original_labels, "weights": flat(agent),
        "matrix": agent.clock.matrix.compute(),
    }  # fmt: skip


def held_out_run(folder: Path, strategy: str, batch_size: int) -> None:
    """Leave in ``STRATEGY{RANK}.pt`` the accuracy matrix of a fit that is evaluated on hold-outs."""
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    y = torch.arange(6).repeat(11)
    x = torch.randn(6, 1, 4, 4, generator=g)[y] + torch.randn(len(y), 1, 4, 4, generator=g)
    data = ContinualDataModule((x, y, x[:6], y[:6]), val_ratio=0.4, evaluate_on="held_out", batch_size=batch_size)
    pl.seed_everything(0)
    agent = FineTuning(MLP([8]), 6, epochs_per_task=2, input_spec=data.input_spec)
    job = trainer(strategy, 2 if strategy == "horovod" else 1, max_epochs=-1, default_root_dir=folder)
    job.fit(agent, datamodule=data)
    torch.save(agent.clock.matrix.compute(), folder / f"{strategy}{job.global_rank}.pt")


def passes_run(folder: Path, strategy: str, batch_size: int) -> None:
    """Leave in ``STRATEGY{RANK}.pt`` what fits with three passes have met, without and with a global memory."""
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    y = torch.arange(6).repeat(7)
    x = torch.randint(0, 256, (len(y), 1, 6, 6), generator=g, dtype=torch.uint8)
    found: dict[str, Any] = {}
    for rehearses in (False, True):
        data = ContinualDataModule((x, y, x, y), batch_size=batch_size, passes=3, augment=True)
        pl.seed_everything(0)
        sizes: Any = {"num_classes": 6, "input_spec": data.input_spec}
        memory = {"buffer_size": 12, "num_samples": 2, "scope": "global", "execution": "blocking"}
        agent = ER(MLP([8]), rehearsal=memory, **sizes) if rehearses else FineTuning(MLP([8]), **sizes)
        batches: list[Batch] = []
        inner = agent.training_loss

        def spy(batch: Batch, inner: Any = inner, batches: list[Batch] = batches) -> tuple[Tensor, Tensor]:
            batches.append(batch)
            return inner(batch)

        agent.training_loss = spy  # type: ignore[method-assign]  # records what it is given
        job = trainer(strategy, 2 if strategy == "horovod" else 1, max_epochs=-1, default_root_dir=folder)
        job.fit(agent, datamodule=data)
        if isinstance(agent, ER):
            manager: Any = agent.rehearsal.manager
            found["rehearsed"] = [batch.sample_ids[batch.num_new :].tolist() for batch in batches]
            found |= {"rehearsing": flat(agent), "offered": int(manager.buffer.offered.sum())}
        else:
            found |= {"weights": flat(agent), "new": [b.sample_ids[b.weights > 0].tolist() for b in batches]}
    torch.save(found, folder / f"{strategy}{job.global_rank}.pt")
