"""``strategy="horovod"``: what ddp does, through Horovod."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import ParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from dcl_lightning._lightning import optimizers_to_device
from dcl_lightning.comm import Comm, SingleProcessComm
from dcl_lightning.distributed.broadcast import share_buffers, share_tensors
from dcl_lightning.distributed.cpu_binding import bind_worker, check_binding
from dcl_lightning.distributed.fork_hazard import warn_of_fork
from dcl_lightning.distributed.horovod.batchnorm import layer_sync_for_horovod
from dcl_lightning.distributed.horovod.comm import HorovodComm
from dcl_lightning.distributed.horovod.environment import HorovodEnvironment
from dcl_lightning.distributed.horovod.failures import FailureProtection
from dcl_lightning.distributed.horovod.gradients import GradientAverager
from dcl_lightning.distributed.horovod.launcher import HorovodLauncher
from dcl_lightning.distributed.horovod.polling import poll_while_waiting
from dcl_lightning.distributed.horovod.shutdown import restore_callbacks
from dcl_lightning.distributed.horovod.slurm import accept_allocation, check_srun, horovod_environment, requeue_together
from dcl_lightning.distributed.ranks import launched_by_horovod, set_rank_from_environment
from dcl_lightning.errors import ConfigurationError, HorovodNotFoundError

__all__ = ["HorovodStrategy"]


class HorovodStrategy(ParallelStrategy):
    """Data-parallel training over Horovod's workers.

    Under ``horovodrun`` and ``mpirun`` it takes the place that it is given; under plain ``python`` with
    ``devices`` above 1 it starts the other workers itself. Gradients are averaged when ``backward()``
    returns, as with ddp.

    Lightning refuses a compiled LightningModule here: compile the backbone within it, in place, by
    ``backbone.compile()`` in ``configure_model``.

    Args:
        accelerator: set by the trainer.
        parallel_devices: set by the trainer.
        checkpoint_io: set by the trainer.
        precision_plugin: set by the trainer.
        cluster_environment: a ``HorovodEnvironment``; made if left out.
        op: how gradients are combined.
        compression: type in which gradients travel.
        gradient_predivide_factor: averages divide by it before the sum and by workers / factor after.
        find_unused_parameters: allow parameters that take no part in some worker's step, at the cost of a small
            message each step; without it a parameter takes part on all workers or on none, else the job ends with
            an error that names it.
        bind: cores of each worker: ``none``, all that it was given; ``core``, its share of the host's; ``numa``,
            those of its share of the NUMA nodes. Threads follow, unless OMP_NUM_THREADS is set.
        start_timeout: seconds that workers wait for each other at the start.
        collective_timeout: seconds that a worker waits within one operation before the job ends, with the
            stacks of the workers that hang; 0 waits for ever.

    Raises:
        HorovodNotFoundError: Horovod is not installed, or without PyTorch support.
        ConfigurationError: a value or a combination of values cannot work.
    """

    strategy_name = "horovod"
    is_distributed = True  # read by the trainer: without it ``sync_dist`` is ignored

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        op: Literal["average", "sum", "adasum"] = "average",
        compression: Literal["none", "fp16", "bf16"] = "none",
        gradient_predivide_factor: float = 1.0,
        find_unused_parameters: bool = False,
        bind: Literal["none", "core", "numa"] = "none",
        start_timeout: float = 120,
        collective_timeout: float = 1800,
    ) -> None:
        if not _horovod_is_installed():
            raise HorovodNotFoundError
        if gradient_predivide_factor <= 0:
            raise ConfigurationError(f"gradient_predivide_factor={gradient_predivide_factor} must be above 0")
        if cluster_environment is not None and not isinstance(cluster_environment, HorovodEnvironment):
            raise ConfigurationError(
                f"strategy=horovod cannot work with {type(cluster_environment).__name__}: leave cluster_environment out"
            )
        check_binding(bind)
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment or horovod_environment(),
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        self._bind = bind
        self._averager = GradientAverager(op, compression, gradient_predivide_factor, find_unused_parameters)
        self._protection = FailureProtection(start_timeout, collective_timeout, self._averager)
        self._comm: Comm = SingleProcessComm()
        self._failed = False
        set_rank_from_environment()

    # -- who and where -----------------------------------------------------------------------------

    @property
    def comm(self) -> Comm:
        """The cluster for memory, data and metrics."""
        return self._comm

    @property
    def environment(self) -> HorovodEnvironment:
        """The cluster environment, ours."""
        assert isinstance(self.cluster_environment, HorovodEnvironment)
        return self.cluster_environment

    @property
    def num_nodes(self) -> int:
        """Number of hosts."""
        return self.environment.num_nodes()

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        if num_nodes not in (1, self.num_nodes):
            raise ConfigurationError(
                f"trainer.num_nodes={num_nodes}, but the launcher started {self.num_nodes} hosts: leave num_nodes out"
            )

    @property
    def world_size(self) -> int:
        """Number of workers; before the local launch, the number of devices asked for."""
        if launched_by_horovod():
            return self.environment.world_size()
        return len(self.parallel_devices or [None])

    @property
    def root_device(self) -> torch.device:
        """This worker's device."""
        devices = self.parallel_devices or [torch.device("cpu")]
        if devices[0].type == "cpu":
            return devices[0]
        # One device for this worker alone: the launcher masked the others, or ``devices=1`` under it.
        if len(devices) == 1:
            masked = torch.cuda.device_count() == 1
            return devices[0] if masked else torch.device("cuda", self.local_rank)
        return devices[self.local_rank]

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Arguments of a ``DistributedSampler``."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def set_world_ranks(self) -> None:
        """Tell Lightning's rank-zero helpers this worker's rank."""
        set_rank_from_environment()

    # -- life --------------------------------------------------------------------------------------

    def _configure_launcher(self) -> None:
        check_srun()
        if self.world_size > 1 and self.parallel_devices:
            _check_build(self.parallel_devices[0].type)
        devices = len(self.parallel_devices or [None])
        if not launched_by_horovod():
            if devices > 1:
                self._launcher = HorovodLauncher(devices)
        elif devices not in (1, self.environment.local_size()) and not self._has_spare_gpus():
            raise ConfigurationError(
                f"trainer.devices={devices}, but the launcher started {self.environment.local_size()} workers on this "
                "host: leave devices out"
            )

    def _has_spare_gpus(self) -> bool:
        """Return whether the devices are all GPUs of the host, as ``auto`` chooses, and enough for its workers."""
        devices = self.parallel_devices or []
        all_gpus = bool(devices) and devices[0].type == "cuda" and len(devices) == torch.cuda.device_count()
        return all_gpus and len(devices) >= self.environment.local_size()

    def setup_environment(self) -> None:
        """Join the other workers; the first thing that needs Horovod itself."""
        import horovod.torch as hvd

        first = not hvd.is_initialized()
        if first:
            trainer = self.lightning_module.trainer if self.lightning_module is not None else None
            self._protection.meet(trainer, self._launcher)
        hvd.init()
        poll_while_waiting()
        self._failed = False
        self._comm = HorovodComm() if hvd.size() > 1 else SingleProcessComm()
        set_rank_from_environment()
        if first and hvd.size() > 1:
            threads = bind_worker(self._bind, self._comm)
            if "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(threads)
            if hvd.rank() == 0:
                print(
                    f"horovod: {hvd.size()} workers on {_counted(hvd.cross_size(), 'host')}, "
                    f"{_counted(torch.get_num_threads(), 'thread')} each",
                    flush=True,
                )
        if self.lightning_module is not None:
            self._protection.begin(self.lightning_module.trainer, self._comm)
            if self._comm.size > 1:
                requeue_together(self.lightning_module.trainer, self.environment)
        super().setup_environment()
        reset_seed()

    def model_to_device(self) -> None:
        """Move the module to this worker's device."""
        assert self.model is not None
        if self.root_device.type == "cuda":
            torch.cuda.set_device(self.root_device)
        self.model.to(self.root_device)

    def process_dataloader(self, dataloader: object) -> object:
        """Return the loader as it is; warn of worker processes that are started in a way that is not safe."""
        warn_of_fork(dataloader)
        return dataloader

    def setup(self, trainer: pl.Trainer) -> None:
        """Start from worker 0's weights; with several workers, average every gradient from now on."""
        assert self.accelerator is not None
        assert self.model is not None
        assert self.lightning_module is not None
        self._protection.watch(trainer, self._comm, self._launcher)
        self.accelerator.setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING and self._layer_sync is not None and self._comm.size > 1:
            self._layer_sync = layer_sync_for_horovod(self._layer_sync)
            self.model = self._layer_sync.apply(self.model)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        if self._comm.size > 1:
            from dcl_lightning.distributed.horovod.metrics import attach_metrics

            share_tensors((*self.lightning_module.parameters(), *self.lightning_module.buffers()), self._comm)
            attach_metrics(self.lightning_module)
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING:
            optimizers_to_device(self.optimizers, self.root_device)
            if self._comm.size > 1:
                self._averager.attach(self.lightning_module)

    def on_validation_start(self) -> None:
        """Evaluate worker 0's running statistics on all workers."""
        if self.lightning_module is not None:
            share_buffers(self.lightning_module, self._comm)

    def on_exception(self, exception: BaseException) -> None:
        """Leave the job, which ends the others' waiting with an error."""
        if self._failed:
            return
        self._failed = True
        self._protection.end()
        self._averager.detach()
        if isinstance(self._launcher, HorovodLauncher):
            self._launcher.note_failure(exception)
        if self._comm.size > 1:
            import horovod.torch as hvd

            if hvd.is_initialized():
                hvd.shutdown()

    def teardown(self) -> None:
        """Remove the hooks; Horovod runs on for the next ``fit``."""
        self._protection.end()
        self._averager.detach()
        if self._layer_sync is not None and self._comm.size > 1 and self.model is not None:
            self.model = self._layer_sync.revert(self.model)
        trainer = None if self.lightning_module is None else self.lightning_module.trainer
        if trainer is not None and trainer.interrupted:  # else the callbacks' own teardown comes later, and does it
            restore_callbacks(trainer)
        super().teardown()

    # -- gradients ---------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Take in parameters that were added or unfrozen since the last step; they start from worker 0's values.

        Args:
            batch: the batch.
            batch_idx: its number.
        """
        self._include_new_parameters()

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Take in what was unfrozen within the step.

        Args:
            closure_loss: the loss.
        """
        self._averager.begin()
        self._include_new_parameters()

    def _include_new_parameters(self) -> None:
        assert self.lightning_module is not None
        share_tensors(self._averager.include(self.lightning_module), self._comm)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Leave gradients local, for all but the last step of an accumulation."""
        with self._averager.paused():
            yield

    # -- collectives -------------------------------------------------------------------------------

    def barrier(self, name: str | None = None) -> None:
        """Wait for all workers; nothing after a failure."""
        if not self._failed:
            self._comm.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return worker ``src``'s object."""
        if self._comm.size == 1 or self._failed:
            return obj
        import horovod.torch as hvd

        # As in ``HorovodComm``: Horovod's thread cannot work on tensors made in inference mode.
        with torch.inference_mode(False):
            return hvd.broadcast_object(obj, root_rank=src, name="strategy.broadcast")

    def reduce(self, tensor: Tensor | Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Return a tensor reduced over workers; other things as they are. Integer means are float64."""
        if not isinstance(tensor, Tensor) or self._comm.size == 1:
            return tensor
        # A string, None, or torch's ReduceOp in one of its two forms.
        op = getattr(reduce_op, "op", reduce_op)
        name = str(getattr(op, "name", op) or "mean").lower()
        name = "mean" if name == "avg" else name
        if name in ("product", "prod"):
            return torch.stack(self._comm.allgather(tensor)).prod(dim=0).to(tensor.dtype)
        if name not in ("sum", "mean", "min", "max"):
            raise ValueError(f"reduce_op={reduce_op!r}: give sum, mean, min, max or product")
        return self._comm.allreduce(tensor, name)  # type: ignore[arg-type]

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Return ``(workers, *shape)``; with ``sync_grads`` gradients are summed over workers, as with ddp."""
        if self._comm.size == 1:
            return tensor
        if sync_grads:
            return _GatherWithGradient.apply(tensor, self._comm)
        return torch.cat(self._comm.allgather(tensor[None]))


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, comm: Comm) -> Tensor:
        ctx.comm = comm
        return torch.cat(comm.allgather(tensor[None]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.comm.allreduce(grads[0])[ctx.comm.rank], None


def _horovod_is_installed() -> bool:
    """Return whether Horovod is there with its part for PyTorch; imports nothing."""
    spec = importlib.util.find_spec("horovod")
    folders = spec.submodule_search_locations if spec is not None else None
    return any(next(Path(folder, "torch").glob("mpi_lib*"), None) for folder in folders or ())


def _check_build(device: str) -> None:
    """Refuse devices whose tensors Horovod would take for the CPU's: its thread aborts the process on the first one.

    Args:
        device: type of the workers' devices.

    Raises:
        ConfigurationError: the installed Horovod cannot reach them.
    """
    if device == "cpu":
        return
    if device != "cuda":
        raise ConfigurationError(f"strategy=horovod works on cpu and gpu, not on {device}: set trainer.accelerator=cpu")
    import horovod.torch as hvd

    if not (hvd.nccl_built() or hvd.cuda_built() or hvd.rocm_built()):
        raise ConfigurationError(
            "trainer.accelerator=gpu: the installed Horovod was built for CPUs; run "
            "`python -m dcl_lightning.tools.install_horovod --gpu cuda`, or set trainer.accelerator=cpu"
        )


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


# Before Horovod runs, so that what Lightning prints first is printed once.
set_rank_from_environment()
accept_allocation()
if HorovodStrategy.strategy_name not in StrategyRegistry:
    StrategyRegistry.register(HorovodStrategy.strategy_name, HorovodStrategy, "Data-parallel training over Horovod")
