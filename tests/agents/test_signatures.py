"""Agents name their arguments, and take the sizes of their network from the data where they are left out."""

from __future__ import annotations

import inspect
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch.utils.data import DataLoader

from dcl_lightning.agents import NIL, ContinualAgent, GDumb, ICaRL, short_names
from dcl_lightning.backbones import MLP, ResNet
from dcl_lightning.errors import ConfigurationError
from tests.conformance.small_stream import make_data, make_trainer

# Each keeps something for each class, or for each weight.
SIZED = ["base", "icarl", "bic", "derpp", "lwf", "ewc", "si", "gem"]
COMMON = set(inspect.signature(ContinualAgent).parameters)


def make(name: str, **kwargs) -> ContinualAgent:
    pl.seed_everything(0)
    kind = getattr(short_names, name)
    if name == "icarl":
        kwargs["rehearsal"] = {"buffer_size": 12}
    elif kind.rehearses:
        kwargs["rehearsal"] = {"buffer_size": 12, "num_samples": 4}
    return kind(**{"backbone": MLP([8]), "epochs_per_task": 1} | kwargs)


@pytest.mark.parametrize("name", short_names.__all__)
def test_a_signature_shows_every_argument_and_a_constructor_takes_no_other(name: str) -> None:
    kind = getattr(short_names, name)
    parameters = inspect.signature(kind).parameters
    assert {"backbone", "num_classes", "lr", "epochs_per_task"} <= set(parameters)
    assert COMMON - set(kind.fixed_arguments) <= set(parameters)
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())
    assert [*parameters][:2] == ["backbone", "num_classes"]
    with pytest.raises(TypeError, match=f"{name} has no argument 'momentun'.*did you mean 'momentum'"):
        kind(MLP([8]), 6, momentun=0.9)


def test_what_a_method_fixes_is_no_argument() -> None:
    assert "reset_state_dict" not in inspect.signature(GDumb).parameters
    with pytest.raises(TypeError, match="GDumb has no argument 'reset_state_dict'"):
        GDumb(MLP([8]), 6, reset_state_dict=False)
    assert GDumb(MLP([8]), 6).reset_state_dict


@pytest.mark.parametrize("name", ["agem", "gem", "gdumb"])
def test_methods_that_have_no_joint_pass_do_not_have_the_key(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} has no argument 'forward'"):
        getattr(short_names, name)(MLP([8]), 6, forward="separate")
    assert "forward" not in getattr(short_names, name)(MLP([8]), 6).hparams


def test_a_backbone_has_a_name() -> None:
    assert isinstance(NIL(backbone="resnet18").backbone, ResNet)
    assert NIL("resnet20", 6, input_spec=(3, 8, 8)).backbone.depth == 20
    with pytest.raises(ConfigurationError, match="backbone='resmet'"):
        NIL("resmet")
    with pytest.raises(ConfigurationError, match="no feature_dim"):
        NIL(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", SIZED)
def test_sizes_come_from_the_data_and_the_run_is_the_same(name: str, tmp_path: Path) -> None:
    def run(agent: ContinualAgent, folder: Path, **kwargs) -> tuple[ContinualAgent, dict[str, torch.Tensor]]:
        data = make_data()
        saver = ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1, filename="{step}")
        make_trainer(folder, [saver], limit_val_batches=0).fit(agent, datamodule=data, **kwargs)
        return agent, {n: t.clone() for n, t in agent.state_dict().items()}

    data = make_data()
    sizes = {"num_classes": data.num_classes, "input_spec": data.input_spec}
    open_agent = make(name)
    assert not open_agent.is_built
    agent, state = run(open_agent, tmp_path / "open")
    assert agent.num_classes == agent.hparams["num_classes"] == data.num_classes
    _, resumed = run(make(name), tmp_path / "resumed", ckpt_path=tmp_path / "open" / "step=4.ckpt")
    _, given = run(make(name, **sizes), tmp_path / "given")
    assert resumed.keys() == given.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(resumed[key], tensor), key
        assert given[key].shape == tensor.shape, key

    path = tmp_path / "open" / "step=4.ckpt"
    loaded = type(agent).load_from_checkpoint(path, backbone=MLP([8]))
    assert loaded.num_classes == data.num_classes
    trainer = make_trainer(tmp_path / "test")
    found = trainer.test(make(name), datamodule=make_data(), ckpt_path=path, verbose=False)
    again = make_trainer(tmp_path / "test").test(loaded, datamodule=make_data(), verbose=False)
    assert found == again
    rows = make_trainer(tmp_path / "test").predict(
        make(name), DataLoader(torch.zeros(2, 1, 4, 4), batch_size=2), ckpt_path=path
    )
    assert rows[0].probabilities.shape == (2, data.num_classes)


def test_averaged_weights_know_the_sizes(tmp_path: Path) -> None:
    agent = make("base", optimizer=torch.optim.Adam)
    make_trainer(tmp_path, [EMAWeightAveraging()], limit_val_batches=0).fit(agent, datamodule=make_data())
    assert agent.clock.schedule.evaluated == 3
    assert agent.results is agent.clock.results


def test_a_name_is_kept_in_the_checkpoint(tmp_path: Path) -> None:
    agent = ICaRL("mlp", rehearsal={"buffer_size": 12})
    trainer = make_trainer(tmp_path, limit_val_batches=0)
    trainer.fit(agent, datamodule=make_data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = ICaRL.load_from_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(loaded.head.weight, agent.head.weight)


def test_without_data_the_sizes_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="NIL does not know its classes"):
        make_trainer(tmp_path).test(NIL(MLP([8])), DataLoader(torch.zeros(2, 1, 4, 4), batch_size=2))
