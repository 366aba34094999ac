"""Decodes an image file into uint8 pixels of the final size; runs in the reader processes."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcl_lightning.errors import DataError

__all__ = ["centre", "random_box", "read_image", "read_images"]

# Tags of TIFF.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_TRIES, _AREA, _RATIO = 10, (0.08, 1.0), (math.log(3 / 4), math.log(4 / 3))


def read_image(path: str) -> Tensor:
    """Return an image as ``(3, H, W)`` uint8; grey becomes RGB, transparency is dropped, of a film the first frame.

    Args:
        path: JPEG, PNG, GIF, WEBP, told by their content, or whatever else Pillow reads.

    Samples of 16 bits keep their upper 8. The orientation in EXIF data is not applied, as in torchvision's datasets.

    Raises:
        DataError: no such file, one that is no image or is cut off, or one whose values have no known range (floats,
            signed numbers, 32 bits); it is named.
    """
    from torchvision.io import ImageReadMode, decode_image

    try:
        # torchvision's own reading of files takes no name that is not UTF-8.
        content = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise DataError(f"image {path} cannot be read: {error.strerror}") from error
    if not len(content):
        raise DataError(f"image {path} cannot be read: the file is empty")
    try:
        image: Tensor = decode_image(torch.from_numpy(content), mode=ImageReadMode.RGB)
    except RuntimeError:
        return _with_pillow(path)
    if image.dtype == torch.uint16:
        image = (image.to(torch.int32) >> 8).to(torch.uint8)
    return image[0] if image.ndim == 4 else image


def _with_pillow(path: str) -> Tensor:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            _check_range(file, path)
            bits, inverted = _grey_bits(file)
            pixels = np.array(file if bits else file.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        reason = "it is no image of a known format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DataError(f"image {path} cannot be read: {reason}") from error
    if bits:
        # Pillow clips instead of scaling: nearly all values of 16 bits would become white.
        grey = (pixels >> (bits - 8)).clip(0, 255).astype(np.uint8)
        pixels = np.repeat((255 - grey if inverted else grey)[:, :, None], 3, axis=2)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _check_range(image: Any, path: str) -> None:
    """Refuse an image of which nothing says which values are black and white.

    Args:
        image: Pillow's, not yet decoded.
        path: its file.

    Raises:
        DataError: floats, signed numbers, or 32 bits.
    """
    signed = getattr(image, "tag_v2", {}).get(_SAMPLE_FORMAT, (1,))[0] == 2
    wide = image.mode == "I" and image.format not in ("PPM", "PNG")  # which Pillow scales to 16 bits
    if image.mode == "F" or wide or signed:
        kind = "floating-point" if image.mode == "F" else "signed" if signed else "32-bit"
        raise DataError(
            f"image {path} ({image.format}, mode {image.mode}) has {kind} samples, of which black and white are not "
            "known: save it with 8 or 16 unsigned bits"
        )


def _grey_bits(image: Any) -> tuple[int, bool]:
    """Return the bits of a grey image with more than 8, 0 for any other, and whether 0 is white."""
    if not image.mode.startswith("I"):
        return 0, False
    tags = getattr(image, "tag_v2", {})
    # Pillow itself scales what a PPM header calls white to 16 bits.
    return tags.get(_BITS_PER_SAMPLE, (16,))[0], tags.get(_PHOTOMETRIC) == 0


def centre(image: Tensor, size: int, resize: int) -> Tensor:
    """Return the middle ``(3, size, size)`` of an image whose shorter side was made ``resize``; as it is if it fits.

    Args:
        image: ``(3, H, W)`` uint8.
        size: side of the result.
        resize: length of the shorter side before the crop, at least ``size``.
    """
    height, width = image.shape[1:]
    if height == width == size:
        return image
    short, long = min(height, width), max(height, width)
    if short != resize:
        long = int(resize * long / short)
        height, width = (resize, long) if height <= width else (long, resize)
        image = _resized(image, height, width)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[:, top : top + size, left : left + size]


def random_box(height: int, width: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """Return ``(top, left, height, width)`` of a crop of random area and aspect, drawn as torchvision draws it.

    Args:
        height: rows of the image.
        width: columns of the image.
        generator: where the numbers come from.

    Returns:
        A box of 8 to 100 % of the area and of an aspect from 3:4 to 4:3; after ten that did not fit, the middle.
    """
    for _ in range(_TRIES):
        area = height * width * generator.uniform(*_AREA)
        ratio = math.exp(generator.uniform(*_RATIO))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(generator.integers(height - h + 1)), int(generator.integers(width - w + 1)), h, w
    low, high = math.exp(_RATIO[0]), math.exp(_RATIO[1])
    w, h = min(width, round(height * high)), min(height, round(width / low))
    return (height - h) // 2, (width - w) // 2, h, w


def read_images(
    paths: Sequence[str], size: int, resize: int, key: tuple[int, int] | None = None, draw_ids: Sequence[int] = ()
) -> Tensor:
    """Return images as ``(n, 3, size, size)`` uint8.

    Args:
        paths: files of the images.
        size: side of the result.
        resize: length of the shorter side before the middle is taken.
        key: seed and epoch of random crops; None for the middle.
        draw_ids: what each image's crop is keyed by beside these.

    Raises:
        DataError: a file that cannot be read, by its name.
    """
    result = torch.empty((len(paths), 3, size, size), dtype=torch.uint8)
    for row, path in enumerate(paths):
        image = read_image(os.fspath(path))
        if key is None:
            result[row] = centre(image, size, resize)
            continue
        seed, epoch = key
        generator = np.random.default_rng((seed % (1 << 63), epoch, draw_ids[row]))
        top, left, height, width = random_box(image.shape[1], image.shape[2], generator)
        result[row] = _resized(image[:, top : top + height, left : left + width], size, size)
    return result


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    if image.shape[1:] == (height, width):
        return image
    return torch.nn.functional.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
