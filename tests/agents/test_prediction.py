"""Predictions: original labels, probabilities, files, lone checkpoints, and export of the network."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dcl_lightning import ContinualDataModule, FineTuning, ICaRL, cli
from dcl_lightning.backbones import MLP
from dcl_lightning.callbacks import PredictionWriter
from dcl_lightning.errors import ConfigurationError
from tests.conformance.small_stream import make_agent, make_data, make_trainer, weights

ROOT = Path(__file__).parent.parent.parent

SMALL = ["--model.epochs_per_task", "1", "--data.increment", "5", "--trainer.accelerator", "cpu"]
SMALL += ["--data.class_order", "[9,8,7,6,5,4,3,2,1,0]"]


def read(path: Path) -> tuple[list[str], list[list[str]]]:
    with path.open() as file:
        head, *lines = csv.reader(file)
    return head, lines


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the command line, whose classes came in another order than ascending."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["fit", "--model", "icarl", *SMALL]) == 0
    return folder / "runs" / "dcl" / "version_0"


def test_predict_of_the_command_line_writes_a_file_in_the_order_of_the_data_set(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    assert cli.main(["predict", "--config", str(run / "config.yaml"), "--ckpt_path", checkpoint]) == 0
    (file,) = tmp_path.rglob("predictions.csv")
    head, lines = read(file)
    assert head == ["sample", "predicted", "label", *(f"p({y})" for y in range(9, -1, -1))]
    assert [int(line[0]) for line in lines] == list(range(360))
    data = ContinualDataModule("digits", class_order=list(range(9, -1, -1)))
    data.setup()
    truth = np.array(data.original_labels)[data.test_targets.numpy()]
    assert [int(line[2]) for line in lines] == truth.tolist()
    hits = np.mean([int(line[1]) for line in lines] == truth)
    assert hits > 0.3  # of ten classes; were ids told in place of labels, next to none would be right
    for line in lines:
        values = [float(v) for v in line[3:]]
        assert sum(values) == pytest.approx(1, abs=1e-4)
        assert head[3 + int(np.argmax(values))] == f"p({line[1]})"


def test_a_checkpoint_alone_predicts_with_labels_of_its_own(run: Path, tmp_path: Path) -> None:
    agent = ICaRL.load_from_checkpoint(run / "checkpoints" / "last.ckpt")
    data = ContinualDataModule("digits")  # whose classes are ordered otherwise
    data.setup()
    images, truth = data.test_inputs, data.test_targets
    loader = DataLoader(TensorDataset(torch.as_tensor(np.asarray(images))), batch_size=50)
    trainer = make_trainer(tmp_path, [PredictionWriter(str(tmp_path))])
    parts = trainer.predict(agent, dataloaders=loader)
    labels = [label for part in parts for label in part.labels]
    assert np.mean(np.array(labels) == truth.numpy()) > 0.3
    _, lines = read(tmp_path / "predictions.csv")
    assert [int(line[0]) for line in lines] == list(range(360))
    assert [int(line[1]) for line in lines] == labels
    assert {line[2] for line in lines} == {""}  # the loader has none


def test_names_of_classes_and_images_as_they_are(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    y = np.array(["cat", "dog"] * 20)
    x = (generator.normal(0, 20, (40, 3, 4, 4)) + np.where(y == "cat", 60, 190)[:, None, None, None]).clip(0, 255)
    images = x.astype(np.uint8)
    data = ContinualDataModule((images, y, images, y), scenario="none", batch_size=4)
    pl.seed_everything(0)
    agent = FineTuning(MLP([16]), data.num_classes, input_spec=data.input_spec, epochs_per_task=8, lr=0.05)
    make_trainer(tmp_path).fit(agent, datamodule=data)
    inputs = torch.from_numpy(images)
    found = make_trainer(tmp_path).predict(agent, dataloaders=DataLoader(inputs, batch_size=40))
    assert found[0].labels == y.tolist()
    assert found[0].probabilities.shape == (40, 2)
    ours = make_trainer(tmp_path).predict(agent, datamodule=data)
    told = {int(i): label for b in ours for i, label in zip(b.sample_ids, b.labels, strict=True)}
    assert [told[i] for i in range(40)] == y.tolist()


def test_classes_not_seen_have_no_probability(tmp_path: Path) -> None:
    data = make_data()
    for kind in ("base", "icarl"):
        agent = make_agent(kind, data)
        make_trainer(tmp_path, max_steps=6).fit(agent, datamodule=data)
        parts = make_trainer(tmp_path).predict(agent, datamodule=data)
        rows = torch.cat([b.probabilities for part in parts for b in part])
        assert torch.all(rows[:, 2:] == 0)
        assert torch.allclose(rows.sum(1), torch.ones(len(rows)))


LONE = """
import sys, torch
from dcl_lightning import ContinualDataModule, ICaRL
agent = ICaRL.load_from_checkpoint(sys.argv[1])
data = ContinualDataModule("digits")
data.setup()
with torch.no_grad():
    print(*agent.predict_step(torch.as_tensor(data.test_inputs), 0).labels)
"""


def test_two_workers_write_one_file_that_says_what_the_checkpoint_alone_does(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("horovod")
    # As a script of a user's, in a process that has imported nothing else.
    (tmp_path / "lone.py").write_text(LONE)
    args = ["predict", "--config", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    done_alone = subprocess.run(
        [sys.executable, "lone.py", args[-1]], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done_alone.returncode == 0, done_alone.stderr
    workers = ["--trainer.strategy", "horovod", "--trainer.devices", "2", "--trainer.default_root_dir", "two"]
    command = [sys.executable, str(ROOT / "cli.py"), *args, *workers, "--trainer.logger", "false"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    _, lines = read(tmp_path / "two" / "predictions.csv")
    assert [int(line[0]) for line in lines] == list(range(360))
    assert [line[1] for line in lines] == done_alone.stdout.split()
    assert not list((tmp_path / "two").glob(".predictions*"))


@pytest.mark.parametrize("kind", [FineTuning, ICaRL])
def test_the_trained_network_is_exported(kind: type[pl.LightningModule], tmp_path: Path) -> None:
    data = make_data()
    agent = make_agent("icarl" if kind is ICaRL else "base", data)
    make_trainer(tmp_path).fit(agent, datamodule=data)
    inputs = torch.randn(3, 1, 4, 4)
    network = nn.Sequential(agent.backbone, agent.head).eval()
    program = torch.export.export(network, (inputs,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "agent.pt2")
    again = torch.export.load(tmp_path / "agent.pt2").module()
    more = torch.randn(7, 1, 4, 4)
    assert torch.allclose(again(more), agent(more), atol=1e-6)
    assert weights(agent).isfinite().all()


def test_a_backbone_given_as_a_module_is_asked_for(tmp_path: Path) -> None:
    data = make_data()
    saver = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    make_trainer(tmp_path, [saver]).fit(make_agent("base", data), datamodule=data)
    with pytest.raises((ConfigurationError, TypeError), match="backbone"):
        FineTuning.load_from_checkpoint(tmp_path / "last.ckpt")
