"""``strategy="horovod"``: data-parallel training as ddp does it, through Horovod."""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import Precision, TorchSyncBatchNorm
from lightning.pytorch.strategies import ParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from dcl_lightning._lightning import bring_environment, optimizers_to_device, wrap_srun_checks
from dcl_lightning.comm import Comm, ReduceOp, SingleProcessComm, broadcast_buffers, broadcast_tensors
from dcl_lightning.distributed import ranks
from dcl_lightning.distributed.cpu_binding import bind_worker
from dcl_lightning.distributed.horovod.batchnorm import HorovodBatchNormSync
from dcl_lightning.distributed.horovod.comm import HorovodComm, attach_metrics
from dcl_lightning.distributed.horovod.environment import HorovodEnvironment, check_srun, horovod_environment
from dcl_lightning.distributed.horovod.gradients import GradientAverager
from dcl_lightning.distributed.horovod.launcher import HorovodLauncher
from dcl_lightning.distributed.horovod.mesh import connect_workers, disconnect_workers
from dcl_lightning.distributed.horovod.peers import Peers, meet_peers
from dcl_lightning.distributed.horovod.relay import SignalListener
from dcl_lightning.distributed.horovod.rendezvous import Rendezvous, wait_for_workers
from dcl_lightning.distributed.horovod.shutdown import (
    guard_failures,
    remove_stop_callbacks,
    report_end,
    requeue_between_steps,
    synchronize_stops,
)
from dcl_lightning.distributed.horovod.watchdog import Watchdog, limited_start, poll_while_waiting
from dcl_lightning.distributed.horovod.worker_process import launching_process
from dcl_lightning.distributed.ranks import launched_by_horovod, mpi_runs, running_horovod, set_rank_from_environment
from dcl_lightning.errors import ConfigurationError, HorovodNotFoundError, check_words

__all__ = ["HorovodStrategy", "fork_hazard"]

T = TypeVar("T")
_CONNECT_S = 120  # to connect once all workers have arrived; horovodrun's 30 s are too few on busy machines
_GLOO_LONGEST_S = 864_000  # Gloo counts milliseconds in 32 bits
_REDUCE_OPS: dict[str, ReduceOp] = {"sum": "sum", "mean": "mean", "avg": "mean", "min": "min", "max": "max"}


