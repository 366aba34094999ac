"""The learning rate that a run uses, given on the command line, in files, or to the optimizer itself."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.cli import ReduceLROnPlateau

from dcl_lightning import ContinualDataModule, FineTuning, cli
from dcl_lightning.backbones import MLP
from dcl_lightning.errors import ConfigurationError

ROOT = Path(__file__).parent.parent.parent
SMALL = ["fit", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=0", "--trainer.accelerator=cpu"]
SMALL += ["--data.dataset=synthetic", "--data.scenario=none", "--data.batch_size=64", "--model.epochs_per_task=2"]


class Rates(pl.Callback):
    """Keeps what each step of the last fit was taken with."""

    seen: list[tuple[str, float, float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        (optimizer,) = trainer.optimizers
        for group in optimizer.param_groups:
            self.seen.append((type(optimizer).__name__, group["lr"], group["weight_decay"]))


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Rates, "seen", [])
    shipped = {"backbone": "mlp", "lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    own = {"backbone": "mlp", "optimizer": {"class_path": "Adam", "init_args": {"lr": 0.003}}}
    both = {**own, "lr": 0.02}
    for name, values in {"shipped": shipped, "own": own, "both": both}.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump({"model": {"class_path": "base", "init_args": values}}))


@pytest.mark.parametrize(
    ("args", "optimizer", "rate", "dropped"),
    [
        ("--model.optimizer Adam --model.optimizer.lr 0.004", "Adam", 0.004, ""),
        # torch's own rate where none is given; ours with SGD
        ("--model.optimizer Adam", "Adam", 0.001, ""),
        ("", "SGD", 0.05, ""),
        ("--model.optimizer Adam --model.lr 0.01", "Adam", 0.01, ""),
        ("--model.lr 0.001 --model.optimizer Adam --model.optimizer.lr 0.001", "Adam", 0.001, ""),
        # what stands later wins, also if it is what the class has by default
        ("--config shipped.yaml --model.optimizer Adam --model.optimizer.lr 1e-3", "Adam", 0.001, "model.lr=0.02"),
        ("--config shipped.yaml --model.optimizer Adam", "Adam", 0.02, "model.momentum=0.9"),
        ("--config shipped.yaml --config own.yaml", "Adam", 0.003, "model.weight_decay=0.1"),
        ("--config own.yaml --model.lr 0.3", "Adam", 0.3, "model.optimizer.lr=0.003"),
        ("--config own.yaml --model.optimizer.lr 0.3", "Adam", 0.3, ""),
        ("--config shipped.yaml", "SGD", 0.02, ""),
        ("--config shipped.yaml --model.optimizer_reset true", "SGD", 0.02, ""),
    ],
)
def test_the_rate_that_was_given_is_trained_with(
    args: str,
    optimizer: str,
    rate: float,
    dropped: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "lightning.pytorch")
    callback = [f"--trainer.callbacks={__name__}.Rates"]
    assert cli.main([*SMALL, *callback, *args.split()]) == 0
    decay = 0.1 if "shipped" in args and optimizer == "SGD" else 0.0
    assert Rates.seen == [(optimizer, rate, decay)] * 2
    assert dropped in caplog.text
    assert ("dropped" in caplog.text or "replaced" in caplog.text) == bool(dropped)
    # What is written down gives the same run.
    Rates.seen.clear()
    (config,) = Path("runs").rglob("config.yaml")
    assert cli.main(["fit", "--config", str(config)]) == 0
    assert Rates.seen == [(optimizer, rate, decay)] * 2
    assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--model.optimizer Adam --model.optimizer.lr 0.004 --model.lr 0.3", ["lr=0.3", "optimizer.lr=0.004"]),
        ("--config both.yaml", ["model.lr=0.02", "model.optimizer.lr=0.003"]),
        ("--model.optimizer Adam --model.momentum 0.5", ["momentum=0.5", "give such values to the optimizer"]),
    ],
)  # fmt: skip
def test_two_rates_in_one_place_are_refused(
    args: str, words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    assert cli.main([*SMALL, *args.split()]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert all(word in error for word in words), error
    assert sorted(tmp_path.iterdir()) == before


def two_rates(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """As a user would train biases faster."""
    return torch.optim.AdamW([{**group, "lr": 0.1 * (i + 1)} for i, group in enumerate(groups)])


def trained(**values: Any) -> list[list[float]]:
    """Return the rates of both groups of parameters of a fit's first step, and of that of the second epoch."""
    data = ContinualDataModule("synthetic", scenario="none", batch_size=500)
    agent = FineTuning(
        MLP([8]),
        data.num_classes,
        data.input_spec,
        epochs_per_task=2,
        decay_biases_and_norms=False,
        milestones=[1],
        **values,
    )
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=2,
        enable_model_summary=False, callbacks=[Rates()], limit_val_batches=0, num_sanity_val_steps=0,
    )  # fmt: skip
    Rates.seen.clear()
    trainer.fit(agent, datamodule=data)
    rates = [rate for _, rate, _ in Rates.seen]
    return [rates[:2], rates[2:4]]


