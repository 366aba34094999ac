"""Data sets with one fault each, for test_hostile_inputs.py."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.data import small_sets

SYNSET = small_sets.SYNSETS[0]


def folder(root: Path) -> Path:
    return small_sets.class_folders(root, "train", "test", ["cat", "dog"], count=3)


# Each writes a data set below its folder, harms it, and returns the data set's name and the words of the message.
Case = Callable[[Path], tuple[str, list[str]]]


def empty_class_folder(root: Path) -> tuple[str, list[str]]:
    (folder(root) / "train" / "eel").mkdir()
    return "folder", ["train/eel holds no images"]


def class_that_is_a_broken_link(root: Path) -> tuple[str, list[str]]:
    (folder(root) / "train" / "eel").symlink_to(root / "gone")
    return "folder", ["train/eel", "broken link"]


def images_without_class_folders(root: Path) -> tuple[str, list[str]]:
    for split in ("train", "test"):
        small_sets.image(root / split / "0.png")
    return "folder", ["train holds no class folders"]


def no_samples(root: Path) -> tuple[str, list[str]]:
    (root / "train").mkdir(parents=True)
    (root / "test").mkdir()
    return "folder", ["train holds no class folders"]


def a_file_for_a_folder(root: Path) -> tuple[str, list[str]]:
    (root / "test").mkdir(parents=True)
    (root / "train").write_text("")
    return "folder", ["train cannot be read: Not a directory"]


def root_that_is_a_file(root: Path) -> tuple[str, list[str]]:
    root.write_text("")
    return "cifar10", ["not found in", "CIFAR10"]


def a_class_that_training_lacks(root: Path) -> tuple[str, list[str]]:
    small_sets.image(folder(root) / "test" / "eel" / "0.png")
    return "folder", ["training lacks", "eel"]


def one_class_in_tasks_of_two(root: Path) -> tuple[str, list[str]]:
    small_sets.class_folders(root, "train", "test", ["cat"])
    return "folder --data.increment 2", ["data.increment=2", "from 1 to 1"]


def list_with_text_labels(root: Path) -> tuple[str, list[str]]:
    return _listed(root, f"train/{SYNSET}/{SYNSET}_1.JPEG cat", "line 21", "relative/path label")


def list_with_negative_labels(root: Path) -> tuple[str, list[str]]:
    return _listed(root, f"train/{SYNSET}/{SYNSET}_1.JPEG -1", "line 21", "-1")


def list_with_one_image_twice(root: Path) -> tuple[str, list[str]]:
    return _listed(root, f"train/{SYNSET}/{SYNSET}_1.JPEG 3", "line 21", f"{SYNSET}_1.JPEG", "line 1", "label 0")


def list_of_an_image_that_is_not_there(root: Path) -> tuple[str, list[str]]:
    return _listed(root, f"train/{SYNSET}/gone.JPEG 0", "line 21", "gone.JPEG")


def _listed(root: Path, line: str, *words: str) -> tuple[str, list[str]]:
    with (small_sets.listed(root, "ImageNet100", "100") / "train_100.txt").open("a") as file:
        file.write(line + "\n")
    return "imagenet100", ["train_100.txt", *words]


def list_with_a_label_too_large(root: Path) -> tuple[str, list[str]]:
    return _listed(root, f"train/{SYNSET}/{SYNSET}_1.JPEG {2**63}", "line 21", "below 2**63")


def empty_list(root: Path) -> tuple[str, list[str]]:
    (small_sets.listed(root, "ImageNet100", "100") / "val_100.txt").write_text("\n")
    return "imagenet100", ["val_100.txt names no images"]


def _batch(root: Path) -> Path:
    small_sets.cifar(root, 10)
    return root / "CIFAR10" / "cifar-10-batches-py" / "data_batch_2"


def pickle_cut_off(root: Path) -> tuple[str, list[str]]:
    file = _batch(root)
    file.write_bytes(file.read_bytes()[:2000])
    return "cifar10", ["data_batch_2"]


def pickle_that_runs_code(root: Path) -> tuple[str, list[str]]:
    _batch(root).write_bytes(b"cos\nsystem\n(S'touch trap'\ntR.")
    return "cifar10", ["data_batch_2", "no array"]


def pickle_with_nan_for_a_label(root: Path) -> tuple[str, list[str]]:
    file = _batch(root)
    content = pickle.loads(file.read_bytes())
    content[b"labels"][3] = float("nan")
    file.write_bytes(pickle.dumps(content))
    return "cifar10", ["data_batch_2"]


def pickle_with_a_negative_label(root: Path) -> tuple[str, list[str]]:
    file = _batch(root)
    content = pickle.loads(file.read_bytes())
    content[b"labels"][3] = -1
    file.write_bytes(pickle.dumps(content))
    return "cifar10", ["data_batch_2", "-1"]


def pickle_with_a_label_too_many(root: Path) -> tuple[str, list[str]]:
    file = _batch(root)
    content = pickle.loads(file.read_bytes())
    content[b"labels"][3] = 10
    file.write_bytes(pickle.dumps(content))
    return "cifar10", ["data_batch_2", "label 10", "0 to 9"]


def pickle_with_a_label_between_two(root: Path) -> tuple[str, list[str]]:
    return _changed(root, b"labels", lambda labels: [0.5, *labels[1:]])


def pickle_with_pixels_of_another_type(root: Path) -> tuple[str, list[str]]:
    return _changed(root, b"data", lambda pixels: pixels.astype("i4") + 256)


def _changed(root: Path, key: bytes, change: Callable[[Any], Any]) -> tuple[str, list[str]]:
    file = _batch(root)
    content = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps(content | {key: change(content[key])}))
    return "cifar10", ["data_batch_2", "of type"]


def pickle_that_is_not_there(root: Path) -> tuple[str, list[str]]:
    _batch(root).unlink()
    return "cifar10", ["not found in", "CIFAR10", "data_batch_2"]


def idx_cut_off(root: Path) -> tuple[str, list[str]]:
    small_sets.mnist(root)
    file = root / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-100])
    return "mnist", ["train-images-idx3-ubyte"]


def idx_of_labels_for_images(root: Path) -> tuple[str, list[str]]:
    small_sets.mnist(root)
    raw = root / "MNIST" / "raw"
    (raw / "t10k-images-idx3-ubyte").write_bytes((raw / "t10k-labels-idx1-ubyte").read_bytes())
    return "mnist", ["t10k-images-idx3-ubyte"]


def idx_with_fewer_labels_than_images(root: Path) -> tuple[str, list[str]]:
    small_sets.mnist(root)
    raw = root / "MNIST" / "raw"
    (raw / "train-labels-idx1-ubyte").write_bytes((raw / "t10k-labels-idx1-ubyte").read_bytes())
    return "mnist", ["mes données", "20 inputs and 10 labels"]


def annotations_that_are_not_there(root: Path) -> tuple[str, list[str]]:
    (small_sets.tinyimagenet(root) / "val" / "val_annotations.txt").unlink()
    return "tinyimagenet", ["not found in", "val_annotations.txt"]


def annotations_of_another_encoding(root: Path) -> tuple[str, list[str]]:
    with (small_sets.tinyimagenet(root) / "val" / "val_annotations.txt").open("ab") as file:
        file.write(b"\xe9t\xe9.JPEG\n")
    return "tinyimagenet", ["val_annotations.txt, line 9"]


def annotation_of_an_image_that_is_not_there(root: Path) -> tuple[str, list[str]]:
    (small_sets.tinyimagenet(root) / "val" / "images" / "val_3.JPEG").unlink()
    return "tinyimagenet", ["val/images/val_3.JPEG"]


def _table(root: Path, row: str, *words: str) -> tuple[str, list[str]]:
    with (small_sets.candle(root, 2, 1) / "nt_train2.csv").open("a") as file:
        file.write(row + "\n")
    return "candle", ["nt_train2.csv, row 3", *words]


def table_of_another_width(root: Path) -> tuple[str, list[str]]:
    return _table(root, "1,2,3", "3 columns")


def table_with_text(root: Path) -> tuple[str, list[str]]:
    return _table(root, "1," + "0.5," * 60_482 + "abc", "column 60484", "abc")


def table_with_nan(root: Path) -> tuple[str, list[str]]:
    return _table(root, "1," + "nan," * 60_482 + "1", "column 2", "nan")


def table_with_text_for_a_label(root: Path) -> tuple[str, list[str]]:
    return _table(root, "tumour," + "0.5," * 60_482 + "1", "column 1", "tumour")


def sessions_that_are_not_there(root: Path) -> tuple[str, list[str]]:
    (root / "CORe50" / "core50_128x128" / "session1").mkdir(parents=True)
    return "core50", ["CORe50", "s<session>/o<object>"]


EARLY: list[Case] = [
    empty_class_folder, class_that_is_a_broken_link, images_without_class_folders, no_samples, a_file_for_a_folder,
    root_that_is_a_file, a_class_that_training_lacks, one_class_in_tasks_of_two, list_with_text_labels,
    list_with_negative_labels, list_with_one_image_twice, list_of_an_image_that_is_not_there,
    list_with_a_label_too_large, empty_list,
    pickle_cut_off, pickle_that_runs_code, pickle_with_nan_for_a_label, pickle_with_a_negative_label,
    pickle_with_a_label_too_many, pickle_with_a_label_between_two, pickle_with_pixels_of_another_type,
    pickle_that_is_not_there, idx_cut_off, idx_of_labels_for_images,
    idx_with_fewer_labels_than_images, annotations_that_are_not_there, annotations_of_another_encoding,
    annotation_of_an_image_that_is_not_there, table_of_another_width, table_with_text, table_with_nan,
    table_with_text_for_a_label, sessions_that_are_not_there,
]  # fmt: skip
