"""``strategy="fsdp2"``: data-parallel training in which each worker keeps a part of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from torch import nn
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from dcl_lightning.checkpoint.io import keep_side_files
from dcl_lightning.checkpoint.shards import PARTED, change_tensors, check_shards, fill_shards, stage_shards
from dcl_lightning.comm import broadcast_tensors, comm_of, whole
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.types import StateDict

__all__ = ["FSDP2Strategy", "hold_whole", "release_whole", "whole_weights"]


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's ``ModelParallelStrategy`` with all workers in one dimension, that of the data.

    Each worker has a part of every weight, of its gradient and of the optimizer's state (PyTorch's ``fully_shard``); a
    block of the network has whole weights while it computes. Evaluation holds whole weights, since workers have
    different numbers of batches there.

    A checkpoint is a file as with any strategy, but the parts of the weights are in files of all workers in the folder
    beside it. It can be loaded by any number of workers and with any strategy.

    Args:
        save_distributed_checkpoint: whether the parts stay apart; if False worker 0 writes whole weights into the
            checkpoint, which ``load_from_checkpoint`` reads.
        process_group_backend: of torch.distributed; by the device if None.
        timeout: for an operation of torch.distributed.
    """

    strategy_name = "fsdp2"

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self._apart = save_distributed_checkpoint

    def setup_environment(self) -> None:
        """Make one group of all workers."""
        self._data_parallel_size, self._tensor_parallel_size = self.world_size, 1
        super().setup_environment()

    @property
    def world_size(self) -> int:
        """Number of workers."""
        return self.num_nodes * self.num_processes

    def shard(self, module: nn.Module) -> None:
        """Leave each worker its part of a module's trained weights, which are worker 0's; safe to repeat.

        Its children are what computes: a forward pass goes through each as a whole. Members of their containers are
        gathered one by one.

        Args:
            module: on whose own no weights are, only on its children.

        Raises:
            ConfigurationError: PyTorch is too old, or a weight is none of a child's.
        """
        try:
            from torch.distributed.fsdp import FSDPModule, fully_shard
        except ImportError as error:
            raise ConfigurationError(
                f"trainer.strategy=fsdp2 needs PyTorch 2.6 or later, not {torch.__version__}: give ddp"
            ) from error
        own = [name for name, _ in module.named_parameters(recurse=False)]
        if own:
            raise ConfigurationError(
                f"trainer.strategy=fsdp2: {own[0]} is no weight of a layer of {type(module).__name__}: put it into a "
                "module that has a forward pass, or give trainer.strategy=ddp"
            )
        parts = [part for part in module.children() if any(p.requires_grad for p in part.parameters())]
        if any(isinstance(part, FSDPModule) for part in parts):
            return
        broadcast_tensors([*module.parameters(), *module.buffers()], comm_of(self))
        mesh = self.device_mesh["data_parallel"]
        for part in parts:
            containers = [m for m in part.modules() if isinstance(m, (nn.Sequential, nn.ModuleList))]
            members = {id(m): m for box in containers for m in box if any(True for _ in m.parameters())}
            # From the inside out, as PyTorch asks for.
            for member in reversed([m for m in part.modules() if id(m) in members and m is not part]):
                fully_shard(member, mesh=mesh, reshard_after_forward=True)
            fully_shard(part, mesh=mesh, reshard_after_forward=False)

    # -- checkpoint: Lightning's protocol as with ddp, and not that of its base class ------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Whether callbacks and module meet a checkpoint later than with other strategies; they do not."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning asks for the optimizers' states to be loaded."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the weights, of which this worker has parts."""
        return Strategy.lightning_module_state_dict(self)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's state, of which this worker has parts."""
        return optimizer.state_dict()

    def save_checkpoint(self, checkpoint: StateDict, filepath: str | Path, storage_options: object = None) -> None:
        """Write what workers have in parts to files of all of them, and the checkpoint; every worker calls this.

        Raises:
            CheckpointError: it cannot be written.
        """
        path = Path(self.broadcast(str(filepath)))
        if self._apart:
            stage_shards(checkpoint, comm_of(self), path.parent)
        else:
            for key in PARTED:
                if key in checkpoint:
                    checkpoint[key] = change_tensors(checkpoint[key], lambda _, tensor: whole(tensor).cpu())
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> StateDict:
        """Return a checkpoint with this worker's parts of the weights; the optimizers' follow when there are some."""
        checkpoint = keep_side_files(self).read_checkpoint(checkpoint_path, weights_only=weights_only)
        check_shards(checkpoint, comm_of(self))
        assert self.lightning_module is not None
        present = self.lightning_module.state_dict()
        for key in ("state_dict", "initial_weights"):
            fill_shards(checkpoint, key, lambda place: present.get(str(place[0])))
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Put weights in place."""
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Read this worker's parts of the optimizers' states, and put them in place."""
        weights = [[p for group in o.param_groups for p in group["params"]] for o in self.optimizers]

        loaded = dict(checkpoint)
        # Places: the optimizer's, "state", the weight's number, a name.
        fill_shards(loaded, "optimizer_states", lambda place: weights[place[0]][place[2]])
        Strategy.load_optimizer_state_dict(self, loaded)


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Hold whole weights, so that workers may compute as often as each has batches; does nothing with other strategies.

    Every worker enters and leaves, and changes no weight within.

    Args:
        module: the agent, or another module of a strategy.
    """
    hold_whole(module)
    try:
        yield
    finally:
        release_whole(module)


def hold_whole(module: nn.Module) -> None:
    """Give each worker whole weights until ``release_whole``; every worker calls it."""
    with torch.inference_mode(False), torch.no_grad():
        for part in _parted(module):
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()


def release_whole(module: nn.Module) -> None:
    """Leave each worker its part of the weights again."""
    parts = {id(part) for part in (module, *module.children())}
    for part in _parted(module):
        part.set_reshard_after_forward(id(part) not in parts, recurse=False)
        part.reshard()


def _parted(module: nn.Module) -> list[Any]:
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError:
        return []
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


if FSDP2Strategy.strategy_name not in StrategyRegistry:
    StrategyRegistry.register(FSDP2Strategy.strategy_name, FSDP2Strategy, "Data-parallel training with sharded weights")
