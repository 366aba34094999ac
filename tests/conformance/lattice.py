"""Whole configurations drawn at random, and what has to hold of each: the promises of this package in one place.

A *draw* has a value for each axis of ``SPACE``. It is either refused before the first step, in one line that names what
does not go together, or all of these hold:

- each row that is trained on or stored is a sample of the data set: its input, its label and its id;
- what is rehearsed was met before, and is of the tasks from which the configuration lets draw;
- the memory keeps to its budget and to the definition of its policy;
- a run that is resumed, from any step, ends bit for bit as the one that was not interrupted;
- a second agent, fitted on the same data module, and the first one fitted again, are trained as on a fresh one;
- modes of modules, ``requires_grad``, the trainer's callbacks, the data module and the environment stay as they were.

What is true is computed from ``Truth``: the samples' ids are written into their inputs, so that labels and tasks follow
from what the network gets, whatever the memory's own books say.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from dcl_lightning import ContinualDataModule, TaskReport
from dcl_lightning.agents import short_names
from dcl_lightning.errors import ConfigurationError

Draw = dict[str, Any]

# -- the space ---------------------------------------------------------------------------------------------------------

# Each axis with its values, the default first. None leaves the key out.
_AGENTS = ("base", *(name for name in short_names.__all__ if name != "base"))
_REHEARSING = {name for name in _AGENTS if name.startswith("nil") or hasattr(getattr(short_names, name), "memory")}
_ICARL = {"icarl", "icarl_v1"}

SPACE: dict[str, tuple[Any, ...]] = {
    # agent
    "agent": _AGENTS,
    "epochs_per_task": (1, 2, "unequal"),
    "momentum": (0.0, 0.9),
    "optimizer": (None, "adam"),
    "optimizer_reset": (True, False),
    "schedule": (None, "milestones", "warmup_epochs"),
    "train_classes": ("all", "seen"),
    "task_aware": (False, True),
    "future_tasks": (False, True),
    "part": ("trained", "frozen", "in_evaluation_mode"),
    # memory
    "size": ({"buffer_size": 9}, {"buffer_size": 16}, {"num_representatives": 2}, {"rehearsal_ratio": 0.3}),
    "num_samples": (3, 1, 5),
    "num_candidates": (None, 2, 4),
    "policy": (None, "nil", "class_balanced", "reservoir", "greedy", "fifo"),
    "quota": (None, "fixed", "adaptive"),
    "update": (None, "step", "task_end"),
    "draw_from": (None, "seen", "past"),
    "loss": (None, "mean", "sum"),
    "weighting": (None, "nil", "none"),
    "scope": (None, "local", "global"),
    "execution": (None, "inline", "blocking", "nonblocking"),
    "prefetch": (None, "draw", "device", "batch"),
    "row_format": (None, "inputs", "index", "augmented"),
    "storage": (None, "cpu", "folder"),
    "exemplars": (None, "union", "per_step"),
    "selection": (None, "herding", "nearest"),
    # trainer
    "precision": ("32-true", "64-true", "bf16-mixed", "bf16-true", "16-true"),
    "accumulate_grad_batches": (1, 2, 3),
    "clipping": (None, "norm", "value"),
    "stopping": (None, "patience", "threshold", "amid_an_epoch"),
    "limit": (None, "max_steps", "max_time"),
    "limit_train_batches": (1.0, 2, 0.5),
    "validation": ("epoch", "every_second_epoch", "every_second_batch", "half_epoch", "across_epochs", "none"),
    "sanity": (0, 2),
    "checkpoint": ("steps", "epochs"),
    "resume": ("step", "task_end", "after_task_end", "last"),
    # data
    "scenario": ("class", "domain", "blurry", "given"),
    "boundaries": ("known", "hidden"),
    "num_classes": (4, 6),
    "num_tasks": (2, 3),
    "sizes": ("equal", "unequal"),
    "one_row_left": (False, True),
    "inputs": ("uint8", "float"),
    "augment": (False, True),
    "batch_size": (5, 3, 8),
    "val_ratio": (0.0, 0.25),
    "sharding": ("epoch", "fixed"),
    "concatenate_tasksets": (False, True),
    # afterwards
    "again": ("new", "same"),
    "second": _AGENTS,
    "seed": tuple(range(1000)),
}

_MEMORY = ("num_samples", "num_candidates", "policy", "quota", "update", "draw_from", "loss", "weighting", "scope",
           "execution", "prefetch", "row_format", "storage")  # fmt: skip

# How often an axis leaves its default; the others do so half of the time, those without a default always.
_OFTEN = {
    "agent": 1.0, "second": 1.0, "seed": 1.0, "optimizer": 0.15, "policy": 0.4, "quota": 0.3, "update": 0.3,
    "draw_from": 0.2, "loss": 0.2, "weighting": 0.2, "scope": 0.25, "prefetch": 0.35, "row_format": 0.4,
    "precision": 0.4, "num_candidates": 0.3, "schedule": 0.25, "train_classes": 0.3, "task_aware": 0.2,
    "future_tasks": 0.2, "part": 0.3,
    "stopping": 0.3, "limit": 0.2, "limit_train_batches": 0.25, "validation": 0.5, "sanity": 0.2, "scenario": 0.4,
    "boundaries": 0.1, "concatenate_tasksets": 0.03, "checkpoint": 0.2, "augment": 0.25, "resume": 0.7, "size": 0.6,
    "epochs_per_task": 0.35,
}  # fmt: skip

# By which words a message names an axis that cannot be recognised by its own name.
_WORDS = {
    "agent": ("agent ",), "clipping": ("gradient_clip",), "stopping": ("EarlyStopping",),
    "validation": ("val_check_interval", "check_val_every_n_epoch"), "limit": ("max_steps", "max_time"),
    "size": ("buffer_size", "num_representatives", "rehearsal_ratio"),
    "schedule": ("milestones", "warmup_epochs"), "part": ("requires_grad", "frozen"),
}  # fmt: skip


def draw(seed: int, number: int) -> Draw:
    """Return a draw: the values that differ from the defaults, and the agent."""
    rng = np.random.default_rng((seed, number))
    found: Draw = {}
    for axis, values in SPACE.items():
        leaves = rng.random() < _OFTEN.get(axis, 0.5)
        value = values[int(rng.integers(0 if _OFTEN.get(axis) == 1.0 else 1, len(values)))]
        if leaves and value != values[0]:
            found[axis] = value
    agent = found.setdefault("agent", "base")
    if agent == "joint" and rng.random() < 0.9:
        found["scenario"] = "none"
    if agent == "cumulative" and rng.random() < 0.9:
        found["concatenate_tasksets"] = True
    # Contradictions that would come too often are made rarer here; some are left, to be refused.
    if rng.random() < 0.9:
        if "optimizer" in found:
            found.pop("momentum", None)
        if "stopping" in found:
            found["val_ratio"] = 0.25
            found.pop("boundaries", None)
            if found["stopping"] == "amid_an_epoch":
                found["validation"] = "every_second_batch"
        if found.get("prefetch") not in (None, "sample") and found.get("execution") in (None, "inline"):
            found["execution"] = "blocking"
        if found.get("policy") in ("reservoir", "greedy"):
            found.pop("num_candidates", None)
            if agent.startswith("nil"):
                found["weighting"] = "none"
        if found.get("scope") == "global" and found.get("quota") == "adaptive":
            found.pop("quota")
        if found.get("row_format") == "augmented":
            found.pop("update", None)
        if found.get("validation") == "every_second_batch":
            found.pop("limit_train_batches", None)
    if rng.random() < 0.7:
        kind = getattr(short_names, agent)
        for axis, value in getattr(kind, "required", {}).items():  # another method's memory
            if found.get(axis, value) != value:
                found.pop(axis)
        if agent in _ICARL and found.get("execution") == "nonblocking":
            found.pop("execution")
        own = getattr(getattr(kind, "memory", None), "policy", None)
        if found.get("policy", own) in ("reservoir", "greedy"):
            found.pop("num_candidates", None)
    applies = _applicable(agent)
    return {axis: value for axis, value in found.items() if applies(axis)}


def _applicable(agent: str) -> Callable[[str], bool]:
    def applies(axis: str) -> bool:
        if axis in ("exemplars", "selection"):
            return agent in _ICARL
        if axis in ("size", "num_samples", "execution"):
            return agent in _REHEARSING | _ICARL
        return axis not in _MEMORY or agent in _REHEARSING

    return applies


def value_of(drawn: Draw, axis: str) -> Any:
    """Return the value of an axis."""
    return drawn.get(axis, SPACE[axis][0])


def recipe(drawn: Draw, file: str = "tests/conformance/test_lattice.py") -> str:
    """Return the line that repeats a draw alone."""
    return f"LATTICE_DRAW='{json.dumps(drawn)}' python -m pytest {file}"


# -- the data, and the truth about them --------------------------------------------------------------------------------

_DIGIT = 8  # an id is written with a digit in each of the three channels


class Truth:
    """A small data set whose inputs tell the samples' ids, and what follows of them.

    Attributes:
        inputs: ``(n, 3, side, side)`` uint8 or float32, the same within each channel.
        labels: ``(n,)`` int64; model ids are the same, as classes come in ascending order.
        tasks: ``(n,)`` int64 where the scenario is ``class``, ``given`` or ``none``, so that it follows from the
            arrays; None else.
    """

    def __init__(self, drawn: Draw) -> None:
        def get(axis: str) -> Any:
            return value_of(drawn, axis)

        rng = np.random.default_rng(get("seed"))
        self.num_classes, num_tasks, batch = get("num_classes"), get("num_tasks"), get("batch_size")
        self.scenario = get("scenario")
        per_task = self.num_classes // num_tasks
        home = np.minimum(np.arange(self.num_classes) // per_task, num_tasks - 1)
        equal = get("sizes") == "equal"
        counts = np.full(self.num_classes, 7) if equal else rng.integers(4, 11, self.num_classes)
        if get("one_row_left"):
            for task in range(num_tasks):
                counts[np.flatnonzero(home == task)[-1]] += (1 - counts[home == task].sum()) % batch
        self.labels = torch.from_numpy(rng.permutation(np.repeat(np.arange(self.num_classes), counts)))
        ids = torch.arange(len(self.labels))
        side = 9 if get("augment") else 2
        self.side, self.batch_size = side, batch
        self.inputs = self._written(ids, get("inputs"))
        self.increment = [int((home == task).sum()) for task in range(num_tasks)]
        self.num_tasks = 1 if self.scenario == "none" else num_tasks
        self.tasks: Tensor | None = None
        if self.scenario == "class":
            self.tasks = torch.from_numpy(home)[self.labels]
        elif self.scenario == "given":
            # Classes come again: each task has all of them but one.
            self.tasks = torch.from_numpy(rng.integers(0, num_tasks, len(ids)))
            for task in range(num_tasks):
                self.tasks[task] = task
        elif self.scenario == "none":
            self.tasks = torch.zeros_like(self.labels)
        tests = torch.arange(2 * self.num_classes)
        self.test_labels = tests % self.num_classes
        self.test_inputs = self._written(tests, get("inputs"))
        self.test_tasks = torch.arange(len(tests)) % num_tasks

    def _written(self, ids: Tensor, kind: str) -> Tensor:
        digits = torch.stack([ids // _DIGIT**place % _DIGIT for place in range(3)], 1)
        pixels = digits[:, :, None, None].expand(-1, -1, self.side, self.side)
        self._scale, self._shift = (255 / 32, 0.0) if kind == "uint8" else (4.0, 1.0)
        return (pixels * 32).to(torch.uint8) if kind == "uint8" else pixels / 4.0 - 1.0

    def ids_of(self, inputs: Tensor) -> Tensor:
        """Return the ids that are written into inputs, as the network or the memory has them; -1 where none is."""
        middle = inputs[..., self.side // 2, self.side // 2].detach().cpu()
        digits = middle.double() / 32 if middle.dtype == torch.uint8 else (middle.double() + self._shift) * self._scale
        near = digits.round()
        right = ((digits - near).abs() < 0.05).all(1) & (near >= 0).all(1) & (near < _DIGIT).all(1)
        ids = (near.long() * _DIGIT ** torch.arange(3)).sum(1)
        return torch.where(right & (ids < len(self.labels)), ids, -1)

    def as_the_network_gets(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return inputs that are not augmented."""
        found = self.inputs[ids]
        return (found.float() / 255 if found.dtype == torch.uint8 else found).to(dtype)

    def datamodule(self, drawn: Draw, seed: int) -> ContinualDataModule:
        """Return a fresh data module."""
        splits: tuple[Any, ...] = (self.inputs, self.labels, self.test_inputs, self.test_labels)
        if self.scenario == "given":
            splits = (self.inputs, self.labels, self.tasks, self.test_inputs, self.test_labels, self.test_tasks)
        return ContinualDataModule(
            splits,
            scenario=self.scenario,
            **({"increment": self.increment} if self.scenario in ("class", "blurry") else {}),
            **({"blurriness": 0.3} if self.scenario == "blurry" else {}),
            **({"num_tasks": self.num_tasks} if self.scenario == "domain" else {}),
            class_order=list(range(self.num_classes)),
            seed=seed,
            eval_batch_size=6,
            **{
                name: value_of(drawn, name)
                for name in ("boundaries", "batch_size", "val_ratio", "sharding", "concatenate_tasksets", "augment")
            },
        )


