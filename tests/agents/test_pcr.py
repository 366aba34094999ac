"""PCR's steps are those of its program's loss; two views of a sample, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from dcl_lightning.errors import ConfigurationError
from dcl_lightning.types import Batch
from tests.conformance.agents import make
from tests.conformance.rehearsal_runs import memory_state, same
from tests.conformance.small_stream import arrays, make_data, make_trainer, matrix, weights

LR, TEMPERATURE = 0.05, 0.2
CROP: dict[str, Any] = {
    "class_path": "torchvision.transforms.v2.RandomCrop",
    "init_args": {"size": 4, "padding": 1},
}


class Normed(nn.Sequential):
    feature_dim = 8

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU())


class Watch(pl.Callback):
    """The batches of a fit, the network before each, and what went through the network."""

    def __init__(self, agent: Any) -> None:
        self.steps: list[tuple[Batch, nn.Module]] = []
        self.passed: list[Batch] = []
        inner = agent.outputs

        def outputs(batch: Batch) -> Tensor:
            self.passed.append(batch)
            found: Tensor = inner(batch)
            return found

        agent.outputs = outputs

    def on_train_batch_start(self, trainer: pl.Trainer, agent: Any, batch: Batch, batch_idx: int) -> None:
        self.steps.append((batch, copy.deepcopy(nn.Sequential(agent.backbone, agent.head))))


def fit(tmp_path: Path, data: Any = None, backbone: nn.Module | None = None, **kwargs: Any) -> tuple[Any, Watch]:
    data = data or make_data()
    memory = kwargs.pop("memory", None)
    options = {"momentum": 0.0, "lr": LR, "temperature": TEMPERATURE} | kwargs
    agent = make("pcr", data, memory=memory, **options)
    if backbone is not None:
        agent.backbone = backbone
    watch = Watch(agent)
    make_trainer(tmp_path, [watch], limit_val_batches=0, enable_checkpointing=False).fit(agent, datamodule=data)
    return agent, watch


def over_pairs(features: Tensor, proxies: Tensor, labels: Tensor) -> Tensor:
    """The loss as the paper's program has it, over all pairs of an anchor and a sample's proxy."""
    similarities = F.normalize(features) @ F.normalize(proxies[labels]).T / TEMPERATURE
    positive = labels[:, None] == labels
    return -(similarities.log_softmax(1) * positive / positive.sum(1, keepdim=True)).sum(1).mean()


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("forward", ["joint", "separate"])
def test_steps_and_statistics_are_those_of_the_programs_loss(forward: str, views: int, tmp_path: Path) -> None:
    data = make_data(transform=CROP if views == 2 else None)
    agent, watch = fit(tmp_path, data, Normed(), forward=forward)
    assert len(watch.steps) == len(watch.passed)
    ends = [*(net for _, net in watch.steps[1:]), nn.Sequential(agent.backbone, agent.head)]
    for (given, net), batch, end in zip(watch.steps, watch.passed, ends, strict=True):
        assert (batch.num_new, len(batch.targets)) == (views * given.num_new, views * len(given.targets))
        new = batch.num_new if forward == "separate" else len(batch.targets)
        before = weights(net)
        backbone, head = net
        features = torch.cat([backbone(rows) for rows in (batch.inputs[:new], batch.inputs[new:]) if len(rows)])
        over_pairs(features, head.weight, batch.targets).backward()
        expected = torch.cat([-LR * p.grad.flatten() for p in net.parameters()])
        torch.testing.assert_close(weights(end) - before, expected, atol=1e-6, rtol=1e-3)
        for name, statistic in backbone.named_buffers():
            torch.testing.assert_close(statistic, dict(end[0].named_buffers())[name])


def test_classes_that_are_not_in_a_step_stay_where_they_are(tmp_path: Path) -> None:
    agent, watch = fit(tmp_path)
    ends = [*(net[1].weight for _, net in watch.steps[1:]), agent.head.weight]
    moved = set()
    for (batch, net), end in zip(watch.steps, ends, strict=True):
        present = set(batch.targets.tolist())
        changed = {y for y in range(6) if not torch.equal(net[1].weight[y], end[y])}
        assert changed <= present
        moved |= changed
    assert moved == set(range(6))


def test_its_head_has_the_temperature_and_predicts(tmp_path: Path) -> None:
    data = make_data()
    agent, _ = fit(tmp_path, data, temperature=0.09)
    inputs = torch.randn(5, 1, 4, 4)
    cosines = F.normalize(agent.backbone(inputs)) @ F.normalize(agent.head.weight).T
    torch.testing.assert_close(agent(inputs), cosines / 0.09)
    assert not {"head", "head_scale"} & set(agent.hparams)


def test_its_rate_is_the_programs_unless_it_is_given() -> None:
    data = make_data()
    assert make("pcr", data, lr=None).lr == 0.1
    assert make("pcr", data, lr=0.02).lr == 0.02
    assert make("er", data, lr=None).lr == 0.05


# -- two views -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", [{"augment": True}, {"transform": CROP}])
def test_two_views_are_the_image_and_what_training_makes_of_it(changed: dict[str, Any], tmp_path: Path) -> None:
    normalised = {"normalize": {"mean": 0.5, "std": 0.25}}
    data = make_data(**changed, **normalised)
    images = (arrays()[0] - 0.5) / 0.25
    agent, watch = fit(tmp_path, data)
    differ = 0
    for (given, _), batch in zip(watch.steps, watch.passed, strict=True):
        new, rows = given.num_new, len(given.targets)
        training = [*range(new), *range(2 * new, new + rows)]
        plain = [*range(new, 2 * new), *range(new + rows, 2 * rows)]
        assert sorted(training + plain) == [*range(2 * rows)]
        assert batch.num_new == 2 * new
        assert batch.normalizer == 2 * given.normalizer
        for places in (training, plain):
            assert torch.equal(batch.targets[places], given.targets)
            assert torch.equal(batch.weights[places], given.weights)
        assert torch.equal(batch.inputs[training], given.inputs)
        torch.testing.assert_close(batch.inputs[plain], images[given.sample_ids])
        differ += not torch.equal(batch.inputs[training], batch.inputs[plain])
    assert differ > 10
    # The logits, of which the accuracy of training is, are those of the views of training.
    given, _ = watch.steps[-1]
    assert len(given.targets) > given.num_new
    torch.testing.assert_close(agent.training_loss(given)[1], agent(given.inputs))


def test_without_augmentation_there_is_one_view(tmp_path: Path) -> None:
    _, watch = fit(tmp_path)
    assert all(given is batch for (given, _), batch in zip(watch.steps, watch.passed, strict=True))


@pytest.mark.parametrize("row_format", ["inputs", "index"])
def test_with_two_views_a_resumed_run_is_the_same(row_format: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"memory": {"execution": "blocking", "row_format": row_format}}
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    agent = make("pcr", make_data(), **options)
    make_trainer(tmp_path, [saver]).fit(agent, datamodule=make_data(transform=CROP))
    for step in (4, 7):
        again = make("pcr", make_data(), seed=5, **options)
        data = make_data(seed=9, transform=CROP)
        make_trainer(tmp_path).fit(again, datamodule=data, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert same(again.state_dict(), agent.state_dict())
        assert torch.equal(matrix(again).nan_to_num(-1), matrix(agent).nan_to_num(-1))
        assert same(memory_state(again.rehearsal.manager), memory_state(agent.rehearsal.manager))


@pytest.mark.parametrize("stream", [{"boundaries": "hidden"}, {"scenario": "blurry", "blurriness": 0.2}])
def test_streams(stream: dict[str, Any], tmp_path: Path) -> None:
    agent, watch = fit(tmp_path, make_data(batch_size=4, augment=True, **stream))
    assert torch.isfinite(weights(agent)).all()
    assert len(watch.steps) > 10


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.0}, r"model\.temperature=0\.0: give a finite number, above 0"),
        ({"memory": {"weighting": "nil", "policy": "nil"}}, r"weighting=nil: agent pcr has weighting=none"),
    ],
)
def test_values_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make("pcr", make_data(), **options)


def test_it_has_no_other_head() -> None:
    with pytest.raises(TypeError, match="has no argument 'head'"):
        make("pcr", make_data(), head="linear")


def test_a_memory_of_augmented_images_has_no_second_view(tmp_path: Path) -> None:
    agent, _ = fit(tmp_path, memory={"row_format": "augmented"})
    assert torch.isfinite(weights(agent)).all()
    agent = make("pcr", make_data(), memory={"row_format": "augmented"})
    with pytest.raises(ConfigurationError, match=r"rehearsal\.row_format=augmented .* give row_format=inputs or index"):
        make_trainer(tmp_path).fit(agent, datamodule=make_data(augment=True))
