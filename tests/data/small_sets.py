"""Writers of small data sets in the published layout and format of the real ones."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from dcl_lightning.data.sources.torchvision import CIFAR_FILES

RNG = np.random.default_rng(0)


def image(path: Path, size: tuple[int, int] = (40, 30), mode: str = "RGB", color: int | None = None) -> Path:
    """Write one image of noise, or of one grey, of ``size`` (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    if color is not None:
        pixels[:] = color
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def tiff(path: Path, samples: np.ndarray, bits: int, *, kind: int = 1, photometric: int = 1, order: str = "<") -> Path:
    """Write an uncompressed TIFF, ``(H, W)`` or ``(H, W, 3)``, sample by sample as the format has it.

    ``kind`` is 1 for unsigned numbers, 2 for signed ones, 3 for floats; ``photometric`` is 0 where 0 is white, 1 where
    it is black and 2 for RGB; ``order`` is ``<`` or ``>``. Samples of 12 bits lie two in three bytes.
    """
    height, width, depth = (*samples.shape, 1)[:3]
    if bits == 12:
        pairs = samples.reshape(-1, 2).astype(int)
        data = b"".join((int(a) << 12 | int(b)).to_bytes(3, "big") for a, b in pairs)
    else:
        data = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    shorts = {258: [bits] * depth, 259: [1], 262: [photometric], 277: [depth], 284: [1], 339: [kind] * depth}
    longs = {256: width, 257: height, 273: 8, 278: height, 279: len(data)}
    values = b"".join(struct.pack(f"{order}{depth}H", *numbers) for numbers in shorts.values() if len(numbers) > 2)
    entries, at = [], 8 + len(data)
    for tag in sorted({*shorts, *longs}):
        if tag in longs:
            entries.append(struct.pack(f"{order}HHII", tag, 4, 1, longs[tag]))
        elif len(shorts[tag]) == 1:
            entries.append(struct.pack(f"{order}HHIHH", tag, 3, 1, shorts[tag][0], 0))
        else:
            entries.append(struct.pack(f"{order}HHII", tag, 3, depth, at))
            at += 2 * depth
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(data) + len(values))
    path.write_bytes(head + data + values + directory)
    return path


def class_folders(root: Path, train: str, test: str, classes: list[str], count: int = 6, ending: str = "JPEG") -> Path:
    """Write ``count`` training and two test images of each class, of mixed sizes."""
    for split, number in ((train, count), (test, 2)):
        for place, name in enumerate(classes):
            for i in range(number):
                image(root / split / name / f"{name}_{i}.{ending}", (30 + 4 * i, 40 - 3 * i), color=20 + 40 * place)
    return root


SYNSETS = ["n01440764", "n01443537", "n01484850", "n01491361"]


def imagenet(root: Path, folder: str = "ImageNet") -> Path:
    return class_folders(root / folder, "train", "val", SYNSETS)


def listed(root: Path, folder: str, suffix: str, lists_beside: bool = False) -> Path:
    """Write ImageNet's layout with list files that name all but the first image of each class."""
    base = class_folders(root / folder, "train", "val", SYNSETS)
    for split in ("train", "val"):
        lines = []
        for label, name in enumerate(SYNSETS):
            lines += [f"{split}/{name}/{file.name} {label}\n" for file in sorted((base / split / name).iterdir())[1:]]
        ((root if lists_beside else base) / f"{split}_{suffix}.txt").write_text("".join(lines))
    return base


def core50(root: Path) -> Path:
    base = root / "CORe50" / "core50_128x128"
    for session in range(1, 12):
        for thing in (1, 2, 10):
            for i in range(2):
                name = f"C_{session:02d}_{thing:02d}_{i:03d}.png"
                image(base / f"s{session}" / f"o{thing}" / name, (128, 128), color=20 * thing)
    return base.parent


