"""Copies of agents, data modules and trainers, before and after a fit, as with plain Lightning."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dcl_lightning import ER
from dcl_lightning.backbones import MLP
from tests.conformance.rehearsal_runs import buffer_of, make_nil, memory_state, same
from tests.conformance.small_stream import make_agent, make_data, make_trainer, weights


def make(name: str, data: Any, folder: Path) -> Any:
    if name == "er":
        options = {"buffer_size": 12, "num_samples": 3, "execution": "blocking", "row_format": "index"}
        return ER(MLP([8]), data.num_classes, rehearsal=options, input_spec=data.input_spec)
    if name == "nil in a folder":
        return make_nil(data, storage=str(folder / "rows"))
    return make_agent(name, data)


def saved(agent: Any) -> Any:
    file = io.BytesIO()
    torch.save(agent, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(agent: Any) -> Any:
    return pickle.loads(pickle.dumps(agent))


@pytest.mark.parametrize("name", ["base", "er", "nil in a folder", "icarl"])
def test_copies_before_and_after_a_fit(tmp_path: Path, name: str) -> None:
    data = make_data()
    agent = make(name, data, tmp_path)
    for copied in (copy.deepcopy, pickled, saved):
        assert torch.equal(weights(copied(agent)), weights(agent))
        assert copied(data).num_tasks == 3
    trainer = make_trainer(tmp_path, limit_val_batches=0)
    trainer.fit(agent, datamodule=data)

    for copied in (copy.deepcopy, pickled, saved):
        twin = copied(agent)
        assert torch.equal(weights(twin), weights(agent))
        assert same(twin.clock.matrix.compute().nan_to_num(-1), agent.clock.matrix.compute().nan_to_num(-1))
        if name in ("er", "nil in a folder"):
            assert same(memory_state(twin.rehearsal.manager), memory_state(agent.rehearsal.manager))
            # Rows of its own, also where they lie in a file.
            buffer_of(twin).store.insert(torch.tensor([0]), buffer_of(twin).store.gather(torch.tensor([1])))
            assert not same(memory_state(twin.rehearsal.manager), memory_state(agent.rehearsal.manager))
    # The trainer comes along, as it does with Lightning's own data modules.
    other = copy.deepcopy(data)
    assert other.trainer is not trainer
    assert copy.deepcopy(trainer).current_epoch == trainer.current_epoch
    assert torch.equal(pickle.loads(pickle.dumps(data)).train_targets, data.train_targets)
    # Twins learn the same.
    twin = copy.deepcopy(agent)
    for one, its_data in ((agent, data), (twin, copy.deepcopy(data))):
        torch.manual_seed(1)
        make_trainer(tmp_path, limit_val_batches=0).fit(one, datamodule=its_data)
    assert torch.equal(weights(twin), weights(agent))


def test_a_fitted_agent_holds_no_data_and_no_threads(tmp_path: Path) -> None:
    data = make_data()
    agent = make("er", data, tmp_path)
    make_trainer(tmp_path, limit_val_batches=0).fit(agent, datamodule=data)
    inputs = data.train_inputs.data_ptr()

    found: list[object] = []

    class Looks(pickle.Pickler):
        def persistent_id(self, part: object) -> None:
            if part is data or (isinstance(part, torch.Tensor) and part.data_ptr() == inputs):
                found.append(part)

    Looks(io.BytesIO()).dump(agent)
    assert found == []
    assert not [t for t in threading.enumerate() if t.name.startswith("rehearsal")]
    assert not [name for name in {**vars(agent), **vars(data)} if name.startswith("on_")]
