"""Transforms of batches on the device; a sample's random draws depend neither on its batch nor on its worker."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dcl_lightning.data.class_paths import built
from dcl_lightning.errors import ConfigurationError, check_number
from dcl_lightning.types import Batch, NetworkInputs

__all__ = [
    "GivenTransforms", "Normalisation", "TransformedInputs", "as_network_takes", "augment", "crop_fill_of", "draws",
    "fitted", "normalisation_of", "normalise", "to_float",
]  # fmt: skip

# Mean and deviation, one number of each for every channel, or one for all.
Normalisation: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]

# splitmix64's increment and multipliers, the 64-bit words as int64.
_INCREMENT, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def to_float(inputs: Tensor) -> Tensor:
    """Return float32; uint8 0..255 becomes 0..1."""
    return inputs.to(torch.float32).div_(255) if inputs.dtype == torch.uint8 else inputs.to(torch.float32)


def normalisation_of(given: Mapping[str, float | Sequence[float]], channels: int) -> Normalisation:
    """Return the normalisation that ``data.normalize`` gives by ``mean`` and ``std``, one number or one a channel each.

    >>> normalisation_of({"mean": 0.5, "std": [0.2, 0.3, 0.2]}, 3)
    ((0.5,), (0.2, 0.3, 0.2))

    Args:
        given: ``mean`` and ``std``, above 0, in units of ``to_float``'s result.
        channels: of an input.

    Raises:
        ConfigurationError: other keys, other numbers, or another number of them.
    """
    if set(given) != {"mean", "std"}:
        raise ConfigurationError(f"data.normalize={dict(given)}: give dataset, none, or mean and std")
    mean = _numbers_of("data.normalize.mean", given["mean"], channels)
    return mean, _numbers_of("data.normalize.std", given["std"], channels, above=0)


def crop_fill_of(given: float | Sequence[float], channels: int) -> tuple[float, ...]:
    """Return the values around an image that ``data.crop_fill`` gives, one number or one a channel, from 0 to 1.

    Raises:
        ConfigurationError: other numbers, or another number of them.
    """
    return _numbers_of("data.crop_fill", given, channels, at_least=0, at_most=1)


def _numbers_of(key: str, given: float | Sequence[float], channels: int, **bounds: float) -> tuple[float, ...]:
    values = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
    if len(values) not in (1, channels):
        raise ConfigurationError(
            f"{key}={given} has {len(values)} numbers: give one, or one for each of {channels} channels"
        )
    for number in values:
        check_number(key, number, **bounds)
    return tuple(map(float, values))


def normalise(inputs: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return ``(to_float(inputs) - mean) / std`` for each channel of ``(B, C, H, W)``."""
    floats, center = to_float(inputs), _per_channel(mean, inputs.device)
    # The caller's own floats stay unchanged.
    centered = floats - center if floats is inputs else floats.sub_(center)
    return centered.div_(_per_channel(std, inputs.device))


def fitted(inputs: Tensor, network: NetworkInputs) -> Tensor:
    """Return float32 images in the size and with the channels that a network takes, resized all at once.

    As torchvision's ``Resize`` of single float images with ``antialias=True``; of uint8 images the result stays in
    [0, 1], beyond which a bicubic curve goes at edges.

    Args:
        inputs: ``(B, C, H, W)``, where C is 1 or the network's.
        network: which says what it takes.

    Returns:
        ``(B, *network.spec)``.
    """
    (channels, *size), floats = network.spec, to_float(inputs)
    if list(inputs.shape[2:]) != size and len(inputs):
        floats = torch.nn.functional.interpolate(floats, size, mode=network.interpolation, antialias=True)
        if inputs.dtype == torch.uint8:
            floats = floats.clamp_(0, 1)
    elif not len(inputs):
        floats = floats.new_empty((0, inputs.shape[1], *size))
    return floats.expand(-1, channels, -1, -1)


def as_network_takes(inputs: Tensor, network: NetworkInputs | None, normalisation: Normalisation | None) -> Tensor:
    """Return float32 images ``(B, C, H, W)``, fitted to a network if it takes others, and normalised.

    Args:
        inputs: ``(B, C, H, W)``, or ``(B, ...)`` without a network.
        network: what it takes; None for images as they are.
        normalisation: of each channel; None to leave them in units of ``to_float``'s result.
    """
    inputs = inputs if network is None else fitted(inputs, network)
    return to_float(inputs) if normalisation is None else normalise(inputs, *normalisation)