class HorovodStrategy(ParallelStrategy):
    """Data-parallel training over Horovod's workers.

    Under ``horovodrun`` and ``mpirun`` each process is one worker; under plain ``python`` with ``devices`` above 1 the
    strategy starts the other workers itself. Gradients are averaged when ``backward()`` returns, as with ddp.

    Lightning refuses a compiled LightningModule here. Agents have ``model.compile``; in another module compile the
    network within it, in place, by ``network.compile()`` in ``configure_model``.

    Args:
        accelerator: set by the trainer.
        parallel_devices: set by the trainer.
        checkpoint_io: set by the trainer.
        precision_plugin: set by the trainer.
        cluster_environment: a ``HorovodEnvironment``; made if left out.
        op: how gradients are combined.
        compression: data type in which gradients travel.
        gradient_predivide_factor: factor f, above 0; averages divide by f before the sum and by workers / f after it.
        find_unused_parameters: allow parameters that take no part in some worker's step. Without it a parameter takes
            part on all workers or on none, else the job ends with an error that names it.
        bind: cores of each worker: ``none``, all available ones; ``core``, its share of the host's cores; ``numa``,
            the cores of its share of the NUMA nodes. The number of threads follows, unless OMP_NUM_THREADS is set.
        start_timeout: seconds, at least 1, that workers wait for each other at the start; later operations have only
            ``collective_timeout``.
        collective_timeout: seconds that a worker may wait within one operation before the job ends, naming the workers
            that hang, with their stacks, are gone, or are on a host that does not answer; 0 for no limit.

    Raises:
        HorovodNotFoundError: Horovod is not installed, or without PyTorch support.
        ConfigurationError: a value, or a combination of values, is not supported.
    """

    strategy_name = "horovod"
    is_distributed = True  # read by the trainer, which otherwise ignores ``sync_dist``

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
                f"strategy=horovod cannot use {type(cluster_environment).__name__}: leave cluster_environment out"
            )
        if start_timeout < 1 or collective_timeout < 0:
            raise ConfigurationError(
                f"start_timeout={start_timeout} must be at least 1 second and collective_timeout={collective_timeout} "
                "at least 0, which is no limit"
            )
        words = {"op": op, "compression": compression, "bind": bind}
        check_words("strategy", get_type_hints(HorovodStrategy.__init__), words)
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment or horovod_environment(),
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        self._bind = bind
        self._averager = GradientAverager(op, compression, gradient_predivide_factor, find_unused_parameters)
        self._start_timeout, self._collective_timeout = start_timeout, collective_timeout or math.inf
        self._watchdog: Watchdog | None = None
        self._listener = SignalListener()
        self._peers: Peers | None = None
        self._comm: Comm = SingleProcessComm()
        self._failed = False
        set_rank_from_environment()

    # -- ranks and devices -------------------------------------------------------------------------

    @property
    def comm(self) -> Comm:
        """The cluster for memory, data and metrics."""
        return self._comm

    @property
    def environment(self) -> HorovodEnvironment:
        """The cluster environment."""
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
        """Set the rank of Lightning's rank-zero helpers."""
        set_rank_from_environment()

    # -- set-up and teardown -----------------------------------------------------------------------

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
        """Return whether the devices are all GPUs of the host, as ``auto`` selects, and enough for its workers."""
        devices = self.parallel_devices or []
        all_gpus = bool(devices) and devices[0].type == "cuda" and len(devices) == torch.cuda.device_count()
        return all_gpus and len(devices) >= self.environment.local_size()

    def setup_environment(self) -> None:
        """Join the other workers: the first call that needs Horovod itself."""
        import horovod.torch as hvd

        trainer = self.lightning_module.trainer if self.lightning_module is not None else None
        first = not hvd.is_initialized()
        if first:
            self._wait_for_workers(trainer)
        with self._limited_start(), self._variables_of_horovod():
            hvd.init()
        poll_while_waiting()
        self._failed = False
        self._comm = SingleProcessComm()
        if hvd.size() > 1:
            self._comm = HorovodComm(mesh=connect_workers(HorovodComm(), first, self._start_timeout))
        set_rank_from_environment()
        self._peers = meet_peers(self._comm, first) if hvd.size() > 1 else None
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
        if trainer is not None and self._peers is not None:
            synchronize_stops(trainer, self._comm, self._peers)
            requeue_between_steps(trainer)
        super().setup_environment()
        reset_seed()

    def _wait_for_workers(self, trainer: pl.Trainer | None) -> None:
        """Wait until all workers have arrived, because Horovod's start aborts the process if one is missing.

        Raises:
            WorkerError: workers did not arrive in time.
        """
        if ranks.world_size() == 1:
            return
        if trainer is not None:
            guard_failures(trainer)
        meeting = Rendezvous.of_job()
        if meeting is not None:
            failed = self._launcher.failed_workers if isinstance(self._launcher, HorovodLauncher) else list
            wait_for_workers(meeting, ranks.rank(), ranks.world_size(), self._start_timeout, failed)

    @contextmanager
    def _variables_of_horovod(self) -> Iterator[None]:
        """Set, within the block, the environment variables that Horovod reads when it starts."""
        given = os.environ.get("HOROVOD_GLOO_TIMEOUT_SECONDS", "0")
        # It holds for every operation, and names nobody: the watchdog, which asks who is silent, speaks before.
        limit = min(max(self._start_timeout, self._collective_timeout) + _CONNECT_S, _GLOO_LONGEST_S)
        # Gradients come in messages of their own; fused as they come, their sums would depend on the time.
        fusion = os.environ.get("HOROVOD_FUSION_THRESHOLD", "0")
        wanted = {
            "HOROVOD_GLOO_TIMEOUT_SECONDS": str(max(int(given), math.ceil(limit))),
            "HOROVOD_FUSION_THRESHOLD": fusion,
        }
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    def _limited_start(self) -> AbstractContextManager[None]:
        """Limit the start within the block; under Gloo all workers have arrived, and have yet to connect."""
        if ranks.world_size() == 1 or running_horovod() is not None:
            return nullcontext()
        if Rendezvous.of_job() is None:
            remedy = "mpirun -mca btl_tcp_if_include NAME -mca oob_tcp_if_include NAME"
            return limited_start(self._start_timeout, remedy, self._launcher)
        return limited_start(
            max(self._start_timeout, _CONNECT_S), "horovodrun --network-interfaces NAME", self._launcher
        )

    def model_to_device(self) -> None:
        """Move the module to this worker's device."""
        assert self.model is not None
        if self.root_device.type == "cuda":
            torch.cuda.set_device(self.root_device)
        self.model.to(self.root_device)

    def process_dataloader(self, dataloader: object) -> object:
        """Return the loader unchanged; warn if it forks worker processes while MPI or CUDA runs."""
        hazard = fork_hazard(dataloader)
        if hazard and isinstance(dataloader, DataLoader):
            rank_zero_warn(
                f"a loader forks {dataloader.num_workers} worker processes. {hazard}. "
                "Give the DataLoader multiprocessing_context='forkserver'"
            )
        return dataloader

    def setup(self, trainer: pl.Trainer) -> None:
        """Take over worker 0's weights, and with several workers average every gradient from now on."""
        assert self.accelerator is not None
        assert self.model is not None
        assert self.lightning_module is not None
        self._watch(trainer)
        self.accelerator.setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING and self._layer_sync is not None and self._comm.size > 1:
            if type(self._layer_sync) is TorchSyncBatchNorm:  # Lightning's choice, not a user's own
                self._layer_sync = HorovodBatchNormSync()
            self.model = self._layer_sync.apply(self.model)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        if self._comm.size > 1:
            broadcast_tensors((*self.lightning_module.parameters(), *self.lightning_module.buffers()), self._comm)
            attach_metrics(self.lightning_module)
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING:
            optimizers_to_device(self.optimizers, self.root_device)
            if self._comm.size > 1:
                self._averager.attach(self.lightning_module)

    def _watch(self, trainer: pl.Trainer) -> None:
        """Start the watchdog and the log files, now that data is prepared, a download by one worker included."""
        self._stop_watching()
        if self._peers is not None:
            self._watchdog = Watchdog(trainer, self._collective_timeout, self._peers, self._launcher, self._averager)
        folder = None if trainer.logger is None else trainer.logger.log_dir
        if isinstance(self._launcher, HorovodLauncher) and folder is not None:
            self._launcher.log_to(Path(folder) / "logs")

    def _stop_watching(self) -> None:
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None

    def on_train_start(self) -> None:
        """Let the job's supervisor signal worker 0, now that signals are acted on between two steps."""
        if self.global_rank == 0:
            self._listener.start()

    def on_train_end(self) -> None:
        """Leave the supervisor's signals to the launcher."""
        self._listener.stop()

    def on_validation_start(self) -> None:
        """Evaluate with worker 0's running statistics on all workers."""
        if self.lightning_module is not None:
            broadcast_buffers(self.lightning_module, self._comm)

    def on_exception(self, exception: BaseException) -> None:
        """Leave the job, so that the other workers' waits end with an error."""
        if self._failed:
            return
        self._failed = True
        self._listener.stop()
        self._stop_watching()
        self._averager.detach()
        if isinstance(self._launcher, HorovodLauncher):
            self._launcher.note_failure(exception)
        elif self._peers is not None and launching_process() is None:  # otherwise the local launcher reports
            report_end(self._peers, exception)
        if self._comm.size > 1:
            import horovod.torch as hvd

            disconnect_workers()
            if hvd.is_initialized():
                hvd.shutdown()

    def teardown(self) -> None:
        """Remove the hooks; Horovod keeps running for the next ``fit``."""
        self._stop_watching()
        self._averager.detach()
        if self._layer_sync is not None and self._comm.size > 1 and self.model is not None:
            self.model = self._layer_sync.revert(self.model)
        trainer = None if self.lightning_module is None else self.lightning_module.trainer
        if trainer is not None and trainer.interrupted:  # otherwise the callbacks' own teardown does it later
            remove_stop_callbacks(trainer)
        super().teardown()

    # -- gradients ---------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        """Include parameters that were added or unfrozen since the last step, with worker 0's values."""
        self._include_new_parameters()

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Include parameters that were unfrozen within the step."""
        self._averager.begin()
        self._include_new_parameters()

    def _include_new_parameters(self) -> None:
        assert self.lightning_module is not None
        broadcast_tensors(self._averager.include(self.lightning_module), self._comm)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Leave gradients local within the block: in all but the last batch of an accumulation."""
        with self._averager.paused():
            yield

    # -- collectives -------------------------------------------------------------------------------

    def barrier(self, name: str | None = None) -> None:
        """Wait for all workers; do nothing after a failure."""
        if not self._failed:
            self._comm.barrier()

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Return the object of worker ``src``."""
        if self._comm.size == 1 or self._failed:
            return obj
        import horovod.torch as hvd

        # Horovod's thread cannot use tensors made in inference mode. Without a name, types that differ never match.
        with torch.inference_mode(False):
            return hvd.broadcast_object(obj, root_rank=src, name="strategy.broadcast")

    def reduce(self, tensor: Tensor | Any, group: object = None, reduce_op: Any = "mean") -> Tensor | Any:
        """Return a tensor reduced over workers, and other objects unchanged; means of integers are float64.

        Args:
            tensor: same shape and dtype on all workers.
            group: ignored.
            reduce_op: ``mean`` (or None, ``avg``), ``sum``, ``min``, ``max``, ``product``, or torch's ``ReduceOp``.
        """
        if not isinstance(tensor, Tensor) or self._comm.size == 1:
            return tensor
        op = getattr(reduce_op, "op", reduce_op) or "mean"  # torch's ReduceOp has an attribute op or is an enumeration
        name = str(op).removeprefix("RedOpType.").lower()
        if name in ("product", "prod"):
            return torch.stack(self._comm.allgather(tensor)).prod(dim=0).to(tensor.dtype)
        if name not in _REDUCE_OPS:
            raise ValueError(f"reduce_op={reduce_op!r}: give sum, mean, min, max or product")
        return self._comm.allreduce(tensor, _REDUCE_OPS[name])

    def all_gather(self, tensor: Tensor, group: object = None, sync_grads: bool = False) -> Tensor:
        """Return ``(workers, *shape)``; with ``sync_grads``, gradients are summed over workers, as with ddp."""
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
    """Return, without importing it, whether Horovod is installed with PyTorch support."""
    spec = importlib.util.find_spec("horovod")
    folders = spec.submodule_search_locations if spec is not None else None
    return any(next(Path(folder, "torch").glob("mpi_lib*"), None) for folder in folders or ())


def fork_hazard(loader: object) -> str:
    """Return why this loader's worker processes should not be forked; an empty string if nothing is wrong."""
    if not isinstance(loader, DataLoader) or not loader.num_workers:
        return ""
    if (loader.multiprocessing_context or multiprocessing).get_start_method() != "fork":
        return ""
    if mpi_runs():
        return "MPI runs in this process, and MPI does not allow processes to be forked: they may hang or crash"
    if torch.cuda.is_initialized():
        return "CUDA runs in this process, and does not work in forked ones: they must not touch it"
    return ""


def _check_build(device: str) -> None:
    """Refuse a type of device that the installed Horovod would take for a CPU, aborting the process on first use."""
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


# On import, before Horovod runs, so that Lightning prints its first messages only once.
set_rank_from_environment()
# Given a strategy's name, Lightning detects a cluster environment before the strategy can bring its own: in an
# allocation one that refuses ``sbatch --ntasks`` without ``--ntasks-per-node``, which is right only for tasks that
# ``srun`` starts; elsewhere it advises to use ``srun`` wherever that is installed, as it does at each fit.
wrap_srun_checks(unless=launched_by_horovod)
bring_environment(HorovodStrategy.strategy_name, horovod_environment)
if HorovodStrategy.strategy_name not in StrategyRegistry:
    StrategyRegistry.register(HorovodStrategy.strategy_name, HorovodStrategy, "Data-parallel training over Horovod")
