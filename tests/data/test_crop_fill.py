"""``data.crop_fill``: what is around an image that is padded and cropped, as torchvision pads and crops it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torchvision.transforms import functional as tv
from torchvision.transforms import v2

from dcl_lightning import ContinualDataModule, cli
from dcl_lightning.data import transforms
from dcl_lightning.errors import ConfigurationError
from tests.conformance.small_stream import make_agent, make_trainer, weights

SMALL = {"size": 6, "per_class": 6, "num_classes": 4}
MEAN = {"mean": [0.5, 0.25, 0.1], "std": [0.5, 1, 0.2]}
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 6, 6, 3), dtype=np.uint8)


def synthetic(**kwargs: Any) -> ContinualDataModule:
    return ContinualDataModule("synthetic", increment=2, batch_size=6, seed=0, source_options=SMALL, **kwargs)


def given_arrays(x: np.ndarray = PIXELS, **kwargs: Any) -> ContinualDataModule:
    return ContinualDataModule((x, np.arange(24) % 4, x, np.arange(24) % 4), increment=2, augment=True, **kwargs)


@pytest.mark.parametrize("make", [synthetic, given_arrays])
@pytest.mark.parametrize(
    ("normalize", "crop_fill"),
    [
        (normalize, fill)
        for normalize in ("none", {"mean": 0.5, "std": 0.5}, MEAN)
        for fill in (None, 0, 0.3, 1, [0.2, 0.0, 0.9], [0.4], "mean")
        if (normalize, fill) != ("none", "mean")  # refused
    ],
    ids=str,
)
def test_training_images_are_torchvisions_padded_cropped_and_flipped_one_by_one(make, normalize, crop_fill) -> None:
    data = make(normalize=normalize, crop_fill=crop_fill)
    data.setup()
    ids = torch.arange(24)
    (batch,) = data.train_eval_loader(ids)
    found = data.prepare_batch(batch, train=True, epoch=2).inputs
    given = MEAN if normalize == MEAN else {"mean": [0.5] * 3, "std": [0.5] * 3}
    tops, lefts, flips = (transforms.draws(ids, data.seed, 2, s, high) for s, high in ((0, 9), (1, 9), (2, 2)))
    for i in range(24):
        image = data.train_inputs[i].float() / 255
        if normalize != "none":
            image = tv.normalize(image, given["mean"], given["std"])
        # Padded after normalisation, with what the value has become there.
        values = np.zeros(3)
        if crop_fill != "mean":
            values = values + np.asarray(0 if crop_fill is None else crop_fill)
            if normalize != "none":
                values = (values - np.asarray(given["mean"])) / np.asarray(given["std"])
        padded = torch.stack([tv.pad(c[None], 4, fill=float(v))[0] for c, v in zip(image, values, strict=True)])
        expected = tv.crop(padded, int(tops[i]), int(lefts[i]), 6, 6)
        torch.testing.assert_close(found[i], tv.hflip(expected) if flips[i] else expected, rtol=1e-5, atol=1e-6)
    if crop_fill == "mean":
        assert int((found == 0).sum()) > 24 * 3 * 6  # exactly


def test_it_is_random_crops_own_padding() -> None:
    """Of ``RandomCrop(padding, fill)`` the set of all crops, whose draws are another generator's."""
    image = torch.arange(1, 5, dtype=torch.uint8).view(1, 2, 2) * 50
    crop = v2.RandomCrop(2, padding=1, fill=0.75)
    torch.manual_seed(0)
    wanted = {bytes(crop(image / 255).numpy()) for _ in range(300)}
    out = transforms.augment(image.expand(300, 1, 2, 2), torch.arange(300), 0, 0, pad=1, fill=(0.75,))
    assert len(wanted) == 9
    assert {bytes(one.contiguous().numpy()) for o in out for one in (o, tv.hflip(o))} >= wanted


def test_an_image_is_the_same_in_any_batch_of_any_worker() -> None:
    data = synthetic(crop_fill=[0.1, 0.2, 0.3])
    data.setup()
    (batch,) = data.train_eval_loader(torch.arange(24))
    whole = data.prepare_batch(batch, train=True, epoch=1).inputs
    for rows in (torch.arange(24)[rank::3] for rank in range(3)):
        (part,) = data.train_eval_loader(rows)
        assert torch.equal(data.prepare_batch(part, train=True, epoch=1).inputs, whole[rows])


