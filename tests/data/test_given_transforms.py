"""``data.transform`` and ``data.eval_transform``: results that depend on nothing but seed, epoch and sample."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torchvision.transforms import v2

from dcl_lightning import ContinualDataModule, cli
from dcl_lightning.data import transforms
from dcl_lightning.data.transforms import GivenTransforms
from dcl_lightning.errors import ConfigurationError
from tests.conformance.agents import make
from tests.conformance.small_stream import make_trainer, matrix, weights

V2 = "torchvision.transforms.v2"
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (42, 3, 8, 8), dtype=np.uint8))
LABELS = torch.arange(6).repeat(7)
CROP: list[dict[str, Any]] = [
    {"class_path": f"{V2}.RandomResizedCrop", "init_args": {"size": 6}},
    {"class_path": f"{V2}.RandomHorizontalFlip"},
]
RESIZE: dict[str, Any] = {"class_path": f"{V2}.Resize", "init_args": {"size": 6}}


def make_data(**kwargs: Any) -> ContinualDataModule:
    kwargs = {"increment": 2, "batch_size": 5, "seed": 0} | kwargs
    return ContinualDataModule((IMAGES, LABELS, IMAGES, LABELS), **kwargs)


class Shapes:
    """Adds one to each pixel, and keeps the shapes of what it was called with."""

    def __init__(self) -> None:
        self.met: list[tuple[int, ...]] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.met.append(tuple(images.shape))
        return images + 1


def test_one_that_draws_nothing_takes_whole_batches() -> None:
    step = Shapes()
    found = GivenTransforms(step, (3, 8, 8), "key")
    step.met.clear()
    assert torch.equal(found(IMAGES, torch.arange(42), 0, 0), IMAGES + 1)
    assert step.met == [(42, 3, 8, 8)]
    batches = GivenTransforms([v2.CenterCrop(6), v2.Grayscale(), v2.ToDtype(torch.float32, scale=True)], (3, 8, 8), "k")
    assert batches.shape == (1, 6, 6)
    expected = torch.stack([v2.functional.rgb_to_grayscale(x[:, 1:7, 1:7]) for x in IMAGES]).float() / 255
    torch.testing.assert_close(batches(IMAGES, torch.arange(42), 0, 0), expected)


def test_one_that_is_of_single_images_gets_single_images() -> None:
    def darkest_is_black(image: Tensor) -> Tensor:
        return image - image.min()

    def single(image: Tensor) -> Tensor:
        channels, height, width = image.shape
        return image.reshape(channels, width, height)

    for step in (darkest_is_black, single):
        found = GivenTransforms(step, (3, 8, 8), "key")(IMAGES, torch.arange(42), 0, 0)
        assert torch.equal(found, torch.stack([step(image) for image in IMAGES]))


@pytest.mark.parametrize(
    "step",
    [
        v2.RandomCrop(8, padding=2),
        v2.RandomResizedCrop(6),
        v2.ColorJitter(0.5, 0.5),
        v2.RandAugment(),
        v2.RandomErasing(1),
    ],
    ids=lambda step: type(step).__name__,
)
def test_a_random_ones_result_is_of_seed_epoch_and_sample_alone(step: Any) -> None:
    given = GivenTransforms([v2.RandomHorizontalFlip(), step], (3, 8, 8), "key")
    ids = torch.arange(42) + 7
    state = torch.get_rng_state()
    whole = given(IMAGES, ids, 3, 1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    order = torch.randperm(42)
    parts = [given(IMAGES[rows], ids[rows], 3, 1) for rows in order.split(5)]
    assert torch.equal(torch.cat(parts), whole[order])
    # Each as torchvision makes it, seeded by itself.
    for place, draw in zip(range(42), transforms.draws(ids, 3, 1, 17, 1 << 31).tolist(), strict=True):
        flipped = GivenTransforms(v2.RandomHorizontalFlip(), (3, 8, 8), "key")(IMAGES, ids, 3, 1)[place]
        torch.manual_seed(draw)
        assert torch.equal(step(flipped), whole[place])
        if place == 5:
            break
    for seed, epoch in ((3, 2), (4, 1)):
        assert not torch.equal(given(IMAGES, ids, seed, epoch), whole)


def test_draws_are_fair_and_those_of_two_transforms_are_independent() -> None:
    images = torch.arange(4.0).view(1, 1, 2, 2).expand(2000, 1, 2, 2)
    given = GivenTransforms([v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()], (1, 2, 2), "key")
    firsts = given(images, torch.arange(2000), 0, 0)[:, 0, 0, 0].long()
    counts = torch.bincount(firsts, minlength=4).double()
    assert float(((counts - 500) ** 2 / 500).sum()) < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


def test_a_batch_without_rows_has_the_shape_too() -> None:
    given = GivenTransforms(CROP, (3, 8, 8), "key")
    assert given(IMAGES[:0], torch.arange(0), 0, 0).shape == (0, 3, 6, 6)


def inputs_of(data: ContinualDataModule, epoch: int, train: bool, size: int = 1) -> dict[int, Tensor]:
    """Return what the network gets of each sample, over all workers."""
    found: dict[int, Tensor] = {}
    for rank in range(size):
        data._place = lambda rank=rank: (rank, size)
        data.task_id = 1
        data._train_loader = None
        for batch in data.train_dataloader() if train else data.test_loaders(1)[1]:
            found |= dict(zip(batch.sample_ids.tolist(), data.prepare_batch(batch, train, epoch).inputs, strict=True))
    return found


def same(one: dict[int, Tensor], other: dict[int, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_batches_of_training_and_of_evaluation() -> None:
    data = make_data(transform=CROP, eval_transform=RESIZE, normalize={"mean": 0.5, "std": 0.25})
    assert data.input_spec == (3, 6, 6)
    assert data.augment is False
    data.setup()
    once = inputs_of(data, 0, train=True)
    assert same(inputs_of(data, 0, train=True, size=3), once)
    assert not same(inputs_of(data, 1, train=True), once)
    tested = inputs_of(data, 0, train=False)
    assert same(inputs_of(data, 4, train=False, size=2), tested)
    for row, found in tested.items():
        expected = (v2.functional.resize(IMAGES[row], [6]).double() / 255 - 0.5) / 0.25
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


def test_a_random_one_in_evaluation_has_the_same_draws_each_time() -> None:
    data = make_data(eval_transform=v2.RandomCrop(8, padding=3))
    data.setup()
    assert same(inputs_of(data, 0, train=False), inputs_of(data, 3, train=False))
    other = make_data(eval_transform=v2.RandomCrop(8, padding=3), seed=5)
    other.setup()
    assert same(inputs_of(data, 0, train=False), inputs_of(other, 0, train=False))
    assert not same(inputs_of(data, 0, train=False), inputs_of(make_setup(), 0, train=False))


def make_setup(**kwargs: Any) -> ContinualDataModule:
    data = make_data(**kwargs)
    data.setup()
    return data


def python_noise(images: Tensor) -> Tensor:
    return images + round(random.random())


def numpy_noise(images: Tensor) -> Tensor:
    return images + int(np.random.randint(2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"transform": CROP}, r"shape \(3, 6, 6\) in training and \(3, 8, 8\) in evaluation: give data\.transform and"),
        ({"eval_transform": RESIZE}, r"shape \(3, 8, 8\) in training and \(3, 6, 6\) in evaluation"),
        ({"transform": v2.RandomErasing(), "augment": True}, r"data\.augment=true with data\.transform"),
        ({"transform": []}, r"data\.transform=\[\]: give class_path"),
        ({"transform": "RandomCrop"}, r"data\.transform=RandomCrop: give class_path"),
        ({"transform": {"class_path": "RandomCrop"}}, r"data\.transform=.*give class_path"),
        ({"transform": {"class_path": f"{V2}.RandomCorp"}}, r"has no 'RandomCorp'; did you mean 'RandomCrop'"),
        ({"transform": {"class_path": f"{V2}.RandomCrop"}}, r"RandomCrop refuses no options: .*size"),
        ({"transform": {"class_path": f"{V2}.RandomCrop", "init_arg": {}}}, r"data\.transform=.*give class_path"),
        ({"eval_transform": v2.CutMix(num_classes=6)}, r"data\.eval_transform: CutMix.* cannot be applied"),
        ({"transform": v2.ToPILImage()}, r"returns Image: give transforms of tensors"),
        ({"transform": lambda x: x.flatten()}, r"makes \(192,\) of an image \(3, 8, 8\)"),
        ({"transform": python_noise}, r"draws from Python's or NumPy's generator"),
        ({"transform": numpy_noise}, r"draws from Python's or NumPy's generator"),
    ],
)
def test_what_cannot_work_is_refused_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as error:
        make_data(**options)
    assert "\n" not in str(error.value)


def test_another_number_of_channels_needs_a_normalisation_of_its_own() -> None:
    grey, part = v2.Grayscale(), {"size": 8}
    with pytest.raises(ConfigurationError, match=r"images of 1 channels.*'synthetic' has no mean"):
        ContinualDataModule("synthetic", transform=grey, eval_transform=grey, source_options=part)
    data = ContinualDataModule(
        "synthetic", transform=grey, eval_transform=grey, source_options=part, normalize={"mean": [0.5], "std": [1]}
    )
    assert data.input_spec == (1, 8, 8)


def fitted(folder: Path, name: str = "er", memory: dict | None = None, ckpt: Path | None = None, **kwargs: Any) -> Any:
    kwargs = {"transform": copy.deepcopy(CROP), "eval_transform": RESIZE} | kwargs
    data = make_data(**kwargs)
    agent = make(name, data, memory=memory, epochs_per_task=2)
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    make_trainer(folder, [saver], limit_val_batches=0).fit(agent, datamodule=data, ckpt_path=ckpt)
    return agent


@pytest.mark.parametrize(
    ("memory", "passes"),
    [({}, 1), ({"row_format": "augmented", "execution": "blocking"}, 1), ({"execution": "blocking"}, 2)],
)
def test_a_resumed_run_is_the_same(memory: dict, passes: int, tmp_path: Path) -> None:
    whole = fitted(tmp_path / "whole", memory=memory, passes=passes)
    for step in (2, 3 * passes, 8 * passes + 1):
        path = tmp_path / "whole" / f"step={step}.ckpt"
        again = fitted(tmp_path / "again", memory=memory, ckpt=path, passes=passes)
        assert torch.equal(weights(again), weights(whole))
        assert torch.equal(matrix(again).nan_to_num(-1), matrix(whole).nan_to_num(-1))


def test_other_transforms_are_another_run(tmp_path: Path) -> None:
    crop = {"class_path": f"{V2}.RandomCrop", "init_args": {"size": 8, "padding": 2}}
    of_run: dict[str, Any] = {"transform": [crop, CROP[1]], "eval_transform": v2.RandomInvert(1.0)}
    whole = fitted(tmp_path / "whole", **of_run)
    path = tmp_path / "whole" / "step=3.ckpt"
    as_objects = [v2.RandomCrop(8, padding=2), v2.RandomHorizontalFlip()]
    again = fitted(tmp_path / "again", ckpt=path, **of_run | {"transform": as_objects})
    assert torch.equal(weights(again), weights(whole))
    for kwargs, words in (
        ({"transform": as_objects[:1]}, "run had transform RandomCrop"),
        ({"eval_transform": None}, "run had eval_transform RandomInvert"),
        ({"transform": None}, "run had transform RandomCrop"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            fitted(tmp_path / "refused", ckpt=path, **of_run | kwargs)
    plain = {"transform": None, "eval_transform": None}
    fitted(tmp_path / "plain", **plain)
    old = torch.load(tmp_path / "plain" / "step=3.ckpt", weights_only=True)
    for name in plain:
        del old["ContinualDataModule"]["stream"][name]
    torch.save(old, tmp_path / "plain" / "old.ckpt")
    with pytest.raises(ConfigurationError, match="run had transform None"):
        fitted(tmp_path / "refused", ckpt=tmp_path / "plain" / "old.ckpt", **of_run)


def test_the_command_line_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    keys = {"dataset": "synthetic", "transform": CROP, "eval_transform": RESIZE}
    (tmp_path / "a.yaml").write_text(json.dumps({"data": {"init_args": keys}}))
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", "a.yaml", "--print_config"])
    (tmp_path / "b.yaml").write_text(capsys.readouterr().out)
    small = ["--data.source_options", json.dumps({"size": 8, "per_class": 8, "num_classes": 4})]
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--model.backbone", "mlp"]
    assert cli.main(["fit", "--config", "b.yaml", *small, *quiet]) == 0
    folder = tmp_path / "runs" / "dcl" / "version_0"
    last = str(folder / "checkpoints" / "last.ckpt")
    assert cli.main(["test", "--config", str(folder / "config.yaml"), "--ckpt_path", last]) == 0
    flags = ["--data.dataset", "synthetic", "--data.transform", json.dumps(CROP)]
    flags += ["--data.eval_transform", json.dumps(RESIZE)]
    assert cli.main(["fit", *flags, *small, *quiet]) == 0
    one, other = (tmp_path / "runs" / "dcl" / f"version_{k}" / "report" / "accuracy_matrix.json" for k in (0, 2))
    assert json.loads(one.read_text())["matrix"] == json.loads(other.read_text())["matrix"]
    assert cli.main(["fit", "--data.transform", "{class_path: torchvision.transforms.v2.RandomCrop}", *quiet]) == 2
