"""A small data set whose inputs encode their sample ids, and what follows from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcl_lightning import ContinualDataModule
from tests.conformance.lattice.draws import Draw, value_of

_DIGIT = 8  # an id is written with a digit in each of the three channels


class Truth:
    """A small data set whose inputs tell the samples' ids, and what follows of them.

    Attributes:
        inputs: ``(n, 3, side, side)`` uint8 or float32, the same within each channel.
        labels: ``(n,)`` int64; model ids are the same, as classes come in ascending order.
        tasks: ``(n,)`` int64 where the scenario is ``class``, ``given`` or ``none``, so that it follows from the
            arrays; None else.
    """

    def __init__(self, drawn: Draw) -> None:
        def get(axis: str) -> Any:
            return value_of(drawn, axis)

        rng = np.random.default_rng(get("seed"))
        self.num_classes, num_tasks, batch = get("num_classes"), get("num_tasks"), get("batch_size")
        self.scenario = get("scenario")
        per_task = self.num_classes // num_tasks
        home = np.minimum(np.arange(self.num_classes) // per_task, num_tasks - 1)
        equal = get("sizes") == "equal"
        counts = np.full(self.num_classes, 7) if equal else rng.integers(4, 11, self.num_classes)
        if get("one_row_left"):
            for task in range(num_tasks):
                counts[np.flatnonzero(home == task)[-1]] += (1 - counts[home == task].sum()) % batch
        self.labels = torch.from_numpy(rng.permutation(np.repeat(np.arange(self.num_classes), counts)))
        ids = torch.arange(len(self.labels))
        side = 9 if get("augment") else 2
        self.side, self.batch_size = side, batch
        self.inputs = self._written(ids, get("inputs"))
        self.increment = [int((home == task).sum()) for task in range(num_tasks)]
        self.num_tasks = 1 if self.scenario == "none" else num_tasks
        self.tasks: Tensor | None = None
        if self.scenario == "class":
            self.tasks = torch.from_numpy(home)[self.labels]
        elif self.scenario == "given":
            # Classes come again: each task has all of them but one.
            self.tasks = torch.from_numpy(rng.integers(0, num_tasks, len(ids)))
            for task in range(num_tasks):
                self.tasks[task] = task
        elif self.scenario == "none":
            self.tasks = torch.zeros_like(self.labels)
        tests = torch.arange(2 * self.num_classes)
        self.test_labels = tests % self.num_classes
        self.test_inputs = self._written(tests, get("inputs"))
        self.test_tasks = torch.arange(len(tests)) % num_tasks

    def _written(self, ids: Tensor, kind: str) -> Tensor:
        digits = torch.stack([ids // _DIGIT**place % _DIGIT for place in range(3)], 1)
        pixels = digits[:, :, None, None].expand(-1, -1, self.side, self.side)
        self._scale, self._shift = (255 / 32, 0.0) if kind == "uint8" else (4.0, 1.0)
        return (pixels * 32).to(torch.uint8) if kind == "uint8" else pixels / 4.0 - 1.0

    def ids_of(self, inputs: Tensor) -> Tensor:
        """Return the ids that are written into inputs, as the network or the memory has them; -1 where none is."""
        middle = inputs[..., self.side // 2, self.side // 2].detach().cpu()
        digits = middle.double() / 32 if middle.dtype == torch.uint8 else (middle.double() + self._shift) * self._scale
        near = digits.round()
        right = ((digits - near).abs() < 0.05).all(1) & (near >= 0).all(1) & (near < _DIGIT).all(1)
        ids = (near.long() * _DIGIT ** torch.arange(3)).sum(1)
        return torch.where(right & (ids < len(self.labels)), ids, -1)

    def as_the_network_gets(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return inputs that are not augmented."""
        found = self.inputs[ids]
        return (found.float() / 255 if found.dtype == torch.uint8 else found).to(dtype)

    def datamodule(self, drawn: Draw, seed: int) -> ContinualDataModule:
        """Return a fresh data module."""
        splits: tuple[Any, ...] = (self.inputs, self.labels, self.test_inputs, self.test_labels)
        if self.scenario == "given":
            splits = (self.inputs, self.labels, self.tasks, self.test_inputs, self.test_labels, self.test_tasks)
        return ContinualDataModule(
            splits,
            scenario=self.scenario,
            **({"increment": self.increment} if self.scenario in ("class", "blurry") else {}),
            **({"blurriness": 0.3} if self.scenario == "blurry" else {}),
            **({"num_tasks": self.num_tasks} if self.scenario == "domain" else {}),
            class_order=list(range(self.num_classes)),
            seed=seed,
            eval_batch_size=6,
            validate_on=None if value_of(drawn, "val_ratio") else "test",
            **{
                name: value_of(drawn, name)
                for name in ("boundaries", "batch_size", "val_ratio", "sharding", "concatenate_tasksets", "augment")
            },
        )
