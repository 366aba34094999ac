"""Averages gradients over the workers while the backward pass is still running."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dcl_lightning.errors import ConfigurationError, some_of

__all__ = ["FIND_UNUSED", "GradientAverager"]

FIND_UNUSED = "set find_unused_parameters=true of strategy=horovod"
_BUCKET_BYTES = 25 << 20  # as ddp's


class _Bucket:
    """Gradients that travel in one message, always in the same order, so that their sums are always the same.

    Behind the gradients is a flag for each: whether it has changed on this worker.

    Args:
        parameters: on one device.
        dtype: of the message.
        flagged: whether there are flags.
    """

    def __init__(self, parameters: list[nn.Parameter], dtype: torch.dtype, flagged: bool) -> None:
        self.parameters = parameters
        self.waiting = set(parameters)  # for their gradients in this pass
        self.handle: int | None = None  # Horovod's, once the message is on its way
        shapes = [torch.view_as_real(p).shape if p.is_complex() else p.shape for p in parameters]
        sizes = [shape.numel() for shape in shapes]
        self.message = torch.zeros(sum(sizes) + flagged * len(parameters), dtype=dtype, device=parameters[0].device)
        *parts, self.flags = self.message.split([*sizes, self.message.numel() - sum(sizes)])
        self.parts = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        self.changed: list[bool] = []  # the flags of this worker


class GradientAverager:
    """Combines gradients in messages of up to 25 MB while backward runs, and waits for all of them when it ends.

    ``horovod.torch.DistributedOptimizer`` is not used, because it synchronizes before Lightning's closure has run the
    backward pass, and so trains on wrong gradients without an error. Horovod's own fusion puts into a message what is
    ready when it looks, so that on more than two workers the order of a sum, and its last bits, depend on the time.

    A gradient is unsynchronized from the moment it changes on this worker until it is combined with the others'. What
    accumulates in passes without synchronization is therefore combined in the next pass that has it, even if the
    parameter takes no part in that pass.

    Args:
        op: ``average``, ``sum`` or ``adasum``. The last two combine the whole content of a gradient in each
            synchronized pass: accumulate with ``accumulate_grad_batches``, not by several passes within a step.
        compression: ``none``, ``fp16`` or ``bf16``.
        predivide: factor f of ``average``: gradients are divided by f before the sum and by workers / f after it.
        find_unused: allow a gradient that has changed on some workers only; otherwise all or none must have it.

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
        # By which parameters are not frozen: the messages, and that of each parameter.
        self._plans: dict[tuple[bool, ...], tuple[list[_Bucket], dict[nn.Parameter, _Bucket]]] = {}
        self._buckets: list[_Bucket] = []  # of the present pass
        self._bucket_of: dict[nn.Parameter, _Bucket] = {}
        self._attached = self._paused = self._queued = False

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
        self.include(module)

    def include(self, module: nn.Module) -> list[nn.Parameter]:
        """Hook parameters that were added or unfrozen, unhook those that were removed, and return the new ones.

        Fast if nothing has changed. Parameters that are frozen now stay hooked, because ``toggle_model`` freezes and
        unfreezes them within a step.
        """
        known = self._names
        if not self._attached or all(p in known for p in module.parameters() if p.requires_grad):
            return []
        self._names = {p: name for name, p in module.named_parameters() if p.requires_grad or p in known}
        self._plans = {}
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
        self._names, self._hooks, self._unsynchronized, self._plans, self._buckets = {}, {}, {}, {}, []
        self._attached = self._queued = False

    def waited_for(self) -> list[str]:
        """Return the parameters whose gradients are on their way."""
        names = self._names
        return [names[p] for b in list(self._buckets) if b.handle is not None for p in b.parameters if p in names]

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
            self._begin_pass()
            # The engine calls it at the end of this backward pass; ddp's reducer is built on the same function.
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        bucket = self._bucket_of.get(parameter)
        if bucket is None or self.op == "adasum":
            return
        if bucket.handle is not None:
            raise ConfigurationError(
                f"the gradient of {self._names[parameter]} came twice in one backward pass: "
                "torch.utils.checkpoint needs use_reentrant=False"
            )
        bucket.waiting.discard(parameter)
        if not bucket.waiting:
            self._start(bucket)

    def _begin_pass(self) -> None:
        trained = tuple(p.requires_grad for p in self._names)
        if trained not in self._plans:
            buckets = self._plan([p for p in self._names if p.requires_grad])
            self._plans[trained] = buckets, {p: bucket for bucket in buckets for p in bucket.parameters}
        self._buckets, self._bucket_of = self._plans[trained]
        for bucket in self._buckets:
            bucket.waiting = set(bucket.parameters)

    def _plan(self, parameters: list[nn.Parameter]) -> list[_Bucket]:
        """Return the messages of a pass: as ddp's, in the order in which backward reaches the parameters."""
        filled: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        buckets: list[_Bucket] = []
        for p in reversed(parameters):
            key = self._wire_dtype(p), p.device
            group = filled.setdefault(key, [])
            full = sum(q.numel() for q in group) * key[0].itemsize > _BUCKET_BYTES
            if group and (full or self.op == "adasum"):  # whose result depends on which values are one tensor
                buckets.append(_Bucket(group, key[0], self.op != "adasum"))
                group = filled[key] = []
            group.append(p)
        return buckets + [_Bucket(group, key[0], self.op != "adasum") for key, group in filled.items()]

    def _wire_dtype(self, parameter: nn.Parameter) -> torch.dtype:
        if self.compression == "fp16":
            return torch.float16
        # Horovod has no bfloat16: values of that precision travel as float32.
        if self.compression == "bf16" or parameter.dtype == torch.bfloat16:
            return torch.float32
        return parameter.dtype.to_real()

    def _start(self, bucket: _Bucket) -> None:
        bucket.changed = [p in self._unsynchronized for p in bucket.parameters]
        here = [(p, part) for p, part in zip(bucket.parameters, bucket.parts, strict=True) if p.grad is not None]
        if len(here) < len(bucket.parts):
            bucket.message.zero_()
        torch._foreach_copy_([part for _, part in here], [_real(p, self._names[p]) for p, _ in here])
        if self.compression == "bf16":
            bucket.message.copy_(bucket.message.bfloat16())
        if bucket.flags.numel():
            bucket.flags.copy_(torch.tensor(bucket.changed))
        for p in bucket.parameters:
            self._unsynchronized.pop(p, None)
        before, after = (1 / self.predivide, self.predivide / self._hvd.size()) if self.op == "average" else (1.0, 1.0)
        bucket.handle = self._hvd.allreduce_async_(
            bucket.message,
            name=f"gradient.{self._names[bucket.parameters[0]]}",
            op=self._ops[self.op],
            prescale_factor=before,
            postscale_factor=after,
        )

    def _finish(self) -> None:
        self._queued = False
        # A parameter frozen by ``toggle_model`` waits for a pass of its own; a gradient set to None is dropped.
        self._unsynchronized = {p: None for p in self._unsynchronized if p.grad is not None}
        partly: dict[nn.Parameter, bool] = {}  # changed on some workers only: whether here
        try:
            for bucket in self._buckets if self.op != "adasum" else self._somewhere_changed():
                if bucket.handle is None:
                    self._start(bucket)
            for bucket in self._buckets:
                if bucket.handle is not None:
                    self._hvd.synchronize(bucket.handle)
                    bucket.handle = None
                    partly |= self._take(bucket)
        finally:
            for bucket in self._buckets:
                bucket.handle = None
            self._buckets = []
        if partly and not self.find_unused:
            self._refuse(partly)

    def _somewhere_changed(self) -> list[_Bucket]:
        """Return the messages of gradients that have changed on some worker, which cannot have flags with them."""
        mine = [bucket.parameters[0] in self._unsynchronized for bucket in self._buckets]
        counts = self._hvd.allreduce(torch.tensor(mine, dtype=torch.int32), op=self._hvd.Sum, name="gradient.changed")
        partly = {b.parameters[0]: here for b, here, n in zip(self._buckets, mine, counts.tolist(), strict=True)
                  if 0 < n < self._hvd.size()}  # fmt: skip
        if partly and not self.find_unused:
            self._refuse(partly)
        return [bucket for bucket, count in zip(self._buckets, counts.tolist(), strict=True) if count]

    def _take(self, bucket: _Bucket) -> dict[nn.Parameter, bool]:
        """Write the combined gradients; return the parameters that have one on some workers only, and whether here."""
        workers = self._hvd.size()
        # An average leaves the share of the workers.
        counts = (bucket.flags.float() * (workers if self.op == "average" else 1)).round().int().tolist()
        received: list[tuple[Tensor, Tensor]] = []
        for p, part, count in zip(bucket.parameters, bucket.parts, counts or [1] * len(bucket.parts), strict=True):
            if count:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                received.append((_real(p), part))
        torch._foreach_copy_([gradient for gradient, _ in received], [part for _, part in received])
        found = zip(bucket.parameters, bucket.changed, counts, strict=False)
        return {p: changed for p, changed, count in found if 0 < count < workers}

    def _refuse(self, partly: dict[nn.Parameter, bool]) -> None:
        """Name, on all workers alike, gradients that have changed on some of them only."""
        partly = {p: partly[p] for p in self._names if p in partly}
        mine = torch.tensor([[*partly.values()]], dtype=torch.int32)
        table = self._hvd.allgather(mine, name="gradient.partly").bool()
        without = int((~table).any(1).nonzero()[0])  # the first worker that has not all of them
        names = [self._names[p] for p, has in zip(partly, table[without].tolist(), strict=True) if not has]
        other = int(table[:, int((~table[without]).nonzero()[0])].nonzero()[0])
        raise ConfigurationError(
            f"worker {without}'s backward pass gave no gradient to {some_of(names)}, and worker {other}'s did: "
            f"{FIND_UNUSED}"
        )


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
