"""Agents and trainers of a draw, and one recorded fit: its steps, its memory, and its side effects."""

from __future__ import annotations

import math
import os
import threading
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from torch import Tensor, nn

from dcl_lightning import ContinualDataModule, TaskReport
from dcl_lightning.agents import short_names
from tests.conformance.lattice.draws import ICARL, MEMORY_AXES, OWN_AXES, REHEARSING, Draw, value_of
from tests.conformance.lattice.truth import Truth


class _Network(nn.Module):
    """A small backbone with a part that can stay in evaluation mode, and one that can be frozen."""

    feature_dim = 6

    def __init__(self, side: int) -> None:
        super().__init__()
        self.first = nn.Linear(3 * side * side, 8)
        self.norm = nn.BatchNorm1d(8, eps=0.1)
        self.second = nn.Linear(8, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs.flatten(1))
        # In training it would need two rows; only a part that stays in evaluation mode takes part.
        hidden = hidden if self.norm.training else self.norm(hidden)
        return self.second(hidden.relu()).relu()


def make_agent(drawn: Draw, truth: Truth, folder: Path, seed: int = 0) -> Any:
    """Return a fresh agent."""

    def get(axis: str) -> Any:
        return value_of(drawn, axis)

    torch.manual_seed(seed)
    name = get("agent")
    options: dict[str, Any] = {
        "epochs_per_task": get("epochs_per_task"), "lr": 0.05, "momentum": get("momentum"),
        "optimizer_reset": get("optimizer_reset"), "task_aware": get("task_aware"),
        "future_tasks": get("future_tasks"),
    }  # fmt: skip
    options |= {axis: drawn[axis] for axis in OWN_AXES if axis in drawn}
    if get("epochs_per_task") == "unequal":
        options["epochs_per_task"] = [2, *[1] * (truth.num_tasks - 1)]
    if get("optimizer") == "adam":
        # Of float16 the default epsilon is 0.
        options["optimizer"] = lambda parameters: torch.optim.Adam(parameters, lr=0.05, eps=1e-4)
    if get("schedule") == "milestones":
        options |= {"milestones": [1], "gamma": 0.5}
    elif get("schedule") == "warmup_epochs":
        options["warmup_epochs"] = 0.5
    if name in REHEARSING | ICARL:
        memory = dict(get("size"))
        given = {axis: get(axis) for axis in MEMORY_AXES if get(axis) is not None}
        if given.get("storage") == "folder":
            given["storage"] = str(folder / "rows")
        if name in REHEARSING:
            memory |= given
        else:
            options |= {k: given[k] for k in ("execution", "num_samples") if k in given}
            options |= {k: get(k) for k in ("exemplars", "selection") if get(k) is not None}
        options["rehearsal"] = memory
    if name == "mir":
        options["num_rehearsed"] = get("num_rehearsed")
    if name == "ranpac":
        options |= {"projection_dim": 8, "first_session": bool(get("seed") % 2)}
    agent = getattr(short_names, name)(_Network(truth.side), truth.num_classes, **options)
    if get("part") == "frozen":
        agent.backbone.first.requires_grad_(False)
    elif get("part") == "in_evaluation_mode":
        agent.backbone.norm.eval()
    return agent


class _Stop(pl.Callback):
    """Lets the time of a ``max_time`` be over after some steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        for timer in trainer.callbacks:
            if isinstance(timer, Timer) and trainer.global_step + 1 >= self.step:
                timer._offset = 1e9


class _NoReport(TaskReport):
    """Stands in the report's place and writes none."""

    def _write_once(self, trainer: pl.Trainer, agent: pl.LightningModule) -> None:
        pass


