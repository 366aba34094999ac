"""A tiny regression, and batches that are the same for any number of workers."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Subset, TensorDataset

SAMPLES = 64


def samples() -> TensorDataset:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(SAMPLES, 5, generator=g)
    return TensorDataset(x, x.sum(1, keepdim=True).sin())


def shard(rank: int, size: int, batch: int) -> DataLoader[tuple[Tensor, ...]]:
    """Global batches are the same whatever the number of workers; no sampler of Lightning's."""
    return DataLoader(Subset(samples(), range(rank, SAMPLES, size)), batch_size=batch)


class Toy(pl.LightningModule):
    def __init__(self, seed: int = 0, unused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
        self.flags: Tensor
        self.register_buffer("flags", torch.full((3,), seed == 0))
        self.extra = nn.ModuleList(nn.Linear(5, 1) for _ in range(2)) if unused else None

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor | None:
        out = self.net(batch[0])
        if self.extra is not None and self.global_rank == 0:
            out = out + self.extra[0](batch[0])  # worker 0 alone uses head 0, nobody head 1
        return nn.functional.mse_loss(out, batch[1])

    def on_after_backward(self) -> None:
        gradient = next(self.net.parameters()).grad
        assert gradient is not None
        self.seen = gradient.clone()

    def configure_optimizers(self) -> Optimizer | list[Optimizer]:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def trainer(strategy: str | Strategy, devices: int = 1, **options: Any) -> pl.Trainer:
    common: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 3,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    return pl.Trainer(strategy=strategy, devices=devices, **{**common, **options})


def weights(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()
