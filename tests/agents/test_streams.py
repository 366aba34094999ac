"""Streams that an agent refuses or warns about."""

import json
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from dcl_lightning import NIL, ContinualAgent, FineTuning
from dcl_lightning.backbones import MLP
from dcl_lightning.errors import ConfigurationError
from tests.conformance.small_stream import make_agent, make_data, make_trainer, matrix, weights


class ClassesOnly(FineTuning):
    scenarios = ("class",)


def test_a_scenario_that_a_method_cannot_learn_from_is_refused_before_training(tmp_path):
    data = make_data(scenario="domain", num_tasks=2)
    agent = ClassesOnly(MLP([4]), data.num_classes, data.input_spec)
    with pytest.raises(ConfigurationError, match=r"data\.scenario=domain: agent ClassesOnly .* class only"):
        make_trainer(tmp_path).fit(agent, datamodule=data)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "told"), [("icarl", True), ("base", False)])
def test_a_memory_beside_all_data_is_told_to_be_pointless(kind, told, tmp_path):
    data = make_data(concatenate_tasksets=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path, fast_dev_run=1).fit(make_agent(kind, data), datamodule=data)
    assert any("concatenate_tasksets" in str(w.message) for w in caught) == told


# -- hidden boundaries -------------------------------------------------------------------------------------------------


class Ears(pl.Callback):
    """Hears what tasks' boundaries tell, and keeps what was trained on."""

    def __init__(self):
        self.heard, self.batches, self.reported = [], [], []

    def on_task_start(self, trainer, agent, task):
        self.heard.append(("start", task.index))

    def on_task_end(self, trainer, agent, task):
        self.heard.append(("end", task.index))

    def on_task_evaluated(self, trainer, agent, task):
        self.reported.append(task.index)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batches.append(batch)


@pytest.mark.parametrize("boundaries", ["known", "hidden"])
def test_hidden_boundaries_leave_no_trace_in_training_and_the_matrix_is_made_all_the_same(boundaries, tmp_path):
    data = make_data(boundaries=boundaries)
    agent, ears = make_agent("base", data), Ears()
    heard = []
    agent.on_task_start = lambda task, inner=agent.on_task_start: (heard.append(task.index), inner(task))
    first = weights(agent).clone()
    make_trainer(tmp_path, [ears], enable_checkpointing=False).fit(agent, datamodule=data)
    known = boundaries == "known"
    assert ears.reported == [0, 1, 2]
    assert not torch.isnan(matrix(agent)[2]).any()
    assert ears.heard == ([(word, t) for t in range(3) for word in ("start", "end")] if known else [])
    assert heard == ([0, 1, 2] if known else [])
    assert {int(t) for b in ears.batches for t in b.task_ids} == ({0, 1, 2} if known else {-1})
    # By hand: one SGD with momentum over all batches, whose state is never reset.
    last = weights(agent).clone()
    torch.nn.utils.vector_to_parameters(first, agent.parameters())
    optimizer = torch.optim.SGD(agent.parameters(), 0.05, 0.9)
    for batch in ears.batches:
        optimizer.zero_grad()
        agent.training_loss(batch)[0].backward()
        optimizer.step()
    assert torch.equal(weights(agent), last) is not known


def nil_agent(data, **config):
    config = {"buffer_size": 12, "num_samples": 3} | config
    return NIL(MLP([8]), data.num_classes, config, input_spec=data.input_spec, epochs_per_task=1)


