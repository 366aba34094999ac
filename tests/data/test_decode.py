"""One image: decoded from any format, of the final size, cropped as torchvision crops for the same draw."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from dcl_lightning.data.decode import center_crop, random_box, read_image, read_images
from dcl_lightning.errors import DataError
from tests.data.small_sets import image, tiff


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


# From black to white in twelve steps, of 16 bits, and their upper 8 bits.
STEPS = np.linspace(0, 65535, 12).astype(np.uint16).reshape(3, 4)
UPPER = [[0, 23, 46, 69], [93, 116, 139, 162], [186, 209, 232, 255]]


@pytest.mark.parametrize("order", ["<", ">"])
def test_grey_tiff_of_16_bits_keeps_its_upper_8(tmp_path: Path, order: str) -> None:
    found = read_image(str(tiff(tmp_path / "x.tif", STEPS, 16, order=order)))
    assert found.tolist() == [UPPER] * 3


def test_tiff_of_16_bits_whose_0_is_white(tmp_path: Path) -> None:
    found = read_image(str(tiff(tmp_path / "x.tif", STEPS, 16, photometric=0)))
    assert found.tolist() == [[[255 - value for value in row] for row in UPPER]] * 3


def test_tiff_of_12_bits_keeps_its_upper_8(tmp_path: Path) -> None:
    found = read_image(str(tiff(tmp_path / "x.tif", STEPS >> 4, 12)))
    assert found.tolist() == [UPPER] * 3


def test_rgb_tiff_of_16_bits(tmp_path: Path) -> None:
    pixels = np.stack([STEPS, STEPS[::-1], STEPS // 2], axis=2)
    found = read_image(str(tiff(tmp_path / "x.tif", pixels, 16, photometric=2)))
    assert np.abs(found.permute(1, 2, 0).numpy() - pixels / 257).max() <= 1


@pytest.mark.parametrize("largest", [1, 100, 255, 300, 1023, 4095, 65535])
@pytest.mark.parametrize("kind", ["P2", "P3", "P5", "P6"])
def test_the_largest_value_of_a_pgm_or_ppm_is_white(tmp_path: Path, largest: int, kind: str) -> None:
    pixels = STEPS.astype(int) * largest // 65535
    samples = np.repeat(pixels[:, :, None], 3 if kind in ("P3", "P6") else 1, axis=2)
    text = " ".join(map(str, samples.ravel())).encode()
    content = samples.astype(">u2" if largest > 255 else "u1").tobytes() if kind in ("P5", "P6") else text
    path = tmp_path / "x.pnm"
    path.write_bytes(f"{kind}\n4 3\n{largest}\n".encode() + content)
    found = read_image(str(path)).numpy()
    assert (found.shape, found.min(), found.max()) == ((3, 3, 4), 0, 255)
    assert np.abs(found - pixels * 255 / largest).max() <= 1


@pytest.mark.parametrize(
    ("name", "samples", "bits", "kind"),
    [
        ("floats to 1", (STEPS / 65535).astype(np.float32), 32, 3),
        ("floats to 255", (STEPS / 257).astype(np.float32), 32, 3),
        ("doubles", STEPS / 65535, 64, 3),
        ("RGB floats", np.stack([STEPS / 65535] * 3, 2).astype(np.float32), 32, 3),
        ("signed bytes", (STEPS // 257 - 128).astype(np.int8), 8, 2),
        ("signed 16 bits", (STEPS.astype(int) - 32768).astype(np.int16), 16, 2),
        ("32 bits", STEPS.astype(np.uint32) * 65537, 32, 1),
        ("signed 32 bits", STEPS.astype(np.int32), 32, 2),
    ],
)
def test_values_of_unknown_range_are_refused_by_file(
    tmp_path: Path, name: str, samples: np.ndarray, bits: int, kind: int
) -> None:
    path = tiff(tmp_path / f"{name}.tif", samples, bits, kind=kind, photometric=2 if samples.ndim == 3 else 1)
    with pytest.raises(DataError) as error:
        read_image(str(path))
    assert str(path) in str(error.value)
    if bits < 64 and samples.ndim == 2:  # of a kind that Pillow knows
        assert "mode" in str(error.value)
        assert "8 or 16 unsigned bits" in str(error.value)


def test_portable_float_map_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pfm"
    path.write_bytes(b"Pf\n4 3\n-1.0\n" + (STEPS / 65535).astype("<f4").tobytes())
    with pytest.raises(DataError, match=r"x\.pfm.*mode F.*floating-point"):
        read_image(str(path))


@pytest.mark.parametrize("ending", ["png", "tif", "webp", "bmp"])
def test_palette_with_a_transparent_colour_shows_its_colours(tmp_path: Path, ending: str) -> None:
    palette = Image.new("P", (3, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.putdata([0, 1, 2])
    options = {"png": {"transparency": 1}, "webp": {"lossless": True}}
    palette.save(tmp_path / f"x.{ending}", **options.get(ending, {}))
    expected = [[[10, 40, 70]], [[20, 50, 80]], [[30, 60, 90]]]
    assert read_image(str(tmp_path / f"x.{ending}")).tolist() == expected


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB"])
def test_modes_of_tiff_show_the_same_picture(tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray(np.array([[0, 255, 0], [255, 255, 0]], dtype=np.uint8))
    (grey if mode in ("P", "PA") else grey.convert("RGB")).convert(mode).save(tmp_path / "x.tif")
    found = read_image(str(tmp_path / "x.tif")).numpy().astype(int)
    assert np.abs(found - np.array(grey, dtype=int)).max() <= 2


def test_orientation_in_exif_data_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    Image.new("RGB", (40, 30)).save(tmp_path / "x.jpg", exif=exif)
    assert read_image(str(tmp_path / "x.jpg")).shape == (3, 30, 40)


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
    assert torch.equal(center_crop(pixels, 32, 37), expected)


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
