"""The table of named data sets, and how each is read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from dcl_lightning.data.images.dataset import ImageFiles
from dcl_lightning.data.images.folders import core50, listed, per_class
from dcl_lightning.data.sources.arrays import Reader, Source, Splits, from_arrays
from dcl_lightning.data.sources.cache import one_at_a_time
from dcl_lightning.data.sources.candle import FILES as CANDLE_FILES
from dcl_lightning.data.sources.candle import NUM_FEATURES, read_candle
from dcl_lightning.data.sources.cifar import FILES as CIFAR_FILES
from dcl_lightning.data.sources.cifar import fetch_cifar, mapped_cifar
from dcl_lightning.data.sources.continuum import arrays_of_class
from dcl_lightning.data.sources.mnist import FILES as MNIST_FILES
from dcl_lightning.data.sources.mnist import fetch_mnist, read_mnist, read_mnist5k
from dcl_lightning.data.sources.tinyimagenet import read_tinyimagenet
from dcl_lightning.errors import ConfigurationError, DataError, DatasetNotFoundError, whole_number
from dcl_lightning.types import InputSpec

__all__ = ["SOURCES", "Source", "Splits", "check_files", "check_options", "from_arrays", "load"]

_SYNTHETIC = {"num_classes": 10, "size": 32, "per_class": 40, "seed": 0}


def check_options(name: str, options: Mapping[str, int]) -> None:
    """Refuse options that a data set does not take.

    Args:
        name: a key of ``SOURCES``, or another name, which takes none.
        options: what was given.

    Raises:
        ConfigurationError: an unknown option, or a value below 1 (0 for ``seed``).
    """
    known = sorted(SOURCES[name].options) if name in SOURCES else []
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigurationError(f"data.source_options: unknown {unknown}; '{name}' takes {known or 'none'}")
    for key, value in options.items():
        whole_number(f"data.source_options.{key}", value, 0 if key == "seed" else 1)


def load(name: str, root: str, download: bool, options: Mapping[str, int] | None = None) -> Splits:
    """Read both splits of a named data set or of a continuum class.

    Args:
        name: a key of ``SOURCES`` or the class path of a continuum data set.
        root: folder of the data sets.
        download: whether a missing data set may be fetched.
        options: those of the data set's ``Source.options``.

    Raises:
        DatasetNotFoundError: the files are not there and may not be fetched; nothing is created.
        DataError: files that cannot be read.
        ConfigurationError: an unknown name.
    """
    if name in SOURCES:
        check_files(name, root, download)
        return SOURCES[name].read(SOURCES[name].path(root), download, options or {})
    return from_arrays(arrays_of_class(name, root, download, SOURCES), where=f"data set '{name}': ")


def check_files(name: str, root: str, download: bool) -> None:
    """Refuse a named data set whose files are missing, before anything touches the disk.

    Args:
        name: a key of ``SOURCES``.
        root: folder of the data sets.
        download: whether a missing data set may be fetched.

    Raises:
        DatasetNotFoundError: the files are not there and may not be fetched.
    """
    source = SOURCES[name]
    folder = source.path(root)

    def exists(file: str) -> bool:
        # ".." is what the user sees above a folder that may be a symbolic link.
        return os.path.exists(os.path.normpath(os.path.join(folder, file)))

    here = all(any(map(exists, one.split("|"))) for one in source.files)
    if not here and not (download and source.downloadable):
        layout = source.layout or ", ".join(source.files)
        raise DatasetNotFoundError(name, os.path.abspath(folder), layout, source.downloadable)


def _digits(path: str, download: bool, options: Mapping[str, int]) -> Splits:
    return from_arrays(_digit_arrays())


def _digits_dev(path: str, download: bool, options: Mapping[str, int]) -> Splits:
    from sklearn.model_selection import train_test_split

    x, y, _, _ = _digit_arrays()
    parts = train_test_split(x, y, test_size=0.2, stratify=y, random_state=1)
    return from_arrays((parts[0], parts[2], parts[1], parts[3]))


def _digit_arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    x = (digits.images / 16).astype(np.float32)
    parts = train_test_split(x, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
    return parts[0], parts[2], parts[1], parts[3]


def _mnist5k(path: str, download: bool, options: Mapping[str, int]) -> Splits:
    return from_arrays(read_mnist5k())


def _synthetic(path: str, download: bool, options: Mapping[str, int]) -> Splits:
    o = _SYNTHETIC | dict(options)
    rng = np.random.default_rng(o["seed"])
    centres = rng.uniform(64, 192, (o["num_classes"], 3, o["size"], o["size"]))

    def draw(per_class: int) -> tuple[np.ndarray, np.ndarray]:
        y = np.repeat(np.arange(o["num_classes"]), per_class)
        x = centres[y] + rng.normal(0, 40, (len(y), *centres.shape[1:]))
        return x.clip(0, 255).astype(np.uint8), y

    (x, y), (x_test, y_test) = draw(o["per_class"]), draw(max(o["per_class"] // 4, 1))
    return from_arrays((x, y, x_test, y_test))


def _arrays(read_folder: Callable[[str], tuple[np.ndarray, ...]], fetch: Callable[[str], None] | None = None) -> Reader:
    def read(path: str, download: bool, options: Mapping[str, int]) -> Splits:
        if download and fetch is not None:
            try:
                os.makedirs(path, exist_ok=True)
                # Of hosts that share the folder one fetches; what is there is looked at and left.
                with one_at_a_time(os.path.join(path, ".download.lock")):
                    fetch(path)
            except (OSError, RuntimeError) as error:
                reason = str(error).splitlines()[0]
                raise DataError(f"{os.path.abspath(path)} cannot be filled by data.download: {reason}") from error
        return from_arrays(read_folder(path), where=f"{os.path.abspath(path)}: ")

    return read


# Names of a split's images, relative to the folder, and their labels; arguments folder and whether for training.
_Lister = Callable[[str, bool], tuple[list[str], np.ndarray]]


def _images(list_split: _Lister, size: int, random_crop: bool = True) -> Reader:
    def read(path: str, download: bool, options: Mapping[str, int]) -> Splits:
        side = options.get("size", size)
        resize = None if random_crop else side
        (names, labels), (test_names, test_labels) = list_split(path, True), list_split(path, False)
        train, test = (
            ImageFiles(path, files, side, resize=resize, random_crop=random_crop) for files in (names, test_names)
        )
        return Splits(train, labels, test, test_labels)

    return read


def _class_folders(folder: str, training: bool) -> tuple[list[str], np.ndarray]:
    test = "test" if os.path.isdir(os.path.join(folder, "test")) else "val"
    return per_class(folder, "train" if training else test, training)


def _imagenet_folders(folder: str, training: bool) -> tuple[list[str], np.ndarray]:
    return per_class(folder, "train" if training else "val", training)


def _list_file(suffix: str, folder: str, training: bool) -> tuple[list[str], np.ndarray]:
    file = f"{'train' if training else 'val'}_{suffix}.txt"
    inside = os.path.join(folder, file)
    return listed(folder, inside if os.path.exists(inside) else os.path.join(os.path.dirname(folder), file))


_CIFAR_STATS = {
    10: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_IMAGENET_STATS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_IMAGES = ("num_classes", "size")


def _imagenet(folder: str) -> Source:
    return Source(
        1000,
        InputSpec(3, 224, 224),
        _images(_imagenet_folders, 224),
        *_IMAGENET_STATS,
        augment=True,
        pad=0,
        folder=folder,
        files=("train", "val"),
        layout="train/<class>/<image> and val/<class>/<image>",
        options=_IMAGES,
    )


def _imagenet100(folder: str, suffix: str) -> Source:
    files = [f"{split}_{suffix}.txt" for split in ("train", "val")]
    return Source(
        100,
        InputSpec(3, 224, 224),
        _images(partial(_list_file, suffix), 224),
        *_IMAGENET_STATS,
        augment=True,
        pad=0,
        folder=folder,
        files=(".", *(f"{file}|../{file}" for file in files)),
        layout=f"{' and '.join(files)}, here or beside this folder, with a line 'relative/path label' an image",
        options=_IMAGES,
    )


SOURCES: dict[str, Source] = {
    "digits": Source(10, InputSpec(1, 8, 8), _digits),
    "digits_dev": Source(10, InputSpec(1, 8, 8), _digits_dev),
    "synthetic": Source(
        10,
        InputSpec(3, 32, 32),
        _synthetic,
        (0.5,) * 3,
        (0.25,) * 3,
        augment=True,
        options=tuple(_SYNTHETIC),
    ),
    "mnist": Source(
        10,
        InputSpec(1, 28, 28),
        _arrays(read_mnist, fetch_mnist),
        (0.1307,),
        (0.3081,),
        files=MNIST_FILES,
        downloadable=True,
    ),
    "mnist5k": Source(10, InputSpec(1, 28, 28), _mnist5k, (0.1307,), (0.3081,)),
    "cifar10": Source(
        10,
        InputSpec(3, 32, 32),
        _arrays(partial(mapped_cifar, num_classes=10), partial(fetch_cifar, num_classes=10)),
        *_CIFAR_STATS[10],
        augment=True,
        folder="CIFAR10",
        files=(*CIFAR_FILES[10][0], *CIFAR_FILES[10][1]),
        downloadable=True,
        cached=True,
    ),
    "cifar100": Source(
        100,
        InputSpec(3, 32, 32),
        _arrays(partial(mapped_cifar, num_classes=100), partial(fetch_cifar, num_classes=100)),
        *_CIFAR_STATS[100],
        augment=True,
        folder="CIFAR100",
        files=(*CIFAR_FILES[100][0], *CIFAR_FILES[100][1]),
        downloadable=True,
        cached=True,
    ),
    "tinyimagenet": Source(
        200,
        InputSpec(3, 64, 64),
        _arrays(read_tinyimagenet),
        (0.4802, 0.4481, 0.3975),
        (0.2770, 0.2691, 0.2821),
        augment=True,
        folder=os.path.join("TinyImageNet", "tiny-imagenet-200"),
        files=("train", "val/images", "val/val_annotations.txt"),
        layout="train/<wnid>/images/<image>, val/images/<image> and val/val_annotations.txt",
        options=("num_classes",),
        cached=True,
    ),
    "imagenet": _imagenet("ImageNet"),
    "imagenet_blurred": _imagenet("ImageNet_blurred"),
    "imagenet100": _imagenet100("ImageNet100", "100"),
    "imagenet100small": _imagenet100("ImageNet100-small", "100_small"),
    "core50": Source(
        50,
        InputSpec(3, 128, 128),
        _images(core50, 128, random_crop=False),
        *_IMAGENET_STATS,
        augment=True,
        pad=0,
        folder="CORe50",
        # The table is not needed, but belongs to it.
        files=("core50_128x128", "core50_train.csv|core50_128x128"),
        layout="core50_128x128/s<session>/o<object>/<image>",
        options=_IMAGES,
    ),
    "folder": Source(
        None,
        InputSpec(3, 224, 224),
        _images(_class_folders, 224),
        *_IMAGENET_STATS,
        augment=True,
        pad=0,
        files=("train", "test|val"),
        layout="train/<class>/<image> and test/<class>/<image> (or val/...)",
        options=("size",),
    ),
    "candle": Source(
        2,
        InputSpec(1, 1, NUM_FEATURES),
        _arrays(read_candle),
        folder="CANDLE",
        files=CANDLE_FILES,
        cached=True,
    ),
}
