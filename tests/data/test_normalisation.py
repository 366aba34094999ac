"""What images are normalised with: the data set's own, none, or what is given; in training, evaluation, prediction."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from dcl_lightning import ContinualDataModule, FineTuning, cli
from dcl_lightning.errors import ConfigurationError
from tests.conformance.small_stream import make_agent, make_trainer, weights

SMALL = {"size": 4, "per_class": 6, "num_classes": 4}
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 4, 4, 3), dtype=np.uint8)
LABELS = np.arange(24) % 4
GIVEN = {"mean": [0.5, 0.25, 0.1], "std": 0.5}


def synthetic(**kwargs: Any) -> ContinualDataModule:
    kwargs = {"source_options": SMALL, "increment": 2, "batch_size": 6, "seed": 0} | kwargs
    return ContinualDataModule("synthetic", **kwargs)


def given_arrays(x: np.ndarray = PIXELS, **kwargs: Any) -> ContinualDataModule:
    return ContinualDataModule((x, LABELS, x, LABELS), increment=2, **kwargs)


@pytest.mark.parametrize(
    ("make", "normalize", "mean", "std"),
    [
        (synthetic, "dataset", 0.5, 0.25),
        (synthetic, "none", 0, 1),
        (synthetic, {"mean": 0.5, "std": 0.5}, 0.5, 0.5),
        (synthetic, {"mean": [0.5], "std": [0.5, 1, 2]}, 0.5, [0.5, 1, 2]),
        (synthetic, GIVEN, GIVEN["mean"], 0.5),
        (given_arrays, "dataset", 0, 1),
        (given_arrays, "none", 0, 1),
        (given_arrays, GIVEN, GIVEN["mean"], 0.5),
    ],
)
@pytest.mark.parametrize("train", [False, True])
def test_inputs_are_those_of_numpy(make, normalize, mean, std, train: bool) -> None:
    data = make(normalize=normalize, augment=False)
    data.setup()
    ids = torch.tensor([3, 1, 20])
    (batch,) = data.train_eval_loader(ids)
    found = data.prepare_batch(batch, train=train, epoch=0).inputs
    pixels = data.train_inputs[ids].numpy().astype(np.float64) / 255
    center, scale = (np.broadcast_to(np.asarray(v, dtype=np.float64), 3)[:, None, None] for v in (mean, std))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), (pixels - center) / scale, atol=2e-6)


def test_floats_are_normalised_as_they_are_and_the_users_stay_unchanged() -> None:
    x = np.random.default_rng(0).normal(10, 3, (24, 7)).astype(np.float32)
    data = given_arrays(x.copy(), normalize={"mean": 10, "std": 3})
    data.setup()
    (batch,) = data.train_eval_loader(torch.arange(24))
    found = data.prepare_batch(batch, train=True, epoch=0).inputs.flatten(1).numpy()
    np.testing.assert_allclose(found, (x - 10) / 3, atol=1e-5)
    assert np.array_equal(data.train_inputs.flatten(1).numpy(), x)


@pytest.mark.parametrize(
    ("normalize", "words"),
    [
        ("datset", r"data\.normalize='datset'.*dataset, none.*did you mean 'dataset'"),
        ({}, r"give dataset, none, or mean and std"),
        ({"mean": 0.5}, r"give dataset, none, or mean and std"),
        ({"mean": 0.5, "std": 0.5, "eps": 0}, r"give dataset, none, or mean and std"),
        ({"mean": [0.5, 0.5], "std": 1}, r"data\.normalize\.mean=\[0\.5, 0\.5\] has 2 numbers: .* each of 3 channels"),
        ({"mean": [], "std": 1}, r"mean=\[\] has 0 numbers"),
        ({"mean": 0.5, "std": 0}, r"data\.normalize\.std=0: .*above 0"),
        ({"mean": 0.5, "std": [1, 1, -1]}, r"data\.normalize\.std=-1: .*above 0"),
        ({"mean": float("nan"), "std": 1}, r"data\.normalize\.mean=nan"),
        ({"mean": "black", "std": 1}, r"data\.normalize\.mean='black'"),
    ],
)
def test_what_is_no_normalisation_is_refused_at_once(normalize: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as error:
        synthetic(normalize=normalize)
    assert "\n" not in str(error.value)


def trained(folder: Path, data: ContinualDataModule, **kwargs: Any) -> tuple[Any, ModelCheckpoint]:
    agent = make_agent("base", data, epochs_per_task=1)
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    make_trainer(folder, [saver]).fit(agent, datamodule=data, **kwargs)
    return agent, saver


def test_a_run_resumes_with_its_own_normalisation_alone(tmp_path: Path) -> None:
    whole, _ = trained(tmp_path / "whole", synthetic(normalize=GIVEN))
    other, _ = trained(tmp_path / "other", synthetic())
    assert not torch.equal(weights(whole), weights(other))
    path = tmp_path / "whole" / "step=3.ckpt"
    again, _ = trained(tmp_path / "again", synthetic(normalize=GIVEN), ckpt_path=path)
    assert torch.equal(weights(whole), weights(again))
    for normalize in ("dataset", "none", {"mean": 0.5, "std": 0.5}):
        with pytest.raises(ConfigurationError, match=r"run had normalisation \[\[0\.5, 0\.25, 0\.1\], \[0\.5\]\]"):
            trained(tmp_path / "refused", synthetic(normalize=normalize), ckpt_path=path)


def test_a_checkpoint_from_before_the_option_resumes_with_its_default(tmp_path: Path) -> None:
    whole, _ = trained(tmp_path / "whole", synthetic())
    old = torch.load(tmp_path / "whole" / "step=3.ckpt", weights_only=True)
    del old["ContinualDataModule"]["stream"]["normalisation"]
    torch.save(old, tmp_path / "old.ckpt")
    again, _ = trained(tmp_path / "again", synthetic(), ckpt_path=tmp_path / "old.ckpt")
    assert torch.equal(weights(whole), weights(again))
    with pytest.raises(ConfigurationError, match="normalisation"):
        trained(tmp_path / "refused", synthetic(normalize="none"), ckpt_path=tmp_path / "old.ckpt")


def test_a_checkpoint_alone_predicts_with_it(tmp_path: Path) -> None:
    data = synthetic(normalize=GIVEN)
    trained(tmp_path, data)
    agent = FineTuning.load_from_checkpoint(tmp_path / "step=4.ckpt", backbone=make_agent("base", data).backbone)
    assert agent.inference.normalisation == ((0.5, 0.25, 0.1), (0.5,))
    trainer = make_trainer(tmp_path)
    ours = [p for part in trainer.predict(agent, datamodule=data) for p in part]
    (theirs,) = trainer.predict(agent, dataloaders=DataLoader(data.test_inputs, batch_size=len(data.test_inputs)))
    order = torch.cat([p.sample_ids for p in ours]).argsort()
    torch.testing.assert_close(torch.cat([p.probabilities for p in ours])[order], theirs.probabilities)


def test_evaluation_with_another_normalisation_of_the_same_data_is_warned_of(tmp_path: Path) -> None:
    trained(tmp_path, synthetic(normalize=GIVEN))
    path = tmp_path / "step=4.ckpt"

    def test(data: ContinualDataModule) -> None:
        make_trainer(tmp_path).test(make_agent("base", data), data, ckpt_path=path, verbose=False)

    with pytest.warns(UserWarning, match=r"trained with normalisation \[\[0\.5, 0\.25, 0\.1\].*with None: give"):
        test(synthetic(normalize="none"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was trained with")
        test(synthetic(normalize=GIVEN))
        test(given_arrays(normalize="none"))  # other data of the same classes


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("none", None),
        ("dataset", ((0.5,) * 3, (0.25,) * 3)),
        ("{mean: [0.5], std: [0.5]}", ((0.5,), (0.5,))),
        ("{mean: 0.5, std: [0.5, 0.5, 1]}", ((0.5,), (0.5, 0.5, 1.0))),
    ],
)
def test_it_comes_from_the_command_line_and_from_a_file(
    flag: str, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found: list[Any] = []
    monkeypatch.setattr(ContinualDataModule, "prepare_data", lambda self: found.append(self.normalisation))
    (tmp_path / "a.yaml").write_text(f"data: {{init_args: {{dataset: synthetic, normalize: {flag}}}}}\n")
    quiet = ["--trainer.fast_dev_run", "1", "--trainer.accelerator", "cpu"]
    options = ["--data.dataset", "synthetic", "--data.source_options", json.dumps(SMALL)]
    assert cli.main(["fit", *options, "--data.normalize", flag, *quiet]) == 0
    assert cli.main(["fit", "--config", "a.yaml", *options, *quiet]) == 0
    assert found == [expected] * 2
