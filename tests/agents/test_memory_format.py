"""``memory_format``: convolutions in channels_last learn what contiguous ones learn, and resume alike; ``auto``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from dcl_lightning import ContinualDataModule, FineTuning
from dcl_lightning.agents import short_names
from dcl_lightning.agents.computation import set_memory_format
from dcl_lightning.backbones import ResNet
from dcl_lightning.errors import ConfigurationError
from tests.conformance.agents import KEEPING
from tests.conformance.small_stream import make_data, make_trainer, weights


def fit(name: str, folder: Path, memory_format: str, sizes: bool = True, **resume: Any) -> Any:
    data = make_data(increment=3, batch_size=7)
    pl.seed_everything(0)
    given = {"num_classes": data.num_classes, "input_spec": data.input_spec} if sizes else {}
    if name in KEEPING:
        given["rehearsal"] = {"buffer_size": 12}
    agent = getattr(short_names, name)(
        ResNet(20, width=2), epochs_per_task=2, lr=0.01, momentum=0.9, memory_format=memory_format, **given
    )
    saver = pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = make_trainer(folder, [saver], precision="64-true", limit_val_batches=0)
    trainer.fit(agent, datamodule=data, **resume)
    return agent


def formats(agent: nn.Module) -> set[bool]:
    """Whether the 3x3 convolutions of several channels are in channels_last."""
    convolutions = [m for m in agent.modules() if isinstance(m, nn.Conv2d)]
    kernels = [m.weight for m in convolutions if m.in_channels > 1 and m.kernel_size == (3, 3)]
    assert kernels
    return {kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels}


@pytest.mark.parametrize("name", ["derpp", "agem", "icarl"])
def test_channels_last_learns_what_contiguous_learns(name: str, tmp_path: Path) -> None:
    plain, last = (fit(name, tmp_path / form, form) for form in ("contiguous", "channels_last"))
    assert formats(plain) == {False}
    assert formats(last) == {True}
    torch.testing.assert_close(weights(last), weights(plain), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["derpp", "icarl"])
def test_sizes_left_out_and_a_resumed_run_keep_the_format(name: str, tmp_path: Path) -> None:
    whole = fit(name, tmp_path / "whole", "channels_last", sizes=False)
    rest = fit(name, tmp_path / "rest", "channels_last", sizes=False, ckpt_path=tmp_path / "whole" / "epoch=0.ckpt")
    assert formats(rest) == {True}
    assert torch.equal(weights(rest), weights(whole))


@pytest.mark.parametrize(
    ("device", "precision", "network", "expected"),
    [
        ("cpu", "32-true", ResNet(20, width=2, input_size=8, in_channels=3), True),
        ("cpu", "bf16-mixed", ResNet(20, width=2, input_size=8, in_channels=3), True),
        ("cpu", "64-true", ResNet(20, width=2, input_size=8, in_channels=3), False),
        ("cuda", "32-true", ResNet(20, width=2, input_size=8, in_channels=3), False),
        ("cuda", "bf16-mixed", ResNet(20, width=2, input_size=8, in_channels=3), True),
        ("mps", "16-mixed", ResNet(20, width=2, input_size=8, in_channels=3), False),
        # The strided shortcuts of narrow networks are not safe on a CPU.
        ("cpu", "32-true", ResNet(18, width=15, input_size=8, in_channels=3), False),
        ("cpu", "32-true", ResNet(18, width=16, input_size=8, in_channels=3), True),
        ("cuda", "16-mixed", ResNet(18, width=15, input_size=8, in_channels=3), True),
    ],
)
def test_auto_is_the_faster_format(device: str, precision: str, network: nn.Module, expected: bool) -> None:
    for wanted, found in (("auto", expected), ("contiguous", False)):
        assert set_memory_format(network, wanted, torch.device(device), precision) == found
        # On a CPU inputs in the format are enough.
        assert formats(network) == {found and device == "cuda"}


def test_auto_leaves_the_format_of_a_users_network() -> None:
    network = ResNet(20, width=2, input_size=8, in_channels=3).to(memory_format=torch.channels_last)
    set_memory_format(network, "auto", torch.device("cuda"), "32-true")
    assert formats(network) == {True}


def test_an_unsafe_network_is_refused_on_a_cpu(tmp_path: Path) -> None:
    data = make_data()
    agent = FineTuning(ResNet(18, width=4), memory_format="channels_last")
    with pytest.raises(ConfigurationError, match="a strided 1x1 convolution of 4 channels needs at least 16"):
        make_trainer(tmp_path).fit(agent, datamodule=data)


class Strides(pl.Callback):
    """Whether the inputs of training and of evaluation, and the maps of a convolution, are in channels_last."""

    def on_fit_start(self, trainer: pl.Trainer, agent: Any) -> None:
        self.found: set[tuple[bool, bool, bool]] = set()
        agent.backbone.layer1[0].conv1.register_forward_hook(self.note)

    def note(self, layer: nn.Module, args: tuple[torch.Tensor], maps: torch.Tensor) -> None:
        is_last = [tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (args[0], maps)]
        self.found.add((layer.training, *is_last))


@pytest.mark.parametrize(("name", "wanted"), [("derpp", "auto"), ("icarl", "auto"), ("icarl", "contiguous")])
def test_a_fit_computes_in_the_format_of_its_device(name: str, wanted: str, tmp_path: Path) -> None:
    images, labels = torch.rand(42, 3, 8, 8), torch.arange(6).repeat(7)
    data = ContinualDataModule((images, labels, images, labels), increment=2, batch_size=7, seed=0)
    strides, memory = Strides(), {"buffer_size": 12}
    agent = getattr(short_names, name)(ResNet(20, width=2), memory_format=wanted, rehearsal=memory)
    make_trainer(tmp_path, [strides], accelerator="cpu").fit(agent, datamodule=data)
    last = wanted == "auto"
    assert strides.found == {(True, last, last), (False, last, last)}
    assert formats(agent) == {False}
    torch.nn.utils.parameters_to_vector(agent.parameters())  # takes views of contiguous weights
