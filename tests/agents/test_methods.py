"""Each method's step and end of a task against the same computation by hand."""

from __future__ import annotations

import copy
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dcl_lightning import RehearsalConfig
from dcl_lightning.agents import short_names
from dcl_lightning.agents.teacher import Teacher
from dcl_lightning.backbones import MLP
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.functional import agem_projection, gem_projection, si_importance
from dcl_lightning.memory.policies import POLICIES
from tests.conformance.agents import make
from tests.conformance.small_stream import make_data, make_trainer


def weights(agent):
    """Those that are trained: a teacher's are not."""
    return torch.cat([p.detach().flatten() for p in agent.parameters() if p.requires_grad])


# Filled with each step's samples, whatever their task.
RESERVOIR = {"policy": "reservoir", "update": "step"}


class Recorder:
    """Keeps each step's batch, and the weights before it."""

    def __init__(self, agent):
        self.batches, self.before, self.tasks, self.nets = [], [], [], []
        inner = agent.training_loss

        def training_loss(batch):
            self.batches.append(batch)
            self.before.append(weights(agent))
            self.tasks.append(agent.clock.task_at(agent.current_epoch))
            self.nets.append(copy.deepcopy(torch.nn.Sequential(agent.backbone, agent.head)))
            return inner(batch)

        agent.training_loss = training_loss


def fit(name, tmp_path, data=None, trainer=None, change=lambda agent: None, **kwargs):
    data = data or make_data(batch_size=7)
    agent = make(name, data, momentum=0.0, **kwargs)
    change(agent)
    seen = Recorder(agent)
    make_trainer(tmp_path, limit_val_batches=0, **(trainer or {})).fit(agent, datamodule=data)
    seen.before.append(weights(agent))
    return agent, seen


def windows(batches, an_epoch, accumulated):
    """The batches of each step: an epoch's last step takes those that are left."""
    epochs = [range(first, first + an_epoch) for first in range(0, batches, an_epoch)]
    return [epoch[k : k + accumulated] for epoch in epochs for k in range(0, an_epoch, accumulated)]


def gradient(net, inputs, targets):
    net.zero_grad()
    F.cross_entropy(net(inputs), targets).backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize(("name", "memory"), [("agem", {}), ("gem", {}), ("agem", RESERVOIR), ("gem", RESERVOIR)])
def test_steps_are_those_of_the_projected_gradient(name, memory, accumulated, tmp_path):
    # 14 samples a task in batches of 5: with two batches a step, the second step of an epoch is of one alone.
    trainer = {"accumulate_grad_batches": accumulated}
    _, seen = fit(name, tmp_path, make_data(batch_size=5), trainer, memory=memory)
    changed = 0
    for window in windows(len(seen.batches), 3, accumulated):
        batches, net = [seen.batches[step] for step in window], seen.nets[window[0]]
        g = sum(gradient(net, b.inputs[: b.num_new], b.targets[: b.num_new]) for b in batches) / accumulated
        inputs, targets, tasks = (
            torch.cat([getattr(b, part)[b.num_new :] for b in batches]) for part in ("inputs", "targets", "task_ids")
        )
        old = [tasks == t for t in range(seen.tasks[window[0]])]
        if name == "agem":
            expected = agem_projection(g, gradient(net, inputs, targets)) if old else g
        else:
            parts = [gradient(net, inputs[o], targets[o]) for o in old if o.any()]
            expected = gem_projection(g, torch.stack(parts), 0.5) if parts else g
        changed += not torch.equal(g, expected)
        moved = seen.before[window[-1] + 1] - seen.before[window[0]]
        torch.testing.assert_close(moved, -0.05 * expected, atol=1e-6, rtol=1e-3)
        assert not set(targets.tolist()) & {y for b in batches for y in b.targets[: b.num_new].tolist()}
        assert set(tasks.tolist()) <= set(range(seen.tasks[window[0]])), "of earlier tasks alone"
        assert len(tasks) or not old or not memory, "from the first step of the second task on"
    assert changed > 2


