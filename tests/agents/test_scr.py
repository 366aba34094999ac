"""SCR contrasts two views of new and rehearsed samples, and predicts by the means of what is stored."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcl_lightning.agents import SCR
from dcl_lightning.backbones import MLP
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.types import Batch
from tests.conformance.agents import make
from tests.conformance.small_stream import make_data, make_trainer, weights

LR = 0.05


class Watch(pl.Callback):
    """Each batch that was trained on, and the network before it."""

    def __init__(self, agent: Any) -> None:
        self.steps: list[tuple[Batch, nn.Module, nn.Module]] = []
        inner = agent.training_loss

        def training_loss(batch: Batch) -> tuple[Tensor, Tensor]:
            self.steps.append((batch, copy.deepcopy(agent.backbone), copy.deepcopy(agent.head)))
            found: tuple[Tensor, Tensor] = inner(batch)
            return found

        agent.training_loss = training_loss


class Normed(nn.Sequential):
    feature_dim = 8

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU())


def fit(folder: Path, name: str = "scr", stream: dict[str, Any] | None = None, **kwargs: Any) -> tuple[Any, Watch]:
    data = make_data(**{"batch_size": 7, "augment": True} | (stream or {}))
    backbone, trainer = kwargs.pop("backbone", None), kwargs.pop("trainer", {})
    agent = make(name, data, **{"momentum": 0.0, "lr": LR} | kwargs)
    agent.backbone = backbone or agent.backbone
    watch = Watch(agent)
    make_trainer(folder, [*trainer.pop("callbacks", ())], **{"limit_val_batches": 0} | trainer).fit(
        agent, datamodule=data
    )
    return agent, watch


def loss_by_hand(views: list[Tensor], labels: Tensor, temperature: float) -> Tensor:
    """The mean over both views of all samples of equation 2 of Khosla et al."""
    z, y = torch.cat(views), labels.repeat(len(views))
    losses = []
    for i in range(len(z)):
        others = torch.arange(len(z)) != i
        shares = F.log_softmax((z @ z[i])[others] / temperature, 0)
        losses.append(-shares[y[others] == y[i]].mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("forward", ["joint", "separate"])
def test_a_step_follows_the_contrast_of_two_views(forward: str, tmp_path: Path) -> None:
    options = {"backbone": Normed(), "forward": forward, "temperature": 0.2, "projection_dim": 6}
    agent, watch = fit(tmp_path, **options)
    ends = [*(nn.ModuleList(nets) for _, *nets in watch.steps[1:]), nn.ModuleList([agent.backbone, agent.head])]
    rehearsed = 0
    for (batch, backbone, head), end in zip(watch.steps, ends, strict=True):
        nets, before = nn.ModuleList([backbone, head]).train(), weights(nn.ModuleList([backbone, head]))
        parts = [slice(batch.num_new), slice(batch.num_new, None)] if forward == "separate" else [slice(None)]
        views = []
        for inputs in (batch.plain, batch.inputs):
            assert inputs is not None
            passes = [backbone(inputs[part]) for part in parts if len(inputs[part])]
            hidden = F.linear(torch.cat(passes), head.hidden.weight, head.hidden.bias).relu()
            views.append(F.normalize(F.linear(hidden, head.weight, head.bias), dim=1, eps=1e-5))
        loss_by_hand(views, batch.targets, 0.2).backward()
        gradient = torch.cat([p.grad.flatten() for p in nets.parameters()])
        torch.testing.assert_close(weights(end) - before, -LR * gradient, atol=1e-6, rtol=1e-3)
        for name, value in end[0].state_dict().items():
            if "running" in name:
                torch.testing.assert_close(value, backbone.state_dict()[name])
        rehearsed += len(batch.targets) - batch.num_new
    assert rehearsed > 20
    assert head.weight.shape == (6, 8)


@pytest.mark.parametrize("row_format", ["inputs", "index"])
@pytest.mark.parametrize("execution", ["inline", "blocking"])
def test_views_are_those_of_evaluation_and_of_training(execution: str, row_format: str, tmp_path: Path) -> None:
    agent, watch = fit(tmp_path, memory={"execution": execution, "row_format": row_format}, stream={"passes": 2})
    data = agent.trainer.datamodule
    differ = 0
    for batch, *_ in watch.steps:
        assert torch.equal(batch.plain, data.train_inputs[batch.sample_ids])
        differ += int((batch.plain != batch.inputs).flatten(1).any(1).sum())
    assert differ > 0.9 * sum(len(batch.targets) for batch, *_ in watch.steps)


def test_the_other_view_follows_the_given_transforms(tmp_path: Path) -> None:
    stream = {
        "augment": None, "normalize": {"mean": 0.5, "std": 2.0},
        "transform": lambda x: x + 3.0, "eval_transform": lambda x: x - 1.0,
    }  # fmt: skip
    agent, watch = fit(tmp_path, stream=stream)
    raw = agent.trainer.datamodule.train_inputs
    for batch, *_ in watch.steps:
        torch.testing.assert_close(batch.plain, (raw[batch.sample_ids] - 1.5) / 2)
        torch.testing.assert_close(batch.inputs, (raw[batch.sample_ids] + 2.5) / 2)


def test_other_agents_have_one_view(tmp_path: Path) -> None:
    _, watch = fit(tmp_path, "er")
    assert all(batch.plain is None for batch, *_ in watch.steps)


def test_what_pads_a_share_is_not_contrasted(tmp_path: Path) -> None:
    agent, watch = fit(tmp_path)
    batch = watch.steps[-1][0]
    assert batch.plain is not None
    columns = ("inputs", "plain", "targets", "task_ids", "sample_ids", "draw_ids", "weights")
    longer = {name: torch.cat([getattr(batch, name)[:1], getattr(batch, name)]) for name in columns}
    longer["inputs"][0] += 1
    for target in range(6):
        longer["targets"][0], longer["weights"][0] = target, 0
        padded = batch._replace(num_new=batch.num_new + 1, **longer)
        torch.testing.assert_close(agent.training_loss(padded)[0], agent.training_loss(batch)[0])
    nothing = padded._replace(weights=torch.zeros(len(padded.targets)))
    assert float(agent.training_loss(nothing)[0].detach()) == 0


def test_accuracy_in_training_is_by_the_means_of_the_other_view(tmp_path: Path) -> None:
    agent, watch = fit(tmp_path)
    batch = watch.steps[-1][0]
    assert batch.plain is not None
    plain, other = agent.project(batch.plain), agent.project(batch.inputs)
    scores = agent.training_loss(batch)[1]
    for y in range(6):
        rows = plain[batch.targets == y]
        expected = -(other - rows.mean(0)).norm(dim=1) if len(rows) else torch.full((len(other),), -float("inf"))
        torch.testing.assert_close(scores[:, y], expected, atol=1e-5, rtol=1e-4)


def means_by_hand(agent: Any) -> dict[int, Tensor]:
    """Of each class that is stored, the direction of the mean of the directions of its features."""
    manager, data = agent.rehearsal.manager, agent.trainer.datamodule
    ids = manager.memory_rows().sample_ids.unique()
    inputs = data.train_inputs[ids].to(next(agent.parameters()).dtype)
    backbone = copy.deepcopy(agent.backbone).eval()
    with torch.no_grad():
        features = F.normalize(backbone(inputs), dim=1)
    labels = data.train_targets[ids]
    return {int(y): F.normalize(features[labels == y].mean(0), dim=0) for y in labels.unique()}


class Looks(pl.Callback):
    """At each evaluation: the means, and what they should be."""

    def __init__(self) -> None:
        self.count = 0

    def look(self, agent: Any) -> None:
        expected = means_by_hand(agent)
        assert agent.has_mean.nonzero().flatten().tolist() == sorted(expected)
        for y, mean in expected.items():
            torch.testing.assert_close(agent.means[y], mean, atol=1e-5, rtol=1e-4)
        self.count += 1

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.look(pl_module)

    def on_task_evaluated(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Any) -> None:
        self.look(pl_module)


@pytest.mark.parametrize(
    ("boundaries", "memory"),
    [
        ("known", {}),
        ("known", {"execution": "blocking"}),
        ("known", {"update": "task_end", "policy": "class_balanced"}),
        ("hidden", {"scope": "global", "execution": "blocking"}),
    ],
)
def test_every_evaluation_is_by_the_means_of_what_is_stored_then(
    boundaries: str, memory: dict[str, Any], tmp_path: Path
) -> None:
    looks, stream = Looks(), {"boundaries": boundaries, "validate_on": "test"}
    trainer = {"callbacks": [looks], "limit_val_batches": 1.0, "val_check_interval": 1, "num_sanity_val_steps": 2}
    agent, _ = fit(tmp_path, stream=stream, backbone=Normed(), memory=memory, trainer=trainer, future_tasks=True)
    assert looks.count == 12 + 3
    inputs, means, ids = torch.randn(5, 1, 4, 4), means_by_hand(agent), torch.arange(5)
    batch = Batch(inputs, ids, ids, ids, torch.ones(5), torch.tensor(5.0), ids, num_new=5)
    agent.eval()
    with torch.no_grad():
        scores, features = agent.evaluate(batch), F.normalize(agent.backbone(inputs), dim=1)
    for y in range(6):
        wanted = -(features - means[y]).norm(dim=1) if y in means else torch.full((5,), -float("inf"))
        torch.testing.assert_close(scores[:, y], wanted, atol=1e-5, rtol=1e-4)


def test_the_loss_of_validation_is_finite_where_a_class_is_not_stored(tmp_path: Path) -> None:
    agent, _ = fit(
        tmp_path, memory={"buffer_size": 2}, stream={"validate_on": "test"}, trainer={"limit_val_batches": 1.0}
    )
    assert int(agent.has_mean.sum()) <= 2
    assert torch.isfinite(agent.trainer.callback_metrics["val/loss"])


def test_it_learns_at_the_rate_of_the_paper_and_has_no_outputs_of_classes() -> None:
    agent = SCR(MLP([8], 1, 4), 6)
    assert agent.lr == agent.hparams["lr"] == 0.1
    assert SCR(MLP([8], 1, 4), 6, lr=0.3).lr == 0.3
    assert (agent.temperature, agent.head.weight.shape[0], agent.rehearsal.config.num_samples) == (0.07, 128, 100)
    for key in ("head", "head_scale", "train_classes"):
        with pytest.raises(TypeError, match=f"SCR has no argument '{key}'"):
            SCR(MLP([8], 1, 4), 6, **{key: "linear"})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temperature": 0.0}, r"model\.temperature=0\.0"),
        ({"projection_dim": 0}, r"model\.projection_dim=0: give a whole number of at least 1"),
        (
            {"rehearsal": {"row_format": "augmented"}},
            r"row_format=augmented stores no sample as it came.*give row_format",
        ),
        ({"rehearsal": {"weighting": "nil", "policy": "nil"}}, r"weighting=nil: agent SCR has weighting=none"),
    ],
)
def test_what_it_cannot_learn_with_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        SCR(MLP([8], 1, 4), 6, **given)
