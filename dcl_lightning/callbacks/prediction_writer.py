"""Predictions as a file: one for the whole job, in the order of the data set."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BasePredictionWriter

from dcl_lightning._lightning import dev_run_batches
from dcl_lightning.comm import comm_of
from dcl_lightning.paths import absolute, replacing
from dcl_lightning.report.paths import run_folder
from dcl_lightning.screen import show
from dcl_lightning.types import Prediction, PyTree

__all__ = ["PredictionWriter"]


class PredictionWriter(BasePredictionWriter):
    """Writes what an agent predicts to ``predictions.csv``: a line for each sample, in the order of the data set.

    The columns are the sample's index, the predicted original label, the true one (empty where it is not known), and
    the probability of each class, under its original label. Worker 0 writes for all; a reader sees the old file or the
    new one, whole.

    Args:
        folder: where the file is written; the run's folder if None.
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__("epoch")
        self.folder = None if folder is None else absolute(folder)

    def write_on_epoch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Gather the predictions of all workers and write them; every worker takes part."""
        found = list(_flat(predictions))
        ids = [p.sample_ids for p in found]
        if any(bool((rows < 0).any()) for rows in ids):  # of a loader that is not ours
            ids = [torch.tensor(rows, dtype=torch.int64) for rows in _index_lists(batch_indices)]
        comm = comm_of(trainer.strategy)
        classes = [torch.stack([p.class_ids, p.targets], 1) for p in found]
        columns = [torch.cat(column) for column in (ids, classes, [p.probabilities for p in found])]
        rows, predicted, probabilities = (torch.cat(comm.allgather(column)) for column in columns)
        if not trainer.is_global_zero or dev_run_batches(trainer):
            return
        folder = Path(self.folder) if self.folder else run_folder(trainer)
        labels = getattr(getattr(pl_module, "inference", None), "labels", None) or list(range(probabilities.shape[1]))
        # A sampler may have shown a sample twice, to give each worker as many.
        order = {int(row): place for place, row in enumerate(rows.tolist())}
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "predictions.csv"
        with replacing(path) as draft, draft.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["sample", "predicted", "label", *(f"p({label})" for label in labels)])
            for row in sorted(order):
                place = order[row]
                values = [f"{p:.6g}" for p in probabilities[place].tolist()]
                given, true = predicted[place].tolist()
                writer.writerow([row, labels[given], labels[true] if true >= 0 else "", *values])
        show(f"Predictions: {path}")


def _flat(nest: PyTree) -> Iterator[Prediction]:
    """Yield the predictions of all batches, loader by loader."""
    for part in nest:
        if isinstance(part, Prediction):
            yield part
        else:
            yield from _flat(part)


def _index_lists(nest: PyTree) -> Iterator[list[int]]:
    for part in nest:
        if part and isinstance(part[0], int):
            yield part
        else:
            yield from _index_lists(part)