def test_a_teacher_says_what_its_network_says_in_evaluation():
    torch.manual_seed(0)
    net, inputs = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5)), torch.randn(8, 3)
    agent = torch.nn.ModuleList([net, Teacher(net)]).train()
    net(inputs)  # moves the running statistics
    agent[1].renew(net)
    assert torch.equal(agent[1](inputs), net.eval()(inputs))


@pytest.mark.parametrize("task", [1, 2])
def test_lwf_learns_from_the_network_before_the_task(task, tmp_path):
    _, seen = fit("lwf", tmp_path, strength=0.5, temperature=3.0)
    steps = [step for step, t in enumerate(seen.tasks) if t == task]
    teacher, classes = seen.nets[steps[0]], list(range(2 * task))
    for step in steps:
        batch, net = seen.batches[step], seen.nets[step]
        net.zero_grad()
        logits, taught = net(batch.inputs), teacher(batch.inputs).detach()
        soft = (taught[:, classes] / 3).softmax(1)
        kept = -(soft * (logits[:, classes] / 3).log_softmax(1)).sum(1).mean()
        (F.cross_entropy(logits, batch.targets) + 0.5 * kept).backward()
        g = torch.cat([p.grad.flatten() for p in net.parameters()])
        torch.testing.assert_close(seen.before[step + 1] - seen.before[step], -0.05 * g, atol=1e-6, rtol=1e-3)