def test_a_memory_with_hidden_boundaries_resumes_from_every_step(tmp_path):
    def fit(folder, ckpt=None, callbacks=()):
        data = make_data(boundaries="hidden", sharding="fixed", scenario="blurry", blurriness=0.3)
        pl.seed_everything(0 if ckpt is None else 5)
        agent = nil_agent(data)
        trainer = make_trainer(folder, callbacks)
        trainer.fit(agent, datamodule=data, ckpt_path=ckpt)
        return agent, trainer.global_step

    saver = ModelCheckpoint(tmp_path / "steps", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    agent, last = fit(tmp_path, callbacks=[saver])
    assert set(agent.rehearsal.manager.buffer.store.gather(torch.arange(12))["task_ids"].tolist()) == {-1}
    for step in range(1, last, 2):
        again, _ = fit(tmp_path / "again", tmp_path / "steps" / f"step={step}.ckpt")
        assert torch.equal(weights(again), weights(agent)), step
        assert torch.equal(matrix(again).nan_to_num(-1), matrix(agent).nan_to_num(-1)), step


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda data: make_agent("icarl", data), r"agent ICaRL works at the ends of tasks.*data\.boundaries=known"),
        (lambda data: make_agent("base", data, milestones=[1]), r"model\.milestones=\[1\].*milestones=\[\]"),
        (lambda data: make_agent("base", data, warmup_epochs=1), r"model\.warmup_epochs=1.*warmup_epochs=0"),
        (lambda data: make_agent("base", data, reset_state_dict=True), r"model\.reset_state_dict=True"),
        (lambda data: make_agent("base", data, train_classes="seen"), r"model\.train_classes=seen.*train_classes=all"),
        (lambda data: nil_agent(data, update="task_end"), r"rehearsal\.update=task_end.*update=step"),
        (lambda data: nil_agent(data, draw_from="past"), r"rehearsal\.draw_from=past.*draw_from=seen"),
        (lambda data: ClassesOnly(MLP([4]), data.num_classes, data.input_spec, 2), None),
    ],
)
def test_what_needs_boundaries_is_refused_before_training_where_they_are_hidden(make, words, tmp_path):
    data = make_data(boundaries="hidden")
    trainer = make_trainer(tmp_path, fast_dev_run=1)
    if words is None:
        trainer.fit(make(data), datamodule=data)
        return
    with pytest.raises(ConfigurationError, match=words):
        trainer.fit(make(data), datamodule=data)
    assert trainer.global_step == 0


def test_early_stopping_with_hidden_boundaries_is_refused(tmp_path):
    data = make_data(boundaries="hidden", val_ratio=0.3)
    trainer = make_trainer(tmp_path, [EarlyStopping("val/acc", mode="max")], enable_checkpointing=False)
    with pytest.raises(ConfigurationError, match=r"EarlyStopping ends tasks.*leave it out"):
        trainer.fit(make_agent("base", data), datamodule=data)


def test_a_method_has_to_say_that_it_needs_no_boundaries(tmp_path):
    class Silent(ContinualAgent):
        def training_loss(self, batch):
            raise AssertionError("trained")

    data = make_data(boundaries="hidden")
    with pytest.raises(ConfigurationError, match="agent Silent works at the ends of tasks"):
        make_trainer(tmp_path).fit(Silent(MLP([4]), data.num_classes, data.input_spec), datamodule=data)


# -- blurry streams ----------------------------------------------------------------------------------------------------


def test_past_goes_by_classes_and_is_refused_at_set_up_where_they_come_again(tmp_path):
    data = make_data(scenario="blurry", blurriness=0.3)
    trainer = make_trainer(tmp_path)
    with pytest.raises(ConfigurationError, match=r"draw_from=past tells tasks apart by their classes.*update=task_end"):
        trainer.fit(nil_agent(data, draw_from="past"), datamodule=data)
    assert trainer.global_step == 0


@pytest.mark.parametrize("options", [{"policy": "class_balanced"}, {"update": "task_end", "draw_from": "past"}, None])
def test_agents_learn_from_a_blurry_stream(options, tmp_path):
    data = make_data(scenario="blurry", blurriness=0.3, val_ratio=0.2, batch_size=2)
    agent = make_agent("icarl", data, epochs_per_task=4) if options is None else nil_agent(data, **options)
    make_trainer(tmp_path).fit(agent, datamodule=data)
    values = matrix(agent)
    assert torch.isfinite(values).sum() == 6
    held = set(torch.nonzero(data.stream.held).flatten().tolist())
    if options is None:
        # A class that comes again is herded anew over its exemplars and its new samples: none is lost, none is twice.
        assert {y: len(ids) for y, ids in agent.exemplars.items()} == dict.fromkeys(range(6), 2)
        stored = agent.exemplar_ids().tolist()
        assert float(values[2].mean()) > 0.5
    else:
        stored = agent.rehearsal.manager.buffer.store.gather(torch.arange(12))["sample_ids"].tolist()
    assert len(set(stored)) == len(stored) == 12
    assert not held & set(stored)


def test_the_report_names_the_classes_that_a_task_is_tested_on(tmp_path):
    data = make_data(validate_on="test", scenario="blurry", blurriness=0.3)
    make_trainer(tmp_path).fit(make_agent("base", data, epochs_per_task=1), datamodule=data)
    report = json.loads((tmp_path / "report" / "accuracy_matrix.json").read_text())
    assert report["task_classes"] == [[0, 1], [2, 3], [4, 5]]


# -- online streams ----------------------------------------------------------------------------------------------------


class Validations(pl.Callback):
    def __init__(self):
        self.at = []

    def on_validation_start(self, trainer, module):
        self.at.append((trainer.global_step, len(trainer.val_dataloaders)))