@lru_cache(maxsize=32)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    # Cached, because a copy from the host at each step would wait for all that is queued on a GPU.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)


def draws(sample_ids: Tensor, seed: int, epoch: int, stream: int, high: int) -> Tensor:
    """Return one number in [0, high) for each sample, a hash of seed, epoch, stream and sample id.

    torchvision's transforms draw from the global generator instead, in the order of the samples.

    Args:
        sample_ids: ``(B,)`` int64.
        seed: seed of the run.
        epoch: epoch of the whole stream of tasks.
        stream: distinguishes several draws for one sample.
        high: exclusive upper end, far below 2**31.
    """
    return _hashes(sample_ids, seed, epoch, (stream,))[0] % high


def _hashes(sample_ids: Tensor, seed: int, epoch: int, streams: tuple[int, ...]) -> Tensor:
    """Return ``(streams, B)`` int64 numbers of 31 bits."""
    # One operation for all streams: its cost hardly depends on the few numbers.
    words = torch.stack([sample_ids + state for state in _states(seed, epoch, streams)])
    return (_mix(words) >> 33) & 0x7FFF_FFFF


@lru_cache(maxsize=32)
def _states(seed: int, epoch: int, streams: tuple[int, ...]) -> list[int]:
    # Each word is mixed before the next is added: a plain sum gave sample i + 1 the next epoch's draw of sample i.
    states = torch.zeros(len(streams), dtype=torch.int64)
    for word in (torch.tensor(seed), torch.tensor(epoch), torch.tensor(streams)):
        states = _mix(states + word)
    return [int(state) for state in states]


def _mix(words: Tensor) -> Tensor:
    state = words * _INCREMENT
    for shift, multiplier in ((30, _FIRST), (27, _SECOND)):
        # Arithmetic shifts copy the sign bit; the mask makes them logical.
        state = (state ^ ((state >> shift) & ((1 << (64 - shift)) - 1))) * multiplier
    return state ^ ((state >> 31) & 0x1_FFFF_FFFF)


def augment(
    inputs: Tensor, sample_ids: Tensor, seed: int, epoch: int, pad: int = 4, fill: tuple[float, ...] = (0.0,)
) -> Tensor:
    """Return a random crop of the padded images, mirrored with probability 1/2; without padding, only mirrored.

    As torchvision's ``RandomCrop(size, padding=pad, fill=fill)`` and ``RandomHorizontalFlip`` of single samples.

    Args:
        inputs: ``(B, C, H, W)``, any dtype.
        sample_ids: ``(B,)`` int64.
        seed: seed of the run.
        epoch: epoch of the whole stream of tasks.
        pad: pixels added on each side before the crop.
        fill: their value, one number or one a channel, in units of ``to_float``'s result.

    Returns:
        ``(B, C, H, W)``, of the inputs' dtype; float32 as from ``to_float`` if they are padded with other than 0.
    """
    if pad and any(fill):
        inputs = to_float(inputs)  # a value such as the mean lies between two of uint8
    count, channels, height, width = inputs.shape
    hashes = _hashes(sample_ids, seed, epoch, (0, 1, 2))
    mirrored = hashes[2] % 2
    both = torch.cat([inputs, inputs.flip(-1)])
    images = torch.arange(count, device=inputs.device) + count * mirrored
    if pad == 0 or count == 0:
        return both.index_select(0, images)
    tops, lefts = hashes[:2] % (2 * pad + 1)
    lefts = torch.where(mirrored.bool(), 2 * pad - lefts, lefts)
    padded = torch.nn.functional.pad(both, (pad, pad, pad, pad), value=fill[0])
    if len(set(fill)) > 1:
        padded = _per_channel(fill, inputs.device).expand_as(padded).clone()
        padded[..., pad:-pad, pad:-pad] = both
    padded = padded.contiguous()  # also of a batch in channels_last
    _, _, padded_height, padded_width = padded.shape
    # A row of the result is contiguous in memory: copying rows is many times as fast as gathering pixels.
    planes = images[:, None] * channels + torch.arange(channels, device=inputs.device)
    rows = (planes * padded_height + tops[:, None])[:, :, None] + torch.arange(height, device=inputs.device)
    runs = padded.as_strided((padded.numel() - width + 1, width), (1, 1))
    chosen = runs.index_select(0, (rows * padded_width + lefts[:, None, None]).flatten())
    return chosen.view(count, channels, height, width)