def test_ewc_measures_single_samples_and_holds_on_to_the_weights(tmp_path):
    agent, seen = fit("ewc", tmp_path, strength=10.0, decay=0.5)
    data = agent.trainer.datamodule
    fisher = torch.zeros(len(seen.before[0]))
    for task in range(3):
        end = len(seen.tasks) - seen.tasks[::-1].index(task)
        net = seen.nets[end] if end < len(seen.nets) else torch.nn.Sequential(agent.backbone, agent.head)
        ids = data.train_indices(task)
        squares = sum(gradient(net, data.train_inputs[i][None], data.train_targets[i][None]) ** 2 for i in ids)
        fisher = 0.5 * fisher + squares / len(ids)
        if task < 2:
            batch, net = seen.batches[end + 1], seen.nets[end + 1]
            moved = seen.before[end + 1] - seen.before[end]
            # Schwarz et al., equation 8: the penalty, too, is of the Fisher information that has faded.
            g = gradient(net, batch.inputs, batch.targets) + 10.0 * 0.5 * fisher * moved
            torch.testing.assert_close(seen.before[end + 2] - seen.before[end + 1], -0.05 * g, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(agent.fisher, fisher, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(agent.anchor, weights(agent))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_si_follows_the_way_of_the_weights_without_the_penalty(accumulated, tmp_path):
    data = make_data(batch_size=5)
    agent, seen = fit("si", tmp_path, data, {"accumulate_grad_batches": accumulated}, strength=2.0, damping=0.1)
    importance, path, start, begun = torch.zeros(len(seen.before[0])), 0.0, seen.before[0], 0
    for window in windows(len(seen.batches), 3, accumulated):
        step, net = window[0], seen.nets[window[0]]
        if seen.tasks[step] != begun:
            importance = si_importance(importance, path, seen.before[step], start, 0.1)
            path, start, begun = 0.0, seen.before[step], seen.tasks[step]
        g = sum(gradient(net, seen.batches[s].inputs, seen.batches[s].targets) for s in window) / accumulated
        moved = seen.before[window[-1] + 1] - seen.before[step]
        path = path - g * moved
        # Lightning divides each batch's loss by the same number, also where fewer are left.
        pull = len(window) / accumulated * 2.0 * 2 * importance * (seen.before[step] - start)
        torch.testing.assert_close(moved, -0.05 * (g + pull), atol=1e-6, rtol=1e-3)
    importance = si_importance(importance, path, seen.before[-1], start, 0.1)
    torch.testing.assert_close(agent.importance, importance, atol=1e-6, rtol=1e-3)
    assert float(importance.max()) > 0


def test_gdumb_starts_anew_and_trains_on_what_is_stored_alone(tmp_path):
    agent, seen = fit("gdumb", tmp_path)
    for task in range(3):
        assert torch.equal(seen.before[seen.tasks.index(task)], seen.before[0])
    for step, (batch, net) in enumerate(zip(seen.batches, seen.nets, strict=True)):
        new, last = batch.num_new, step + 1 == len(seen.tasks) or seen.tasks[step + 1] != seen.tasks[step]
        if not last:
            stored = len(batch.targets) > new
            g = gradient(net, batch.inputs[new:], batch.targets[new:]) if stored else torch.zeros(len(seen.before[0]))
            torch.testing.assert_close(seen.before[step + 1] - seen.before[step], -0.05 * g, atol=1e-6, rtol=1e-3)
    assert agent.rehearsal.manager.buffer.class_counts.tolist() == [2] * 6


def test_bic_corrects_the_classes_of_the_task_by_samples_that_train_nothing(tmp_path):
    data = make_data(batch_size=7)
    agent, seen = fit("bic", tmp_path, data, held_out=0.4, memory={"buffer_size": 30, "policy": "greedy"})
    assert torch.equal(agent.bias.alpha[:2], torch.ones(2)), "the first task has no older ones"
    assert float((agent.bias.alpha[2:] - 1).abs().min()) > 1e-3
    assert agent.bias.alpha[2] == agent.bias.alpha[3] != agent.bias.alpha[4] == agent.bias.alpha[5]
    # The head's own logits, scaled and shifted, are what is evaluated and what teaches.
    inputs = data.train_inputs[:5]
    agent.eval()
    raw = agent.head(agent.backbone(inputs))
    torch.testing.assert_close(agent(inputs), raw * agent.bias.alpha + agent.bias.beta)
    torch.testing.assert_close(agent.teacher(inputs), agent(inputs))
    # A held-out sample trains nothing, new or stored.
    batch = next(b for b in seen.batches if len(b.targets) > b.num_new)
    held = agent._held(batch.sample_ids)
    assert 0 < int(held.sum()) < len(held)
    other = batch._replace(inputs=torch.where(held[:, None, None, None], torch.zeros(()), batch.inputs))
    assert agent.training_loss(batch)[0] == agent.training_loss(other)[0]
    assert 0.3 < float(agent._held(torch.arange(1000)).float().mean()) < 0.5


def test_derpp_of_the_tasks_ends_stores_the_logits_of_then(tmp_path):
    agent, seen = fit("derpp_task_end", tmp_path)
    first = seen.tasks.index(1)
    ends = {0: seen.nets[first], 1: seen.nets[seen.tasks.index(2)]}
    inputs = agent.trainer.datamodule.train_inputs
    for batch in seen.batches[first:]:
        for logits, sample, task in zip(
            batch.rehearsed["logits"], batch.sample_ids[batch.num_new :], batch.task_ids[batch.num_new :], strict=True
        ):
            torch.testing.assert_close(logits, ends[int(task)](inputs[sample][None])[0].detach())


@pytest.mark.parametrize(("name", "alpha", "beta"), [("der", 0.3, 0.0), ("derpp", 0.3, 0.8)])
def test_steps_of_dark_replay_have_each_factor_at_its_term(name, alpha, beta, tmp_path):
    factors = {"alpha": alpha} | ({"beta": beta} if beta else {})
    _, seen = fit(name, tmp_path, **factors)
    checked = 0
    for step, (batch, net) in enumerate(zip(seen.batches, seen.nets, strict=True)):
        new, stored = batch.num_new, batch.rehearsed.get("logits", torch.zeros(0))
        if not len(stored):
            continue
        net.zero_grad()
        logits = net(batch.inputs)
        loss = F.cross_entropy(logits[:new], batch.targets[:new])
        loss = loss + alpha * F.mse_loss(logits[new:], stored)
        (loss + beta * F.cross_entropy(logits[new:], batch.targets[new:])).backward()
        g = torch.cat([p.grad.flatten() for p in net.parameters()])
        torch.testing.assert_close(seen.before[step + 1] - seen.before[step], -0.05 * g, atol=1e-6, rtol=1e-3)
        checked += 1
    assert checked > 5


def test_er_ace_tells_new_classes_from_one_another_only(tmp_path):
    _, seen = fit("er_ace", tmp_path)
    step = seen.tasks.index(1)
    batch, net = seen.batches[step], seen.nets[step]
    new, present = batch.num_new, [2, 3]
    net.zero_grad()
    logits = net(batch.inputs)
    loss = F.cross_entropy(logits[:new, present], batch.targets[:new] - 2)
    (loss + F.cross_entropy(logits[new:], batch.targets[new:])).backward()
    g = torch.cat([p.grad.flatten() for p in net.parameters()])
    torch.testing.assert_close(seen.before[step + 1] - seen.before[step], -0.05 * g, atol=1e-6, rtol=1e-3)


def test_er_ace_opens_the_classes_that_no_sample_was_of(tmp_path):
    _, seen = fit("er_ace", tmp_path, make_data(batch_size=1), unmet_classes="open")
    met, opened = set(), []
    for step, (batch, net) in enumerate(zip(seen.batches, seen.nets, strict=True)):
        new = batch.num_new
        present = set(batch.targets[:new].tolist())
        met |= present
        allowed = sorted(present | (set(range(6)) - met))
        opened.append(len(allowed) - len(present))
        net.zero_grad()
        logits = net(batch.inputs)
        places = torch.tensor([allowed.index(y) for y in batch.targets[:new].tolist()])
        loss = F.cross_entropy(logits[:new, allowed], places)
        if len(batch.targets) > new:
            loss = loss + F.cross_entropy(logits[new:], batch.targets[new:])
        loss.backward()
        g = torch.cat([p.grad.flatten() for p in net.parameters()])
        torch.testing.assert_close(seen.before[step + 1] - seen.before[step], -0.05 * g, atol=1e-6, rtol=1e-3)
    # One sample a step: five classes are open at the first, and one less from each first sample of a class on.
    assert [*dict.fromkeys(opened)] == [5, 4, 3, 2, 1, 0]


def test_er_ace_opens_no_class_that_is_not_trained(tmp_path):
    agent, seen = fit("er_ace", tmp_path, unmet_classes="open", train_classes="seen")
    for before, after, task in zip(seen.before, seen.before[1:], seen.tasks, strict=False):
        rows = [vector[-54:-6].view(6, 8)[2 * task + 2 :] for vector in (before, after)]
        assert torch.equal(*rows)
    assert bool(agent.met_classes.all())


@pytest.mark.parametrize("boundaries", ["known", "hidden"])
def test_er_ace_meets_the_classes_of_a_new_stream_anew_and_resumes_with_those_met(boundaries, tmp_path):
    def data():
        return make_data(boundaries=boundaries, batch_size=3)

    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    agent = make("er_ace", data(), unmet_classes="open")
    masks, inner = [], agent.training_loss

    def training_loss(batch):
        found = inner(batch)
        masks.append(agent.met_classes.clone())
        return found

    agent.training_loss = training_loss
    for callbacks in ([saver], []):
        make_trainer(tmp_path, callbacks, limit_val_batches=0).fit(agent, datamodule=data())
        if callbacks:
            state = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
    half = len(masks) // 2
    assert all(torch.equal(a, b) for a, b in zip(masks[:half], masks[half:], strict=True))
    for step in (1, 5, 10, 15):
        resumed = make("er_ace", data(), seed=3, unmet_classes="open")
        make_trainer(tmp_path / "again", limit_val_batches=0).fit(
            resumed, datamodule=data(), ckpt_path=tmp_path / f"step={step}.ckpt"
        )
        assert all(torch.equal(tensor, state[name]) for name, tensor in resumed.state_dict().items()), step


def test_er_ace_that_masks_them_keeps_no_classes(tmp_path):
    agent = make("er_ace", make_data())
    assert "met_classes" not in agent.state_dict()


@pytest.mark.parametrize("forward", ["joint", "separate"])
def test_steps_of_separate_draws_have_half_of_the_rows_at_each_term(forward, tmp_path):
    data, kinds = make_data(batch_size=3), set()
    _, seen = fit("derpp", tmp_path, data, alpha=0.3, beta=0.8, draws="separate", forward=forward)
    for step, (batch, net) in enumerate(zip(seen.batches, seen.nets, strict=True)):
        new, stored = batch.num_new, batch.rehearsed.get("logits", torch.zeros(0))
        net.zero_grad()
        logits = net(batch.inputs)
        loss = F.cross_entropy(logits[:new], batch.targets[:new])
        old, labels = logits[new:], batch.targets[new:]
        first, second = [[k for k in range(len(stored)) if k % 2 == rest] for rest in (0, 1)]
        kinds.add((len(first), len(second)))
        if first:
            loss = loss + 0.3 * (old[first] - stored[first]).square().mean()
        if second:
            loss = loss + 0.8 * F.cross_entropy(old[second], labels[second])
        loss.backward()
        g = torch.cat([p.grad.flatten() for p in net.parameters()])
        torch.testing.assert_close(seen.before[step + 1] - seen.before[step], -0.05 * g, atol=1e-6, rtol=1e-3)
    assert {(0, 0), (2, 1), (2, 2)} == kinds


def test_separate_draws_need_halves(tmp_path):
    data = make_data()
    agent = make("derpp", data, draws="separate", memory={"num_samples": 5})
    with pytest.raises(ConfigurationError, match=r"num_samples=5 has no halves.*draws=separate.*an even number"):
        make_trainer(tmp_path).fit(agent, datamodule=data)


def padded(batch, target):
    """The batch with one more new row, which only pads a worker's share."""
    columns = {"inputs": batch.inputs[:1] + 1, "targets": torch.tensor([target]), "weights": torch.zeros(1)}
    columns |= {name: getattr(batch, name)[:1] for name in ("task_ids", "sample_ids", "draw_ids")}
    new = batch.num_new
    longer = {
        name: torch.cat([getattr(batch, name)[:new], row, getattr(batch, name)[new:]]) for name, row in columns.items()
    }
    return batch._replace(num_new=new + 1, **longer)


@pytest.mark.parametrize(
    "name",
    ["base", "nil", "er", "er_ace", "mir", "pcr", "der", "derpp", "agem", "gem", "bic", "lwf", "icarl", "icarl_online"],
)
def test_rows_that_pad_a_share_change_no_loss(name, tmp_path):
    agent, seen = fit(name, tmp_path)
    for batch in (seen.batches[0], seen.batches[-1]):
        for target in range(6):
            assert torch.allclose(agent.training_loss(padded(batch, target))[0], agent.training_loss(batch)[0])
    nothing = padded(batch, 5)._replace(weights=torch.zeros(len(batch.targets) + 1))
    assert float(agent.training_loss(nothing)[0]) == 0


class Normed(torch.nn.Sequential):
    feature_dim = 8

    def __init__(self):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU())


def test_gdumb_takes_nothing_from_new_samples(tmp_path):
    data = make_data(batch_size=7)
    agent, seen = fit("gdumb", tmp_path, data, change=lambda a: setattr(a, "backbone", Normed()))
    batch = next(b for b in reversed(seen.batches) if len(b.targets) > b.num_new)
    other = batch._replace(inputs=torch.cat([batch.inputs[: batch.num_new] + 5, batch.inputs[batch.num_new :]]))
    found = []
    for given in (batch, other):
        one = copy.deepcopy(agent.backbone)
        loss, logits = agent.training_loss(given)
        found.append((loss.detach(), agent.backbone[2].running_mean.clone()))
        assert len(logits) == len(batch.targets) - batch.num_new
        agent.backbone = one
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("loss", ["mean", "sum"])
def test_bic_takes_means_over_the_samples_that_train(loss, tmp_path):
    memory = {"buffer_size": 30, "policy": "greedy", "loss": loss}
    agent, seen = fit("bic", tmp_path, held_out=0.3, memory=memory)
    batch, new = seen.batches[-1], seen.batches[-1].num_new
    logits, taught = agent(batch.inputs).detach().numpy(), agent.teacher(batch.inputs).numpy()[:, :4]
    trains, label = ~agent._held(batch.sample_ids).numpy(), batch.targets.numpy()

    def softmax(z):
        return np.exp(z) / np.exp(z).sum(1, keepdims=True)

    rows = np.arange(len(label))
    losses = -np.log(softmax(logits)[rows, label])
    kept = -(softmax(taught / 2) * np.log(softmax(logits[:, :4] / 2))).sum(1)
    both = 4 / 6 * kept + 2 / 6 * losses  # four classes are old, two are new
    parts = [slice(None)] if loss == "mean" else [slice(new), slice(new, None)]
    assert 0 < trains[:new].sum() < new
    expected = sum(both[part][trains[part]].mean() for part in parts)
    assert float(agent.training_loss(batch)[0]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("row_format", ["inputs", "index", "augmented"])
@pytest.mark.parametrize("policy", POLICIES)
def test_bic_is_fitted_to_all_stored_samples_that_are_held_out(policy, row_format, scope, tmp_path):
    memory = {"buffer_size": 30, "policy": policy, "row_format": row_format, "scope": scope, "quota": "fixed"}
    agent, _ = fit("bic", tmp_path, held_out=0.4, memory=memory)
    buffer = agent.rehearsal.manager.buffer
    stored = buffer.store.column("sample_ids", torch.arange(30))[: len(buffer)]
    ids = {i for i in stored.tolist() if bool(agent._held(torch.tensor([i])))}
    targets = agent._held_out_logits()[1]
    assert sorted(targets.tolist()) == sorted(int(agent.trainer.datamodule.train_targets[i]) for i in ids)
    assert len(targets) > 5
    assert float((agent.bias.alpha[2:] - 1).abs().min()) > 1e-3, "both later tasks are corrected"


def test_bic_says_where_it_cannot_correct(tmp_path):
    with pytest.warns(UserWarning, match=r"BiC does not correct task 1: no held-out sample of .* is stored"):
        agent, _ = fit("bic", tmp_path, held_out=1e-6)
    assert agent.bias.alpha.tolist() == [1] * 6


class Counting(torch.nn.Sequential):
    """Writes each sample into a buffer, which ``vmap`` does not allow."""

    feature_dim = 8

    def __init__(self):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.ReLU())
        self.register_buffer("sum", torch.zeros(16))

    def forward(self, inputs):
        self.sum += inputs.detach().flatten(1).sum(0)
        return super().forward(inputs)


class Checkpointed(torch.nn.Sequential):
    """Keeps no activations of its hidden layers."""

    feature_dim = 8

    def __init__(self, reentrant):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
        self.reentrant = reentrant

    def forward(self, inputs):
        hidden = self[1](self[0](inputs))
        return checkpoint(lambda h: self[3](self[2](h)), hidden, use_reentrant=self.reentrant)


@pytest.mark.parametrize("backbone", [Counting, lambda: Checkpointed(True), lambda: Checkpointed(False)])
def test_ewc_takes_single_gradients_where_it_has_to(backbone, tmp_path):
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="one by one"):
        agent, _ = fit("ewc", tmp_path, change=lambda a: setattr(a, "backbone", backbone()))
    data, before = agent.trainer.datamodule, agent.fisher.clone()
    agent.fisher.zero_()
    counted = agent.backbone.sum.clone() if hasattr(agent.backbone, "sum") else None
    agent.on_task_end(agent.clock.tasks[2])
    if counted is not None:
        assert torch.equal(agent.backbone.sum, counted), "the measure leaves no trace in the network"
    assert all(p.grad is None or not p.grad.any() for p in agent.parameters()) or before.any()
    net, squares = torch.nn.Sequential(agent.backbone, agent.head), 0.0
    for i in data.train_indices(2):
        squares = squares + gradient(net, data.train_inputs[i][None], data.train_targets[i][None]) ** 2
    torch.testing.assert_close(agent.fisher, squares / len(data.train_indices(2)), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", ["ewc", "si"])
def test_weights_that_are_frozen_after_the_agent_was_made(name, tmp_path):
    def freeze(agent):
        agent.backbone.requires_grad_(False)

    agent, _ = fit(name, tmp_path, change=freeze, strength=1.0)
    measured = agent.fisher if name == "ewc" else agent.importance
    frozen = sum(p.numel() for p in agent.backbone.parameters())
    assert not measured[:frozen].any()
    assert measured[frozen:].any()

    def change(agent):
        agent.backbone = Normed()  # another number of weights

    agent, _ = fit(name, tmp_path, change=change, strength=1.0)
    assert torch.isfinite(weights(agent)).all()


@pytest.mark.parametrize("name", ["ewc", "si"])
def test_weights_that_thaw_between_tasks(name, tmp_path):
    class Thaw(pl.Callback):
        def on_task_start(self, trainer, agent, task):
            agent.backbone.requires_grad_(task.index > 0)

    words = "EWC knows of no importance of backbone.*to the tasks before task 1"
    with pytest.warns(UserWarning, match=words if name == "ewc" else ""):
        agent, seen = fit(name, tmp_path, trainer={"callbacks": [Thaw()]}, strength=1.0)
    assert not torch.equal(seen.before[0][:10], seen.before[-1][:10])
    assert torch.isfinite(weights(agent)).all()


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("er", {"memory": {"weighting": "nil", "policy": "nil"}}, r"weighting=nil: agent er has weighting=none"),
        ("derpp", {"memory": {"loss": "mean"}}, r"rehearsal\.loss=mean: agent derpp has loss=sum"),
        ("agem", {"memory": {"draw_from": "seen"}}, r"rehearsal\.draw_from=seen: agent agem has draw_from=past"),
        ("gdumb", {"memory": {"update": "task_end"}}, r"rehearsal\.update=task_end: agent gdumb has update=step"),
        ("gem", {"margin": -1.0}, r"model\.margin=-1\.0: give a finite number, at least 0"),
        ("lwf", {"temperature": 0.0}, r"temperature=0\.0: .* above 0"),
        ("ewc", {"decay": 2.0}, r"decay=2\.0: .* at least 0 and at most 1"),
        ("si", {"damping": 0.0}, r"damping=0\.0: .* above 0"),
        ("bic", {"held_out": 1.0}, r"held_out=1\.0: .* above 0 and below 1"),
        ("der", {"alpha": -1.0}, r"model\.alpha=-1\.0"),
        ("derpp", {"beta": float("nan")}, r"model\.beta=nan: give a finite number, at least 0"),
        ("ewc", {"strength": float("inf")}, r"model\.strength=inf"),
        ("base", {"lr": float("nan")}, r"model\.lr=nan: give a finite number, above 0"),
        ("base", {"lr": 1e300}, r"model\.lr=1e\+300: .* at most 3\.4"),
        ("base", {"weight_decay": float("nan")}, r"model\.weight_decay=nan"),
    ],
)
def test_values_that_make_no_sense_are_refused(name, kwargs, words):
    with pytest.raises(ConfigurationError, match=words):
        make(name, make_data(), **kwargs)