# -- what is fitted ----------------------------------------------------------------------------------------------------


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
        "optimizer_reset": get("optimizer_reset"), "train_classes": get("train_classes"),
        "task_aware": get("task_aware"), "future_tasks": get("future_tasks"),
    }  # fmt: skip
    if get("epochs_per_task") == "unequal":
        options["epochs_per_task"] = [2, *[1] * (truth.num_tasks - 1)]
    if get("optimizer") == "adam":
        # Of float16 the default epsilon is 0.
        options["optimizer"] = lambda parameters: torch.optim.Adam(parameters, lr=0.05, eps=1e-4)
    if get("schedule") == "milestones":
        options |= {"milestones": [1], "gamma": 0.5}
    elif get("schedule") == "warmup_epochs":
        options["warmup_epochs"] = 0.5
    if name in _REHEARSING | _ICARL:
        memory = dict(get("size"))
        given = {axis: get(axis) for axis in _MEMORY if get(axis) is not None}
        if given.get("storage") == "folder":
            given["storage"] = str(folder / "rows")
        if name in _REHEARSING:
            memory |= given
        else:
            options |= {k: given[k] for k in ("execution", "num_samples") if k in given}
            options |= {k: get(k) for k in ("exemplars", "selection") if get(k) is not None}
        options["rehearsal"] = memory
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


