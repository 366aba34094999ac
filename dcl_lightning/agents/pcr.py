"""PCR, proxy-based contrastive replay.

Lin, Zhang, Feng, Li and Ye, "PCR: Proxy-based Contrastive Replay for Online Class-Incremental Continual Learning", CVPR
2023, arXiv 2304.04408.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcl_lightning._lightning import datamodule_of
from dcl_lightning.agents.replay import RehearsingAgent
from dcl_lightning.errors import ConfigurationError, check_number
from dcl_lightning.functional.losses import proxy_contrastive
from dcl_lightning.memory.config import RehearsalConfig
from dcl_lightning.types import Batch

__all__ = ["PCR"]


class PCR(RehearsingAgent):
    """Draws each sample to the vector of its class, its proxy, among the proxies of the samples in the batch.

    New samples and representatives are anchors alike. A class is in the loss as often as it has samples in the step, on
    all workers, and not at all without any, so that no step pushes a class down that it does not rehearse. Workers add
    up K numbers a step for that: N workers have the loss of one process with the N-fold batch. The head, of cosines
    over the temperature, predicts.

    Where ``data.augment`` or ``data.transform`` changes images, a step trains on two views of each sample: as
    evaluation sees it, and as training does. Without ``lr`` and ``optimizer`` the rate is the program's, 0.1. The
    paper's program (github.com/FelixHuiweiLin/PCR) has new samples and representatives in passes of their own,
    ``forward: separate``, and does not train in the first step, whose memory is empty; here that step is trained on.

    Args:
        *args: arguments of ``RehearsingAgent``, by place.
        temperature: what cosines are divided by, above 0.
        **kwargs: arguments of ``RehearsingAgent``, by name.

    Raises:
        ConfigurationError: the temperature is out of range.
    """

    boundaries = ("known", "hidden")
    short_name = "pcr"
    papers = ("lin2023",)
    fixed_arguments = ("head", "head_scale")  # cosines over the temperature
    memory = RehearsalConfig(num_samples=10)
    two_views = True
    sgd_lr = 0.1

    def __init__(self, *args: Any, temperature: float = 0.09, **kwargs: Any) -> None:
        check_number("model.temperature", temperature, above=0)
        super().__init__(*args, head="cosine", head_scale=1 / temperature, **kwargs)
        self.temperature = temperature
        self._views_differ = False

    def setup(self, stage: str) -> None:
        """Note whether there are two views; refuse a memory that has only one of them.

        Raises:
            ConfigurationError: with the remedy.
        """
        super().setup(stage)
        if stage != "fit":
            return
        self._views_differ = datamodule_of(self.trainer).augments
        if self._views_differ and self.rehearsal.config.row_format == "augmented":
            raise ConfigurationError(
                f"rehearsal.row_format=augmented stores no image as it came, of which agent {type(self).__name__} "
                "takes both views: give row_format=inputs or index, or data without augmentation"
            )

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the mean over all views of the samples of all workers, and the logits of the views of training."""
        new, old = batch.num_new, len(batch.targets) - batch.num_new
        if self._views_differ:
            batch = _both_views(batch)
        logits = self.outputs(batch)
        loss = proxy_contrastive(logits, batch.targets, self.class_counts(batch), batch.weights, batch.normalizer)
        return loss, torch.cat([logits[:new], logits[batch.num_new :][:old]])


def _both_views(batch: Batch) -> Batch:
    """Return a batch of both views, those of new samples first, and of each kind the views of training first."""
    new = batch.num_new

    def joined(rows: Tensor, others: Tensor) -> Tensor:
        return torch.cat([rows[:new], others[:new], rows[new:], others[new:]])

    assert batch.plain is not None
    return batch._replace(
        inputs=joined(batch.inputs, batch.plain),
        targets=joined(batch.targets, batch.targets),
        weights=joined(batch.weights, batch.weights),
        normalizer=2 * batch.normalizer,
        num_new=2 * new,
    )
