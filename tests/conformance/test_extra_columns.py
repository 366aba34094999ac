"""Extra columns that an agent stores with a sample stay with it for every execution of the memory's work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from dcl_lightning.types import StoresExtraColumns
from tests.conformance.agents import make
from tests.conformance.small_stream import make_data, make_trainer

MEMORIES = {
    "inline": {},
    "blocking": {"execution": "blocking"},
    "device": {"execution": "blocking", "prefetch": "device"},
    "batch": {"execution": "blocking", "prefetch": "batch"},
    "nonblocking": {"execution": "nonblocking"},
    "global": {"scope": "global", "execution": "blocking"},
    "index": {"row_format": "index"},
    "augmented": {"row_format": "augmented"},
    "folder": {"storage": "rows"},
    "task_end": {"policy": "class_balanced", "update": "task_end"},
    "task_end, index": {"policy": "class_balanced", "update": "task_end", "row_format": "index"},
}


def told(agent) -> list[int]:
    """Let stored logits say whose they are; return how many rows each step had, once they said it rightly."""
    rows: list[int] = []
    inner, evaluated = agent.training_loss, agent.columns_of

    def ids(batch) -> torch.Tensor:
        return batch.sample_ids[: batch.num_new, None].float().expand(-1, agent.num_classes)

    def training_loss(batch):
        if batch.rehearsed:
            assert torch.equal(batch.rehearsed["logits"][:, 0].long(), batch.sample_ids[batch.num_new :])
            rows.append(len(batch.rehearsed["logits"]))
        found = inner(batch)
        agent.columns_of_step = lambda: {"logits": ids(batch)}
        return found

    def columns_of(batch):
        assert not agent.training
        assert evaluated(batch)["logits"].shape == (len(batch.targets), agent.num_classes)
        return {"logits": ids(batch)}

    agent.training_loss, agent.columns_of = training_loss, columns_of
    return rows


@pytest.mark.parametrize("name", MEMORIES)
def test_rows_come_back_with_their_own_columns(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = make_data(batch_size=5)  # the last batch of a task is shorter
    agent = make("derpp", data, memory=MEMORIES[name], lr=1e-4)  # ids are large logits
    assert isinstance(agent, StoresExtraColumns)
    rows = told(agent)
    make_trainer(tmp_path, limit_val_batches=0).fit(agent, datamodule=data)
    assert sum(rows) == agent.clock.samples_seen["rehearsed"] > 12
    assert agent.training


def test_columns_are_in_the_checkpoint_with_what_was_drawn(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    data = make_data(batch_size=5)
    agent = make("derpp", data, memory={"execution": "blocking"}, lr=1e-4)
    told(agent)
    make_trainer(tmp_path, [saver], limit_val_batches=0).fit(agent, datamodule=data)
    again, data = make("derpp", data, memory={"execution": "blocking"}, lr=1e-4), make_data(batch_size=5)
    rows = told(again)
    make_trainer(tmp_path, limit_val_batches=0).fit(again, datamodule=data, ckpt_path=tmp_path / "step=4.ckpt")
    assert rows


def test_the_logits_are_those_of_the_step(tmp_path: Path) -> None:
    data = make_data(batch_size=5)
    agent = make("der", data, memory={"buffer_size": 42})
    seen: dict[int, torch.Tensor] = {}
    inner = agent.training_loss

    def training_loss(batch):
        for logits, sample in zip(batch.rehearsed.get("logits", []), batch.sample_ids[batch.num_new :], strict=False):
            assert torch.equal(logits, seen[int(sample)])
        found = inner(batch)
        for logits, sample in zip(found[1].detach(), batch.sample_ids[: batch.num_new], strict=False):
            seen[int(sample)] = logits.clone()
        return found

    agent.training_loss = training_loss
    make_trainer(tmp_path, limit_val_batches=0).fit(agent, datamodule=data)
    assert len(seen) == 42


def test_a_step_that_is_left_out_stores_nothing(tmp_path: Path) -> None:
    data = make_data(batch_size=5)
    agent = make("derpp", data, memory={"buffer_size": 42}, lr=1e-4)
    told(agent)
    trained: set[int] = set()
    inner = agent.training_step

    def training_step(batch, batch_idx):
        if batch_idx == 1:
            return None
        trained.update(batch.sample_ids[: batch.num_new].tolist())
        return inner(batch, batch_idx)

    agent.training_step = training_step
    make_trainer(tmp_path, limit_val_batches=0).fit(agent, datamodule=data)
    assert set(agent.rehearsal.manager.memory_rows().sample_ids.tolist()) == trained
