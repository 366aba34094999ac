"""Averages gradients while the backward pass is still running."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from dcl_lightning.errors import ConfigurationError

__all__ = ["FIND_UNUSED", "GradientAverager"]

FIND_UNUSED = "set find_unused_parameters=true of strategy=horovod"
_PREFIX = "gradient."


class GradientAverager:
    """Starts a named asynchronous allreduce when a gradient is ready; all are done when backward returns.

    ``horovod.torch.DistributedOptimizer`` is not used: it synchronises before Lightning's closure has run
    the backward pass, and trains on wrong gradients without a word.

    A gradient is owed to the others from the moment it grows in this worker until it is combined with
    theirs. So what accumulates in passes that are not synchronised is combined in the next one that is,
    even if the parameter takes no part in that one.

    Args:
        op: ``average``, ``sum`` or ``adasum``. The last two combine what a gradient holds each time that a
            pass is synchronised: accumulate with ``accumulate_grad_batches``, not by several passes of a step.
        compression: ``none``, ``fp16`` or ``bf16``.
        predivide: averages divide by it before the sum and by workers / predivide after.
        find_unused: agree, once a backward pass, which parameters have a gradient on some worker.

    Raises:
        ConfigurationError: ``predivide`` goes with averages only.
    """

    def __init__(self, op: str, compression: str, predivide: float, find_unused: bool) -> None:
        if predivide != 1.0 and op != "average":
            raise ConfigurationError(f"gradient_predivide_factor={predivide} goes with op=average, not op={op}")
        self.op, self.compression, self.predivide, self.find_unused = op, compression, predivide, find_unused
        self._names: dict[nn.Parameter, str] = {}
        self._hooks: dict[nn.Parameter, Any] = {}
        # Dictionaries as sets that keep their order.
        self._owed: dict[nn.Parameter, None] = {}
        self._pending: list[tuple[nn.Parameter, Any]] = []
        self._attached = self._paused = self._queued = False
        self._passes = self._history = 0
        self._without: dict[int, list[str]] = {}

    def attach(self, module: nn.Module) -> None:
        """Hook every parameter that is trained.

        Args:
            module: whose parameters.

        Raises:
            ConfigurationError: ``op=adasum`` cannot work with this Horovod, or with this number of workers.
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
        """Hook parameters that were added or unfrozen since, let go of those that are gone; return the new ones.

        It looks at every parameter and is quick where nothing has changed. Parameters that are frozen now
        stay hooked: ``toggle_model`` freezes and unfreezes them within a step.

        Args:
            module: whose parameters.
        """
        known = self._names
        if not self._attached or all(p in known for p in module.parameters() if p.requires_grad):
            return []
        self._names = {p: f"{_PREFIX}{name}" for name, p in module.named_parameters() if p.requires_grad or p in known}
        for gone in known.keys() - self._names.keys():
            self._hooks.pop(gone).remove()
            self._owed.pop(gone, None)
        new = [p for p in self._names if p not in known]
        self._hooks |= {p: p.register_post_accumulate_grad_hook(self._ready) for p in new}
        return new

    def begin(self) -> None:
        """Make good what a backward pass that failed, and whose error was caught, has left behind."""
        if self._queued:
            self._finish()

    def detach(self) -> None:
        """Remove all hooks and forget what a failed backward pass left behind."""
        for hook in self._hooks.values():
            hook.remove()
        self._names, self._hooks, self._owed, self._pending = {}, {}, {}, []
        self._attached = self._queued = False

    def history(self) -> int:
        """Return a number below 2**20 for which parameters had no gradient in the passes since it was last asked for.

        Where it differs between workers, a gradient of one pass was combined with one of another pass.
        """
        history, self._history = self._history % (1 << 20), 0
        return history

    def without_gradient(self) -> dict[int, list[str]]:
        """Return, of the last two synchronised passes by number, the trained parameters that had no gradient here."""
        return dict(self._without)

    def waited_for(self) -> tuple[int, list[str]]:
        """Return the number of the pass that is being synchronised, and the parameters whose gradients it waits for."""
        names = self._names
        return self._passes, [names[p].removeprefix(_PREFIX) for p, _ in list(self._pending) if p in names]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave gradients as they are within the block."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def _ready(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        self._owed[parameter] = None
        if self._paused:
            return
        if not self._queued:
            self._queued = True
            # The engine runs it when this backward pass is over; ddp's reducer is built on the same call.
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        if not self.find_unused:
            self._start(parameter)

    def _start(self, parameter: nn.Parameter) -> None:
        self._owed.pop(parameter, None)
        gradient = _real(parameter, self._names[parameter])
        if not gradient.numel():
            return
        sent = gradient.contiguous()
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.compression, sent.dtype)
        before, after = self._factors()
        if dtype == torch.bfloat16:
            # Horovod has no bfloat16: its precision travels in float32.
            sent = sent.to(torch.bfloat16).to(torch.float32)
        elif dtype != sent.dtype:
            sent = sent.to(dtype)
        handle = self._hvd.allreduce_async_(
            sent,
            name=self._names[parameter],
            op=self._ops[self.op],
            prescale_factor=before,
            postscale_factor=after,
        )
        self._pending.append((parameter, handle))

    def _factors(self) -> tuple[float, float]:
        if self.op != "average":
            return 1.0, 1.0
        return 1.0 / self.predivide, self.predivide / self._hvd.size()

    def _finish(self) -> None:
        self._queued = False
        # What ``toggle_model`` has frozen waits for a pass of its own; what was set to None is gone.
        owed = {p for p in self._owed if p.requires_grad and p.grad is not None}
        self._owed = {p: None for p in self._owed if p.grad is not None}
        if self.find_unused:
            mine = torch.tensor([p in owed for p in self._names], dtype=torch.int32)
            used = self._hvd.allreduce(mine, op=self._hvd.Max, name="gradient.used").tolist()
            owed = {p for p, somewhere in zip(self._names, used, strict=True) if somewhere}
        for parameter in [p for p in self._names if p in owed]:
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
        # Another worker may still wait in the pass before this one.
        self._without = {self._passes: without} | {k: v for k, v in self._without.items() if k == self._passes - 1}
        if without:
            self._history = crc32("\n".join([str(self._history), *without]).encode())


def _real(parameter: nn.Parameter, name: str = "") -> Tensor:
    """Return the gradient as Horovod can take it: dense, complex numbers as pairs."""
    assert parameter.grad is not None
    gradient = parameter.grad.detach()
    if gradient.layout != torch.strided:
        raise ConfigurationError(
            f"{name} is a sparse tensor, and strategy=horovod combines dense ones only: set sparse=False in its layer"
        )
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient


def _check_adasum(hvd: Any) -> None:
    if not hvd.mpi_enabled():
        raise ConfigurationError(
            "op=adasum needs a Horovod with MPI: build it with "
            "`python -m dcl_lightning.tools.install_horovod --mpi on`, and start the job with mpirun"
        )
    if hvd.size() & (hvd.size() - 1):
        raise ConfigurationError(f"op=adasum works on 2, 4, 8, ... workers, not on {hvd.size()}: start as many")
