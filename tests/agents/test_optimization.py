"""Optimizers and schedules of the agents against torch's own, set up by hand."""

import copy
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from dcl_lightning import FineTuning
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.functional import parameter_groups
from tests.conformance.small_stream import make_agent, make_data, make_trainer


class Normalised(nn.Module):
    """Every kind of parameter: matrices, kernels, biases, scales, and a layer that does not learn."""

    feature_dim = 6

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3)
        self.linear, self.last = nn.Linear(27, 6), nn.LayerNorm(6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, inputs):
        # Without the tanh the gradient of the convolution's bias would be 0, and AdamW's step of it rounding.
        return self.last(self.linear(self.norm(self.conv(inputs).tanh()).flatten(1)))


KERNELS = {"conv.weight", "linear.weight"}
SPARED = {"conv.bias", "norm.weight", "norm.bias", "linear.bias", "last.weight", "last.bias"}


def test_groups_tell_matrices_from_the_rest():
    module = Normalised()
    names = {p: name for name, p in module.named_parameters()}
    one = parameter_groups(module.named_parameters(), True)
    assert [[names[p] for p in group["params"]] for group in one] == [
        [name for name, p in module.named_parameters() if p.requires_grad]
    ]
    assert "weight_decay" not in one[0]
    decayed, spared = parameter_groups(module.named_parameters(), False)
    assert {names[p] for p in decayed["params"]} == KERNELS
    assert {names[p] for p in spared["params"]} == SPARED
    assert spared["weight_decay"] == 0
    assert len(parameter_groups(nn.LayerNorm(3).named_parameters(), False)) == 1


def test_decay_acts_and_spares_as_in_timm():
    optim = pytest.importorskip("timm.optim")
    module = Normalised()
    theirs = optim.param_groups_weight_decay(module, 0.1)
    spared, decayed = ({id(p) for p in group["params"]} for group in theirs)
    ours = [{id(p) for p in group["params"]} for group in parameter_groups(module.named_parameters(), False)]
    assert ours == [decayed, spared]


@pytest.mark.parametrize("all_decay", [True, False])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_fit_equals_a_hand_made_optimizer(kind, all_decay, tmp_path):
    data = make_data(scenario="none", batch_size=42)
    pl.seed_everything(0)
    values = {"momentum": 0.9, "weight_decay": 0.5} if kind == "sgd" else {}
    if kind == "adamw":
        values["optimizer"] = partial(torch.optim.AdamW, weight_decay=0.5)
    agent = FineTuning(
        Normalised(), data.num_classes, epochs_per_task=3, lr=0.05, decay_biases_and_norms=all_decay, **values
    )
    hand = nn.Sequential(copy.deepcopy(agent.backbone), copy.deepcopy(agent.head))
    make_trainer(tmp_path).fit(agent, datamodule=data)

    trained = {n: p for n, p in hand.named_parameters() if p.requires_grad}
    flat = {n: p for n, p in trained.items() if p.ndim == 1}
    groups = [
        {"params": [p for n, p in trained.items() if n not in flat], "weight_decay": 0.5},
        {"params": list(flat.values()), "weight_decay": 0.5 if all_decay else 0.0},
    ]
    optimizer = torch.optim.SGD(groups, 0.05, 0.9) if kind == "sgd" else torch.optim.AdamW(groups, lr=0.05)
    x, y = data.train_inputs, data.train_targets
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(hand(x), y).backward()
        optimizer.step()
    ours = nn.Sequential(agent.backbone, agent.head).state_dict()
    for name, tensor in hand.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


class Rates(pl.Callback):
    def __init__(self):
        self.seen, self.logged, self.decays = [], [], set()

    def on_before_optimizer_step(self, trainer, module, optimizer):
        groups = optimizer.param_groups
        assert len({group["lr"] for group in groups}) == 1
        self.seen.append(groups[0]["lr"])
        self.decays.add(tuple(group["weight_decay"] for group in groups))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.logged.append(float(trainer.callback_metrics["train/lr"]))


