"""Samples that a scenario's transformations make from a data set, task by task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dcl_lightning.data.transforms import draws
from dcl_lightning.types import Batch

__all__ = ["TransformedInputs"]


class TransformedInputs:
    """The samples of a split, in the place of a tensor ``(n, C, H, W)`` float32.

    uint8 images become Pillow's before they are transformed, as continuum does it; float samples are transformed as
    they are. Draws of random transformations come from torch's generator, seeded for each sample by its id and in
    training by seed and epoch, so that they repeat; the generator is then put back.

    Args:
        base: ``(m, C, H, W)`` uint8 or float32, what is transformed.
        rows: ``(n,)`` int64, place in ``base`` of each sample.
        tasks: ``(n,)`` int64, task of each sample.
        transforms: for each task what is applied in turn.
    """

    def __init__(
        self, base: Tensor, rows: Tensor, tasks: Tensor, transforms: Sequence[Sequence[Callable[[Any], Any]]]
    ) -> None:
        self.base, self.rows, self.tasks = base, rows, tasks
        self.transforms = transforms
        kept = torch.get_rng_state()
        self.shape = (len(rows), *(self._sample(0, 0).shape if len(rows) else base.shape[1:]))
        torch.set_rng_state(kept)

    def __len__(self) -> int:
        return len(self.rows)

    def fill(self, batches: Iterable[Batch], key: tuple[int, int] | None = None) -> Iterator[Batch]:
        """Yield batches with their inputs ``(B, C, H, W)`` float32.

        Args:
            batches: batches of which ``sample_ids`` and ``draw_ids`` are read.
            key: seed and epoch of training's draws; None in evaluation, whose draws are the same each time.
        """
        for batch in batches:
            seeds = draws(batch.draw_ids, *(key or (0, 0)), 3, 1 << 31).tolist()
            kept = torch.get_rng_state()
            samples = [self._sample(row, seed) for row, seed in zip(batch.sample_ids.tolist(), seeds, strict=True)]
            torch.set_rng_state(kept)
            yield batch._replace(inputs=torch.stack(samples) if samples else torch.empty((0, *self.shape[1:])))

    def _sample(self, row: int, seed: int) -> Tensor:
        from torchvision.transforms.functional import to_pil_image, to_tensor

        # ``torch.manual_seed`` would seed the devices, too.
        torch.default_generator.manual_seed(seed)
        sample: Any = self.base[self.rows[row]].clone()  # a transformation may write into what it is given
        if sample.dtype == torch.uint8:
            sample = to_pil_image(sample)
        for transform in self.transforms[int(self.tasks[row])]:
            sample = transform(sample)
        return (sample if isinstance(sample, Tensor) else to_tensor(sample)).to(torch.float32)
