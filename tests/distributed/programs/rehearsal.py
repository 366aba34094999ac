"""Rehearsal on two workers: recorded runs of every scope and execution, and one memory over several fits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from dcl_lightning import ContinualDataModule, Rehearsal, RehearsalConfig
from dcl_lightning.agents.short_names import nil, nil_global
from dcl_lightning.backbones import MLP
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.types import Batch
from tests.distributed import toy
from tests.distributed.programs.place import flat, rank


class Runs:
    """Fits with a memory; ``done`` has for each what it trained on and what it ended with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: dict[str, Any] = {}

    def fit(
        self, name: str, kind: type[nil] | type[nil_global] = nil, callbacks: Sequence[pl.Callback] = (),
        ckpt: Path | None = None, seed: int = 0, **config: Any,
    ) -> None:  # fmt: skip
        """Task 0 has one sample: worker 1 pads, and its memory stays empty. Task 1 has 15, task 2 has 14."""
        pl.seed_everything(seed)
        g = torch.Generator().manual_seed(0)
        y = torch.tensor([0] + [1] * 8 + [2] * 7 + [3] * 5 + [4] * 5 + [5] * 4)
        x = torch.randn(6, 1, 4, 4, generator=g)[y] * 2 + torch.randn(len(y), 1, 4, 4, generator=g)
        data = ContinualDataModule((x, y, x.clone(), y.clone()), increment=[1, 2, 3], batch_size=3, seed=0)
        options: dict[str, Any] = {}
        if config or kind is nil:
            config = {"buffer_size": 13, "num_candidates": 2, "num_samples": 4} | config
            if config.get("policy") == "reservoir":
                config["num_candidates"] = None
            options["rehearsal"] = RehearsalConfig(**config)
        agent = kind(
            MLP([8]), data.num_classes, epochs_per_task=2, lr=0.05, momentum=0.9, input_spec=data.input_spec, **options
        )
        first, steps, inner = flat(agent), [], agent.training_loss

        def spy(batch: Batch) -> tuple[Tensor, Tensor]:
            loss, logits = inner(batch)
            manager: Any = agent.rehearsal.manager
            epoch = agent.trainer.current_epoch
            steps.append(
                {"epoch": epoch, "task": agent.clock.task_at(epoch), "loss": loss.detach().clone(),
                 "stored": len(manager.buffer), **batch._asdict()}
            )  # fmt: skip
            return loss, logits

        agent.training_loss = spy  # type: ignore[method-assign]  # records what it is given
        pl.Trainer(
            strategy="horovod", devices=2, accelerator="cpu", logger=False, default_root_dir=self.folder,
            callbacks=list(callbacks), enable_checkpointing=bool(callbacks), enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        ).fit(agent, datamodule=data, ckpt_path=ckpt)  # fmt: skip
        manager: Any = agent.rehearsal.manager
        buffer = manager.buffer
        rows = buffer.store.gather(buffer.slots_at(torch.arange(len(buffer))))
        self.done[name] = {
            "first": first, "steps": steps, "state": {k: v.clone() for k, v in agent.state_dict().items()},
            "weights": flat(agent), "manager": manager.state_dict(), "capacity": buffer.store.capacity,
            "rows": rows, "ids": rows["sample_ids"],
        }  # fmt: skip


def runs(folder: Path) -> None:
    """Leave all runs in ``RANK.pt``."""
    torch.set_num_threads(1)
    made = Runs(folder)
    made.fit("global inline", scope="global")
    made.fit("global blocking", scope="global", execution="blocking")
    made.fit("global none", scope="global", execution="blocking", weighting="none", policy="reservoir")
    made.fit("local none", weighting="none")
    made.fit("local sum", weighting="none", loss="sum", execution="blocking")
    made.fit("preset", kind=nil_global)
    configs: dict[str, dict[str, Any]] = {"global": {"scope": "global", "execution": "blocking"}, "local": {}}
    for name, config in configs.items():
        saver = ModelCheckpoint(folder / name, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        made.fit(f"{name} saved", callbacks=[saver], **config)
        for step in (4, 8, 10):
            made.fit(f"{name} from {step}", ckpt=folder / name / f"step={step}.ckpt", seed=5, **config)
    with pytest.raises(ConfigurationError) as error:
        made.fit("refused", scope="global", execution="nonblocking")
    made.done["refused"] = str(error.value)
    torch.save(made.done, folder / f"{rank()}.pt")


class Numbered(toy.Toy):
    """Looks at inputs that name their sample: 100 times the task, plus a number that is k mod 2 on worker k."""

    def __init__(self) -> None:
        super().__init__()
        self.start(0)

    def start(self, task: int) -> None:
        """Begin another task."""
        self.task = task
        self.drawn: list[list[tuple[int, int]]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Record task and worker of each rehearsed row."""
        tasks = (batch[0][:, 0] // 100).long()
        numbers = batch[0][:, 0].long() % 100
        assert torch.equal(batch[1][:, 0], batch[0][:, 0] * 2)
        assert (tasks[:4] == self.task).all()
        assert (numbers[:4] % 2 == rank()).all()
        self.drawn.append(list(zip(tasks[4:].tolist(), (numbers[4:] % 2).tolist(), strict=True)))
        loss: Tensor = self.net(batch[0] / 300).square().mean()
        return loss


def several_fits() -> None:
    """One memory over a fit for each task: later fits meet what the fits before have stored."""
    torch.set_num_threads(1)
    ways: list[dict[str, Any]] = [
        {"scope": "local", "execution": "inline"},
        {"scope": "local", "execution": "blocking"},
        {"scope": "global", "execution": "blocking"},
    ]
    for way in ways:
        memory = Rehearsal(
            RehearsalConfig(buffer_size=24, num_samples=6, policy="reservoir", weighting="none", seed=1, **way)
        )
        module, stored = Numbered(), []
        for task in range(3):
            module.start(task)
            inputs = (100.0 * task + torch.arange(40.0)[rank() :: 2])[:, None].repeat(1, 5)
            loader = DataLoader(TensorDataset(inputs, inputs[:, :1] * 2), batch_size=4)
            toy.trainer("horovod", max_epochs=1, callbacks=[memory]).fit(module, loader)
            manager: Any = memory.manager
            buffer = manager.buffer
            rows, _ = buffer.store.gather(buffer.slots_at(torch.arange(len(buffer))))
            stored.append(set((rows[:, 0] // 100).long().tolist()))
            assert len(buffer) == 12
            assert (rows[:, 0].long() % 2 == rank()).all()
            if task:
                assert {t for t, _ in module.drawn[0]} <= set(range(task))
                assert all(len(step) == 6 for step in module.drawn)
            owners = {k for step in module.drawn for _, k in step}
            assert owners == ({0, 1} if way["scope"] == "global" else {rank()})
        assert stored == [{0}, {0, 1}, {0, 1, 2}]
        memory.clear()
        assert memory.manager is None
