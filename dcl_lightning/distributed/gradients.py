"""Averages gradients while the backward pass still runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dcl_lightning.errors import ConfigurationError

__all__ = ["GradientAverager"]


class GradientAverager:
    """Starts a named asynchronous allreduce when a gradient is ready; all are done when backward returns.

    ``horovod.torch.DistributedOptimizer`` is not used: it synchronises before Lightning's closure has run
    the backward pass, and trains on wrong gradients without a word.

    Args:
        op: ``average``, ``sum`` or ``adasum``.
        compression: ``none``, ``fp16`` or ``bf16``.
        predivide: averages divide by it before the sum and by workers / predivide after.
        find_unused: agree, once a backward pass, which parameters have a gradient on some worker.
    """

    def __init__(self, op: str, compression: str, predivide: float, find_unused: bool) -> None:
        if predivide != 1.0 and op != "average":
            raise ConfigurationError(f"gradient_predivide_factor={predivide} goes with op=average, not op={op}")
        self.op, self.compression, self.predivide, self.find_unused = op, compression, predivide, find_unused
        self._names: dict[nn.Parameter, str] = {}
        self._hooks: list[Any] = []
        self._pending: list[tuple[nn.Parameter, Any]] = []
        self._paused = self._queued = False

    def attach(self, module: nn.Module) -> None:
        """Hook every parameter that is trained."""
        import horovod.torch as hvd

        self.detach()
        if self.op == "adasum" and not (hvd.mpi_enabled() or hvd.nccl_built()):
            raise ConfigurationError("op=adasum needs a Horovod with MPI: install --mpi on, and start with mpirun")
        self._hvd = hvd
        self._ops = {"average": hvd.Sum, "sum": hvd.Sum, "adasum": hvd.Adasum}
        self._names = {p: f"gradient.{name}" for name, p in module.named_parameters() if p.requires_grad}
        self._hooks = [p.register_post_accumulate_grad_hook(self._ready) for p in self._names]

    def detach(self) -> None:
        """Remove all hooks and forget what a failed backward pass left behind."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._pending, self._names = [], [], {}
        self._queued = False

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
        if self._paused:
            return
        if not self._queued:
            self._queued = True
            # The engine runs it when this backward pass is over; ddp's reducer is built on the same call.
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        if not self.find_unused:
            self._start(parameter)

    def _start(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        sent = parameter.grad.detach().contiguous()
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
        if self.find_unused:
            self._start_used()
        pending, self._pending = self._pending, []
        for parameter, handle in pending:
            result = self._hvd.synchronize(handle)
            assert parameter.grad is not None
            if result.data_ptr() != parameter.grad.data_ptr():
                parameter.grad.copy_(result)

    def _start_used(self) -> None:
        mine = torch.tensor([p.grad is not None for p in self._names], dtype=torch.int32)
        used = self._hvd.allreduce(mine, op=self._hvd.Max, name="gradient.used")
        for parameter, somewhere in zip(self._names, used.tolist(), strict=True):
            if somewhere:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                self._start(parameter)
