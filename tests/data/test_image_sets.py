"""Data sets of image files: known before they are read, listed without opening an image, faults in one line."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from dcl_lightning.data import ContinualDataModule, decode
from dcl_lightning.data.folders import IMAGE_ENDINGS, per_class
from dcl_lightning.data.sources import table as sources
from dcl_lightning.errors import ConfigurationError, DataError, DatasetNotFoundError
from dcl_lightning.types import InputSpec
from tests.data import small_sets
from tests.data.small_sets import SYNSETS

PART = {"num_classes": 4, "size": 32}


def make(name: str, root: Path, **kwargs) -> ContinualDataModule:
    data = ContinualDataModule(
        name, root=str(root), **({"source_options": PART, "num_workers": 0, "batch_size": 4} | kwargs)
    )
    data.prepare_data()
    data.setup()
    return data


def greys(loader) -> list[tuple[int, int]]:
    """Return target and grey of every image."""
    return [(int(y), int(x.float().mean().round())) for b in loader for x, y in zip(b.inputs, b.targets, strict=True)]


@pytest.mark.parametrize(
    ("name", "num_classes", "spec"),
    [
        ("imagenet", 1000, (3, 224, 224)),
        ("imagenet_blurred", 1000, (3, 224, 224)),
        ("imagenet100", 100, (3, 224, 224)),
        ("imagenet100small", 100, (3, 224, 224)),
        ("core50", 50, (3, 128, 128)),
        ("tinyimagenet", 200, (3, 64, 64)),
        ("candle", 2, (1, 1, 60_483)),
    ],
)
def test_the_table_is_known_before_any_file_and_a_missing_set_creates_nothing(
    tmp_path: Path, name: str, num_classes: int, spec: tuple[int, int, int]
) -> None:
    data = ContinualDataModule(name, root=str(tmp_path / "none"), increment=1)
    assert (data.num_classes, data.input_spec, data.num_tasks) == (num_classes, InputSpec(*spec), num_classes)
    source = sources.SOURCES[name]
    assert len(source.mean) == len(source.std) == spec[0]
    for step in (data.prepare_data, data.setup):
        with pytest.raises(DatasetNotFoundError) as error:
            step()
        text = str(error.value)
        assert os.path.join(str(tmp_path), "none", source.folder) in text
        assert (source.layout or source.files[0]) in text
        if source.downloadable:
            assert "--data.download true" in text
        else:
            assert f"cannot be downloaded: {source.origin}" in text
            assert len(source.origin.split()) > 2
            assert "--data.download" not in text
        assert "\n" not in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["imagenet", "imagenet_blurred"])
def test_imagenet_in_its_published_form(tmp_path: Path, name: str) -> None:
    small_sets.imagenet(tmp_path, sources.SOURCES[name].folder)
    data = make(name, tmp_path)
    assert data.original_labels == SYNSETS
    assert data.num_tasks == 2
    assert data.train_inputs.shape == (24, 3, 32, 32)
    assert data.train_targets.tolist() == np.repeat(np.arange(4), 6).tolist()
    assert data.test_targets.tolist() == np.repeat(np.arange(4), 2).tolist()
    seen = greys(data.train_eval_loader(torch.arange(24)))
    assert all(abs(grey - (20 + 40 * y)) <= 1 for y, grey in seen)
    for task, loader in enumerate(data.test_loaders(1)):
        assert {y for y, _ in greys(loader)} == {2 * task, 2 * task + 1}
    batch = next(iter(data.test_loaders(0)[0]))
    assert (batch.inputs.dtype, batch.inputs.shape) == (torch.uint8, (4, 3, 32, 32))
    inputs = data.prepare_batch(batch, train=False, epoch=0).inputs
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (batch.inputs.float() / 255 - mean[:, None, None]) / std[:, None, None]
    assert torch.allclose(inputs, expected, atol=1e-5)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(("name", "suffix"), [("imagenet100", "100"), ("imagenet100small", "100_small")])
def test_list_files_choose_the_images(tmp_path: Path, name: str, suffix: str, beside: bool) -> None:
    small_sets.listed(tmp_path, sources.SOURCES[name].folder, suffix, beside)
    data = make(name, tmp_path)
    assert data.original_labels == [0, 1, 2, 3]
    assert (len(data.train_inputs), len(data.test_inputs)) == (20, 4)
    assert all(abs(grey - (20 + 40 * y)) <= 1 for y, grey in greys(data.train_eval_loader(torch.arange(20))))
    assert data.train_inputs.path(0).endswith(f"train/{SYNSETS[0]}/{SYNSETS[0]}_1.JPEG")


def test_a_list_beside_a_linked_folder(tmp_path: Path) -> None:
    small_sets.listed(tmp_path / "far", "ImageNet100", "100", True)
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "ImageNet100").symlink_to(tmp_path / "far" / "ImageNet100")
    for file in ("train_100.txt", "val_100.txt"):
        (tmp_path / "far" / file).rename(tmp_path / "near" / file)
    assert len(make("imagenet100", tmp_path / "near").train_inputs) == 20


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train/n0/gone.JPEG 0", ["line 21", "train/n0/gone.JPEG"]),
        (f"train/{SYNSETS[0]}/gone.JPEG 0", ["line 21", "gone.JPEG"]),
        ("train/n0/gone.JPEG", ["line 21", "relative/path label"]),
        ("train/n0/gone.JPEG zero", ["line 21", "zero"]),
        ("train/n0/gone.JPEG -1", ["line 21", "-1"]),
    ],
)
def test_wrong_lines_of_a_list_file(tmp_path: Path, line: str, words: list[str]) -> None:
    base = small_sets.listed(tmp_path, "ImageNet100", "100")
    with (base / "train_100.txt").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError) as error:
        make("imagenet100", tmp_path)
    assert all(word in str(error.value) for word in [*words, "train_100.txt"])


def test_an_empty_list_file(tmp_path: Path) -> None:
    base = small_sets.listed(tmp_path, "ImageNet100", "100")
    (base / "train_100.txt").write_text("\n")
    with pytest.raises(DataError, match=r"train_100\.txt names no images"):
        make("imagenet100", tmp_path)


def test_core50_has_published_sessions_for_test(tmp_path: Path) -> None:
    small_sets.core50(tmp_path)
    data = make("core50", tmp_path, source_options={"num_classes": 3}, increment=1)
    assert data.original_labels == [0, 1, 9]
    assert (len(data.train_inputs), len(data.test_inputs)) == (8 * 6, 3 * 6)
    sessions = [data.train_inputs.path(i).split("core50_128x128/s")[1].split("/")[0] for i in range(48)]
    assert list(dict.fromkeys(sessions)) == ["1", "2", "4", "5", "6", "8", "9", "11"]
    batch = next(iter(data.train_eval_loader(torch.arange(6))))
    assert torch.equal(batch.inputs[0], decode.read_image(data.train_inputs.path(0)))
    domain = make("core50", tmp_path, source_options={"num_classes": 3}, scenario="domain", num_tasks=8)
    for task, session in enumerate(["1", "2", "4", "5", "6", "8", "9", "11"]):
        assert {sessions[i] for i in domain.train_indices(task).tolist()} == {session}


def test_core50s_own_table_chooses_training_images(tmp_path: Path) -> None:
    base = small_sets.core50(tmp_path)
    rows = "".join(f"C_{s:02d}_{o:02d}_000.png,x\n" for s in range(1, 12) for o in (1, 2, 10))
    (base / "core50_train.csv").write_text(rows)
    data = make("core50", tmp_path, source_options={"num_classes": 3}, increment=1)
    assert (len(data.train_inputs), len(data.test_inputs)) == (33, 33)
    assert all(data.train_inputs.path(i).endswith("_000.png") for i in range(33))


@pytest.mark.parametrize("test", ["test", "val"])
def test_any_folder_with_accents_spaces_links_and_folders_within(tmp_path: Path, test: str) -> None:
    root = small_sets.class_folders(tmp_path / "größe é 1", "train", test, ["chat noir", "hündin"], ending="png")
    inner = root / "train" / "chat noir" / "par là"
    inner.mkdir()
    (inner / "self").symlink_to(root / "train" / "chat noir")
    shutil.move(root / "train" / "chat noir" / "chat noir_0.png", inner / "x.PNG")
    (root / "train" / "hündin" / ".hidden.png").write_text("no image")
    (root / "train" / "hündin" / "notes.txt").write_text("no image")
    (root / "train" / ".cache").mkdir()
    (tmp_path / "link").symlink_to(root)
    data = make("folder", tmp_path / "link", source_options={"size": 32}, increment=1)
    assert data.original_labels == ["chat noir", "hündin"]
    assert (data.num_classes, data.input_spec, len(data.train_inputs)) == (2, (3, 32, 32), 12)
    assert all(abs(grey - (20 + 40 * y)) <= 1 for y, grey in greys(data.train_eval_loader(torch.arange(12))))


def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    root = small_sets.class_folders(tmp_path, "train", "val", ["a", "b"], count=2)
    name = os.fsdecode(b"\xe9t\xe9.png")
    small_sets.image(root / "train" / "a" / name)
    data = make("folder", root, source_options={"size": 32}, increment=1)
    assert len(greys(data.train_eval_loader(torch.arange(5)))) == 5


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    base = small_sets.imagenet(tmp_path)
    (base / "train" / "n09999999").mkdir()
    with pytest.raises(DataError, match=r"train/n09999999 holds no images"):
        make("imagenet", tmp_path)


@pytest.mark.parametrize("name", ["imagenet", "folder"])
def test_no_samples(tmp_path: Path, name: str) -> None:
    base = tmp_path / sources.SOURCES[name].folder
    (base / "train").mkdir(parents=True)
    (base / "val").mkdir()
    with pytest.raises(DataError, match="holds no class folders: expected train/<class>/<image>"):
        make(name, tmp_path, source_options={"size": 32})


def test_a_test_split_without_one_of_the_classes(tmp_path: Path) -> None:
    base = small_sets.imagenet(tmp_path)
    shutil.rmtree(base / "val" / SYNSETS[0])
    for file in (base / "val" / SYNSETS[1]).iterdir():
        file.unlink()
    data = make("imagenet", tmp_path)
    assert [sorted(set(data.stream.test_targets[data.stream.test_parts == t].tolist())) for t in range(2)] == [
        [],
        [2, 3],
    ]
    base.joinpath("val", "n09999999").mkdir()
    small_sets.image(base / "val" / "n09999999" / "x.JPEG")
    with pytest.raises(DataError, match="n09999999"):
        make("imagenet", tmp_path)


@pytest.mark.parametrize("harm", ["text", "cut"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_is_named_when_it_is_met(tmp_path: Path, harm: str, num_workers: int) -> None:
    file = small_sets.imagenet(tmp_path) / "train" / SYNSETS[1] / f"{SYNSETS[1]}_2.JPEG"
    file.write_bytes(b"no image" if harm == "text" else file.read_bytes()[:300])
    data = make("imagenet", tmp_path, num_workers=num_workers)
    with pytest.raises(DataError) as error:
        list(data.train_dataloader())
    data.teardown("fit")
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_labels_are_learnt_from_names_alone(tmp_path: Path) -> None:
    base = small_sets.imagenet(tmp_path)
    for file in base.rglob("*.JPEG"):
        file.write_bytes(b"")
    assert make("imagenet", tmp_path, val_ratio=0.2, increment=1).tasks([1] * 4)[3].labels == (SYNSETS[3],)


def test_a_part_of_a_named_set_has_to_be_asked_for(tmp_path: Path) -> None:
    small_sets.imagenet(tmp_path)
    with pytest.raises(
        DataError, match=r"ImageNet has .* 4 classes, expected 1000: set data\.source_options\.num_classes=4"
    ):
        make("imagenet", tmp_path, source_options={"size": 32}, increment=250)
    with pytest.raises(DataError, match="expected 3"):
        make("imagenet", tmp_path, source_options={"num_classes": 3}, increment=1)
    with pytest.raises(ConfigurationError, match="unknown"):
        make("imagenet", tmp_path, source_options={"width": 3})
    with pytest.raises(ConfigurationError, match="num_workers=-1"):
        make("imagenet", tmp_path, num_workers=-1)


def test_every_ending_of_torchvision_is_an_image_and_every_ending_is_one_of_pillow() -> None:
    Image.init()
    assert set(IMG_EXTENSIONS) <= set(IMAGE_ENDINGS) <= set(Image.registered_extensions())
    assert all(ending in IMAGE_ENDINGS for ending, kind in Image.registered_extensions().items() if kind == "JPEG")


@pytest.mark.parametrize("ending", [*IMAGE_ENDINGS, ".JPG", ".Jfif", ".TIFF"])
def test_images_of_every_ending_are_found_and_read(tmp_path: Path, ending: str) -> None:
    Image.init()
    kind = Image.registered_extensions()[ending.lower()]
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow does not write {kind}")
    folder = tmp_path / "train" / "cat"
    folder.mkdir(parents=True)
    mode = "1" if ending == ".pbm" else "RGB"
    Image.fromarray(np.full((8, 8, 3), 255, dtype=np.uint8)).convert(mode).save(folder / f"x{ending}", kind)
    names, labels = per_class(str(tmp_path), "train", training=True)
    assert (names, labels.tolist()) == ([f"train/cat/x{ending}"], ["cat"])
    found = decode.read_image(str(tmp_path / names[0]))
    assert found.shape == (3, 8, 8)
    assert int(found.min()) >= 250


def test_files_that_are_left_out_are_counted_by_their_endings_in_one_line(tmp_path: Path) -> None:
    root = small_sets.class_folders(tmp_path, "train", "test", ["cat", "dog"], count=2)
    for name in ("cat/a.heic", "dog/b.HEIC", "dog/inner/c.npy", "dog/README", "notes.txt", "dog/.hidden.txt"):
        (root / "train" / name).parent.mkdir(exist_ok=True)
        (root / "train" / name).write_text("")
    with pytest.warns(UserWarning, match="left out") as caught:
        names, _ = per_class(str(root), "train", training=True)
    assert len(names) == 4
    (line,) = (str(warning.message) for warning in caught)
    assert f"{root}/train: 5 files" in line
    assert line.endswith("left out: 2 .heic, 1 .npy, 1 .txt, 1 without ending")


def test_a_class_folder_of_other_files_says_what_it_holds(tmp_path: Path) -> None:
    root = small_sets.class_folders(tmp_path, "train", "test", ["cat"], count=2)
    (root / "train" / "eel").mkdir()
    (root / "train" / "eel" / "x.heic").write_text("")
    with pytest.raises(DataError, match=r"train/eel holds no images, but 1 \.heic"):
        per_class(str(root), "train", training=True)


@pytest.mark.filterwarnings("error")
def test_tables_of_boxes_belong_to_tinyimagenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_sets.tinyimagenet(tmp_path)
    monkeypatch.setattr(decode, "read_image", lambda path: torch.zeros(3, 64, 64, dtype=torch.uint8))
    make("tinyimagenet", tmp_path, source_options={"num_classes": 4})