def test_each_task_has_the_whole_schedule_and_both_groups(tmp_path):
    # Tasks of 14 samples, so 3 steps an epoch; by hand: milestones at epochs 1 and 2 of each task.
    rates = Rates()
    data = make_data()
    agent = make_agent(
        "base", data, epochs_per_task=3, lr=0.4, milestones=[1, 2], gamma=[0.5, 0.1], weight_decay=0.1,
        decay_biases_and_norms=False,
    )  # fmt: skip
    make_trainer(tmp_path, [rates], log_every_n_steps=1, enable_checkpointing=False).fit(agent, datamodule=data)
    assert rates.seen == pytest.approx(([0.4] * 3 + [0.2] * 3 + [0.02] * 3) * 3)
    assert rates.logged == pytest.approx(rates.seen)
    assert rates.decays == {(0.1, 0.0)}


def test_warm_up_counts_epochs_and_steps_within_them(tmp_path, monkeypatch):
    # Four workers, two epochs of three steps: a step's rate is that of the progress after it, so the sixth has all.
    data = make_data(scenario="class", increment=6, batch_size=14)
    agent = make_agent("base", data, epochs_per_task=3, lr=0.1, warmup_epochs=2, scale_lr="linear")
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(type(trainer), "world_size", 4)
    monkeypatch.setattr(type(trainer), "num_training_batches", 3)
    agent.trainer = trainer
    scheduler = agent.configure_optimizers()["lr_scheduler"]["scheduler"]
    factors = [scheduler.base_lrs[0] * agent._factor(step) for step in range(9)]
    assert scheduler.base_lrs == [0.4]
    rising = [0.1 + 0.3 * (step + 1) / 6 for step in range(6)]
    assert factors == pytest.approx(rising + [0.4] * 3)


@pytest.mark.parametrize("reset", [True, False])
def test_two_groups_resume_as_if_never_interrupted(reset, tmp_path):
    def run(callbacks=(), **kwargs):
        data = make_data()
        agent = make_agent(
            "base", data, decay_biases_and_norms=False, weight_decay=0.05, optimizer_reset=reset, milestones=[1]
        )
        make_trainer(tmp_path, callbacks).fit(agent, datamodule=data, **kwargs)
        return agent

    whole = run([ModelCheckpoint(tmp_path, every_n_train_steps=8, save_top_k=-1, filename="{step}")])
    resumed = run(ckpt_path=tmp_path / "step=8.ckpt")
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"gamma": [0.1], "milestones": [1, 2]}, "one for each of 2 milestones"),
        ({"gamma": [0.1, 0.0], "milestones": [1, 2]}, "above 0"),
        ({"optimizer": torch.optim.AdamW, "weight_decay": 0.1}, "brings its own"),
    ],
)
def test_contradictions_are_refused(kwargs, message):
    with pytest.raises(ConfigurationError, match=message):
        make_agent("base", make_data(), **{"momentum": 0.0, **kwargs})


class SetsRate(pl.Callback):
    """Writes a rate into the optimizer in one of Lightning's hooks before training."""

    def __init__(self, hook):
        def write(trainer, *_):
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = 0.4

        setattr(self, hook, write)


