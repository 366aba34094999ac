"""Two workers that are bound to cores of their own."""

from __future__ import annotations

import os

import torch

from dcl_lightning import HorovodStrategy
from tests.distributed.programs.place import rank
from tests.distributed.toy import Toy, shard, trainer


class Looking(Toy):
    """Looks at the cores of all its threads, and compares them with those of the other worker."""

    def __init__(self) -> None:
        super().__init__()
        self.before = os.sched_getaffinity(0)

    def on_train_start(self) -> None:
        masks = {frozenset(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")}
        assert len(masks) == 1
        mine = torch.tensor(sorted(masks.pop()))
        strategy = self.trainer.strategy
        assert isinstance(strategy, HorovodStrategy)
        others = strategy.comm.allgather(mine)
        if len(self.before) > 1:
            assert not set(others[0].tolist()) & set(others[1].tolist())
        assert set(torch.cat(others).tolist()) <= self.before
        assert torch.get_num_threads() == max(1, len(mine)) == max(1, len(self.before) // 2)


def bound() -> None:
    """Fit without a number of threads in the environment."""
    del os.environ["OMP_NUM_THREADS"]
    trainer(HorovodStrategy(bind="core")).fit(Looking(), shard(rank(), 2, 8))