def tinyimagenet(root: Path, classes: list[str] = SYNSETS) -> Path:
    base = root / "TinyImageNet" / "tiny-imagenet-200"
    (base / "val" / "images").mkdir(parents=True)
    (base / "wnids.txt").write_text("".join(f"{name}\n" for name in reversed(classes)))
    lines = []
    for place, name in enumerate(classes):
        for i in range(6):
            image(base / "train" / name / "images" / f"{name}_{i}.JPEG", (64, 64), "L" if i == 0 else "RGB", 50 * place)
        (base / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t62\t62\n")
    for i in range(2 * len(classes)):
        name = classes[i % len(classes)]
        image(base / "val" / "images" / f"val_{i}.JPEG", (64, 64), color=50 * (i % len(classes)))
        lines.append(f"val_{i}.JPEG\t{name}\t0\t0\t63\t63\n")
    (base / "val" / "val_annotations.txt").write_text("".join(lines))
    return base


def tinyimagenet_in_parts(root: Path, classes: int = 4) -> dict[str, np.ndarray]:
    """Write Mammoth's arrays of floats, two images in each part; return both splits' pixels and labels."""
    base = root / "TINYIMG" / "processed"
    base.mkdir(parents=True)
    whole = {}
    for split in ("train", "val"):
        pixels = RNG.integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
        labels = np.arange(40) % classes
        for part in range(20):
            rows = slice(2 * part, 2 * part + 2)
            np.save(base / f"x_{split}_{part + 1:02d}.npy", (pixels[rows] / 255).astype(np.float32))
            np.save(base / f"y_{split}_{part + 1:02d}.npy", labels[rows])
        whole |= {f"x_{split}": pixels, f"y_{split}": labels}
    return whole


def candle(root: Path, rows: int = 8, test_rows: int = 4) -> Path:
    base = root / "CANDLE"
    base.mkdir(parents=True)
    for name, count, scale in (("nt_train2.csv", rows, 10), ("nt_test2.csv", test_rows, 20)):
        x = RNG.integers(0, 1000, (count, 60_483)) * scale / 1000
        with (base / name).open("w") as file:
            for i in range(count):
                file.write(f"{i % 2}," + ",".join(map(str, x[i].tolist())) + "\n")
    return base


def cifar(root: Path, num_classes: int, per_file: int = 20, test_rows: int | None = None) -> dict[str, np.ndarray]:
    """Write rows of 3072 values, channel by channel, keys as bytes; return the pixels of each file.

    Few rows have labels from all over the classes.
    """
    label = b"labels" if num_classes == 10 else b"fine_labels"
    train, test = CIFAR_FILES[num_classes]
    pixels = {}
    for file in train + test:
        count = per_file if file in train or test_rows is None else test_rows
        path = root / f"CIFAR{num_classes}" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels[file] = RNG.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = (np.arange(count) * max(num_classes // count, 1) % num_classes).tolist()
        content = {b"data": pixels[file], label: labels, b"filenames": [b"x.png"] * count, b"batch_label": b"one"}
        if num_classes == 100:
            content[b"coarse_labels"] = [0] * count
        path.write_bytes(pickle.dumps(content, protocol=2))
    return pixels


def mnist(root: Path, rows: int = 20, test_rows: int = 10) -> list[np.ndarray]:
    """Write the four idx files, of noise; return the pixels of both splits."""
    pixels = [RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8) for count in (rows, test_rows)]
    _idx(root, *((images, np.arange(len(images)) % 10) for images in pixels))
    return pixels


def mnist_of_digits(root: Path, times: int) -> None:
    """Write the four idx files, of scikit-learn's digits at random places: each training image so many times."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits, rng = load_digits(), np.random.default_rng(0)
    small = np.kron(digits.images * 255 / 16, np.ones((3, 3)))
    train, test, labels, test_labels = train_test_split(
        small, digits.target, test_size=0.2, stratify=digits.target, random_state=0
    )
    train, labels = np.tile(train, (times, 1, 1)), np.tile(labels, times)
    splits = []
    for images in (train, test):
        padded = np.zeros((len(images), 28, 28), np.uint8)
        for place, (top, left) in enumerate(rng.integers(0, 5, (len(images), 2))):
            padded[place, top : top + 24, left : left + 24] = images[place]
        splits.append(padded)
    _idx(root, (splits[0], labels), (splits[1], test_labels))


def _idx(root: Path, *splits: tuple[np.ndarray, np.ndarray]) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, (images, labels) in zip(("train", "t10k"), splits, strict=True):
        for kind, magic, array in (("images-idx3", 2051, images), ("labels-idx1", 2049, labels.astype(np.uint8))):
            head = np.array([magic, *array.shape], dtype=">i4").tobytes()
            (raw / f"{part}-{kind}-ubyte").write_bytes(head + array.tobytes())