class TransformedInputs:
    """The samples of a split after a scenario's transformations, in place of a tensor ``(n, C, H, W)`` float32.

    As in continuum, uint8 images become Pillow's before they are transformed, and float samples do not. Random
    transformations draw from torch's generator. It is seeded for each sample by its id, in training also by seed and
    epoch, so that the draws repeat, and restored afterwards.

    Args:
        base: ``(m, C, H, W)`` uint8 or float32, the inputs of the transformations.
        rows: ``(n,)`` int64, row in ``base`` of each sample.
        tasks: ``(n,)`` int64, task of each sample.
        transforms: each task's transformations in their order.
    """

    dtype = torch.float32

    def __init__(
        self, base: Tensor, rows: Tensor, tasks: Tensor, transforms: Sequence[Sequence[Callable[[object], object]]]
    ) -> None:
        self.base, self.rows, self.tasks, self.transforms = base, rows, tasks, transforms
        with torch.random.fork_rng(devices=[]):
            self.shape = (len(rows), *(self._sample(0, 0).shape if len(rows) else base.shape[1:]))

    def __len__(self) -> int:
        return len(self.rows)

    def fill(self, batches: Iterable[Batch], key: tuple[int, int] | None = None) -> Iterator[Batch]:
        """Yield the batches in their order with inputs ``(B, C, H, W)`` float32.

        Args:
            batches: batches with ``sample_ids`` and ``draw_ids``.
            key: seed and epoch of training's draws; None in evaluation, where each sample has the same draws each time.
        """
        for batch in batches:
            seeds = draws(batch.draw_ids, *(key or (0, 0)), 3, 1 << 31).tolist()
            with torch.random.fork_rng(devices=[]):
                samples = [self._sample(row, seed) for row, seed in zip(batch.sample_ids.tolist(), seeds, strict=True)]
            yield batch._replace(inputs=torch.stack(samples) if samples else torch.empty((0, *self.shape[1:])))

    def _sample(self, row: int, seed: int) -> Tensor:
        from torchvision.transforms.functional import to_pil_image, to_tensor

        torch.default_generator.manual_seed(seed)  # ``torch.manual_seed`` would also seed the devices
        pixels = self.base[self.rows[row]].clone()  # a transformation may write into its input
        sample: object = to_pil_image(pixels) if pixels.dtype == torch.uint8 else pixels
        for transform in self.transforms[int(self.tasks[row])]:
            sample = transform(sample)
        return (sample if isinstance(sample, Tensor) else to_tensor(sample)).to(torch.float32)


# -- the user's own ------------------------------------------------------------------------------------------------

Step: TypeAlias = Callable[[Tensor], Tensor]

_ALLOWED = "class_path and init_args of a transform of torchvision.transforms.v2, a list, or in Python callables"
_FIRST_STREAM = 16  # of the draws of a user's transforms; those below are of the package's own