def make_trainer(drawn: Draw, folder: Path, callbacks: list[pl.Callback], reports: bool = False,
                 **more: Any) -> pl.Trainer:  # fmt: skip
    """Return a fresh trainer; what it reports is seen in no other place, so that most fits go without."""

    def get(axis: str) -> Any:
        return value_of(drawn, axis)

    options: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "precision": get("precision"),
        "accumulate_grad_batches": get("accumulate_grad_batches"), "limit_train_batches": get("limit_train_batches"),
        "num_sanity_val_steps": get("sanity"), "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": folder, "enable_checkpointing": False,
    }  # fmt: skip
    if get("clipping") is not None:
        options |= {"gradient_clip_val": 0.5 if get("clipping") == "norm" else 0.01}
        options |= {"gradient_clip_algorithm": get("clipping")}
    options |= {
        "epoch": {}, "every_second_epoch": {"check_val_every_n_epoch": 2}, "none": {"limit_val_batches": 0},
        "every_second_batch": {"val_check_interval": 2}, "half_epoch": {"val_check_interval": 0.5},
        "across_epochs": {"val_check_interval": 3, "check_val_every_n_epoch": None},
    }[get("validation")]  # fmt: skip
    limit, step = get("limit"), 2 + get("seed") % 7
    callbacks = list(callbacks)
    if limit == "max_steps":
        options["max_steps"] = step
    elif limit == "max_time":
        options["max_time"] = timedelta(days=1)
        callbacks.append(_Stop(step))
    # Stops when the loss falls, which it does sooner or later; at once; at the first look.
    stopping = {"patience": {"mode": "max", "patience": 1}}.get(get("stopping"), {"stopping_threshold": 1e9})
    if get("stopping") is not None:
        callbacks.append(EarlyStopping("val/loss", check_on_train_epoch_end=False, **stopping))
    if any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        options["enable_checkpointing"] = True
    callbacks.append(TaskReport(pictures=False) if reports else _NoReport(pictures=False))
    return pl.Trainer(callbacks=callbacks, **(options | more))


def make_saver(drawn: Draw, folder: Path) -> ModelCheckpoint:
    """Return what keeps the checkpoints of all steps, or of all epochs."""
    often: dict[str, Any] = {"every_n_train_steps": 1}
    if value_of(drawn, "checkpoint") == "epochs":
        # Not at a validation amid accumulated batches, whose gradients Lightning does not keep.
        often = {"every_n_epochs": 1, "save_on_train_epoch_end": value_of(drawn, "accumulate_grad_batches") > 1 or None}
    return ModelCheckpoint(folder, "{step}", save_top_k=-1, **often)


@dataclass
class Memory:
    """Rows in a memory: what their columns say, and the ids that are written into their inputs, if these are stored."""

    ids: Tensor
    labels: Tensor
    written: Tensor | None
    columns: dict[str, Tensor]
    capacity: int


@dataclass
class Step:
    """What one training step of one worker got."""

    epoch: int
    task: int
    num_new: int
    ids: Tensor
    labels: Tensor
    task_ids: Tensor
    draw_ids: Tensor
    weights: Tensor
    normalizer: float
    written: Tensor
    inputs: Tensor
    logits: Tensor | None
    memory: Memory | None
    modes: list[str]
    loss: float = math.nan
    new_logits: Tensor | None = None

    @property
    def new(self) -> slice:
        return slice(self.num_new)

    @property
    def old(self) -> slice:
        return slice(self.num_new, None)


@dataclass
class Fit:
    """One call of ``Trainer.fit``: its steps, and how it ended."""

    steps: list[Step] = field(default_factory=list)
    error: BaseException | None = None
    agent: Any = None
    trainer: Any = None
    state: dict[str, Tensor] = field(default_factory=dict)
    matrix: Tensor | None = None
    memory: Memory | None = None
    exemplars: dict[int, Tensor] | None = None
    left: list[str] = field(default_factory=list)


def memory_of(agent: Any, truth: Truth) -> Memory | None:
    """Return what an agent's memory holds, row by row."""
    rehearsal = getattr(agent, "rehearsal", None)
    manager = getattr(rehearsal, "manager", None)
    if manager is None:
        return None
    buffer = manager.buffer
    rows = buffer.store.gather(buffer.slots_at(torch.arange(len(buffer))))
    written = truth.ids_of(rows["inputs"]) if "inputs" in rows else None
    return Memory(rows["sample_ids"].clone(), rows["targets"].clone(), written, dict(rows), buffer.store.capacity)