HOOKS = ["on_fit_start", "on_train_start", "on_train_epoch_start of epoch 0"]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_rate_that_a_callback_sets_before_training_is_every_tasks(hook, tmp_path):
    def run(callbacks, **kwargs):
        rates, setter = Rates(), SetsRate(hook.partition(" ")[0])
        if hook == HOOKS[2]:
            write = setter.on_train_epoch_start
            setter.on_train_epoch_start = lambda trainer, module: trainer.current_epoch or write(trainer, module)
        data = make_data()
        agent = make_agent("base", data, epochs_per_task=2, lr=0.05, milestones=[1], gamma=0.5)
        trainer = make_trainer(tmp_path, [setter, rates, *callbacks], log_every_n_steps=1)
        trainer.fit(agent, datamodule=data, **kwargs)
        return rates.seen

    whole = run([ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")])
    assert whole == pytest.approx(([0.4] * 3 + [0.2] * 3) * 3)
    if hook != HOOKS[0]:  # what is set before a checkpoint is loaded, is loaded
        assert run([], ckpt_path=tmp_path / "step=5.ckpt") == pytest.approx(whole[5:])


def test_the_rate_found_is_the_one_trained_with(tmp_path, monkeypatch):
    monkeypatch.setattr("dcl_lightning.callbacks.progress.is_watched", lambda: True)
    monkeypatch.setattr("dcl_lightning.callbacks.task_clock.is_watched", lambda: True, raising=False)
    rates, data = Rates(), make_data()
    agent = make_agent("base", data, lr=0.05, milestones=[1], gamma=0.5, train_classes="seen")
    tried, inner = set(), agent.training_loss

    def spy(batch):
        if not agent.clock.has_started:
            tried.update(batch.targets.tolist())
        return inner(batch)

    agent.training_loss = spy
    finder = pl.callbacks.LearningRateFinder(num_training_steps=16, early_stop_threshold=None)
    trainer = pl.Trainer(
        default_root_dir=tmp_path, callbacks=[finder, rates, pl.callbacks.TQDMProgressBar()], accelerator="cpu",
        logger=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(agent, datamodule=data)
    found = finder.optimal_lr.suggestion()
    assert found != pytest.approx(0.05)
    assert rates.seen == pytest.approx(([found] * 3 + [found / 2] * 3) * 3)
    assert tried == {0, 1}, "tried on the first task alone"
    assert {"train/loss", "train/acc"} <= set(trainer.progress_bar_metrics)


def test_a_batch_size_is_found_with_a_progress_bar(tmp_path):
    data = make_data(batch_size=2)
    finder = pl.callbacks.BatchSizeFinder(steps_per_trial=1, init_val=2, max_trials=2)
    sizes = []

    class Sizes(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            sizes.append(len(batch.targets))

    trainer = pl.Trainer(
        default_root_dir=tmp_path, callbacks=[finder, Sizes(), pl.callbacks.TQDMProgressBar()], accelerator="cpu",
        logger=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(make_agent("base", data, epochs_per_task=1), datamodule=data)
    assert data.batch_size == finder.optimal_batch_size > 2
    assert len(sizes) == trainer.global_step
    assert max(sizes) == data.batch_size


def test_a_search_before_a_resumed_run_is_refused(tmp_path):
    data = make_data()
    saver = ModelCheckpoint(tmp_path, save_last=True)
    make_trainer(tmp_path, [saver], max_steps=2).fit(make_agent("base", data), datamodule=data)
    finder = pl.callbacks.LearningRateFinder(num_training_steps=16)
    trainer = make_trainer(tmp_path, [finder])
    with pytest.raises(ConfigurationError, match="LearningRateFinder would start a resumed run anew"):
        trainer.fit(make_agent("base", data), datamodule=data, ckpt_path=tmp_path / "last.ckpt")


def test_a_run_that_goes_on_with_other_workers_has_their_rate(tmp_path, monkeypatch):
    def run(workers, callbacks=(), **kwargs):
        monkeypatch.setattr("dcl_lightning.agents.base.lr_scale", lambda rule, _: float(workers))
        rates, data = Rates(), make_data()
        agent = make_agent("base", data, lr=0.1, milestones=[1], gamma=0.5, scale_lr="linear")
        make_trainer(tmp_path, [rates, *callbacks], log_every_n_steps=1).fit(agent, datamodule=data, **kwargs)
        return rates.seen

    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    assert run(2, [saver]) == pytest.approx(([0.2] * 3 + [0.1] * 3) * 3)
    assert run(3, ckpt_path=tmp_path / "step=2.ckpt") == pytest.approx((([0.3] * 3 + [0.15] * 3) * 3)[2:])


@pytest.mark.parametrize("milestones", [[], [1]])
def test_parameters_added_later_keep_their_rate(milestones, tmp_path):
    # By hand: the backbone joins at epoch 1 of 6 with rate 0.01, and doubles it at each epoch after that.
    seen, data = [], make_data()
    agent = make_agent("base", data, lr=0.1, milestones=milestones, gamma=0.5)
    tuning = pl.callbacks.BackboneFinetuning(
        unfreeze_backbone_at_epoch=1, lambda_func=lambda _: 2.0, backbone_initial_lr=0.01, should_align=False
    )

    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    before = agent.backbone.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    make_trainer(tmp_path, [tuning, Spy()]).fit(agent, datamodule=data)
    assert [rates[1:] for rates in seen[::3]] == [[], *([0.01 * 2**i] for i in range(5))]
    assert any(not torch.equal(tensor, agent.backbone.state_dict()[name]) for name, tensor in before.items())


def test_an_optimizer_that_is_made_already_is_refused_by_what_to_give() -> None:
    network = Normalised()
    with pytest.raises(ConfigurationError, match=r"model\.optimizer is a Adam of weights.*functools\.partial\(Adam"):
        FineTuning(network, 6, optimizer=torch.optim.Adam(network.parameters()))