@pytest.mark.parametrize("fill", [(0.0,), (0.5,), (0.1, 0.2, 0.3)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_callers_images_stay_unchanged_and_a_batch_may_be_empty(fill, dtype) -> None:
    images = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).to(dtype)
    before = images.clone()
    out = transforms.augment(images, torch.arange(24), 0, 0, 4, fill)
    assert torch.equal(images, before)
    assert out.dtype == (dtype if fill == (0.0,) else torch.float32)
    assert transforms.augment(images[:0], torch.arange(0), 0, 0, 4, fill).shape == (0, 3, 6, 6)


def test_floats_are_padded_in_their_own_units() -> None:
    data = given_arrays(np.full((24, 6, 6, 3), 7.0, dtype=np.float32), crop_fill=[0.1, 0.2, 0.3])
    data.setup()
    (batch,) = data.train_eval_loader(torch.arange(24))
    found = data.prepare_batch(batch, train=True, epoch=0).inputs
    for channel, value in enumerate((0.1, 0.2, 0.3)):
        assert found[:, channel].unique().tolist() == [pytest.approx(value), 7]


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (synthetic, {"crop_fill": 1.5}, r"data\.crop_fill=1\.5: .*at least 0 and at most 1"),
        (synthetic, {"crop_fill": -1}, r"data\.crop_fill=-1: .*at least 0"),
        (synthetic, {"crop_fill": [0.5, 0.5]}, r"has 2 numbers: give one, or one for each of 3 channels"),
        (synthetic, {"crop_fill": []}, r"has 0 numbers"),
        (synthetic, {"crop_fill": [0.5, float("nan"), 0]}, r"data\.crop_fill=nan"),
        (synthetic, {"crop_fill": "median"}, r"data\.crop_fill='median': give mean, or numbers"),
        (synthetic, {"crop_fill": 0.5, "augment": False}, r"no image is padded without data\.augment"),
        (synthetic, {"crop_fill": 0, "augment": False}, r"no image is padded without data\.augment"),
        (synthetic, {"crop_fill": "mean", "normalize": "none"}, r"not normalised, .* number from 0 to 1"),
        (given_arrays, {"crop_fill": "mean"}, r"not normalised, .* or data\.normalize"),
        (
            synthetic,
            {"crop_fill": 0.5, "transform": v2.RandomHorizontalFlip()},
            r"no image is padded without data\.augment",
        ),
    ],
)
def test_what_is_no_fill_or_would_fill_nothing_is_refused_at_once(make, options: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as error:
        make(**options)
    assert "\n" not in str(error.value)


def test_it_is_refused_for_images_that_are_not_padded() -> None:
    with pytest.raises(ConfigurationError, match=r"images of data set 'imagenet100' are augmented without padding"):
        ContinualDataModule("imagenet100", crop_fill=0.5)


def trained(folder: Path, data: ContinualDataModule, **kwargs: Any) -> Any:
    agent = make_agent("base", data, epochs_per_task=1)
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    make_trainer(folder, [saver]).fit(agent, datamodule=data, **kwargs)
    return agent


def test_a_run_resumes_with_its_own_fill_alone(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", synthetic(crop_fill="mean"))
    path = tmp_path / "whole" / "step=3.ckpt"
    assert torch.equal(
        weights(whole), weights(trained(tmp_path / "again", synthetic(crop_fill="mean"), ckpt_path=path))
    )
    black = trained(tmp_path / "black", synthetic())
    assert not torch.equal(weights(whole), weights(black))
    with pytest.raises(ConfigurationError, match=r"run had crop_fill \[0\.5, 0\.5, 0\.5\], this one has \[0\.0\]"):
        trained(tmp_path / "refused", synthetic(), ckpt_path=path)
    old = torch.load(tmp_path / "black" / "step=3.ckpt", weights_only=True)
    del old["ContinualDataModule"]["stream"]["crop_fill"]  # as saved before the key existed
    torch.save(old, tmp_path / "old.ckpt")
    again = trained(tmp_path / "old", synthetic(crop_fill=0), ckpt_path=tmp_path / "old.ckpt")
    assert torch.equal(weights(again), weights(black))


@pytest.mark.parametrize(
    ("flag", "expected"), [("mean", (0.5,) * 3), ("1", (1.0,)), ("0.25", (0.25,)), ("[0, 0.5, 1]", (0.0, 0.5, 1.0))]
)
def test_it_comes_from_the_command_line_and_from_a_file(
    flag: str, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found: list[Any] = []
    monkeypatch.setattr(ContinualDataModule, "prepare_data", lambda self: found.append(self._crop_fill))
    (tmp_path / "a.yaml").write_text(f"data: {{init_args: {{dataset: synthetic, crop_fill: {flag}}}}}\n")
    quiet = ["--trainer.fast_dev_run", "1", "--trainer.accelerator", "cpu"]
    options = ["--data.dataset", "synthetic", "--data.source_options", json.dumps(SMALL)]
    assert cli.main(["fit", *options, "--data.crop_fill", flag, *quiet]) == 0
    assert cli.main(["fit", "--config", "a.yaml", *options, *quiet]) == 0
    assert found == [expected] * 2