def online(folder, interval, ckpt=None, callbacks=(), **options):
    # Tasks of 3, 5 and 1 batches.
    data = make_data(validate_on="test", increment=[2, 3, 1], batch_size=5)
    agent, seen = make_agent("base", data, epochs_per_task=1), Validations()
    trainer = make_trainer(folder, [seen, *callbacks], val_check_interval=interval, **options)
    trainer.fit(agent, datamodule=data, ckpt_path=ckpt)
    return agent, seen.at, trainer


def test_validation_every_n_steps_goes_on_over_tasks_of_any_length_and_changes_nothing(tmp_path):
    agent, at, trainer = online(tmp_path, 2, check_val_every_n_epoch=None, enable_checkpointing=False)
    assert trainer.global_step == 3 + 5 + 2
    assert at == [(2, 1), (4, 2), (6, 2), (8, 2), (10, 3)]
    without, none, _ = online(tmp_path, 100, check_val_every_n_epoch=None, enable_checkpointing=False)
    assert none == []
    assert torch.equal(weights(agent), weights(without))
    assert torch.equal(matrix(agent).nan_to_num(-1), matrix(without).nan_to_num(-1))


def test_a_resumed_online_run_validates_at_the_same_steps(tmp_path):
    saver = ModelCheckpoint(tmp_path / "steps", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    agent, at, trainer = online(tmp_path, 4, callbacks=[saver], check_val_every_n_epoch=None)
    assert [step for step, _ in at] == [4, 8]
    for step in range(2, trainer.global_step, 3):
        again, later, _ = online(
            tmp_path / "again", 4, tmp_path / "steps" / f"step={step}.ckpt", check_val_every_n_epoch=None
        )
        assert torch.equal(weights(again), weights(agent))
        # Step 8 is the last of task 1: what a checkpoint of an epoch's last step owes is done on resume.
        assert [s for s, _ in later] == [s for s, _ in at if s > step or s == step == 8], step


def test_validation_rarer_than_a_task_is_long_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigurationError, match=r"val_check_interval=3, but task 2 has only 2 .*every_n_epoch=null"):
        online(tmp_path, 3)
    with pytest.raises(ConfigurationError, match=r"val_check_interval=2, but task 0 has only 1 "):
        online(tmp_path, 2, limit_train_batches=1)
    _, at, _ = online(tmp_path, 2, enable_checkpointing=False)
    assert at == [(2, 1), (5, 2), (7, 2), (10, 3)]


def test_early_stopping_between_two_validations_of_an_epoch_ends_the_task(tmp_path):
    class Constant(pl.Callback):
        def __init__(self):
            self.steps = []

        def on_validation_epoch_end(self, trainer, module):
            module.log("constant", torch.tensor(1.0))

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.steps.append(module.clock.task_at(trainer.current_epoch))

    data = make_data(validate_on="test", batch_size=2)
    agent, constant = make_agent("base", data), Constant()
    stop = EarlyStopping("constant", patience=1, check_on_train_epoch_end=False)
    trainer = make_trainer(tmp_path, [constant, stop], val_check_interval=2, enable_checkpointing=False)
    trainer.fit(agent, datamodule=data)
    assert constant.steps == [0] * 4 + [1] * 4 + [2] * 4  # seven batches an epoch, two epochs a task, were planned
    assert torch.isfinite(matrix(agent)).sum() == 6


# -- scenarios of continuum --------------------------------------------------------------------------------------------


def test_a_stream_with_random_transformations_resumes_from_every_step(tmp_path):
    scenario = {"class_path": "continuum.scenarios.Rotations", "init_args": {"list_degrees": [0, [10, 80]]}}

    def fit(folder, ckpt=None, callbacks=()):
        data = make_data(scenario=scenario, batch_size=21)
        agent = make_agent("icarl", data, seed=0 if ckpt is None else 5)
        trainer = make_trainer(folder, callbacks)
        trainer.fit(agent, datamodule=data, ckpt_path=ckpt)
        return agent, trainer.global_step

    saver = ModelCheckpoint(tmp_path / "steps", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    agent, last = fit(tmp_path, callbacks=[saver])
    # The second task has other samples than the first, and the exemplars of that beside them.
    assert last == 2 * 2 + 2 * 3
    for step in (3, 4, 7):
        again, _ = fit(tmp_path / "again", tmp_path / "steps" / f"step={step}.ckpt")
        assert torch.equal(weights(again), weights(agent)), step
        assert torch.equal(matrix(again).nan_to_num(-1), matrix(agent).nan_to_num(-1)), step