# -- what is seen of a fit ---------------------------------------------------------------------------------------------


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


def _public(thing: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(thing).items() if not k.startswith("_") and k != "trainer"}


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.dtype == second.dtype and torch.equal(first.nan_to_num(-7), second.nan_to_num(-7))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(v, second[k]) for k, v in first.items())
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(_same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


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


# -- what has to hold --------------------------------------------------------------------------------------------------

Gather = Callable[[Any], list[Any]]


class Examination:
    """One draw, run in all the ways that have to agree.

    Args:
        drawn: the draw.
        folder: for its files.
        more: makes further arguments of a trainer, such as a strategy.
        gather: gives what each worker has, the same on all of them; each calls it.
    """

    def __init__(self, drawn: Draw, folder: Path, more: Callable[[], dict[str, Any]] = dict,
                 gather: Gather = lambda one: [one]) -> None:  # fmt: skip
        self.drawn, self.folder, self.more, self.gather = drawn, folder, more, gather
        self.faults: list[str] = []
        self.refused: str | None = None

    def run(self) -> Examination:
        """Run the draw and note its faults, or why it was refused."""
        drawn, folder = self.drawn, self.folder
        folder.mkdir(parents=True, exist_ok=True)
        self.truth = Truth(drawn)
        fresh_agent_state: dict[str, Tensor] = {}
        try:
            data = self.truth.datamodule(drawn, 0)
            agent = make_agent(drawn, self.truth, folder)
            fresh_agent_state = {k: v.clone() for k, v in agent.state_dict().items()}
        except (ConfigurationError, MisconfigurationException) as error:
            self._refusal(error)
            return self
        saver = make_saver(drawn, folder / "saved")
        first = self._fit("fit", data, agent, saver)
        if isinstance(first.error, (ConfigurationError, MisconfigurationException)) and not first.steps:
            files = [str(path.relative_to(folder)) for path in folder.rglob("*")]
            if files:
                self.faults.append(f"the refused fit left {files}")
            self._untouched(data, "the refused fit")
            self._refusal(first.error)
            return self
        if first.error is not None:
            return self
        self.first, self.config = first, getattr(getattr(agent, "rehearsal", None), "config", None)
        self._untouched(data, "fit")
        self._in_effect()
        self.logs = self.gather(first.steps)
        weights = [p.detach() for p in agent.parameters()]
        if any(not _same(weights, other) for other in self.gather(weights)):
            self.faults.append("workers ended with different weights")
        self._rows()
        self._order()
        self._memory()
        repeats = self.config is None or self.config.execution != "nonblocking"
        if repeats:
            self._resume(saver)
        self._second(data, agent, fresh_agent_state, repeats)
        return self

    def _fit(self, what: str, data: Any, agent: Any, saver: Any = None, ckpt: Path | None = None,
             drawn: Draw | None = None, **more: Any) -> Fit:  # fmt: skip
        drawn = self.drawn if drawn is None else drawn
        fit = run_fit(drawn, self.truth, self.folder, data, agent, saver, ckpt, **self.more(), **more)
        refused = isinstance(fit.error, (ConfigurationError, MisconfigurationException)) and not fit.steps
        errors = self.gather(None if fit.error is None else type(fit.error).__name__)
        if len(set(errors)) > 1:
            self.faults.append(f"{what}: workers ended with {errors}")
            fit.error = fit.error or RuntimeError("another worker failed")
        if fit.error is not None and not (refused and what in ("fit", "second")):
            self.faults.append(f"{what}: {type(fit.error).__name__} after {len(fit.steps)} steps: {fit.error}")
        self.faults += [f"{what} left behind: {text}" for text in fit.left]
        for step in fit.steps:
            if step.modes:
                self.faults.append(f"{what}: in training other modes of {step.modes}")
                break
        return fit

    # -- refusals --

    def _refusal(self, error: BaseException) -> None:
        self.refused = str(error)
        if len(set(self.gather(self.refused))) > 1:
            self.faults.append(f"refused with other words on other workers: {self.refused!r}")
        if "\n" in self.refused.strip():
            self.faults.append(f"refused in several lines: {self.refused!r}")
        if not named_axes(self.refused, self.drawn):
            self.faults.append(f"refused without naming what was given: {self.refused!r}")
            return
        # Without what it names, another thing may be refused, but not the same.
        other = obeyed(self.refused, self.drawn)
        again = Examination(other, self.folder.with_name("obeyed"), self.more, self.gather)
        if again.starts() == self.refused:
            self.faults.append(f"refused for what it does not name: {self.refused!r}, also of {other}")

    def starts(self) -> str | None:
        """Return why the draw is refused, None if it is not; at most one step is done."""
        self.truth = Truth(self.drawn)
        try:
            data, agent = self.truth.datamodule(self.drawn, 0), make_agent(self.drawn, self.truth, self.folder)
            trainer = make_trainer({**self.drawn, "limit": None}, self.folder, [], max_steps=1, **self.more())
            trainer.fit(agent, datamodule=data)
        except (ConfigurationError, MisconfigurationException) as error:
            return str(error)
        return None

    # -- rows --

    def _rows(self) -> None:
        truth = self.truth
        exact = not value_of(self.drawn, "augment")
        for number, step in enumerate(self.first.steps):
            where = f"epoch {step.epoch}, step {number}"
            if not torch.equal(step.written, step.ids):
                wrong = (step.written != step.ids).nonzero().flatten().tolist()
                self.faults.append(f"{where}: rows {wrong} of {step.num_new} new: inputs of {step.written.tolist()}, "
                                   f"ids {step.ids.tolist()}")  # fmt: skip
                return
            if not torch.equal(truth.labels[step.written], step.labels):
                self.faults.append(f"{where}: labels {step.labels.tolist()} of samples {step.ids.tolist()}")
                return
            if exact and not torch.equal(truth.as_the_network_gets(step.ids, step.inputs.dtype), step.inputs):
                self.faults.append(f"{where}: inputs are not those of the data set")
                return
        self._given_before()

    def _given_before(self) -> None:
        """Check what is stored of a sample as the network had it: its augmented input, and its logits."""
        if self.config is None or len(self.logs) > 1:
            return
        before: dict[str, dict[int, list[Tensor]]] = {"input": {}, "logits": {}}
        stored = {"input": self.config.row_format == "augmented", "logits": self.config.update == "step"}
        for number, step in enumerate(self.first.steps):
            old = {"input": step.inputs[step.old], "logits": step.logits}
            for name, rows in old.items():
                for sample, row in zip(step.ids[step.old].tolist(), rows if rows is not None else (), strict=False):
                    if stored[name] and not any(torch.equal(row, one) for one in before[name].get(sample, [])):
                        self.faults.append(f"step {number}: sample {sample} comes back with an {name} it never had")
                        return
            new = {"input": step.inputs[step.new], "logits": step.new_logits}
            for name, rows in new.items():
                for sample, row in zip(step.ids[step.new].tolist(), rows if rows is not None else (), strict=False):
                    before[name].setdefault(sample, []).append(row)

    # -- the order of the stream, and what may be rehearsed --

    def _order(self) -> None:
        truth, get = self.truth, lambda axis: value_of(self.drawn, axis)
        exemplars = get("agent") in _ICARL
        first_task: dict[int, int] = {}  # in which a sample came first, on any worker
        per_epoch: dict[int, list[int]] = {}
        for log in self.logs:
            for step in log:
                new = step.ids[step.new][step.weights[step.new] > 0].tolist()
                per_epoch.setdefault(step.epoch, []).extend(new)
                for sample in new:
                    first_task[sample] = min(step.task, first_task.get(sample, step.task))
        task_of_epoch = {step.epoch: step.task for step in self.logs[0]}
        cut = get("limit_train_batches") != 1.0
        if truth.tasks is not None and not get("concatenate_tasksets") and not exemplars:
            for epoch, ids in per_epoch.items():
                foreign = [i for i in ids if int(truth.tasks[i]) != task_of_epoch[epoch]]
                if foreign:
                    self.faults.append(f"epoch {epoch}: samples {foreign} of other tasks are new")
                    return
        for epoch, ids in per_epoch.items():
            double = [i for i, n in Counter(ids).items() if n > 1]
            if double:
                self.faults.append(f"epoch {epoch}: samples {double} came twice")
                return
        complete = get("stopping") is None and get("limit") is None and not cut
        if complete and get("val_ratio") == 0 and not exemplars:
            missing = set(range(len(truth.labels))) - set(first_task)
            if missing:
                self.faults.append(f"samples {sorted(missing)} were never trained on")
        if self.config is None and not exemplars:
            if any(len(s.ids) > s.num_new for log in self.logs for s in log):
                self.faults.append("an agent without memory rehearses")
            return
        self._drawn_rows(first_task, complete)

    def _drawn_rows(self, first_task: dict[int, int], complete: bool) -> None:
        """Check what is rehearsed: met before, from where it may be drawn, as many as there are, none twice."""
        config, single = self.config, len(self.logs) == 1
        if config is None:
            return
        met: list[set[int]] = [set() for _ in self.logs]
        for number, steps in enumerate(zip(*self.logs, strict=True)):
            for rank, step in enumerate(steps):
                old = step.ids[step.old].tolist()
                known = set.union(*met) if config.scope == "global" or config.update == "task_end" else met[rank]
                strange = [i for i in old if i not in known] if config.update == "step" else []
                if strange:
                    self.faults.append(f"step {number}: samples {strange} are rehearsed before they came")
                    return
                # What was left out of its task is new in a later one, where that comes with the earlier ones.
                late = config.update == "task_end" and not complete and value_of(self.drawn, "concatenate_tasksets")
                if (config.update == "task_end" or config.draw_from == "past") and not late:
                    present = [i for i in old if first_task.get(i, -1) >= step.task]
                    if present:
                        self.faults.append(f"step {number}: samples {present} of the present task are rehearsed")
                        return
                if config.policy != "nil" and len(set(old)) < len(old):
                    self.faults.append(f"step {number}: a sample is rehearsed twice: {old}")
                    return
                if len(old) > config.num_samples:
                    self.faults.append(f"step {number}: {len(old)} rows are rehearsed")
                    return
                if step.memory is not None and config.scope == "local" and self._draw_is_wrong(number, step, old):
                    return
            for rank, step in enumerate(steps):
                met[rank].update(step.ids[step.new][step.weights[step.new] > 0].tolist())
            self._weights(number, steps, single)

    def _draw_is_wrong(self, number: int, step: Step, old: list[int]) -> bool:
        """Compare with the memory from which was drawn."""
        assert step.memory is not None
        allowed = step.memory.ids.tolist()
        if self.config.draw_from == "past" and self.config.update == "step":
            present = set(self.truth.labels[step.ids[step.new]].tolist()) if self.truth.tasks is None else None
            if present is None:
                assert self.truth.tasks is not None
                classes = set(self.truth.labels[self.truth.tasks == step.task].tolist())
            else:
                return False
            allowed = [i for i in allowed if int(self.truth.labels[i]) not in classes]
        if Counter(old) - Counter(allowed):
            self.faults.append(f"step {number}: {old} were drawn from {allowed}")
            return True
        if len(old) != min(self.config.num_samples, len(allowed)):
            self.faults.append(f"step {number}: {len(old)} were drawn from {len(allowed)} rows")
            return True
        return False

    def _weights(self, number: int, steps: tuple[Step, ...], single: bool) -> None:
        """Check that all workers divide by the same number, which is what their rows weigh."""
        if self.config.execution == "nonblocking" and not single:
            return  # a worker may have gone on with other rows than those that the others heard of
        new = sum(float(s.weights[s.new].sum()) for s in steps) / len(steps)
        old = sum(float(s.weights[s.old].sum()) for s in steps) / len(steps)
        expected = new if self.config.loss == "sum" else new + old
        close = 1e-5 if "16-true" not in value_of(self.drawn, "precision") else 1e-2
        if any(not math.isclose(s.normalizer, expected, rel_tol=close) for s in steps):
            self.faults.append(f"step {number}: divides by {[s.normalizer for s in steps]}, rows weigh {expected}")
        elif self.config.loss == "sum" and old and not math.isclose(old, new, rel_tol=close):
            self.faults.append(f"step {number}: rehearsed rows weigh {old}, new ones {new}")
        elif (self.config.loss, self.config.weighting) == ("mean", "none") and any(
            not bool((s.weights[s.old] == 1).all()) for s in steps
        ):
            self.faults.append(f"step {number}: weights {[s.weights.tolist() for s in steps]}")

    # -- the memory --

    def _in_effect(self) -> None:
        """Check that what was given for the memory is what it works with."""
        if self.config is None:
            return
        for axis in _MEMORY:
            given, used = value_of(self.drawn, axis), getattr(self.config, axis)
            if given is not None and axis != "storage" and given != used:
                self.faults.append(f"rehearsal.{axis}={given} was given, {used} is used")

    def _memory(self) -> None:
        first = self.first
        if first.exemplars is not None:
            self._exemplars()
        if self.config is None:
            return
        size = value_of(self.drawn, "size")
        classes, workers = self.truth.num_classes, len(self.logs)
        total = size.get("buffer_size") or size.get("num_representatives", 0) * classes * workers
        total = total or max(int(size["rehearsal_ratio"] * len(self.truth.labels)), 1)
        memories = self.gather(first.memory)
        if sum(m.capacity for m in memories if m is not None) != total and all(m is not None for m in memories):
            self.faults.append(f"room for {[m.capacity for m in memories]} rows in place of {total}")
        offered: list[list[int]] = []
        for number, step in enumerate(first.steps):
            last = first.steps[number - 1].memory if number else None
            when = f"before step {number}"
            if step.memory is not None and self._memory_is_wrong(when, step.memory, offered, step.task, last):
                return
            offered.append(step.ids[step.new][step.weights[step.new] > 0].tolist())
        if first.memory is not None:
            # Its last task may have been cut off, and what enters at its end not have entered.
            task = first.steps[-1].task + 1 if value_of(self.drawn, "limit") is None else None
            self._memory_is_wrong("at the end", first.memory, offered, task)

    def _memory_is_wrong(self, when: str, memory: Memory, offered: list[list[int]], tasks: int | None,
                         before_it: Memory | None = None) -> bool:  # fmt: skip
        before = len(self.faults)
        truth, config = self.truth, self.config
        if memory.written is not None and not torch.equal(memory.written, memory.ids):
            self.faults.append(f"{when}: inputs of {memory.written.tolist()} are stored as {memory.ids.tolist()}")
        if bool((memory.ids < 0).any()):
            self.faults.append(f"{when}: rows without an id: {memory.ids.tolist()}")
        elif not torch.equal(truth.labels[memory.ids], memory.labels):
            self.faults.append(f"{when}: stored labels {memory.labels.tolist()} of samples {memory.ids.tolist()}")
        if before_it is not None and config.update == "step":
            foreign = set(memory.ids.tolist()) - set(before_it.ids.tolist()) - set(offered[-1])
            if foreign:
                self.faults.append(f"{when}: samples {foreign} have entered that were not offered")
            if (config.policy, config.quota) == ("greedy", "adaptive"):
                known = gdumb_counts(truth, memory.capacity, before_it.ids.tolist(), offered)
                if not torch.equal(known, torch.bincount(memory.labels, minlength=truth.num_classes)):
                    self.faults.append(
                        f"{when}: {memory.labels.bincount().tolist()} rows of the classes, not {known.tolist()}"
                    )
        if len(memory.ids) > memory.capacity:
            self.faults.append(f"{when}: {len(memory.ids)} rows in a memory of {memory.capacity}")
        if config.policy != "nil" and len(memory.ids.unique()) < len(memory.ids):
            self.faults.append(f"{when}: samples stored twice: {memory.ids.tolist()}")
        if config.update == "step":
            expected = policy_counts(config, truth, memory.capacity, offered)
        else:
            whole = self._tasksets(tasks)
            if whole is None:
                return len(self.faults) > before
            expected = policy_counts(config, truth, memory.capacity, whole)
        counts = torch.bincount(truth.labels[memory.ids], minlength=truth.num_classes)
        if expected.stored is not None and len(memory.ids) != expected.stored:
            self.faults.append(f"{when}: {len(memory.ids)} rows are stored, {config.policy} has {expected.stored}")
        if not bool(((expected.least <= counts) & (counts <= expected.most)).all()):
            self.faults.append(
                f"{when}: {counts.tolist()} rows of the classes; {config.policy}, {config.quota} has from "
                f"{expected.least.tolist()} to {expected.most.tolist()} of them"
            )
        return len(self.faults) > before

    def _tasksets(self, tasks: int | None) -> list[list[int]] | None:
        """Return what tasks so far offered at their ends; None where it is not known here."""
        truth = self.truth
        if tasks is None or truth.tasks is None or len(self.logs) > 1 or value_of(self.drawn, "val_ratio") > 0:
            return None
        if value_of(self.drawn, "limit_train_batches") != 1.0:
            return None  # which samples of a task the limit leaves is for the package to choose
        return [torch.nonzero(truth.tasks == task).flatten().tolist() for task in range(tasks)]

    def _exemplars(self) -> None:
        """iCaRL: of each class met the same share of the memory, of samples of the class."""
        assert self.first.exemplars is not None
        truth, exemplars = self.truth, self.first.exemplars
        for y, ids in exemplars.items():
            if len(ids.unique()) < len(ids) or not bool((truth.labels[ids] == y).all()):
                self.faults.append(f"exemplars {ids.tolist()} of class {y}")
        if exemplars:
            capacity = self.first.agent.capacity
            share = capacity // len(exemplars)
            if any(len(ids) > share for ids in exemplars.values()):
                self.faults.append(f"{ {y: len(ids) for y, ids in exemplars.items()} } exemplars, {share} a class")

    # -- repetition --

    def _resume(self, saver: ModelCheckpoint) -> None:
        steps = self._saved(saver)
        if not steps:
            return
        chosen = self._chosen(sorted(steps))
        agent = make_agent(self.drawn, self.truth, self.folder / "again", seed=7)
        data = self.truth.datamodule(self.drawn, 9)
        again = self._fit(f"resume from step {chosen}", data, agent, ckpt=steps[chosen])
        # Where the time is over before the first step Lightning starts no training, and nothing is made up for.
        over = value_of(self.drawn, "limit") == "max_time" and not again.steps
        if again.error is None and not over:
            self._agree(f"resumed from step {chosen}", again, self.first)
        if value_of(self.drawn, "limit") is None or value_of(self.drawn, "checkpoint") == "epochs":
            return  # at the end of an epoch that a limit cut off Lightning counts it as over
        # A run that a limit cut off goes on as if there had been none.
        free = {axis: value for axis, value in self.drawn.items() if axis != "limit"}
        whole = self._fit("without limit", self.truth.datamodule(free, 0),
                          make_agent(free, self.truth, self.folder / "whole"), drawn=free)  # fmt: skip
        last = max(steps)
        agent = make_agent(free, self.truth, self.folder / "on", seed=7)
        on = self._fit(f"limit lifted at step {last}", self.truth.datamodule(free, 9), agent, ckpt=steps[last],
                       drawn=free)  # fmt: skip
        if whole.error is None and on.error is None:
            self._agree(f"limit lifted at step {last}", on, whole)

    def _saved(self, saver: ModelCheckpoint) -> dict[int, Path]:
        found = sorted(Path(str(saver.dirpath)).glob("*.ckpt")) if saver.dirpath else []
        return {int(path.stem.split("=")[1].split("-")[0]): path for path in found}

    def _chosen(self, steps: list[int]) -> int:
        """Return the step to resume from, as the draw says."""
        kind, rng = value_of(self.drawn, "resume"), np.random.default_rng(value_of(self.drawn, "seed") + 1)
        every = value_of(self.drawn, "accumulate_grad_batches")
        ends, count = [], 0
        log, batch = self.first.steps, 0
        for place, step in enumerate(log):
            batch += 1
            last = place + 1 == len(log) or log[place + 1].epoch != step.epoch
            if batch % every == 0 or last:
                count += 1
                batch = 0 if last else batch
            if place + 1 < len(log) and log[place + 1].task != step.task:
                ends.append(count)
        if kind == "last":
            return steps[-1]
        wanted = {"task_end": ends, "after_task_end": [end + 1 for end in ends]}.get(kind, steps)
        among = [step for step in wanted if step in steps] or steps
        return among[int(rng.integers(len(among)))]

    def _agree(self, what: str, fit: Fit, other: Fit) -> None:
        tail = other.steps[len(other.steps) - len(fit.steps) :] if fit.steps else []
        if len(tail) != len(fit.steps):
            self.faults.append(f"{what}: {len(fit.steps)} steps in place of at most {len(other.steps)}")
            return
        for number, (ours, theirs) in enumerate(zip(fit.steps, tail, strict=True)):
            for name in ("epoch", "num_new", "ids", "draw_ids", "weights", "normalizer", "inputs", "logits", "loss"):
                if not _same(getattr(ours, name), getattr(theirs, name)) and not _both_nan(ours, theirs, name):
                    self.faults.append(
                        f"{what}: its step {number} of {len(tail)} (epoch {theirs.epoch}) differs in {name}: "
                        f"{_short(getattr(ours, name))} in place of {_short(getattr(theirs, name))}"
                    )
                    return
        for name in ("state", "matrix", "exemplars"):
            if not _same(getattr(fit, name), getattr(other, name)):
                ours, theirs = getattr(fit, name), getattr(other, name)
                which = [k for k in theirs if not _same(ours.get(k), theirs[k])] if isinstance(theirs, dict) else ""
                self.faults.append(f"{what}: another {name} {which}")
        if not fit.steps:
            return  # nothing was left to train on, and Lightning calls no hook in which a memory is taken back
        if (fit.memory is None) != (other.memory is None):
            self.faults.append(f"{what}: one has a memory")
        elif (fit.memory is not None and other.memory is not None) and not _same(
            fit.memory.columns, other.memory.columns
        ):
            self.faults.append(f"{what}: other rows: {fit.memory.ids.tolist()}, {other.memory.ids.tolist()}")

    # -- afterwards --

    def _second(self, data: Any, agent: Any, fresh_state: dict[str, Tensor], repeats: bool) -> None:
        """Fit another agent on the data module, then the first one again."""
        keep = {"num_classes", "num_tasks", "scenario", "boundaries", "sizes", "one_row_left", "inputs", "augment",
                "batch_size", "val_ratio", "sharding", "concatenate_tasksets", "seed"}  # fmt: skip
        other = {axis: value for axis, value in self.drawn.items() if axis in keep}
        name = value_of(self.drawn, "second")
        other |= {"agent": "base" if name == "nil_v2" else name}
        # Only what the data module gives is of interest here.
        brief = {"barebones": True, "limit_train_batches": 2, "limit_val_batches": 0}
        fits = []
        for place, used in (("fresh", None), ("used", data)):
            try:
                second = make_agent(other, self.truth, self.folder / place, seed=3)
            except (ConfigurationError, MisconfigurationException):
                return
            fits.append(self._fit("second", used or self.truth.datamodule(self.drawn, 0), second, drawn=other, **brief))
            if fits[0].error is not None:  # it cannot learn from such a stream
                other = {**other, "agent": "base"}
                second = make_agent(other, self.truth, self.folder / place, seed=3)
                fresh = self.truth.datamodule(self.drawn, 0)
                fits = [self._fit("second, base", fresh, second, drawn=other, **brief)]
        if fits[-1].error is None:
            self._agree(f"{other['agent']} on the used data module", fits[1], fits[0])
            self._untouched(data, f"the fit of {other['agent']}")
        if not repeats:
            return
        if value_of(self.drawn, "again") == "same":
            agent.load_state_dict(fresh_state)
        else:
            agent = make_agent(self.drawn, self.truth, self.folder / "third")
        again = self._fit("fitted again", data, agent)
        if again.error is None:
            self._agree("fitted again", again, self.first)

    def _untouched(self, data: Any, after: str) -> None:
        fresh = self.truth.datamodule(self.drawn, 0)
        fresh.setup()
        before, now = _public(fresh), _public(data)
        for name in before:
            if name in _KEPT or name not in now:
                continue
            if not _same_value(before[name], now[name]):
                self.faults.append(f"after {after} data.{name} is {_short(now[name])}, not {_short(before[name])}")


# What a data module may know after a fit.
_KEPT = {"task_id", "original_labels", "train_targets", "test_targets", "train_inputs", "test_inputs"}


def _same_value(first: Any, second: Any) -> bool:
    plain = (Tensor, dict, list, tuple, int, float, str, bool, type(None))
    return _same(first, second) if isinstance(first, plain) else type(first) is type(second)


def _both_nan(ours: Step, theirs: Step, name: str) -> bool:
    first, second = getattr(ours, name), getattr(theirs, name)
    return isinstance(first, float) and math.isnan(first) and math.isnan(second)


def _short(value: Any) -> str:
    text = str(value.tolist() if isinstance(value, Tensor) else value)
    return text if len(text) < 120 else text[:117] + "..."


# -- the policies, from their definitions ------------------------------------------------------------------------------


@dataclass
class Counts:
    """What a policy stores: rows in all, if that is certain, and the least and the most of each class."""

    stored: int | None
    least: Tensor
    most: Tensor


def policy_counts(config: Any, truth: Truth, capacity: int, offers: list[list[int]]) -> Counts:
    """Return what a memory holds after batches of samples were offered, in their order.

    Args:
        config: the memory's configuration.
        truth: about the samples.
        capacity: rows of this worker's memory.
        offers: sample ids of each batch.
    """
    num_classes = truth.num_classes
    distinct = sorted({i for batch in offers for i in batch})
    labels = truth.labels[torch.tensor(distinct, dtype=torch.int64)]
    of_class = torch.bincount(labels, minlength=num_classes)
    if config.policy == "reservoir":
        # Appended while there is room, and nothing leaves but for another.
        return Counts(min(capacity, len(distinct)), torch.zeros_like(of_class), of_class)
    if config.policy == "greedy" and config.quota == "adaptive":
        return Counts(None, torch.zeros_like(of_class), of_class)  # see ``gdumb_counts``
    classes = torch.ones(num_classes, dtype=torch.bool) if config.quota == "fixed" else of_class > 0
    share, rest = divmod(capacity, max(int(classes.sum()), 1))
    room = torch.where(classes, share + (classes.cumsum(0) - 1 < rest).long(), 0)
    most = torch.minimum(room, of_class)
    if config.policy in ("class_balanced", "greedy"):
        # Every sample is offered, and a class with room takes it.
        return Counts(int(most.sum()), most, most)
    times = torch.bincount(truth.labels[torch.tensor([i for b in offers for i in b], dtype=torch.int64)],
                           minlength=num_classes)  # fmt: skip
    if config.policy == "nil":  # which may store a sample twice
        most = torch.minimum(room, times)
    candidates = config.num_candidates or 20
    chosen = sum(len(b) if config.update == "task_end" else min(candidates, len(b)) for b in offers)
    missing = sum(len(b) for b in offers) - chosen
    least = torch.minimum(most, (times - missing).clamp(min=0)) if config.policy == "nil" else torch.minimum(
        most, (of_class - missing).clamp(min=0))  # fmt: skip
    return Counts(None, least, most)


def gdumb_counts(truth: Truth, capacity: int, before: list[int], offers: list[list[int]]) -> Tensor:
    """Return how many rows of each class GDumb's sampler holds after the last of some batches.

    Prabhu et al., ECCV 2020, algorithm 1: a sample of a class with less than its share of the memory enters; where the
    memory is full a row of the largest class leaves, of several the first.

    Args:
        truth: about the samples.
        capacity: rows of the memory.
        before: samples that were stored before the last batch.
        offers: sample ids of each batch.
    """
    counts = torch.bincount(truth.labels[torch.tensor(before, dtype=torch.int64)], minlength=truth.num_classes)
    seen = {int(truth.labels[i]) for batch in offers[:-1] for i in batch}
    for sample in offers[-1]:
        label = int(truth.labels[sample])
        seen.add(label)
        if sample in before or counts[label] >= capacity / len(seen):
            continue
        if counts.sum() == capacity:
            counts[counts.argmax()] -= 1
        counts[label] += 1
    return counts


def named_axes(message: str, drawn: Draw) -> list[str]:
    """Return the axes of a draw, off their defaults, that a message names."""
    return [axis for axis in drawn if any(word in message for word in _WORDS.get(axis, (axis,)))]


def obeyed(message: str, drawn: Draw) -> Draw:
    """Return a draw without what a refusal names, the agent last."""
    named = named_axes(message, drawn)
    named = [axis for axis in named if axis != "agent"] or named
    return {axis: value for axis, value in drawn.items() if axis not in named} | (
        {"agent": "base"} if "agent" in named else {"agent": drawn["agent"]}
    )


def examine(drawn: Draw, folder: Path) -> Examination:
    """Run a draw in this process, in a folder that is emptied first; return what was found."""
    shutil.rmtree(folder, ignore_errors=True)
    return Examination(drawn, folder / "run").run()


def shrunk(drawn: Draw, folder: Path) -> Draw:
    """Return a draw that fails as well, with as many axes at their defaults as can be."""
    for axis in [axis for axis in drawn if axis != "agent"]:
        smaller = {k: v for k, v in drawn.items() if k != axis}
        if examine(smaller, folder).faults:
            drawn = smaller
    return drawn