class Recorder(pl.Callback):
    """Looks at each batch as the network gets it, and at the memory while nothing works on it."""

    def __init__(self, truth: Truth, fit: Fit, modes: dict[str, bool]) -> None:
        self.truth, self.fit, self.modes = truth, fit, modes

    def on_train_batch_start(self, trainer: pl.Trainer, agent: Any, batch: Any, batch_idx: int) -> None:
        config = getattr(getattr(agent, "rehearsal", None), "config", None)
        calm = config is not None and config.execution != "nonblocking"
        calm = calm and (config.scope == "local" or config.execution == "inline")
        self.fit.steps.append(
            Step(
                epoch=trainer.current_epoch,
                task=agent.clock.task_at(trainer.current_epoch),
                num_new=batch.num_new,
                ids=batch.sample_ids.clone(),
                labels=batch.targets.clone(),
                task_ids=batch.task_ids.clone(),
                draw_ids=batch.draw_ids.clone(),
                weights=batch.weights.clone(),
                normalizer=float(batch.normalizer),
                written=self.truth.ids_of(batch.inputs),
                inputs=batch.inputs.clone(),
                logits=batch.rehearsed["logits"].clone() if "logits" in batch.rehearsed else None,
                memory=memory_of(agent, self.truth) if calm else None,
                modes=[name for name, m in agent.named_modules() if m.training != self.modes[name]],
            )
        )

    # Not after the batch: for a callback that looks there, an agent logs each step.
    def on_before_backward(self, trainer: pl.Trainer, agent: Any, loss: Tensor) -> None:
        step = self.fit.steps[-1]
        step.loss = float(loss)
        if hasattr(agent, "columns_of_step"):
            step.new_logits = agent.columns_of_step()["logits"].float().clone()


def _modes(agent: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in agent.named_modules()}


def run_fit(
    drawn: Draw,
    truth: Truth,
    folder: Path,
    data: ContinualDataModule,
    agent: Any,
    saver: ModelCheckpoint | None = None,
    ckpt: Path | None = None,
    **more: Any,
) -> Fit:
    """Fit, and note what it got and what it left."""
    fit = Fit(agent=agent)
    modes, frozen = _modes(agent), [p.requires_grad for p in agent.parameters()]
    environment = dict(os.environ)
    threads = set(threading.enumerate())
    recorder = Recorder(truth, fit, modes)
    try:
        callbacks = [recorder, *([saver] if saver else [])]
        trainer = fit.trainer = make_trainer(drawn, folder, callbacks, reports=saver is not None, **more)
        callbacks = list(trainer.callbacks)
        trainer.fit(agent, datamodule=data, ckpt_path=None if ckpt is None else str(ckpt))
    except (Exception, SystemExit) as error:
        fit.error = error
        if fit.trainer is None:
            return fit
    left = fit.left
    if _modes(agent) != modes:
        left.append(f"modes of {[n for n, m in agent.named_modules() if m.training != modes[n]]}")
    if [p.requires_grad for p in agent.parameters()] != frozen:
        left.append("requires_grad")
    if list(trainer.callbacks) != callbacks:
        names = [[type(c).__name__ for c in found] for found in (callbacks, trainer.callbacks)]
        left.append(f"callbacks {names[0]} became {names[1]}")
    if dict(os.environ) != environment:
        left.append(f"environment {sorted(set(os.environ.items()) ^ set(environment.items()))}")
    new = [t.name for t in threading.enumerate() if t not in threads and t.name.startswith("rehearsal")]
    if new:
        left.append(f"threads {new}")
    if fit.error is None:
        fit.state = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
        fit.matrix = agent.clock.matrix.compute()
        fit.memory = memory_of(agent, truth)
        if hasattr(agent, "exemplars"):
            fit.exemplars = {y: ids.clone() for y, ids in agent.exemplars.items()}
    return fit