@pytest.mark.parametrize(
    ("name", "stream", "words"),
    [
        ("joint", {}, r"data\.scenario=class: agent joint learns in scenario none only"),
        ("cumulative", {}, r"agent cumulative.*data\.concatenate_tasksets=true"),
        ("bic", {"scenario": "domain", "num_tasks": 2}, r"data\.scenario=domain: agent bic"),
        ("lwf", {"boundaries": "hidden"}, r"data\.boundaries=hidden: agent lwf"),
    ],
)
def test_streams_that_a_method_cannot_learn_from_are_refused(name, stream, words, tmp_path):
    data = make_data(**stream)
    with pytest.raises(ConfigurationError, match=words):
        make_trainer(tmp_path).fit(make(name, data), datamodule=data)


@pytest.mark.parametrize("name", ["lwf", "agem", "gem", "der", "gdumb", "mir", "scr", "pcr"])
def test_domains(name, tmp_path):
    data = make_data(scenario="domain", num_tasks=2, batch_size=7)
    memory = {"memory": {"policy": "class_balanced", "update": "task_end"}} if name in ("agem", "gem") else {}
    agent, _ = fit(name, tmp_path, data, **memory)
    assert torch.isfinite(weights(agent)).all()
    if name == "lwf":
        assert bool(agent.taught.all())


