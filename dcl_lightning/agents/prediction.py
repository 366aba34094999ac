"""What ``predict`` returns: original labels and probabilities, for our batches and for those of any loader."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcl_lightning.data import transforms
from dcl_lightning.types import Batch

__all__ = ["Inference", "Prediction"]


class Prediction(NamedTuple):
    """Of a batch of B samples.

    Args:
        labels: B predicted labels as they stand in the data; model ids if the agent has never seen these.
        class_ids: ``(B,)`` int64, their model ids.
        probabilities: ``(B, K)`` float32, softmax of the agent's scores, a column for each model id; 0 for classes not
            seen. Of agents that go by distances they rank classes, and say nothing of how often one is right.
        sample_ids: ``(B,)`` int64, indices in the data set; -1 where the loader does not tell.
    """

    labels: list[int | str]
    class_ids: Tensor
    probabilities: Tensor
    sample_ids: Tensor


class Inference:
    """What an agent has to know of its data to predict without them: labels, and how images become inputs."""

    def __init__(self) -> None:
        self.labels: list[int | str] = []
        self.normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def note(self, data: Any) -> None:
        """Take it from the data module; what is no ``ContinualDataModule`` leaves all as it is."""
        if getattr(data, "original_labels", None):
            labels = [label if isinstance(label, str) else int(label) for label in data.original_labels]
            self.labels = max(self.labels, labels, key=len)  # those learnt before keep their places
            self.normalisation = data.normalisation

    def state_dict(self) -> dict[str, Any]:
        """Return it as lists, numbers and strings."""
        return {"labels": list(self.labels), "normalisation": self.normalisation}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        self.labels, normalisation = list(state_dict["labels"]), state_dict["normalisation"]
        self.normalisation = None if normalisation is None else (tuple(normalisation[0]), tuple(normalisation[1]))

    def batch(self, batch: Any) -> Batch:
        """Return any loader's batch as one of ours.

        Args:
            batch: ours; or inputs ``(B, ...)``, alone or first of a sequence. uint8 images are normalised as in
                training; what is floating has to be so already.
        """
        if isinstance(batch, Batch):
            return batch
        inputs = batch if isinstance(batch, Tensor) else batch[0]
        if inputs.dtype == torch.uint8 and self.normalisation is not None:
            inputs = transforms.normalise(inputs, *self.normalisation)
        inputs = transforms.to_float(inputs)
        none = torch.full((len(inputs),), -1, device=inputs.device)
        ones = torch.ones(len(inputs), device=inputs.device)
        return Batch(inputs, none, none, none, ones, ones.sum(), none, len(inputs))

    def prediction(self, scores: Tensor, batch: Batch) -> Prediction:
        """Return what the scores say.

        Args:
            scores: ``(B, K)``, highest for the predicted class; -inf for classes not seen.
            batch: the samples.
        """
        ids = scores.argmax(1)
        labels: list[int | str] = [self.labels[i] if self.labels else i for i in ids.tolist()]
        return Prediction(labels, ids, scores.float().softmax(1), batch.sample_ids)
