"""Batched transforms on the device; each sample has its own draw, whatever batch or worker it is in."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["augment", "draws", "normalise", "to_float"]

# splitmix64's increment and multipliers, the 64-bit words as int64.
_INCREMENT, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def to_float(inputs: Tensor) -> Tensor:
    """Return float32; uint8 0..255 becomes 0..1."""
    return inputs.to(torch.float32).div_(255) if inputs.dtype == torch.uint8 else inputs.to(torch.float32)


def normalise(inputs: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return ``(inputs - mean) / std`` for each channel of ``(B, C, H, W)``."""
    return (inputs - _per_channel(mean, inputs.dtype, inputs.device)) / _per_channel(std, inputs.dtype, inputs.device)


@lru_cache(maxsize=32)
def _per_channel(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Kept: to make it on a GPU anew each step, the host would wait for all that is queued there.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device).view(1, -1, 1, 1)


def draws(sample_ids: Tensor, seed: int, epoch: int, stream: int, high: int) -> Tensor:
    """Return one number in [0, high) for each sample, a hash of seed, epoch, stream and sample id.

    Args:
        sample_ids: ``(B,)`` int64.
        seed: seed of the run.
        epoch: epoch of the whole stream of tasks.
        stream: tells the draws of one sample apart.
        high: exclusive upper end, far below 2**31.
    """
    # Each word is mixed before the next is added: a plain sum gave sample i + 1 the next epoch's draw of sample i.
    state = torch.zeros((), dtype=torch.int64)
    for word in (seed, epoch, stream):
        state = _mix(state + word)
    return ((_mix(sample_ids + state.item()) >> 33) & 0x7FFF_FFFF) % high


def _mix(words: Tensor) -> Tensor:
    state = words * _INCREMENT
    for shift, multiplier in ((30, _FIRST), (27, _SECOND)):
        # Arithmetic shifts copy the sign bit; the mask makes them logical.
        state = (state ^ ((state >> shift) & ((1 << (64 - shift)) - 1))) * multiplier
    return state ^ ((state >> 31) & 0x1_FFFF_FFFF)


def augment(inputs: Tensor, sample_ids: Tensor, seed: int, epoch: int, pad: int = 4) -> Tensor:
    """Return a random crop of the zero-padded images, mirrored with probability 1/2; without padding, mirrored only.

    Args:
        inputs: ``(B, C, H, W)``, any dtype.
        sample_ids: ``(B,)`` int64.
        seed: seed of the run.
        epoch: epoch of the whole stream of tasks.
        pad: pixels added on each side before the crop.
    """
    count, _, height, width = inputs.shape
    device = inputs.device
    flips = draws(sample_ids, seed, epoch, 2, 2).bool()
    if pad == 0:
        return torch.where(flips[:, None, None, None], inputs.flip(-1), inputs)
    tops, lefts = (draws(sample_ids, seed, epoch, s, 2 * pad + 1) for s in (0, 1))
    padded = torch.nn.functional.pad(inputs, (pad, pad, pad, pad))
    columns = torch.arange(width, device=device).expand(count, width)
    columns = torch.where(flips[:, None], columns.flip(1), columns) + lefts[:, None]
    rows = torch.arange(height, device=device)[None] + tops[:, None]
    batch = torch.arange(count, device=device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