@pytest.mark.parametrize(
    ("policy", "stream", "words"),
    [
        ("nil", {"scenario": "domain", "num_tasks": 2}, "overwrite its stored ones"),
        ("class_balanced", {"scenario": "domain", "num_tasks": 2}, "overwrite its stored ones"),
        ("fifo", {"scenario": "instance", "num_tasks": 2}, "overwrite its stored ones"),
        ("greedy", {"scenario": "domain", "num_tasks": 2}, "keeps the first samples of each class"),
        ("reservoir", {"scenario": "domain", "num_tasks": 2}, None),
        ("class_reservoir", {"scenario": "domain", "num_tasks": 2}, None),
        ("nil", {}, None),
        ("nil", {"scenario": "domain", "num_tasks": 2, "concatenate_tasksets": True}, None),
    ],
)
def test_a_memory_that_forgets_tasks_says_so_once_before_training(policy, stream, words, tmp_path):
    data = make_data(**stream)
    agent = make("er", data, memory={"policy": policy})
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        make_trainer(tmp_path, limit_train_batches=1, limit_val_batches=0).fit(agent, datamodule=data)
    said = [str(w.message) for w in found if "classes come again" in str(w.message)]
    assert len(said) == (words is not None)
    assert all(words in text and "rehearsal.policy=reservoir keeps samples of all tasks alike" in text for text in said)


@pytest.mark.parametrize(
    ("name", "memory", "message"),
    [
        ("nil_v1", {"execution": "inline"}, "execution=inline: agent nil_v1 has execution=blocking"),
        ("nil_v2", {"execution": "blocking"}, "execution=blocking: agent nil_v2 has execution=nonblocking"),
        ("nil_v3", {"prefetch": "draw"}, "prefetch=draw: agent nil_v3 has prefetch=device"),
        (
            "nil_v4",
            RehearsalConfig(execution="blocking", prefetch="device"),
            "prefetch=device: agent nil_v4 has prefetch=batch",
        ),
        ("nil_global", {"scope": "local"}, "scope=local: agent nil_global has scope=global"),
    ],
)
def test_what_a_short_name_stands_for_is_not_changed_silently(name, memory, message) -> None:
    with pytest.raises(ConfigurationError, match=rf"rehearsal\.{message}; leave .* out, or take another agent"):
        getattr(short_names, name)(MLP([4]), 4, input_spec=(1, 2, 2), rehearsal=memory)
