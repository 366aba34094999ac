"""What a checkpoint records of its run: tasks seen and the method; agents with two memories or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from dcl_lightning import Rehearsal, RehearsalConfig, agents, cli
from dcl_lightning.agents import ER, NIL, ICaRL, short_names
from dcl_lightning.backbones import MLP
from dcl_lightning.errors import ConfigurationError
from tests.conformance.small_stream import make_agent, make_data, make_trainer, weights

NUM_TASKS = 3


def hits_of(agent: pl.LightningModule, data: Any, tasks: int) -> float:
    """Return the accuracy over the test sets of the first tasks, counted by hand."""
    data.setup()
    which = data.stream.test_parts < tasks
    agent.eval()
    with torch.no_grad():
        scores = agent.mask_unseen(agent(data.test_inputs[which]))
    return float((scores.argmax(1) == data.test_targets[which]).float().mean())


def found_by(evaluate: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
    """Return what an evaluation finds, of all loaders together."""
    return {name: value for part in evaluate(*args, verbose=False, **kwargs) for name, value in part.items()}


def fitted(kind: str, folder: Path, **kwargs: Any) -> tuple[pl.LightningModule, Any, Path]:
    data = make_data(**kwargs)
    agent = make_agent(kind, data, epochs_per_task=1)
    trainer = make_trainer(folder, [ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")])
    trainer.fit(agent, datamodule=data)
    return agent, data, folder


@pytest.mark.parametrize(("kind", "boundaries"), [("base", "known"), ("base", "hidden"), ("icarl", "known")])
def test_validation_of_a_checkpoint_is_of_all_tasks_that_it_has_seen(
    kind: str, boundaries: str, tmp_path: Path
) -> None:
    trained, _, _ = fitted(kind, tmp_path, boundaries=boundaries)
    steps_of_a_task = 3  # the first: 14 samples in batches of five
    for step, seen in ((1, 1), (steps_of_a_task + 1, 2), (trained.trainer.global_step, NUM_TASKS)):
        data = make_data(boundaries=boundaries)
        agent = make_agent(kind, data, epochs_per_task=1)
        trainer = make_trainer(tmp_path)
        found = found_by(trainer.validate, agent, data, ckpt_path=tmp_path / f"step={step}.ckpt")
        tasks = {name for name in found if name.startswith("val/acc_task_")}
        assert tasks == {f"val/acc_task_{t}" for t in range(seen)}
        if kind == "base":
            assert found["val/acc"] == pytest.approx(hits_of(agent, data, seen))
        tested = found_by(trainer.test, agent, data)
        assert len([name for name in tested if name.startswith("test/acc_task_")]) == NUM_TASKS
        if seen == NUM_TASKS:
            assert tested["test/acc"] == pytest.approx(found["val/acc"])


def test_an_agent_that_was_loaded_knows_it_without_its_data_module(tmp_path: Path) -> None:
    fitted("base", tmp_path)
    agent = type(make_agent("base", make_data())).load_from_checkpoint(tmp_path / "step=4.ckpt", backbone=MLP([8]))
    found = found_by(make_trainer(tmp_path).validate, agent, make_data())
    assert {name for name in found if "task_" in name} == {"val/acc_task_0", "val/acc_task_1"}


def test_validation_after_a_fit_and_of_another_agent_on_its_data(tmp_path: Path) -> None:
    agent, data, _ = fitted("base", tmp_path)
    trainer = make_trainer(tmp_path)
    found = found_by(trainer.validate, agent, data)
    assert found["val/acc"] == pytest.approx(hits_of(agent, data, NUM_TASKS))
    other = found_by(trainer.validate, make_agent("base", data), data)
    assert len([name for name in other if "task_" in name]) == NUM_TASKS
    agent.tasks_seen = 2  # as one that was loaded from amid task 1
    found = found_by(trainer.validate, agent, data)
    assert found["val/acc"] == pytest.approx(hits_of(agent, data, 2))


def test_sanity_checking_is_of_the_first_task(tmp_path: Path) -> None:
    data = make_data(validate_on="test")
    seen: list[int] = []

    class Spy(pl.Callback):
        def on_sanity_check_end(self, trainer: pl.Trainer, *_: Any) -> None:
            seen.append(len(trainer.val_dataloaders))

    make_trainer(tmp_path, [Spy()], num_sanity_val_steps=1, max_steps=1).fit(make_agent("base", data), datamodule=data)
    assert seen == [1]


def test_hold_outs_are_those_of_the_run_and_not_of_another_seed(tmp_path: Path) -> None:
    _, data, _ = fitted("base", tmp_path, val_ratio=0.3)
    held = data.stream.held.clone()
    other = make_data(val_ratio=0.3, seed=1)
    other.setup()
    assert not torch.equal(other.stream.held, held)
    make_trainer(tmp_path).validate(make_agent("base", other), other, ckpt_path=tmp_path / "step=6.ckpt", verbose=False)
    assert torch.equal(other.stream.held, held)


def test_another_order_of_classes_is_refused_in_evaluation_too(tmp_path: Path) -> None:
    fitted("base", tmp_path)
    other = make_data(class_order=[5, 4, 3, 2, 1, 0])
    for evaluate in ("validate", "test", "predict"):
        with pytest.raises(ConfigurationError, match="class_order"):
            getattr(make_trainer(tmp_path), evaluate)(
                make_agent("base", other), datamodule=other, ckpt_path=tmp_path / "step=9.ckpt"
            )


@pytest.mark.parametrize("evaluate", ["validate", "test", "predict"])
def test_random_weights_are_warned_of_in_one_line(evaluate: str, tmp_path: Path) -> None:
    data = make_data()
    agent = make_agent("base", data, epochs_per_task=1)
    run = getattr(make_trainer(tmp_path), evaluate)
    with pytest.warns(UserWarning, match=r"^FineTuning was trained on no task .* give --ckpt_path$"):
        run(agent, datamodule=data)
    make_trainer(tmp_path, max_steps=1).fit(agent, datamodule=data)
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was trained on no task")
        run(agent, datamodule=data)


# -- one identity --------------------------------------------------------------------------------------

SHORT = [name for name in short_names.__all__ if name not in ("joint", "cumulative")]


def class_of(name: str) -> type[pl.LightningModule]:
    return getattr(agents, getattr(short_names, name).method())


@pytest.mark.parametrize("name", SHORT)
def test_a_short_name_and_its_class_go_on_with_each_others_checkpoints(name: str, tmp_path: Path) -> None:
    short, method = getattr(short_names, name), class_of(name)
    assert method in short.__mro__
    assert short.method() == method.method() == method.__name__

    def make(kind: type[pl.LightningModule], data: Any) -> pl.LightningModule:
        kwargs: dict[str, Any] = {}
        if hasattr(short(MLP([8]), 6, input_spec=data.input_spec), "rehearsal") and not issubclass(kind, ICaRL):
            # The same values: of the class they have to be said where the short name stands for others.
            kwargs["rehearsal"] = short(MLP([8]), 6, input_spec=data.input_spec).rehearsal.config
        return kind(MLP([8]), 6, input_spec=data.input_spec, **kwargs)

    for first, second in ((short, method), (method, short)):
        data = make_data()
        saver = ModelCheckpoint(tmp_path / first.__name__, save_last=True)
        make_trainer(tmp_path, [saver], max_steps=2).fit(make(first, data), datamodule=data)
        data = make_data()
        agent = make(second, data)
        make_trainer(tmp_path, max_steps=4).fit(agent, datamodule=data, ckpt_path=saver.last_model_path)
        assert agent.trainer.global_step == 4


def test_another_method_is_refused_and_a_subclass_is_one(tmp_path: Path) -> None:
    class Mine(ER):
        pass

    data = make_data()
    saver = ModelCheckpoint(tmp_path, save_last=True)
    make_trainer(tmp_path, [saver], max_steps=2).fit(
        short_names.er(MLP([8]), 6, input_spec=data.input_spec), datamodule=data
    )
    with pytest.raises(ConfigurationError, match="had the agent ER, this one has Mine"):
        make_trainer(tmp_path).fit(
            Mine(MLP([8]), 6, input_spec=data.input_spec), datamodule=make_data(), ckpt_path=saver.last_model_path
        )


# -- one memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "own", "theirs", "words"),
    [
        (NIL, {"buffer_size": 200}, {"buffer_size": 50}, "buffer_size=200 and buffer_size=50"),
        (ER, {"buffer_size": 200}, {"num_representatives": 5}, "buffer_size=200 and num_representatives=5"),
        (ER, {"policy": "reservoir"}, {"policy": "fifo"}, "policy=reservoir and policy=fifo"),
        (ER, {}, {"policy": "nil", "weighting": "nil"}, "weighting=nil: agent ER has weighting=none"),
        (short_names.nil_v1, {}, {"execution": "inline"}, "execution=inline: agent nil_v1 has execution=blocking"),
        (NIL, {"buffer_size": 50}, {"buffer_size": 50}, ""),
        (NIL, {}, {"buffer_size": 50}, ""),
        (short_names.nil_v1, {}, {"buffer_size": 50}, ""),
        (ER, {"policy": "fifo"}, {"buffer_size": 50}, ""),
    ],
)
def test_a_rehearsal_of_the_users_that_contradicts_the_agents_memory_is_refused(
    kind: type[pl.LightningModule], own: dict, theirs: dict, words: str, tmp_path: Path
) -> None:
    data = make_data()
    agent = kind(MLP([8]), 6, RehearsalConfig(**own), input_spec=data.input_spec)
    callback = Rehearsal(RehearsalConfig(**theirs))
    trainer = make_trainer(tmp_path, [callback], max_steps=1, enable_checkpointing=False)
    if words:
        with pytest.raises(ConfigurationError, match=words):
            trainer.fit(agent, datamodule=data)
        assert trainer.global_step == 0
    else:
        trainer.fit(agent, datamodule=data)
        assert agent.rehearsal is callback
        assert sum(isinstance(c, Rehearsal) for c in trainer.callbacks) == 1
        whole = kind(MLP([8]), 6, own | theirs, input_spec=data.input_spec)
        assert callback.config == whole.rehearsal.config
        assert agent.hparams == whole.hparams


def test_two_memories_on_the_command_line_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["fit", "--model=nil", "--model.rehearsal.buffer_size=200", "--trainer.accelerator=cpu"]
    args += ["--trainer.callbacks+=Rehearsal", "--trainer.callbacks.config.buffer_size=50"]
    assert cli.main(args) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "buffer_size=200" in error
    assert "buffer_size=50" in error
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_however_its_memory_is_said(tmp_path: Path) -> None:
    def run(rehearsal: Any, *callbacks: pl.Callback, kind: Any = ER, **kwargs: Any) -> torch.Tensor:
        data = make_data()
        pl.seed_everything(0)
        agent = kind(MLP([8]), 6, rehearsal, input_spec=data.input_spec)
        make_trainer(tmp_path, callbacks, limit_val_batches=0).fit(agent, datamodule=data, **kwargs)
        return weights(agent)

    given = {"buffer_size": 12, "num_samples": 3}
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole, path = run(RehearsalConfig(**given), saver), tmp_path / "step=4.ckpt"
    for rehearsal, callbacks, kind in (
        (given, [], ER),
        (given, [], short_names.er),
        (RehearsalConfig(**given, policy="reservoir", weighting="none", execution="blocking"), [], ER),
        (ER(MLP([8], 1, 4), 6, given).rehearsal.config, [], ER),
        (None, [Rehearsal(RehearsalConfig(**given))], ER),
        ({"num_samples": 3}, [Rehearsal({"buffer_size": 12})], ER),
    ):
        assert torch.equal(run(rehearsal, *callbacks, kind=kind, ckpt_path=path), whole), (rehearsal, callbacks)
    for other, words in (
        ({"policy": "fifo"}, "policy=fifo: .* had reservoir"),
        ({"row_format": "index"}, "had inputs"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            run(given | other, ckpt_path=path)


def test_what_a_checkpoint_says_of_its_memory_makes_the_same_agent(tmp_path: Path) -> None:
    data = make_data()
    agent = short_names.derpp_task_end(MLP([8]), 6, {"num_samples": 3}, input_spec=data.input_spec)
    saver = ModelCheckpoint(tmp_path, save_last=True)
    make_trainer(tmp_path, [saver, Rehearsal({"buffer_size": 12})], max_steps=1).fit(agent, datamodule=data)
    checkpoint = torch.load(saver.last_model_path, weights_only=True)
    said = checkpoint["hyper_parameters"]["rehearsal"]
    assert (said["buffer_size"], said["num_samples"], said["policy"]) == (12, 3, "class_balanced")
    assert checkpoint["dcl_lightning"]["memory"]["config"] == said
    again = short_names.derpp_task_end.load_from_checkpoint(saver.last_model_path, backbone=MLP([8]))
    assert again.rehearsal.config == agent.rehearsal.config


def test_a_rehearsal_takes_each_agents_own_values_and_beside_another_module_those_of_plain_replay(
    tmp_path: Path,
) -> None:
    class Plain(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 6))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self.net(batch.inputs), batch.targets)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    memory = Rehearsal({"buffer_size": 12})
    for module, words in (
        (NIL(MLP([8], 1, 4), 6), ("nil", "nil", "mean")),
        (Plain(), ("reservoir", "none", "mean")),
        (short_names.gdumb(MLP([8], 1, 4), 6), ("greedy", "none", "sum")),
        (Plain(), ("reservoir", "none", "mean")),
    ):
        trainer = make_trainer(tmp_path, [memory], max_steps=1, enable_checkpointing=False, limit_val_batches=0)
        trainer.fit(module, datamodule=make_data(scenario="none"))
        assert (memory.config.policy, memory.config.weighting, memory.config.loss) == words
        assert len(memory.manager.buffer) > 0


def test_another_configuration_can_be_given_to_an_agents_memory_between_fits(tmp_path: Path) -> None:
    data = make_data()
    agent = short_names.gdumb(MLP([8]), 6, {"num_samples": 3}, input_spec=data.input_spec)
    for given, wanted in (({"buffer_size": 8}, (8, 3, "greedy")), ({"num_samples": 4}, (None, 4, "greedy"))):
        agent.rehearsal.config = given
        trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0)
        trainer.fit(agent, datamodule=data)
        config = agent.rehearsal.config
        assert (config.buffer_size, config.num_samples, config.policy) == wanted
        assert agent.hparams["rehearsal"]["num_samples"] == wanted[1]
    agent.rehearsal.config = {"policy": "fifo", "loss": "mean"}
    with pytest.raises(ConfigurationError, match="loss=mean: agent gdumb has loss=sum"):
        make_trainer(tmp_path).fit(agent, datamodule=data)