@pytest.mark.parametrize(
    ("values", "rates"),
    [
        ({"optimizer": partial(torch.optim.Adam, lr=0.2)}, [0.2, 0.2]),
        ({"optimizer": partial(torch.optim.Adam, amsgrad=True), "lr": 0.2}, [0.2, 0.2]),
        ({"optimizer": partial(torch.optim.Adam, amsgrad=True)}, [0.001, 0.001]),
        ({"optimizer": torch.optim.Adam}, [0.001, 0.001]),
        ({"optimizer": torch.optim.Adam, "lr": 0.2}, [0.2, 0.2]),
        ({"optimizer": lambda parameters: torch.optim.Adam(parameters), "lr": 0.2}, [0.2, 0.2]),
        ({"optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.2)}, [0.2, 0.2]),
        ({"optimizer": two_rates}, [0.1, 0.2]),
        ({}, [0.05, 0.05]),
    ],
)
def test_in_python_the_rate_is_the_optimizers_own_or_the_agents(values: dict[str, Any], rates: list[float]) -> None:
    first, second = trained(**values)
    assert first == pytest.approx(rates)
    assert second == pytest.approx([0.1 * rate for rate in rates])  # the schedule acts on it


@pytest.mark.parametrize("optimizer", [partial(torch.optim.Adam, lr=0.2), two_rates])
def test_in_python_two_rates_are_refused_before_the_first_step(optimizer: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"model\.lr=0\.7 and .*0\.[12]\b.* contradict"):
        trained(optimizer=optimizer, lr=0.7)
    assert Rates.seen == []


# -- schedules ---------------------------------------------------------------------------------------------------------


def test_a_schedule_by_its_name_starts_again_with_each_task() -> None:
    args = f"--trainer.callbacks={__name__}.Rates --data.scenario class --data.increment 5 --model.epochs_per_task 4"
    schedule = "--model.lr 0.2 --model.lr_scheduler CosineAnnealingLR --model.lr_scheduler.T_max 4"
    assert cli.main([*SMALL, *args.split(), *schedule.split()]) == 0
    expected = [0.1 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]
    assert [rate for _, rate, _ in Rates.seen] == pytest.approx([*expected, *expected])
    # What is written down gives the same run.
    before = list(Rates.seen)
    Rates.seen.clear()
    assert cli.main(["fit", "--config", "runs/dcl/version_0/config.yaml"]) == 0
    assert Rates.seen == before


def rates_of(tmp_path: Path, **values: Any) -> list[float]:
    data = ContinualDataModule("synthetic", increment=5, batch_size=64)
    agent = FineTuning(MLP([8]), lr=0.2, epochs_per_task=3, **values)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, callbacks=[Rates()],
        limit_train_batches=1, limit_val_batches=0, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(agent, datamodule=data)
    return [rate for _, rate, _ in Rates.seen]


def test_a_schedule_goes_on_where_nothing_is_reset(tmp_path: Path) -> None:
    schedule = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    expected = [0.2 * 0.5**epoch for epoch in range(6)]
    assert rates_of(tmp_path, lr_scheduler=schedule, optimizer_reset=False) == pytest.approx(expected)


def test_a_schedule_by_what_it_watches(tmp_path: Path) -> None:
    # No loss is 9 below the one before: after the first epoch without such a one the rate falls.
    watching = partial(
        ReduceLROnPlateau, monitor="train/loss", patience=0, factor=0.1, threshold=9, threshold_mode="abs"
    )
    assert rates_of(tmp_path, lr_scheduler=watching) == pytest.approx([0.2, 0.2, 0.02] * 2)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lr_scheduler": partial(torch.optim.lr_scheduler.ExponentialLR, gamma=1), "milestones": [1]}, "give one of"),
        ({"lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau}, "ReduceLROnPlateau with monitor"),
        ({"optimizer": torch.optim.Adam, "momentum": 0.9}, "model.momentum=0.9: model.optimizer brings"),
    ],
)
def test_what_contradicts_a_schedule_or_an_optimizer_is_refused(
    values: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        rates_of(tmp_path, **values)
