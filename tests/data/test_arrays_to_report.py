"""Arrays with unusual class orders, labels, splits and types, from the data module to the report."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from dcl_lightning import NIL, ContinualDataModule, FineTuning
from dcl_lightning.backbones import MLP
from dcl_lightning.data import scenarios
from dcl_lightning.errors import ConfigurationError, DataError
from dcl_lightning.memory.config import RehearsalConfig
from tests.conformance.rehearsal_runs import stored_rows
from tests.data import small_sets

T10 = np.repeat(np.arange(10), 4)
# Images that say what they show: so an agent that learns is right about all of them.
PICTURES = np.zeros((40, 8, 8, 3), dtype=np.uint8)
PICTURES[np.arange(40), T10 // 5, T10 % 5] = 255


def stream(x=PICTURES, y=T10, x_test=None, y_test=None, **kwargs) -> ContinualDataModule:
    arrays = (x, y, x if x_test is None else x_test, y if y_test is None else y_test)
    return ContinualDataModule(arrays, **({"batch_size": 4, "augment": False} | kwargs))


def fit(folder: Path, data: ContinualDataModule, epochs: int = 1, lr: float = 0.1):
    """Return the trainer, the agent and the report of a fit."""
    pl.seed_everything(0)
    agent = FineTuning(MLP([32]), data.num_classes, data.input_spec, epochs_per_task=epochs, lr=lr, momentum=0.9)
    trainer = pl.Trainer(
        default_root_dir=folder, max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(agent, datamodule=data)
    return trainer, agent, json.loads((folder / "report" / "accuracy_matrix.json").read_text())


def test_last_task_smaller_than_the_increment(tmp_path: Path) -> None:
    _, _, report = fit(tmp_path, stream(increment=7))
    assert report["task_classes"] == [list(range(7)), [7, 8, 9]]
    assert [len(row) for row in report["matrix"]] == [2, 2]
    assert report["matrix"][0][1] is None
    assert None not in (report["matrix"][0][0], *report["matrix"][1])


@pytest.mark.parametrize("increment", [[5, 4], [5, 0, 5], [12, -2], 0, -1])
def test_no_training_with_a_wrong_increment(increment) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.increment.*10"):
        stream(increment=increment)


def test_labels_given_as_text_are_numbers_and_not_sorted_as_text() -> None:
    labels = np.repeat(np.arange(12), 3)
    assert scenarios.order_classes(labels, [str(y) for y in range(11, -1, -1)]) == list(range(11, -1, -1))
    with pytest.raises(ConfigurationError, match="whole numbers"):
        scenarios.order_classes(labels, ["one", *map(str, range(1, 12))])


def test_predictions_and_reports_are_original_labels(tmp_path: Path) -> None:
    data = stream(class_order=list(range(9, -1, -1)), increment=5, concatenate_tasksets=True, batch_size=20)
    trainer, agent, report = fit(tmp_path, data, epochs=12, lr=0.2)
    assert [sorted(classes) for classes in report["task_classes"]] == [[5, 6, 7, 8, 9], [0, 1, 2, 3, 4]]
    assert report["matrix"][1] == [1.0, 1.0]
    predicted = trainer.predict(agent, datamodule=data)
    tested = [T10[data.test_loaders(1)[task].indices.numpy()].tolist() for task in range(2)]
    assert [[label for batch in part for label in batch.labels] for part in predicted] == tested
    assert set(tested[0]) == {5, 6, 7, 8, 9}


def test_a_task_without_test_samples_is_empty_in_the_matrix(tmp_path: Path) -> None:
    keep = ~np.isin(T10, [3, 4, 5])
    data = stream(x_test=PICTURES[keep], y_test=T10[keep], increment=2)
    with pytest.warns(UserWarning, match=r"tasks without test samples: \[2\]"):
        _, _, report = fit(tmp_path, data)
    assert report["task_classes"] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert [[value is not None for value in row] for row in report["matrix"]] == [
        [j <= i and j != 2 for j in range(5)] for i in range(5)
    ]
    assert report["average_accuracy"] == pytest.approx(np.mean([v for v in report["matrix"][-1] if v is not None]))


@pytest.mark.parametrize("labels", [[10, 20, 30], ["ten", "twenty", "thirty"]])
def test_labels_with_gaps_and_names_are_in_the_report(labels: list, tmp_path: Path) -> None:
    _, _, report = fit(tmp_path, stream(PICTURES[:12], np.repeat(labels, 4), increment=1))
    assert report["task_classes"] == [[label] for label in sorted(labels)]


@pytest.mark.parametrize("labels", [T10.tolist(), torch.from_numpy(T10), T10.astype(np.float64), T10.astype(np.int16)])
def test_a_batch_has_labels_of_one_type(labels) -> None:
    for scenario in ("class", "domain"):
        data = stream(y=labels, scenario=scenario)
        data.setup()
        assert {batch.targets.dtype for batch in data.train_dataloader()} == {torch.int64}


def test_float_images_are_not_turned_black(tmp_path: Path) -> None:
    data = stream((PICTURES / 255).astype(np.float32), augment=True)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert float(data.prepare_batch(batch, train=False, epoch=0).inputs.max()) > 0.9


def test_grey_arrays_for_a_network_of_three_channels() -> None:
    data = stream(PICTURES[..., 0])
    assert data.input_spec == (1, 8, 8)
    with pytest.raises(ConfigurationError, match=r"in_channels=3, but the data have 1 channels"):
        FineTuning(MLP(in_channels=3, input_size=8), data.num_classes, data.input_spec)


def test_accents_through_continuums_class_of_folders(tmp_path: Path) -> None:
    for name in ("chat", "hündin"):
        small_sets.image(tmp_path / "ifé" / name / "0.png", (8, 8))
    with pytest.raises(DataError, match=r"continuum keeps.*ifé.*data\.dataset=folder"):
        ContinualDataModule("continuum.datasets.ImageFolderDataset", root=str(tmp_path / "ifé"), increment=1)
    with pytest.raises(DataError, match="nowhere"):
        ContinualDataModule("continuum.datasets.ImageFolderDataset", root=str(tmp_path / "nowhere"), increment=1)
    assert not (tmp_path / "nowhere").exists()


def test_hold_outs_depend_on_the_seed_alone_and_never_enter_a_memory(tmp_path: Path) -> None:
    data = stream(increment=2, val_ratio=0.1, augment=True, seed=3)
    pl.seed_everything(0)
    config = RehearsalConfig(buffer_size=40, num_candidates=4, num_samples=4)
    agent = NIL(MLP([8]), data.num_classes, config, input_spec=data.input_spec, epochs_per_task=2)
    trainer = pl.Trainer(
        default_root_dir=tmp_path, max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(agent, datamodule=data)
    held = torch.cat([loader.indices for loader in data.val_dataloader()])
    assert len(held) == 10
    other = stream(increment=2, val_ratio=0.1, seed=3)
    other.setup()
    other.task_id = 4
    assert torch.equal(torch.cat([loader.indices for loader in other.val_dataloader()]), held)
    assert not any(loader.augment or loader.train for loader in data.val_dataloader())
    stored = stored_rows(agent)["sample_ids"]
    assert len(stored) > 10
    assert not torch.isin(held, stored).any()
    kept = torch.cat([data.train_indices(task) for task in range(5)])
    assert not torch.isin(held, kept).any()
    assert sorted(torch.cat([held, kept]).tolist()) == list(range(40))


def test_task_ids_from_one() -> None:
    ids = np.repeat([1, 2], 20)
    with pytest.raises(ConfigurationError, match=r"task 0 has no training samples: number them from 0"):
        ContinualDataModule((PICTURES, T10, ids, PICTURES, T10, ids), scenario="given").setup()
    data = ContinualDataModule((PICTURES, T10, ids - 1, PICTURES, T10, ids - 1), scenario="given")
    data.setup()
    assert [len(data.train_indices(task)) for task in range(data.num_tasks)] == [20, 20]