class GivenTransforms:
    """A user's transforms of images, applied one after the other to batches on the device.

    A transform that draws from torch's generators is applied to each sample by itself. The generators are seeded by
    the sample's draw and restored afterwards, so that a result depends neither on the batch nor on the worker. One that
    does not draw is applied to the whole batch, unless it treats a batch in another way than its samples. Which of
    these a transform is, a first image shows.

    Args:
        given: a callable that takes ``(..., C, H, W)``, as those of torchvision's v2; ``class_path`` and ``init_args``
            of one; or a list of these.
        shape: of an input, ``(C, H, W)``.
        key: of the configuration, for messages.

    Attributes:
        shape: of a transformed input.
        text: what the transforms are, in words, which must be the same when a run is resumed.

    Raises:
        ConfigurationError: no such transform, or one that cannot be applied or repeated.
    """

    def __init__(self, given: object, shape: Sequence[int], key: str) -> None:
        self._key = key
        self._steps: list[tuple[Step, bool]] = []
        steps = [built(one, key, _ALLOWED) for one in (given if isinstance(given, list) else [given])]
        if not steps or not all(map(callable, steps)):
            raise ConfigurationError(f"{key}={given}: give {_ALLOWED}")
        pixels = torch.arange(math.prod(shape)).view(tuple(shape)) % 128
        try:
            image = self._tried(steps, pixels.to(torch.uint8))
        except ConfigurationError:
            self._steps.clear()
            image = self._tried(steps, pixels / 255)  # of data that are floats
        if image.ndim != 3:
            raise ConfigurationError(
                f"{key} makes {tuple(image.shape)} of an image {tuple(shape)}: give transforms whose result is "
                "(channels, height, width)"
            )
        self.shape = tuple(image.shape)
        self.text = ", ".join(map(_text_of, steps))

    def __call__(self, inputs: Tensor, draw_ids: Tensor, seed: int, epoch: int) -> Tensor:
        """Return the transformed inputs.

        Args:
            inputs: ``(B, C, H, W)``.
            draw_ids: ``(B,)`` int64, which with seed and epoch key each sample's draws.
            seed: seed of the run.
            epoch: epoch of the whole stream of tasks.

        Returns:
            ``(B, *shape)``.
        """
        if not len(inputs):
            return inputs.new_empty((0, *self.shape))
        for place, (step, whole) in enumerate(self._steps):
            if whole:
                inputs = step(inputs)
                continue
            seeds = draws(draw_ids, seed, epoch, _FIRST_STREAM + place, 1 << 31).tolist()
            inputs = torch.stack(_one_by_one(step, inputs, seeds))
        return inputs

    def _tried(self, steps: Sequence[Any], image: Tensor) -> Tensor:
        """Apply the steps to a first image, and note which of them take a whole batch; return the result."""
        for step in steps:
            others = random.getstate(), np.random.get_state(legacy=False)["state"]["pos"]
            try:
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(0)
                    before = torch.default_generator.get_state()
                    result = step(image)
                    draws_numbers = not torch.equal(torch.default_generator.get_state(), before)
            except Exception as error:  # of whatever type the transform raises
                raise ConfigurationError(
                    f"{self._key}: {_text_of(step)} cannot be applied to an image {tuple(image.shape)} of "
                    f"{image.dtype}: {type(error).__name__}: {' '.join(str(error).split())}"
                ) from error
            if not isinstance(result, Tensor):
                raise ConfigurationError(
                    f"{self._key}: {_text_of(step)} returns {type(result).__name__}: give transforms of tensors"
                )
            if others != (random.getstate(), np.random.get_state(legacy=False)["state"]["pos"]):
                raise ConfigurationError(
                    f"{self._key}: {_text_of(step)} draws from Python's or NumPy's generator, whose numbers a resumed "
                    "run could not repeat: draw from torch's"
                )
            self._steps.append((step, not draws_numbers and _takes_batches(step, image, result)))
            image = result
        return image


def _takes_batches(step: Step, image: Tensor, result: Tensor) -> bool:
    """Return whether a batch of two images, of which one is lighter, becomes a batch of their results."""
    other = image.flip(-1) + (0.5 if image.is_floating_point() else 128)
    try:
        return torch.equal(step(torch.stack([image, other])), torch.stack([result, step(other)]))
    except Exception:  # of whatever type the transform raises
        return False


def _one_by_one(step: Step, inputs: Tensor, seeds: Sequence[int]) -> list[Tensor]:
    on_gpu = inputs.device.type == "cuda"
    devices = [inputs.get_device()] if on_gpu else []
    generators = [torch.default_generator, *(torch.cuda.default_generators[device] for device in devices)]
    samples = []
    with torch.random.fork_rng(devices=devices):
        for sample, seed in zip(inputs, seeds, strict=True):
            for generator in generators:  # ``torch.manual_seed`` would also seed other devices
                generator.manual_seed(seed)
            samples.append(step(sample))
    return samples


def _text_of(step: object) -> str:
    if isinstance(step, torch.nn.Module):
        return " ".join(repr(step).split())  # of several lines
    named = step if hasattr(step, "__qualname__") else type(step)
    return f"{named.__module__}.{named.__qualname__}"
