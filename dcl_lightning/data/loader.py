"""The loader over tensors or image files: equal numbers of steps on all workers, resumable within an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from dcl_lightning.data.images import ImageFiles
from dcl_lightning.data.transforms import TransformedInputs
from dcl_lightning.types import Batch, StateDict

__all__ = ["Inputs", "PrefetchLoader", "TaskLoader", "draw_ids_of", "for_all"]


Inputs = Tensor | ImageFiles | TransformedInputs

_NONE = torch.empty(0)


class TaskLoader:
    """Yields the batches of one worker over some rows of a data set.

    In training the order is one permutation keyed by seed and epoch. Worker k takes every N-th row from the k-th on,
    and shorter shards are padded with rows of weight 0. So step i of N workers with batch b holds the same samples as
    step i of one worker with batch N b, unless ``owners`` assigns rows to workers. In evaluation nothing is shuffled or
    padded.

    Args:
        inputs: tensor ``(n, ...)``, images in files, or samples that a scenario transforms.
        targets: ``(n,)`` int64.
        task_ids: ``(n,)`` int64.
        batch_size: rows of a step and worker.
        indices: rows to visit, ``(m,)`` int64.
        rank: this worker, of ``size`` workers.
        train: whether to shuffle and pad.
        epoch: epoch of the whole stream; with ``seed`` it keys the order.

    Attributes:
        owners: worker of each row of the data set, ``(n,)`` int64; None if each epoch deals the rows anew.
        augment: whether training takes random crops of images in files; tensors are augmented on the device.
        passes: how many times in a row each batch is yielded, with other draws each time.
        pin_memory: whether inputs lie in page-locked memory, from which a GPU copies asynchronously.
        for_all: whether to yield one batch without rows if this worker has none and another has. Lightning refuses
            loaders of length 0, and a worker that skipped an evaluation would make the others wait.
    """

    def __init__(
        self,
        inputs: Inputs,
        targets: Tensor,
        task_ids: Tensor,
        batch_size: int,
        indices: Tensor,
        rank: int = 0,
        size: int = 1,
        train: bool = False,
        seed: int = 0,
        epoch: int = 0,
    ) -> None:
        self.inputs, self.targets, self.task_ids = inputs, targets, task_ids
        self.batch_size, self.rank, self.size, self.train, self.seed = batch_size, rank, size, train, seed
        self.indices, self.epoch = indices, epoch
        self.rehearsed, self.num_rehearsed = indices[:0], 0
        self.owners: Tensor | None = None
        self.for_all = self.augment = self.pin_memory = False
        self.passes = 1
        self._position = 0
        self._start = 0

    def visit(self, indices: Tensor, epoch: int, rehearsed: Tensor | None = None, num_rehearsed: int = 0) -> None:
        """Choose the rows and the epoch of the next iteration.

        Args:
            indices: rows to visit, ``(m,)`` int64.
            epoch: epoch of the whole stream.
            rehearsed: rows of which some join each batch, ``(e,)`` int64.
            num_rehearsed: how many join each batch of a worker, drawn without replacement; all if there are fewer.
        """
        if epoch != self.epoch:
            self._start = self._position = 0
        self.indices, self.epoch = indices, epoch
        self.rehearsed = indices[:0] if rehearsed is None else rehearsed
        self.num_rehearsed = min(num_rehearsed, len(self.rehearsed))

    def _counts(self) -> list[int]:
        if self.owners is None:
            return [len(range(rank, len(self.indices), self.size)) for rank in range(self.size)]
        return torch.bincount(self.owners[self.indices], minlength=self.size).tolist()

    def _rows(self) -> int:
        counts = self._counts()
        return max(counts) if self.train else counts[self.rank]

    def lengths(self) -> list[int]:
        """Return the number of batches of each worker."""
        return [-(-count // self.batch_size) * self.passes for count in self._counts()]

    def __len__(self) -> int:
        return max(-(-self._rows() // self.batch_size) * self.passes, int(self.for_all and len(self.indices) > 0))

    def __iter__(self) -> Iterator[Batch]:
        start, self._start = self._start, 0
        batches = self._without_inputs(start)
        inputs = self.inputs
        key = (self.seed, self.epoch) if self.train else None
        if isinstance(inputs, ImageFiles):
            filled = inputs.fill(batches, key if self.augment else None, self.pin_memory)
        elif isinstance(inputs, TransformedInputs):
            filled = inputs.fill(batches, key)
        else:
            filled = (batch._replace(inputs=_take(inputs, batch.sample_ids, self.pin_memory)) for batch in batches)
        # ``filled`` may have prefetched: the position is that of the batch yielded.
        for step, batch in enumerate(filled, start):
            self._position = step + 1
            yield batch

    def _without_inputs(self, start: int) -> Iterator[Batch]:
        counts, count, order = self._counts(), self._rows(), self.indices
        if self.train:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = order.index_select(0, torch.randperm(len(order), generator=generator))
        mine = order[self.rank :: self.size] if self.owners is None else order[self.owners[order] == self.rank]
        real = len(mine)
        if real < count:
            mine = torch.cat([mine, order[: count - real]])
        # Columns of the whole epoch, of which a batch takes slices, and one normalizer for steps of the same size: both
        # save time. Types are explicit, because in a thread the default may be the training step's precision.
        weights = torch.ones(len(mine), dtype=torch.float32)
        weights[real:] = 0
        columns = mine, self.targets[mine], self.task_ids[mine], weights
        normalizer, last_in_step = torch.zeros((), dtype=torch.float32), 0.0
        for step in range(start, len(self)):
            number, pass_index = divmod(step, self.passes)
            low = number * self.batch_size
            rows, *others = (column[low : low + self.batch_size] for column in columns)
            draw_ids, num_new = draw_ids_of(rows, pass_index), len(rows)
            in_step = float(num_new)
            if self.train:
                in_step = sum(min(max(n - low, 0), self.batch_size) for n in counts) / self.size + self.num_rehearsed
            if in_step != last_in_step:
                normalizer, last_in_step = torch.tensor(in_step, dtype=torch.float32), in_step
            if self.num_rehearsed:
                again = self._draw(step)
                # Another draw at each step: an exemplar comes again and again within one epoch.
                draw_ids = torch.cat([draw_ids, again + ((step + 1) << 32)])
                rows = torch.cat([rows, again])
                more = self.targets[again], self.task_ids[again], torch.ones(len(again), dtype=torch.float32)
                others = [torch.cat(pair) for pair in zip(others, more, strict=True)]
            targets, task_ids, row_weights = others
            yield Batch(
                inputs=_NONE,
                targets=targets,
                task_ids=task_ids,
                sample_ids=rows,
                weights=row_weights,
                normalizer=normalizer,
                draw_ids=draw_ids,
                num_new=num_new,
                passes_left=self.passes - 1 - pass_index,
            )

    def _draw(self, step: int) -> Tensor:
        key = ((self.seed * 1_000_003 + self.epoch) * 1_000_003 + step) * 1_009 + self.rank
        generator = torch.Generator().manual_seed(key % (1 << 63))
        return self.rehearsed[torch.randperm(len(self.rehearsed), generator=generator)[: self.num_rehearsed]]

    def state_dict(self) -> StateDict:
        """Return the position within the epoch."""
        return {"position": self._position, "epoch": self.epoch}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Continue from a position of the current epoch; a position of another epoch means the beginning."""
        self._start = self._position = state_dict["position"] if state_dict["epoch"] == self.epoch else 0


