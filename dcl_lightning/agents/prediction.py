"""What ``predict`` returns: original labels and probabilities, for our batches and for those of any loader."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dcl_lightning.data import ContinualDataModule, transforms
from dcl_lightning.types import Batch, InputSpec, NetworkInputs, Prediction, StateDict

__all__ = ["Inference"]


class Inference:
    """What an agent has to know of its data to predict without them: labels, and how images become inputs."""

    def __init__(self) -> None:
        self.labels: list[int | str] = []
        self.network: NetworkInputs | None = None
        self.normalisation: transforms.Normalisation | None = None

    def note(self, data: object) -> None:
        """Take them from a ``ContinualDataModule`` after its set-up; any other data module changes nothing."""
        if isinstance(data, ContinualDataModule) and data.original_labels:
            labels = [label if isinstance(label, str) else int(label) for label in data.original_labels]
            self.labels = max(self.labels, labels, key=len)  # those learnt before keep their places
            self.network, self.normalisation = data.network, data.normalisation

    def state_dict(self) -> StateDict:
        """Return them as lists, numbers and strings."""
        network = self.network and (*self.network.spec, self.network.interpolation)
        return {"labels": list(self.labels), "normalisation": self.normalisation, "network": network}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore them."""
        self.labels, normalisation = list(state_dict["labels"]), state_dict["normalisation"]
        self.normalisation = None if normalisation is None else (tuple(normalisation[0]), tuple(normalisation[1]))
        network = state_dict.get("network")  # absent in older checkpoints
        self.network = network and NetworkInputs(InputSpec(*network[:3]), network[3])

    def batch(self, batch: Batch | Tensor | Sequence[Tensor]) -> Batch:
        """Return any loader's batch as one of ours.

        Args:
            batch: ours; or inputs ``(B, ...)``, alone or first of a sequence. uint8 images are resized and normalised
                as in training; what is floating has to be so already.
        """
        if isinstance(batch, Batch):
            return batch
        inputs = batch if isinstance(batch, Tensor) else batch[0]
        if inputs.dtype == torch.uint8:
            inputs = transforms.as_network_takes(inputs, self.network, self.normalisation)
        inputs = transforms.to_float(inputs)
        none = torch.full((len(inputs),), -1, device=inputs.device)
        ones = torch.ones(len(inputs), device=inputs.device)
        return Batch(inputs, none, none, none, ones, ones.sum(), none, len(inputs))

    def prediction(self, scores: Tensor, batch: Batch) -> Prediction:
        """Return the prediction that scores stand for.

        Args:
            scores: ``(B, K)``, highest for the predicted class; -inf for classes not seen.
            batch: the samples.
        """
        ids = scores.argmax(1)
        labels: list[int | str] = [self.labels[i] if self.labels else i for i in ids.tolist()]
        return Prediction(labels, ids, scores.float().softmax(1), batch.sample_ids, batch.targets)
