"""One callback adds a memory to a Lightning module without continual learning.

python embedding.py

The digits of MNIST arrive class after class, as if the data were collected over time. The module and its loaders are
ordinary Lightning code; only the marked lines are new.
"""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, default_collate
from torchmetrics.classification import MulticlassAccuracy
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor

from dcl_lightning import Rehearsal, RehearsalConfig  # new


class DigitClassifier(pl.LightningModule):
    """A small classifier for MNIST whose batches are tuples (images, labels)."""

    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 64), nn.ReLU(), nn.Linear(64, 10))
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Any:
        return self.network(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("test_accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])


class DigitClassifierOfDicts(DigitClassifier):
    """The same classifier for batches that are dicts."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch["image"], batch["label"]), batch_idx)


def dicts(samples: list[Any]) -> dict[str, Tensor]:
    """Collate samples (image, label) into a dict."""
    images, labels = default_collate(samples)
    return {"image": images, "label": labels}


def digits(train: bool, collate_fn: Callable[[list[Any]], Any] | None = None) -> DataLoader[Any]:
    """Return a loader of MNIST from ``datasets``; training images come class after class."""
    images: Any = MNIST("datasets", train=train, download=True, transform=ToTensor())
    if train:
        images = Subset(images, images.targets.argsort(stable=True).tolist())
    return DataLoader(images, batch_size=32, collate_fn=collate_fn)


def run(module: pl.LightningModule, loader: DataLoader[Any], *callbacks: pl.Callback) -> float:
    """Train one epoch; return the accuracy over all test images."""
    pl.seed_everything(0)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, loader)
    (metrics,) = trainer.test(module, digits(train=False), verbose=False)
    return metrics["test_accuracy"]


def memory(label: int | str) -> Rehearsal:
    """Return a memory of 200 images, balanced over the classes; 32 of them join every batch."""
    config = RehearsalConfig(buffer_size=200, num_samples=32, policy="class_balanced")
    return Rehearsal(config, label=label, num_classes=10)


if __name__ == "__main__":
    print(f"as it was: {run(DigitClassifier(), digits(train=True)):.2f}")
    print(f"with a memory: {run(DigitClassifier(), digits(train=True), memory(label=1)):.2f}")  # new
    loader = digits(train=True, collate_fn=dicts)
    print(f"the same, of dicts: {run(DigitClassifierOfDicts(), loader, memory(label='label')):.2f}")  # new
