"""A fit of an agent, of a user's module or of plain Lightning, with a callback or an argument and without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.spike import TrainingSpikeException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dcl_lightning import NIL, ContinualDataModule, Rehearsal, RehearsalConfig, TaskReport
from dcl_lightning.backbones import MLP

Kind = Literal["supported", "refused", "per task", "not tried"]
Who = Literal["plain", "agent", "foreign"]

# Two tasks of two epochs of four batches.
CLASSES, ROWS, BATCH, TASKS, EPOCHS = 4, 20, 5, 2, 2
STEPS = TASKS * EPOCHS * ROWS // BATCH


def stream() -> tuple[torch.Tensor, ...]:
    """Inputs and labels of training and test, as many of each class."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(CLASSES).repeat(TASKS * ROWS // CLASSES)
    x = torch.randn(CLASSES, 1, 4, 4, generator=g)[y] * 2 + torch.randn(len(y), 1, 4, 4, generator=g)
    return x, y, x.clone(), y.clone()


class OnPurpose(Exception):
    """Ends a fit in its third step."""


class Plain(pl.LightningModule):
    """What anybody would write, with batches as many and as large as a task's of the stream."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.ReLU())
        self.head = nn.Linear(width, CLASSES)
        self.lr, self.batch_size = 0.05, BATCH

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, index: int) -> None:
        self.log("test/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, index: int) -> torch.Tensor:
        return self(batch[0]).softmax(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]  # as Lightning asks for where layers thaw later
        return torch.optim.SGD(trained, lr=self.lr, momentum=0.9)

    def train_dataloader(self) -> DataLoader[Any]:
        x, y, *_ = stream()
        return DataLoader(TensorDataset(x[:ROWS], y[:ROWS]), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*stream()[2:]), batch_size=self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader


class Spy(pl.Callback):
    """Notes what it is called for, and what holds then."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.looks: dict[str, Callable[[pl.Trainer, Any], Any]] = {}
        self.seen: dict[str, list[Any]] = {}
        self.loaders: dict[str, list[tuple[int, int]]] = {}
        self.gradients: list[tuple[float, float]] = []
        self.dtypes: set[str] = set()

    def note(self, hook: str, trainer: pl.Trainer, module: Any, *rest: Any) -> None:
        self.calls.append(hook if not trainer.sanity_checking else f"sanity {hook}")
        if hook in self.looks:
            self.seen.setdefault(hook, []).append(self.looks[hook](trainer, module))
        if hook.endswith("batch_start"):
            loader = rest[2] if len(rest) > 2 else 0
            self.loaders.setdefault(hook, []).append((self.calls.count(hook.replace("batch", "epoch")), loader))
        if hook == "on_train_start":
            trainer.optimizers[0].register_step_pre_hook(self._before_step)
            module.head.register_forward_hook(self._after_head)

    def _before_step(self, optimizer: torch.optim.Optimizer, *rest: Any) -> None:
        gradients = [
            p.grad.flatten() for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        if gradients:
            gradient = torch.cat(gradients)
            self.gradients.append((float(gradient.norm()), float(gradient.abs().max())))

    def _after_head(self, head: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.dtypes.add(str(output.dtype))

    def count(self, hook: str) -> int:
        return self.calls.count(hook)

    @property
    def sequence(self) -> list[str]:
        """What it was called for, but for each batch of validation: an agent validates on each task."""
        return [call for call in self.calls if not call.startswith("on_validation_batch")]


def _noting(name: str) -> Callable[..., None]:
    def hook(self: Spy, trainer: pl.Trainer, module: Any, *rest: Any, **kwargs: Any) -> None:
        self.note(name, trainer, module, *rest, *kwargs.values())

    return hook


HOOKS = [name for name in vars(pl.Callback) if name.startswith("on_") or name in ("setup", "teardown")]
for _name in HOOKS:
    setattr(Spy, _name, _noting(_name))


@dataclass
class Run:
    """A fit, and what can be asked of it."""

    trainer: pl.Trainer
    module: Any
    data: Any
    spy: Spy
    folder: Path
    extra: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None


@dataclass(frozen=True)
class Row:
    """A callback class or an argument.

    Args:
        name: as Lightning has it.
        given: arguments of the Trainer that try it, made anew for each run in a folder of its own.
        effect: what it does, as seen in a run.
        agent: whether an agent on a ContinualDataModule has it.
        foreign: whether a module of the user's with ``Rehearsal`` on a loader of its own has it.
        note: for the page: what is different, or why it is refused or not tried.
        per_task: the effect with an agent where it is not plain Lightning's.
        looks: what the spy notes at a hook.
        then: what is done after the fit.
        beside: arguments of the run without it, too.
        words: of the refusal.
        package: without which Lightning refuses the callback itself.
        since: the release of Lightning that brought it, if an older one is supported.
    """

    name: str
    given: Callable[[Path], dict[str, Any]] | None = None
    effect: Callable[[Run], Any] | None = None
    agent: Kind = "supported"
    foreign: Kind = "supported"
    note: str = ""
    per_task: Any = None
    looks: dict[str, Callable[[pl.Trainer, Any], Any]] = field(default_factory=dict)
    then: Callable[[Run], None] | None = None
    words: str = ""
    package: str | None = None
    since: str = ""
    beside: Callable[[Path], dict[str, Any]] = lambda folder: {}


def run(who: Who, row: Row, folder: Path, with_it: bool = True) -> Run:
    """Fit, with the callback or argument or without it, and do what the row says then."""
    pl.seed_everything(0, verbose=False)
    data: Any = None
    module: Any
    spy = Spy()
    spy.looks = row.looks
    options: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
        "default_root_dir": folder, "log_every_n_steps": 50,
    }  # fmt: skip
    if who == "agent":
        data = ContinualDataModule(stream(), increment=CLASSES // TASKS, batch_size=BATCH, seed=0, select_on_test=True)
        config = RehearsalConfig(buffer_size=8, num_candidates=2, num_samples=2)
        module = NIL(
            MLP([8]),
            CLASSES,
            input_spec=data.input_spec,
            epochs_per_task=EPOCHS,
            lr=0.05,
            momentum=0.9,
            rehearsal=config,
        )
    else:
        module = Plain()
        options["max_epochs"] = TASKS * EPOCHS
    given = (row.given if with_it and row.given is not None else row.beside)(folder)
    memory = Rehearsal(RehearsalConfig(buffer_size=8, num_samples=2, policy="reservoir", weighting="none"))
    theirs = given.get("callbacks", [])
    ours = {"plain": [], "agent": [TaskReport(pictures=False)], "foreign": [memory]}[who]
    options |= given | {"callbacks": [spy, *theirs, *ours]}
    result = Run(pl.Trainer(**options), module, data, spy, folder, {"callbacks": theirs, "loaders": 0})
    source = data or module
    inner = source.train_dataloader

    def counted(*args: Any) -> Any:
        result.extra["loaders"] += 1
        return inner(*args)

    source.train_dataloader = counted
    try:
        result.trainer.fit(module, datamodule=data)
    except (OnPurpose, TrainingSpikeException) as error:
        result.error = error
    if row.then is not None:
        row.then(result)
    return result
