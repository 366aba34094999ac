"""Decodes image files into uint8 pixels of the size that the network takes; the reader processes run it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dcl_lightning.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["center_crop", "random_box", "read_image", "read_images"]

_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_TRIES, _AREA, _LOG_RATIO = 10, (0.08, 1.0), (math.log(3 / 4), math.log(4 / 3))


def read_image(path: str) -> Tensor:
    """Return an image file as ``(3, H, W)`` uint8, an animation's first frame; grey becomes RGB, alpha is dropped.

    torchvision decodes JPEG, PNG, GIF and WEBP, which it recognises by their content, and Pillow every other format.
    16-bit samples keep their upper 8 bits. The EXIF orientation is ignored, as in torchvision's data sets.

    Raises:
        DataError: the file is missing, truncated or not an image, or its samples have no known range (floats, signed
            or 32-bit numbers).
    """
    from torchvision.io import ImageReadMode, decode_image

    try:
        content = np.fromfile(path, dtype=np.uint8)  # torchvision opens no file whose name is not UTF-8
    except OSError as error:
        raise DataError(f"image {path} cannot be read: {error.strerror}") from error
    if not len(content):
        raise DataError(f"image {path} cannot be read: the file is empty")
    try:
        image: Tensor = decode_image(torch.from_numpy(content), mode=ImageReadMode.RGB)
    except RuntimeError:
        return _read_with_pillow(path)
    if image.dtype == torch.uint16:
        image = (image.to(torch.int32) >> 8).to(torch.uint8)
    return image[0] if image.ndim == 4 else image


def _read_with_pillow(path: str) -> Tensor:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            bits, inverted = _grey_bits(file, path)
            pixels = np.array(file if bits else file.convert("RGB"))
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "it is no image of a known format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DataError(f"image {path} cannot be read: {reason}") from error
    if bits:
        # Pillow's own conversion clips instead of scaling: nearly all 16-bit values would become white.
        grey = (pixels >> (bits - 8)).clip(0, 255).astype(np.uint8)
        pixels = np.repeat((255 - grey if inverted else grey)[:, :, None], 3, axis=2)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _grey_bits(image: Image.Image, path: str) -> tuple[int, bool]:
    """Return the bits per sample of a grey image of more than 8, else 0, and whether the value 0 is white."""
    from PIL.TiffImagePlugin import TiffImageFile

    tags: Mapping[int, Any] = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    signed = tags.get(_SAMPLE_FORMAT, (1,))[0] == 2
    wide = image.mode == "I" and image.format not in ("PPM", "PNG")  # Pillow scales these two to 16 bits
    if image.mode == "F" or wide or signed:
        kind = "floating-point" if image.mode == "F" else "signed" if signed else "32-bit"
        raise DataError(
            f"image {path} ({image.format}, mode {image.mode}) has {kind} samples, which do not say what black and "
            "white are: save it with 8 or 16 unsigned bits"
        )
    if not image.mode.startswith("I"):
        return 0, False
    return tags.get(_BITS_PER_SAMPLE, (16,))[0], tags.get(_PHOTOMETRIC) == 0


def center_crop(image: Tensor, size: int, resize: int) -> Tensor:
    """Return the center ``(3, size, size)`` of an image whose shorter side is first resized to ``resize`` pixels.

    An image of the final size is returned as it is.
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
    """Return ``(top, left, height, width)`` of a random crop, distributed as torchvision's ``RandomResizedCrop``.

    The box has 8 to 100 % of the area and an aspect from 3:4 to 4:3; after ten draws that do not fit into the image,
    it is the center. torchvision's own ``get_params`` draws from the global generator, so that its draws cannot be
    keyed by sample and epoch.
    """
    for _ in range(_TRIES):
        area = height * width * generator.uniform(*_AREA)
        ratio = math.exp(generator.uniform(*_LOG_RATIO))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(generator.integers(height - h + 1)), int(generator.integers(width - w + 1)), h, w
    low, high = math.exp(_LOG_RATIO[0]), math.exp(_LOG_RATIO[1])
    w, h = min(width, round(height * high)), min(height, round(width / low))
    return (height - h) // 2, (width - w) // 2, h, w


def read_images(
    paths: Sequence[str], size: int, resize: int, key: tuple[int, int] | None = None, draw_ids: Sequence[int] = ()
) -> Tensor:
    """Return images as ``(n, 3, size, size)`` uint8.

    Args:
        paths: the n image files.
        size: side of the result in pixels.
        resize: length of the shorter side before the center crop.
        key: seed and epoch of random crops; None for the center.
        draw_ids: the n numbers that key each image's crop together with ``key``.
    """
    result = torch.empty((len(paths), 3, size, size), dtype=torch.uint8)
    for row, path in enumerate(paths):
        image = read_image(path)
        if key is None:
            result[row] = center_crop(image, size, resize)
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