def draw_ids_of(rows: Tensor, pass_index: int) -> Tensor:
    """Return what the augmentation of new samples is keyed by, ``(n,)`` int64.

    Args:
        rows: ``(n,)`` int64 sample ids.
        pass_index: 0-based pass over them, of ``passes`` in a row.
    """
    return rows + (pass_index << 48) if pass_index else rows


def _take(inputs: Tensor, rows: Tensor, pin_memory: bool) -> Tensor:
    taken = torch.empty((len(rows), *inputs.shape[1:]), dtype=inputs.dtype, pin_memory=pin_memory)
    return torch.index_select(inputs, 0, rows, out=taken)


def for_all(loaders: list[TaskLoader]) -> list[TaskLoader]:
    """Return the loaders with a batch on every worker, since all workers have to run Lightning's loops."""
    for loader in loaders:
        loader.for_all = True
    return loaders


class PrefetchLoader:
    """The batches of a loader in their order, each prepared by a thread while the previous one is in use.

    Its position is that of the batch yielded last, so that a resume prepares the prefetched batch again.
    """

    def __init__(self, loader: TaskLoader) -> None:
        self.loader = loader
        self._state = loader.state_dict()

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)

        def prepare() -> tuple[Batch | None, StateDict]:
            return next(batches, None), self.loader.state_dict()

        with ThreadPoolExecutor(1, thread_name_prefix="rehearsal-load") as thread:
            ahead = thread.submit(prepare)
            while True:
                batch, self._state = ahead.result()
                if batch is None:
                    return
                ahead = thread.submit(prepare)
                yield batch

    def state_dict(self) -> StateDict:
        """Return the position of the batch yielded last."""
        return self._state

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Continue from a position."""
        self._state = state_dict
        self.loader.load_state_dict(state_dict)
