"""Networks of timm with weights: what becomes of images, files of weights, and what is frozen."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import v2

from dcl_lightning import ER, ContinualDataModule, FineTuning, cli
from dcl_lightning.backbones import TimmModel
from dcl_lightning.data.transforms import fitted
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.types import InputSpec, NetworkInputs
from tests.conformance.small_stream import make_trainer, weights

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
GREY = COLOUR[..., :1]
LABELS = np.arange(24) % 4


pytestmark = pytest.mark.usefixtures("one_thread")


def arrays(x: Any = COLOUR, **kwargs: Any) -> ContinualDataModule:
    return ContinualDataModule((x, LABELS, x, LABELS), **{"increment": 2, "batch_size": 6, "seed": 0} | kwargs)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of weights, by kind, with a classifier as those of the hub have."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    made = {}
    for name in ("test_resnet", "test_vit"):
        state = timm.create_model(name, num_classes=1000).state_dict()
        made[name] = folder / f"{name}.safetensors"
        save_file(state, made[name])
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, folder / "vit.pth")
    return made | {"vit.pth": folder / "vit.pth"}


def resnet(files: dict[str, Path], **kwargs: Any) -> TimmModel:
    return TimmModel("test_resnet", checkpoint_path=str(files["test_resnet"]), **kwargs)


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("pixels", [COLOUR, GREY, GREY.astype(np.float32) - 60])
@pytest.mark.parametrize("size", [(20, 24), (5, 6), (8, 8)])
def test_fitted_images_are_torchvision_s_of_single_ones(pixels, interpolation, size) -> None:
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    steps = [v2.ToDtype(torch.float32, scale=True), v2.Resize(size, v2.InterpolationMode[interpolation.upper()])]
    expected = torch.stack([v2.Compose(steps)(image) for image in images])
    if pixels.dtype == np.uint8:
        expected = expected.clamp(0, 1)
    expected = expected.repeat(1, 3 // expected.shape[1], 1, 1)
    found = fitted(images, NetworkInputs(InputSpec(3, *size), interpolation))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert fitted(images[:0], NetworkInputs(InputSpec(3, *size), interpolation)).shape == (0, 3, *size)


@pytest.mark.parametrize("pixels", [COLOUR, GREY])
def test_pretrained_features_are_timm_s_by_its_own_data_config(pixels, files, tmp_path) -> None:
    data, saver = arrays(pixels), ModelCheckpoint(tmp_path, filename="end")
    agent = FineTuning(resnet(files, freeze="all"), epochs_per_task=1)
    theirs = timm.create_model("test_resnet", num_classes=1000).eval()
    theirs.load_state_dict(timm.models.load_state_dict(str(files["test_resnet"])))
    theirs.reset_classifier(0)
    config = timm.data.resolve_model_data_config(theirs)
    steps = [
        v2.ToDtype(torch.float32, scale=True), v2.Resize(config["input_size"][1:], v2.InterpolationMode.BILINEAR),
        v2.Normalize(config["mean"], config["std"]),
    ]  # fmt: skip
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = theirs(torch.stack([v2.Compose(steps)(image.repeat(3 // len(image), 1, 1)) for image in images]))
    seen: list[torch.Tensor] = []
    agent.backbone.register_forward_hook(lambda _, inputs, outputs: seen.append(outputs))
    trainer = make_trainer(tmp_path, [saver], limit_val_batches=0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(agent, datamodule=data)
    assert not [w for w in said if "eval mode" in str(w.message)]
    seen.clear()
    parts = trainer.predict(agent, datamodule=data)
    torch.testing.assert_close(torch.cat(seen), expected[np.argsort(LABELS // 2, kind="stable")], atol=2e-4, rtol=1e-3)
    # From a checkpoint alone, and raw images.
    loaded = FineTuning.load_from_checkpoint(saver.best_model_path, backbone=resnet(files, freeze="all"))
    raw = make_trainer(tmp_path).predict(loaded, torch.utils.data.DataLoader(images, batch_size=24))
    probabilities = torch.cat([one.probabilities for part in parts for one in part])
    order = np.argsort(LABELS // 2, kind="stable")
    torch.testing.assert_close(raw[0].probabilities[order], probabilities, atol=1e-5, rtol=1e-4)
    assert data.network is None, "the next module gets the data's own images"


def test_stored_rows_stay_in_the_data_s_own_size_and_the_network_gets_its_own(files, tmp_path) -> None:
    shapes = set()
    agent = ER(resnet(files, img_size=32), epochs_per_task=1, rehearsal={"buffer_size": 8, "num_samples": 2})
    agent.backbone.register_forward_pre_hook(lambda _, inputs: shapes.add(tuple(inputs[0].shape[1:])))
    make_trainer(tmp_path, limit_val_batches=0).fit(agent, datamodule=arrays(GREY))
    store = agent.rehearsal.manager.buffer.store
    assert store.gather(torch.arange(2))["inputs"].shape[1:] == (1, 8, 8)
    assert store.gather(torch.arange(2))["inputs"].dtype == torch.uint8
    assert shapes == {(3, 32, 32)}


def test_a_given_normalisation_stands_and_random_weights_take_the_data_as_they_are(files) -> None:
    data = arrays(normalize={"mean": 0.3, "std": 0.5})
    data.fit_inputs_to(resnet(files).own_inputs(data.input_spec))
    assert data.normalisation == ((0.3,), (0.5,))
    assert TimmModel("test_resnet").own_inputs(data.input_spec) is None
    assert TimmModel("test_resnet", img_size=40).own_inputs(InputSpec(1, 8, 8)) == ((1, 40, 40), "bilinear", None)


@pytest.mark.parametrize(
    ("pixels", "options", "words"),
    [
        (np.concatenate([COLOUR, GREY], 3).transpose(0, 3, 1, 2), {}, "images of 4 channels, the network takes 3"),
        (COLOUR, {"normalize": {"mean": [0.5, 0.5], "std": 0.5}}, "mean=.* has 2 numbers"),
        (GREY, {"crop_fill": "mean", "augment": True, "normalize": {"mean": 0.5, "std": 0.5}}, None),
    ],
)
def test_channels_that_do_not_fit_are_refused(pixels, options, words, files) -> None:
    def fit() -> None:
        data = arrays(pixels, **options)
        data.fit_inputs_to(resnet(files).own_inputs(data.input_spec))

    if words is None:
        fit()
        return
    with pytest.raises(ConfigurationError, match=words):
        fit()


def test_a_run_goes_on_with_images_of_the_same_size(files, tmp_path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="end")
    make_trainer(tmp_path, [saver], limit_val_batches=0).fit(
        FineTuning(resnet(files, img_size=32), epochs_per_task=1), datamodule=arrays()
    )
    other = FineTuning(resnet(files, img_size=40), epochs_per_task=1)
    with pytest.raises(ConfigurationError, match=r"had resized \[3, 32, 32, 'bilinear'\]"):
        make_trainer(tmp_path).fit(other, datamodule=arrays(), ckpt_path=saver.best_model_path)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "size"), [("test_vit", None), ("vit.pth", None), ("test_vit", 64)])
def test_weights_are_those_of_the_file(kind, size, files) -> None:
    ours = TimmModel("test_vit", checkpoint_path=str(files[kind]), img_size=size)
    ours.adapt(InputSpec(1, 8, 8))
    side = size or 160
    file = {"file": str(files["test_vit"])}
    theirs = timm.create_model("test_vit", True, num_classes=0, img_size=side, pretrained_cfg_overlay=file)
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.model.state_dict().items())
    assert ours.eval()(torch.zeros(1, 3, side, side)).shape == (1, ours.feature_dim)


def test_a_checkpoint_of_this_package_is_a_file_of_weights(files, tmp_path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="end")
    agent = FineTuning(TimmModel("test_resnet"), epochs_per_task=1)
    make_trainer(tmp_path, [saver], limit_val_batches=0).fit(agent, datamodule=arrays())
    again = TimmModel("test_resnet", checkpoint_path=saver.best_model_path)
    again.adapt(InputSpec(3, 8, 8))
    assert torch.equal(weights(again), weights(agent.backbone))


class _Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("test_vit", None, "is no file: give one of weights"),
        ("test_vit", b"not weights", "cannot be read as weights alone"),
        ("test_vit", {"a": _Evil()}, "cannot be read as weights alone"),
        ("test_vit", {"head.weight": torch.zeros(3)}, r"has not the weights .*: \d+ are missing, as cls_token"),
        ("test_resnet", {"conv1.0.weight": torch.zeros(3)}, "has not the weights of test_resnet: .*size mismatch"),
    ],
)
def test_other_files_are_refused_in_one_line(name, content, words, tmp_path, capsys) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    network = TimmModel(name, checkpoint_path=str(path))
    with pytest.raises(ConfigurationError, match=words) as error:
        network.adapt(InputSpec(3, 8, 8))
    assert "\n" not in str(error.value)
    assert "executed" not in capsys.readouterr().out


def test_without_a_hub_one_line_says_which_file_to_put_where(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = ["--model.backbone", "timm", "--model.backbone.name", "test_vit", "--model.backbone.pretrained", "true"]
    assert cli.main(["fit", *model, "--data.dataset", "synthetic"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "model.safetensors of https://huggingface.co/timm/test_vit.r160_in1k" in line
    assert "model.backbone.checkpoint_path" in line


# -- freezing ----------------------------------------------------------------------------------------------------------


def trained(network: TimmModel) -> set[str]:
    return {name for name, p in network.model.named_parameters() if p.requires_grad}


def test_what_is_frozen_of_a_transformer() -> None:
    def made(**kwargs: Any) -> TimmModel:
        network = TimmModel("test_vit", in_channels=3, img_size=32, drop_rate=0.5, **kwargs)
        return network.train()

    names = trained(made())
    assert names == set(dict(made().model.named_parameters()))
    everything = made(freeze="all")
    assert not trained(everything)
    assert not any(part.training for part in everything.model.modules())
    norms = made(freeze="all_but_norm")
    assert trained(norms) == {name for name in names if "norm" in name}
    assert norms.model.blocks[0].norm1.training
    assert not norms.model.blocks[0].attn.attn_drop.training
    first = made(freeze={"blocks": 2})
    behind = tuple(f"blocks.{k}." for k in range(2, 6))
    assert trained(first) == {name for name in names if name.startswith((*behind, "norm."))}
    assert [block.training for block in first.model.blocks] == [False, False, True, True, True, True]
    assert not first.model.pos_drop.training
    assert first.model.head_drop.training
    assert not any(block.training for block in first.eval().model.blocks)
    assert trained(made(freeze={"blocks": 0})) == {name for name in names if name.startswith(("blocks", "norm"))}


@pytest.mark.parametrize("freeze", ["all", "all_but_norm", {"blocks": 2}])
def test_what_is_frozen_does_not_change_in_a_fit_statistics_included(freeze, files, tmp_path) -> None:
    agent = FineTuning(resnet(files, img_size=32, freeze=freeze), 4, InputSpec(3, 8, 8), epochs_per_task=1)
    before = {name: value.clone() for name, value in agent.backbone.model.state_dict().items()}
    make_trainer(tmp_path).fit(agent, datamodule=arrays())
    moved = {name for name, value in agent.backbone.model.state_dict().items() if not torch.equal(value, before[name])}
    norms = {n for n, part in agent.backbone.model.named_modules() if isinstance(part, nn.BatchNorm2d)}
    of_norms = {name for name in before if name.rpartition(".")[0] in norms}
    if freeze == "all":
        assert not moved
    elif freeze == "all_but_norm":
        assert moved
        assert moved <= of_norms
    else:
        assert moved
        assert not {name for name in moved if name.startswith(("conv1", "bn1", "layer1"))}
    assert not torch.equal(agent.head.weight, torch.zeros_like(agent.head.weight))


@pytest.mark.parametrize(
    ("freeze", "words"),
    [
        ("al", r"freeze='al': give none, all, all_but_norm, or blocks: N; did you mean 'all'\?"),
        ({"layers": 1}, r"freeze=\{'layers': 1\}: give none"),
        ({"blocks": -1}, r"freeze\.blocks=-1: give a whole number of at least 0"),
        ({"blocks": 99}, r"freeze\.blocks=99: test_vit has 6 blocks"),
    ],
)
def test_other_words_are_refused(freeze, words) -> None:
    with pytest.raises(ConfigurationError, match=words):
        TimmModel("test_vit", in_channels=3, img_size=32, freeze=freeze)


def test_freeze_on_the_command_line(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(
            ["fit", "--model.backbone", "timm", "--model.backbone.name", "test_vit", "--model.backbone.freeze",
             "{blocks: 2}", "--model.backbone.img_size", "32", "--print_config"]
        )  # fmt: skip
    printed = capsys.readouterr().out
    assert "blocks: 2" in printed
    assert "img_size: 32" in printed
