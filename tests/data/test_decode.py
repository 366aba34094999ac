"""One image: decoded whatever its format, of the final size, cropped as torchvision crops for the same draw."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv
from written import image

from dcl_lightning.data.decode import centre, random_box, read_image, read_images
from dcl_lightning.errors import DataError


@pytest.mark.parametrize("ending", ["png", "bmp", "tiff", "ppm", "webp", "gif", "jpg"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_formats_become_three_channels(tmp_path: Path, ending: str, mode: str) -> None:
    path = image(tmp_path / f"x.{ending}", (40, 30), mode)
    expected = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
    found = read_image(str(path))
    assert (found.shape, found.dtype) == ((3, 30, 40), torch.uint8)
    if ending in ("jpg", "webp"):
        assert float((found.int() - expected.int()).abs().double().mean()) < 3
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "1", "I;16", "CMYK"])
def test_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    if mode == "I;16":
        Image.fromarray(np.full((30, 40), 200 * 256 + 255, dtype=np.uint16)).save(path)
    else:
        image(path, (40, 30), mode)
    found = read_image(str(path))
    assert (found.shape, found.dtype) == ((3, 30, 40), torch.uint8)
    if mode == "I;16":
        assert set(found.flatten().tolist()) == {200}


def test_the_content_tells_the_format_not_the_name(tmp_path: Path) -> None:
    png = image(tmp_path / "x.png")
    png.rename(tmp_path / "x.JPEG")
    assert read_image(str(tmp_path / "x.JPEG")).shape == (3, 30, 40)


@pytest.mark.parametrize("harm", ["text", "empty", "cut.jpg", "cut.png", "head.jpg", "missing", "folder"])
def test_a_file_that_cannot_be_read_is_named_in_one_line(tmp_path: Path, harm: str) -> None:
    path = image(tmp_path / f"bild é {harm}.{'png' if harm.endswith('png') else 'jpg'}", (200, 200))
    content = path.read_bytes()
    if harm == "missing":
        path.unlink()
    elif harm == "folder":
        path.unlink()
        path.mkdir()
    else:
        kept = {"text": b"no image at all", "empty": b"", "head.jpg": content[:20]}
        path.write_bytes(kept.get(harm, content[: len(content) // 2]))
    with pytest.raises(DataError) as error:
        read_image(str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("height", "width"), [(30, 40), (40, 30), (100, 33), (32, 32), (37, 37), (16, 20)])
def test_evaluation_is_torchvisions_resize_and_centre_crop(height: int, width: int) -> None:
    pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    expected = tv.center_crop(tv.resize(pixels, [37], antialias=True), [32, 32])
    if height == width == 32:
        expected = pixels  # of the final size already
    assert torch.equal(centre(pixels, 32, 37), expected)


def test_training_crops_are_torchvisions_for_the_same_draw(tmp_path: Path) -> None:
    paths = [str(image(tmp_path / f"{i}.png", (50, 40))) for i in range(12)]
    found = read_images(paths, 32, 37, (3, 4), range(100, 112))
    for i, path in enumerate(paths):
        box = random_box(40, 50, np.random.default_rng((3, 4, 100 + i)))
        assert torch.equal(found[i], tv.resized_crop(read_image(path), *box, [32, 32], antialias=True))
    assert torch.equal(read_images(paths[5:7], 32, 37, (3, 4), [105, 106]), found[5:7])
    assert not torch.equal(read_images(paths, 32, 37, (3, 5), range(100, 112)), found)


@pytest.mark.parametrize(("height", "width"), [(40, 60), (10, 400)])
def test_boxes_are_distributed_as_torchvisions(height: int, width: int) -> None:
    torch.manual_seed(0)
    pixels = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(pixels, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(2000)])
    generators = (np.random.default_rng((0, 0, i)) for i in range(2000))
    ours = np.array([random_box(height, width, generator) for generator in generators])
    assert (ours >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    for column in range(4):
        a, b = np.sort(ours[:, column]), np.sort(theirs[:, column])
        points = np.union1d(a, b)
        gap = np.abs(np.searchsorted(a, points, "right") - np.searchsorted(b, points, "right")).max() / 2000
        assert gap < 1.95 * math.sqrt(2 / 2000)  # Kolmogorov-Smirnov, p = 0.001
