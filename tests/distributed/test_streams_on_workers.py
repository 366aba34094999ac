"""Streams on two real Horovod workers: what each of them keeps, and that both have the same tasks."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.distributed.workers import assert_ended_well, run_workers

RUN = """
import lightning.pytorch as pl, torch
from pathlib import Path
from dcl_lightning import ContinualDataModule, NIL
from dcl_lightning.backbones import MLP

torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
y = torch.arange(6).repeat(8)[:-1]
x = torch.randn(6, 1, 4, 4, generator=g)[y] * 2 + torch.randn(len(y), 1, 4, 4, generator=g)
done = {}
for sharding, update in (("fixed", "step"), ("fixed", "task_end"), ("epoch", "step")):
    data = ContinualDataModule((x, y, x.clone(), y.clone()), scenario="blurry", blurriness=0.3, val_ratio=0.2,
                               batch_size=3, sharding=sharding, class_order="random", seed=1)
    pl.seed_everything(0)
    agent = NIL(MLP([8]), 6, {"buffer_size": 36, "num_samples": 2, "policy": "class_balanced", "update": update},
                epochs_per_task=2, input_spec=data.input_spec)
    met, inner = [], agent.training_loss
    def spy(batch, met=met, inner=inner):
        new = batch.sample_ids[: batch.num_new]
        met.append(new[batch.weights[: batch.num_new] > 0])
        return inner(batch)
    agent.training_loss = spy
    trainer = pl.Trainer(strategy="horovod", devices=2, accelerator="cpu", logger=False, default_root_dir=FOLDER,
                         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                         num_sanity_val_steps=0)
    trainer.fit(agent, datamodule=data)
    buffer = agent.rehearsal.manager.buffer
    rows = buffer.store.gather(buffer.slots_at(torch.arange(len(buffer))))
    done[sharding, update] = {
        "stored": rows["sample_ids"], "met": torch.cat(met), "parts": data.stream.train_parts,
        "held": torch.nonzero(data.stream.held).flatten(), "labels": data.original_labels,
        "weights": torch.nn.utils.parameters_to_vector(agent.parameters()).detach().clone(),
        "matrix": agent.clock.matrix.compute(),
    }
torch.save(done, Path(FOLDER) / f"{trainer.global_rank}.pt")
"""


def test_fixed_shards_make_memories_disjoint(tmp_path: Path) -> None:
    assert_ended_well(run_workers(f"FOLDER = {str(tmp_path)!r}\n{RUN}", 2))
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))

    def both(key, name):
        return [set(worker[key][name].tolist()) for worker in (one, other)]

    trained = set(range(47)) - both(("fixed", "step"), "held")[0]
    for key in one:
        for name in ("parts", "held", "weights"):
            assert torch.equal(one[key][name], other[key][name]), (key, name)
        assert one[key]["labels"] == other[key]["labels"]
        assert torch.isfinite(one[key]["matrix"]).sum() == 6
        met = both(key, "met")
        assert met[0] | met[1] == trained
        fixed = key[0] == "fixed"
        assert bool(met[0] & met[1]) is not fixed
        stored = both(key, "stored")
        assert all(stored[rank] <= met[rank] for rank in range(2))
        assert all(stored)
        # What is met by one worker in one epoch and by the other in the next is stored by both.
        assert bool(stored[0] & stored[1]) is not fixed
