"""SimpleCIL, streaming LDA and RanPAC against plain NumPy over all samples at once, in any order of tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from dcl_lightning.agents import short_names
from dcl_lightning.backbones import MLP
from dcl_lightning.errors import ConfigurationError
from tests.agents.closed_form_truth import NAMES, Normed, expected, make, stream, truth_of
from tests.conformance.small_stream import make_trainer, weights


@pytest.mark.parametrize("order", [None, [4, 1, 5, 0, 3, 2]])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_classifier_of_all_samples_at_once(name: str, order: list[int] | None, tmp_path: Path) -> None:
    data = stream(class_order=order)
    agent = make(name)
    make_trainer(tmp_path, limit_val_batches=0, precision="64-true").fit(agent, datamodule=data)
    truth = truth_of(agent, data)
    for key, value in truth.statistics.items():
        np.testing.assert_allclose(agent.statistics[key].numpy(), value, rtol=1e-10, atol=1e-10, err_msg=key)
    np.testing.assert_allclose(agent.coefficients.numpy(), truth.coefficients, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(agent.offsets.numpy(), truth.offsets, rtol=1e-8, atol=1e-10)
    assert bool(agent.known.all())
    scores = agent.eval()(data.train_inputs.double()).detach().numpy()
    np.testing.assert_allclose(scores, truth.scores, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("scenario", ["domain", "blurry"])
def test_classes_that_come_again_add_up(scenario: str, tmp_path: Path) -> None:
    options = {"num_tasks": 3} if scenario == "domain" else {"blurriness": 0.3}
    data = stream(scenario=scenario, **options)
    agent = make("slda")
    make_trainer(tmp_path, limit_val_batches=0, precision="64-true").fit(agent, datamodule=data)
    np.testing.assert_allclose(agent.coefficients.numpy(), truth_of(agent, data).coefficients, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_epochs_passes_decay_and_a_normalisation_layer_change_nothing(name: str, tmp_path: Path) -> None:
    found = []
    for options, kwargs in (
        ({}, {}),
        ({"passes": 2, "batch_size": 4}, {"epochs_per_task": 2, "lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}),
        ({}, {"optimizer": lambda p: torch.optim.AdamW(p, lr=0.1), "optimizer_reset": False}),
    ):
        agent = make(name, backbone=Normed, **kwargs)
        before = weights(agent)
        make_trainer(tmp_path, limit_val_batches=0).fit(agent, datamodule=stream(**options))
        assert torch.equal(weights(agent), before)
        assert agent.backbone[2].num_batches_tracked == 0
        found.append(agent.coefficients)
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def test_the_first_session_trains_the_network_and_no_other_does(tmp_path: Path) -> None:
    states: list[dict[str, torch.Tensor]] = []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, agent: Any) -> None:
            states.append({name: value.clone() for name, value in agent.backbone.state_dict().items()})

    agent = make("ranpac", backbone=Normed, first_session=True, lr=0.1, momentum=0.9, weight_decay=0.01,
                 optimizer_reset=False, epochs_per_task=[2, 1, 1])  # fmt: skip
    before = {name: value.clone() for name, value in agent.backbone.state_dict().items()}
    data = stream()
    make_trainer(tmp_path, [Watch()], limit_val_batches=0).fit(agent, datamodule=data)
    assert len(states) == 4
    assert all(not torch.equal(before[name], states[1][name]) for name in ("1.weight", "2.running_mean"))
    assert all(torch.equal(states[1][name], later[name]) for later in states[2:] for name in before)
    # The statistics are of the network as it is then, those of the first task as well.
    np.testing.assert_allclose(agent.coefficients.numpy(), truth_of(agent, data).coefficients, rtol=1e-4, atol=1e-6)
    # Of the head, only the outputs of the first task's classes are trained.
    assert bool((agent.head.weight[:2] != make("ranpac", backbone=Normed).head.weight[:2]).any())


def test_a_given_lambda_is_taken(tmp_path: Path) -> None:
    data, agent = stream(), make("ranpac", ridge=7.0)
    make_trainer(tmp_path, limit_val_batches=0, precision="64-true").fit(agent, datamodule=data)
    assert float(agent.statistics["ridge"]) == 7.0
    np.testing.assert_allclose(agent.coefficients.numpy(), truth_of(agent, data).coefficients, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("first_session", [False, True])
def test_a_run_that_is_resumed_ends_with_the_same_bits(name: str, first_session: bool, tmp_path: Path) -> None:
    if first_session and name != "ranpac":
        return
    own = {"first_session": True, "epochs_per_task": 2} if first_session else {}
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    agent = make(name, **own)
    trainer = make_trainer(tmp_path, [saver], limit_val_batches=0)
    trainer.fit(agent, datamodule=stream())
    for step in range(1, trainer.global_step, 3):
        again = make(name, seed=5, **own)
        make_trainer(tmp_path / "again", limit_val_batches=0).fit(
            again, datamodule=stream(seed=7), ckpt_path=tmp_path / f"step={step}.ckpt"
        )
        assert agent.statistics.keys() == again.statistics.keys()
        assert all(torch.equal(value, agent.statistics[key]) for key, value in again.statistics.items()), step
        assert all(torch.equal(value, agent.state_dict()[key]) for key, value in again.state_dict().items()), step


def test_classes_are_known_from_the_end_of_their_task(tmp_path: Path) -> None:
    seen: list[list[bool]] = []

    class Watch(pl.Callback):
        def on_validation_batch_end(self, trainer: Any, agent: Any, outputs: Any, batch: Any, *_: Any) -> None:
            seen.append(torch.isfinite(agent.evaluate(batch)).any(0).tolist())

    data = stream(validate_on="test")
    make_trainer(tmp_path, [Watch()], check_val_every_n_epoch=1).fit(
        make("simplecil", epochs_per_task=2), datamodule=data
    )
    # Each epoch: before the first task has ended, the head's outputs of its classes.
    assert [sum(one) for one in seen] == [2, 2, 2, 2, 4, 4, 4, 4, 4, 6, 6, 6]


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("slda", {"shrinkage": 0.0}, r"model\.shrinkage=0\.0: .* above 0 and at most 1"),
        ("ranpac", {"projection_dim": 0}, r"model\.projection_dim=0: give a whole number of at least 1"),
        ("ranpac", {"ridge": 0.0}, r"model\.ridge=0\.0: .* above 0"),
    ],
)
def test_values_out_of_range_are_refused(name: str, kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        getattr(short_names, name)(MLP([8]), 6, **kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_hidden_boundaries_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.boundaries=hidden: agent"):
        make_trainer(tmp_path).fit(make(name), datamodule=stream(boundaries="hidden"))


def test_expected_is_not_made_by_the_package() -> None:
    assert "dcl_lightning.functional" not in Path(expected.__code__.co_filename).read_text()
    assert isinstance(Normed(), nn.Module)
