"""``trainer.sync_batchnorm`` under Horovod: statistics of a batch over all workers, on CPU and GPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import LayerSync, TorchSyncBatchNorm
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from dcl_lightning.distributed.horovod.comm import HorovodComm
from dcl_lightning.errors import ConfigurationError

__all__ = ["HorovodBatchNormSync", "layer_sync_for_horovod"]


def layer_sync_for_horovod(given: LayerSync) -> LayerSync:
    """Return the layer sync that works under Horovod in place of the one that Lightning chose.

    Args:
        given: the trainer's; one that a user wrote is kept.
    """
    return HorovodBatchNormSync() if type(given) is TorchSyncBatchNorm else given


class HorovodBatchNormSync(LayerSync):
    """Lets every batch normalisation layer see the batch of all workers.

    Layers change their class for the time of training: they stay the same objects with the same
    parameters, buffers and hooks, and ``isinstance`` says of them what it said before.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        """Synchronise the layers.

        Args:
            model: the module, changed in place and returned.

        Raises:
            ConfigurationError: a layer computes its output in a way of its own.
        """
        for name, module in model.named_modules():
            if not isinstance(module, _BatchNorm) or isinstance(module, _Synchronised):
                continue
            kind = type(module)
            if kind.forward is not _BatchNorm.forward and kind is not nn.SyncBatchNorm:
                raise ConfigurationError(
                    f"trainer.sync_batchnorm=true: layer {name} is a {kind.__name__} with a forward of its own, which "
                    "cannot be synchronised: use torch's BatchNorm there, or leave sync_batchnorm out"
                )
            # A module takes any attribute, and an object another class, of which type checkers know neither.
            module.sync_name = f"batchnorm.{name}"  # type: ignore[assignment]
            module.__class__ = _synchronised(kind)
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Make them the layers that they were.

        Args:
            model: the module, changed in place and returned.
        """
        for module in model.modules():
            if isinstance(module, _Synchronised):
                del module.sync_name
                module.__class__ = module.before  # type: ignore[assignment]
        return model


class _Synchronised(_BatchNorm):
    """What is added to a layer's class.

    Attributes:
        before: the layer's own class.
        sync_name: start of the names of its collectives.
    """

    before: type[_BatchNorm]
    sync_name: str

    # A compiler cannot look into a collective. (The decorator has no types.)
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return self.before.forward(self, input)
        self._check_input_dim(input)
        output, mean, variance, count = _Normalise.apply(input, self.weight, self.bias, self.eps, self.sync_name)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            unbiased = variance * (count / (count - 1).clamp(min=1))
            self.running_mean.mul_(1 - factor).add_(mean, alpha=factor)
            self.running_var.mul_(1 - factor).add_(unbiased, alpha=factor)
        return output


def _synchronised(kind: type[_BatchNorm]) -> type[_BatchNorm]:
    return type(f"Synchronised{kind.__name__}", (_Synchronised, kind), {"before": kind})


class _Normalise(torch.autograd.Function):
    """Normalises by mean and variance over all workers' rows; workers may have different numbers, or none.

    One allreduce forward and one backward. Returns the output, mean, biased variance and number of values
    of each channel.
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
        # Each worker fills its own row: the sum shows all rows to all, in one operation without a header.
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
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, count = ctx.saved_tensors
        shape = [1, -1, *[1] * (x.ndim - 2)]
        dims = _all_but_channels(x)
        dy = gradient.to(ctx.wide)
        normalised = (x.to(ctx.wide) - mean.view(shape)) * scale.view(shape)
        for_bias, for_weight = dy.sum(dims), (dy * normalised).sum(dims)
        for_input = None
        if ctx.needs_input_grad[0]:
            sums = HorovodComm(f"{ctx.name}.backward").allreduce(torch.stack([for_bias, for_weight])) / count
            for_input = dy - sums[0].view(shape) - normalised * sums[1].view(shape)
            for_input = (for_input * (scale if weight is None else scale * weight).view(shape)).to(x.dtype)
        # Those of weight and bias stay this worker's: they are averaged with all the others.
        needed = ctx.needs_input_grad
        return for_input, for_weight if needed[1] else None, for_bias if needed[2] else None, None, None


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]
