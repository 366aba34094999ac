"""What each method does in a step and at the end of a task, beside the same by hand."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "conformance"))
from agents import make
from streams import make_data, make_trainer

from dcl_lightning import ER, RehearsalConfig
from dcl_lightning.backbones import MLP
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.functional import agem_projection, gem_projection, si_importance


def weights(agent):
    """Those that are trained: a teacher's are not."""
    return torch.cat([p.detach().flatten() for p in agent.parameters() if p.requires_grad])


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


def fit(name, tmp_path, data=None, **kwargs):
    data = data or make_data(batch_size=7)
    agent = make(name, data, momentum=0.0, **kwargs)
    seen = Recorder(agent)
    make_trainer(tmp_path, limit_val_batches=0).fit(agent, datamodule=data)
    seen.before.append(weights(agent))
    return agent, seen


def gradient(net, inputs, targets):
    net.zero_grad()
    F.cross_entropy(net(inputs), targets).backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


@pytest.mark.parametrize("name", ["agem", "gem"])
def test_steps_are_those_of_the_projected_gradient(name, tmp_path):
    _, seen = fit(name, tmp_path)
    changed = 0
    for step, (batch, net) in enumerate(zip(seen.batches, seen.nets, strict=True)):
        new = batch.num_new
        g = gradient(net, batch.inputs[:new], batch.targets[:new])
        old = [batch.task_ids[new:] == t for t in range(seen.tasks[step])]
        if name == "agem":
            expected = agem_projection(g, gradient(net, batch.inputs[new:], batch.targets[new:])) if old else g
        else:
            parts = [gradient(net, batch.inputs[new:][o], batch.targets[new:][o]) for o in old if o.any()]
            expected = gem_projection(g, torch.stack(parts), 0.5) if parts else g
        changed += not torch.equal(g, expected)
        torch.testing.assert_close(seen.before[step + 1] - seen.before[step], -0.05 * expected, atol=1e-6, rtol=1e-3)
        assert not set(batch.targets[new:].tolist()) & set(batch.targets[:new].tolist())
    assert changed > 2


def test_lwf_learns_from_the_network_before_the_task(tmp_path):
    _, seen = fit("lwf", tmp_path, strength=0.5, temperature=3.0)
    first = seen.tasks.index(1)
    teacher, classes = seen.nets[first], [0, 1]
    for step in range(first, seen.tasks.index(2)):
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
            g = gradient(net, batch.inputs, batch.targets) + 10.0 * fisher * (seen.before[end + 1] - seen.before[end])
            torch.testing.assert_close(seen.before[end + 2] - seen.before[end + 1], -0.05 * g, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(agent.fisher, fisher, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(agent.anchor, weights(agent))


def test_si_follows_the_way_of_the_weights_without_the_penalty(tmp_path):
    agent, seen = fit("si", tmp_path, strength=2.0, damping=0.1)
    importance, path, start, begun = torch.zeros(len(seen.before[0])), 0.0, seen.before[0], 0
    for step, (batch, net) in enumerate(zip(seen.batches, seen.nets, strict=True)):
        if seen.tasks[step] != begun:
            importance = si_importance(importance, path, seen.before[step], start, 0.1)
            path, start, begun = 0.0, seen.before[step], seen.tasks[step]
        g = gradient(net, batch.inputs, batch.targets)
        moved = seen.before[step + 1] - seen.before[step]
        path = path - g * moved
        pull = 2.0 * 2 * importance * (seen.before[step] - start)
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


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("er", {"memory": {"weighting": "nil", "policy": "nil"}}, r"weighting=nil: agent er has weighting=none"),
        ("derpp", {"memory": {"loss": "mean"}}, r"rehearsal\.loss=mean: agent derpp has loss=sum"),
        ("agem", {"memory": {"rehearse": "seen"}}, r"rehearsal\.rehearse=seen: agent agem has rehearse=past"),
        ("gdumb", {"memory": {"update": "task_end"}}, r"rehearsal\.update=task_end: agent gdumb has update=step"),
        ("gem", {"margin": -1.0}, r"model\.margin=-1\.0: give at least 0"),
        ("lwf", {"temperature": 0.0}, r"temperature=0\.0 above 0"),
        ("ewc", {"decay": 2.0}, r"decay=2\.0 in \[0, 1\]"),
        ("si", {"damping": 0.0}, r"damping=0\.0 above 0"),
        ("bic", {"held_out": 1.0}, r"held_out=1\.0 between 0 and 1"),
        ("der", {"alpha": -1.0}, r"model\.alpha=-1\.0"),
    ],
)
def test_values_that_make_no_sense_are_refused(name, kwargs, words):
    with pytest.raises(ConfigurationError, match=words):
        make(name, make_data(), **kwargs)


def test_a_whole_configuration_is_taken_as_it_is():
    config = RehearsalConfig(buffer_size=12, policy="fifo", weighting="none")
    assert ER(MLP([4], 1, 4), 6, rehearsal=config).rehearsal.config == config
    assert ER(MLP([4], 1, 4), 6, rehearsal={"buffer_size": 12}).rehearsal.config.policy == "reservoir"


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


@pytest.mark.parametrize("name", ["lwf", "agem", "gem", "der", "gdumb"])
def test_domains(name, tmp_path):
    data = make_data(scenario="domain", num_tasks=2, batch_size=7)
    memory = {"memory": {"policy": "class_balanced", "update": "task_end"}} if name in ("agem", "gem") else {}
    agent, _ = fit(name, tmp_path, data, **memory)
    assert torch.isfinite(weights(agent)).all()
    if name == "lwf":
        assert bool(agent.taught.all())
