"""Gradients that come at other times are added up in the same order."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dcl_lightning.distributed.horovod import gradients
from tests.distributed.programs.place import rank
from tests.distributed.toy import Toy, trainer, weights


class Delayed(Toy):
    """Some layers of unequal size, whose gradients come after random times, other ones on each worker."""

    def __init__(self, timing: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            *[nn.Sequential(nn.Linear(5, 3 + k), nn.Tanh(), nn.Linear(3 + k, 5)) for k in range(6)]
        )
        times = random.Random(10 * timing + rank())
        parameters: Any = self.net.parameters()
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(lambda _: time.sleep(times.choice([0.0, 0.0, 0.004])))

    def training_step(self, batch: tuple[Tensor, ...], index: int) -> Tensor:
        return self.net(batch[0]).square().mean()


def same_bits(workers: int) -> None:
    """Two fits with other delays give the same bits, with several messages in each step."""
    torch.set_num_threads(1)
    x = torch.randn(8 * workers * 6, 5, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x[rank() :: workers])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "_BUCKET_BYTES", 300)
        found: list[Any] = []
        for timing in range(2):
            module = Delayed(timing)
            t = trainer("horovod")
            t.fit(module, DataLoader(data, batch_size=8))
            every = t.strategy.all_gather(weights(module))
            assert (every == every[0]).all()
            found.append(every[0])
    assert torch.equal(*found), (found[0] - found[1]).abs().max()
