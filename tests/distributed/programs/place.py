"""A worker's rank among those that a test started, and the group that ``torch.distributed`` makes of them."""

from __future__ import annotations

import os

import torch
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from dcl_lightning import FSDP2Strategy


def rank() -> int:
    """Return this worker's number."""
    return int(os.environ["HOROVOD_RANK"])


def size() -> int:
    """Return the number of workers."""
    return int(os.environ["HOROVOD_SIZE"])


def join_torch_group() -> None:
    """Make a Gloo group of all workers."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{os.environ['TORCH_PORT']}", rank=rank(), world_size=size()
    )


def elastic_ddp() -> DDPStrategy:
    """Return Lightning's ``ddp`` on these workers, as torchrun would have started them."""
    return DDPStrategy(cluster_environment=_torchrun(), process_group_backend="gloo")


def elastic_fsdp2(apart: bool = True) -> FSDP2Strategy:
    """Return our ``fsdp2`` on these workers, as torchrun would have started them."""
    strategy = FSDP2Strategy(apart, process_group_backend="gloo")
    strategy.cluster_environment = _torchrun()
    return strategy


def _torchrun() -> TorchElasticEnvironment:
    os.environ |= {
        "RANK": str(rank()), "LOCAL_RANK": str(rank()), "GROUP_RANK": "0", "WORLD_SIZE": str(size()),
        "LOCAL_WORLD_SIZE": str(size()), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ["TORCH_PORT"],
    }  # fmt: skip
    return TorchElasticEnvironment()


def flat(module: nn.Module) -> torch.Tensor:
    """Return a copy of all parameters as one vector."""
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()
