"""``trainer.sync_batchnorm`` under Horovod: batch statistics over all workers, on CPU and GPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import LayerSync
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from dcl_lightning.distributed.horovod.comm import HorovodComm
from dcl_lightning.errors import ConfigurationError

__all__ = ["HorovodBatchNormSync"]


class HorovodBatchNormSync(LayerSync):
    """Makes every batch normalization layer use the statistics of all workers' batches.

    Layers change their class during training. They stay the same objects with the same parameters, buffers and hooks,
    and remain instances of their own class.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        """Synchronize the layers of a module in place, and return the module.

        Raises:
            ConfigurationError: a layer has a ``forward`` of its own.
        """
        for name, module in model.named_modules():
            if not isinstance(module, _BatchNorm) or isinstance(module, _Synchronized):
                continue
            kind = type(module)
            if kind.forward is not _BatchNorm.forward and kind is not nn.SyncBatchNorm:
                raise ConfigurationError(
                    f"trainer.sync_batchnorm=true: layer {name} is a {kind.__name__} with a forward of its own, which "
                    "cannot be synchronized: use torch's BatchNorm there, or leave sync_batchnorm out"
                )
            vars(module)["sync_name"] = f"batchnorm.{name}"
            module.__class__ = _synchronized(kind)
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Restore the layers' own classes in place, and return the module."""
        for module in model.modules():
            if isinstance(module, _Synchronized):
                del module.sync_name
                module.__class__ = module.before  # type: ignore[assignment]
        return model


class _Synchronized(_BatchNorm):
    """Mixed into a layer's class.

    Attributes:
        before: the layer's own class.
        sync_name: prefix of the names of its collectives.
    """

    before: type[_BatchNorm]
    sync_name: str

    # torch.compile cannot trace a collective. (The decorator is untyped.)
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return self.before.forward(self, input)
        self._check_input_dim(input)
        output, mean, variance, count = _Normalize.apply(input, self.weight, self.bias, self.eps, self.sync_name)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            unbiased = variance * (count / (count - 1).clamp(min=1))
            self.running_mean.mul_(1 - factor).add_(mean, alpha=factor)
            self.running_var.mul_(1 - factor).add_(unbiased, alpha=factor)
        return output


def _synchronized(kind: type[_BatchNorm]) -> type[_BatchNorm]:
    return type(f"Synchronized{kind.__name__}", (_Synchronized, kind), {"before": kind})


class _Normalize(torch.autograd.Function):
    """Normalizes by the mean and variance over all workers' rows, of which a worker may have any number, also none.

    Takes one allreduce forward and one backward. Returns the output and, for each channel, the mean, the biased
    variance and the number of values.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, name: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        comm = HorovodComm(f"{name}.forward")
        channels = x.shape[1]
        wide = torch.promote_types(x.dtype, torch.float32)
        table = torch.zeros(comm.size, 1 + 2 * channels, dtype=wide, device=x.device)
        if x.numel():
            variance, mean = torch.var_mean(x.to(wide), _all_but_channels(x), correction=0)
            table[comm.rank] = torch.cat([mean.new_tensor([x.numel() // channels]), mean, variance])
        # Each worker fills its own row of the table, so the sum gathers all rows in one operation.
        counts, means, variances = comm.allreduce(table).split([1, channels, channels], dim=1)
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        variance = (counts * (variances + (means - mean).square())).sum(0) / count
        weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
        output = F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(variance + eps), count)
        ctx.name, ctx.wide = name, wide
        ctx.mark_non_differentiable(mean, variance, count)
        return output, mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: object) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, count = ctx.saved_tensors
        shape = [1, -1, *[1] * (x.ndim - 2)]
        dims = _all_but_channels(x)
        dy = gradient.to(ctx.wide)
        normalized = (x.to(ctx.wide) - mean.view(shape)) * scale.view(shape)
        for_bias, for_weight = dy.sum(dims), (dy * normalized).sum(dims)
        for_input = None
        if ctx.needs_input_grad[0]:
            sums = HorovodComm(f"{ctx.name}.backward").allreduce(torch.stack([for_bias, for_weight])) / count
            for_input = dy - sums[0].view(shape) - normalized * sums[1].view(shape)
            for_input = (for_input * (scale if weight is None else scale * weight).view(shape)).to(x.dtype)
        # The gradients of weight and bias stay local: they are averaged together with those of other parameters.
        needed = ctx.needs_input_grad
        return for_input, for_weight if needed[1] else None, for_bias if needed[2] else None, None, None


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]
