"""Averages gradients over the workers while the backward pass is still running."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dcl_lightning.errors import ConfigurationError

__all__ = ["FIND_UNUSED", "GradientAverager"]

FIND_UNUSED = "set find_unused_parameters=true of strategy=horovod"
_PREFIX = "gradient."


class GradientAverager:
    """Starts a named asynchronous allreduce for each gradient that is ready, and waits for all when backward ends.

    ``horovod.torch.DistributedOptimizer`` is not used, because it synchronizes before Lightning's closure has run the
    backward pass, and so trains on wrong gradients without an error.

    A gradient is unsynchronized from the moment it changes on this worker until it is combined with the others'. What
    accumulates in passes without synchronization is therefore combined in the next pass that has it, even if the
    parameter takes no part in that pass.

    Args:
        op: ``average``, ``sum`` or ``adasum``. The last two combine the whole content of a gradient in each
            synchronized pass: accumulate with ``accumulate_grad_batches``, not by several passes within a step.
        compression: ``none``, ``fp16`` or ``bf16``.
        predivide: factor f of ``average``: gradients are divided by f before the sum and by workers / f after it.
        find_unused: in each backward pass, agree on the parameters that have a gradient on some worker.

    Raises:
        ConfigurationError: ``predivide`` is given without ``average``.
    """

    def __init__(self, op: str, compression: str, predivide: float, find_unused: bool) -> None:
        if predivide != 1.0 and op != "average":
            raise ConfigurationError(f"gradient_predivide_factor={predivide} goes with op=average, not op={op}")
        self.op, self.compression, self.predivide, self.find_unused = op, compression, predivide, find_unused
        self._names: dict[nn.Parameter, str] = {}
        self._hooks: dict[nn.Parameter, RemovableHandle] = {}
        self._unsynchronized: dict[nn.Parameter, None] = {}  # an ordered set
        self._pending: list[tuple[nn.Parameter, int]] = []  # with Horovod's handles
        self._attached = self._paused = self._queued = False
        self._passes = self._history = 0
        self._without: dict[int, list[str]] = {}

    def attach(self, module: nn.Module) -> None:
        """Hook every trainable parameter of a module.

        Raises:
            ConfigurationError: ``op=adasum`` does not work with this Horovod, or with this number of workers.
        """
        import horovod.torch as hvd

        self.detach()
        if self.op == "adasum":
            _check_adasum(hvd)
        self._hvd = hvd
        self._ops = {"average": hvd.Sum, "sum": hvd.Sum, "adasum": hvd.Adasum}
        self._attached = True
        self._passes, self._history, self._without = 0, 0, {}
        self.include(module)

    def include(self, module: nn.Module) -> list[nn.Parameter]:
        """Hook parameters that were added or unfrozen, unhook those that were removed, and return the new ones.

        Fast if nothing has changed. Parameters that are frozen now stay hooked, because ``toggle_model`` freezes and
        unfreezes them within a step.
        """
        known = self._names
        if not self._attached or all(p in known for p in module.parameters() if p.requires_grad):
            return []
        self._names = {p: f"{_PREFIX}{name}" for name, p in module.named_parameters() if p.requires_grad or p in known}
        for gone in known.keys() - self._names.keys():
            self._hooks.pop(gone).remove()
            self._unsynchronized.pop(gone, None)
        new = [p for p in self._names if p not in known]
        self._hooks |= {p: p.register_post_accumulate_grad_hook(self._ready) for p in new}
        return new

    def begin(self) -> None:
        """Before a backward pass, complete an earlier one that failed with an error that the user caught."""
        if self._queued:
            self._finish()

    def detach(self) -> None:
        """Remove all hooks, and forget what a failed backward pass left behind."""
        for hook in self._hooks.values():
            hook.remove()
        self._names, self._hooks, self._unsynchronized, self._pending = {}, {}, {}, []
        self._attached = self._queued = False

    def history(self) -> int:
        """Return a hash below 2**20 of which parameters had no gradient in the passes since the last call.

        If it differs between workers, gradients of different passes were combined.
        """
        history, self._history = self._history % (1 << 20), 0
        return history

    def without_gradient(self) -> dict[int, list[str]]:
        """Return the trainable parameters without a gradient here, for the last two synchronized passes by number."""
        return dict(self._without)

    def waited_for(self) -> tuple[int, list[str]]:
        """Return the number of the present synchronized pass, and the parameters whose gradients it waits for."""
        names = self._names
        return self._passes, [names[p].removeprefix(_PREFIX) for p, _ in list(self._pending) if p in names]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave gradients local within the block."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def _ready(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        self._unsynchronized[parameter] = None
        if self._paused:
            return
        if not self._queued:
            self._queued = True
            # The engine calls it at the end of this backward pass; ddp's reducer is built on the same function.
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        if not self.find_unused:
            self._start(parameter)

    def _start(self, parameter: nn.Parameter) -> None:
        self._unsynchronized.pop(parameter, None)
        gradient = _real(parameter, self._names[parameter])
        if not gradient.numel():
            return
        sent = gradient.contiguous()
        if self.compression == "fp16":
            sent = sent.to(torch.float16)
        elif self.compression == "bf16" or sent.dtype == torch.bfloat16:
            # Horovod has no bfloat16: values of that precision travel as float32.
            sent = sent.to(torch.bfloat16).to(torch.float32)
        before, after = (1 / self.predivide, self.predivide / self._hvd.size()) if self.op == "average" else (1.0, 1.0)
        handle = self._hvd.allreduce_async_(
            sent,
            name=self._names[parameter],
            op=self._ops[self.op],
            prescale_factor=before,
            postscale_factor=after,
        )
        self._pending.append((parameter, handle))

    def _finish(self) -> None:
        self._queued = False
        # A parameter frozen by ``toggle_model`` waits for a pass of its own; a gradient set to None is dropped.
        self._unsynchronized = {p: None for p in self._unsynchronized if p.grad is not None}
        due = {p for p in self._unsynchronized if p.requires_grad}
        if self.find_unused:
            mine = torch.tensor([p in due for p in self._names], dtype=torch.int32)
            used = self._hvd.allreduce(mine, op=self._hvd.Max, name="gradient.used").tolist()
            due = {p for p, somewhere in zip(self._names, used, strict=True) if somewhere}
        for parameter in [p for p in self._names if p in due]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self._start(parameter)
        if not self.find_unused:
            self._note_without()
        try:
            while self._pending:
                parameter, handle = self._pending[0]
                result = self._hvd.synchronize(handle)
                del self._pending[0]
                gradient = _real(parameter)
                if result.data_ptr() != gradient.data_ptr():
                    gradient.copy_(result)
        finally:
            self._pending = []

    def _note_without(self) -> None:
        started = {parameter for parameter, _ in self._pending}
        without = [
            name.removeprefix(_PREFIX)
            for p, name in self._names.items()
            if p not in started and p.requires_grad and p.numel()
        ]
        self._passes += 1
        # The previous pass stays too, because another worker may still wait in it.
        self._without = {self._passes: without} | {k: v for k, v in self._without.items() if k == self._passes - 1}
        if without:
            self._history = crc32("\n".join([str(self._history), *without]).encode())


def _real(parameter: nn.Parameter, name: str = "") -> Tensor:
    """Return the gradient in a form that Horovod takes: dense, with complex numbers as pairs."""
    assert parameter.grad is not None
    gradient = parameter.grad.detach()
    if gradient.layout != torch.strided:
        raise ConfigurationError(
            f"{name} is a sparse tensor, and strategy=horovod combines dense ones only: set sparse=False in its layer"
        )
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient


def _check_adasum(hvd: ModuleType) -> None:
    if not hvd.mpi_enabled():
        raise ConfigurationError(
            "op=adasum needs a Horovod with MPI: build it with "
            "`python -m dcl_lightning.tools.install_horovod --mpi on`, and start the job with mpirun"
        )
    if hvd.size() & (hvd.size() - 1):
        raise ConfigurationError(f"op=adasum works on 2, 4, 8, ... workers, not on {hvd.size()}: start as many")
