"""Every agent that repeats itself ends alike under horovod and under ddp, on the same two processes."""

from __future__ import annotations

from tests.distributed.workers import assert_ended_well, run_workers

CHECKS = """
import os
rank = os.environ["HOROVOD_RANK"]
os.environ |= {
    "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ["TORCH_PORT"],
}
import logging, warnings
import lightning.pytorch as pl, torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from dcl_lightning import ContinualDataModule
from dcl_lightning.agents import short_names
from dcl_lightning.backbones import MLP
from dcl_lightning.callbacks import TaskReport

torch.set_num_threads(1)
warnings.simplefilter("ignore")
g = torch.Generator().manual_seed(0)
y = torch.arange(6).repeat(9)
x = torch.randn(6, 1, 4, 4, generator=g)[y] * 2 + torch.randn(len(y), 1, 4, 4, generator=g)

def fit(kind, strategy):
    pl.seed_everything(0, verbose=False)
    data = ContinualDataModule((x, y, x.clone(), y.clone()), increment=2, batch_size=4, seed=0)
    memory = {"rehearsal": {"buffer_size": 12}} if kind.rehearses else {}
    if hasattr(kind, "memory"):
        memory["rehearsal"] |= {"num_samples": 3}
    elif issubclass(kind, short_names.NIL):
        memory["rehearsal"] |= {"num_candidates": 3, "num_samples": 3}
    agent = kind(MLP([8]), data.num_classes, epochs_per_task=2, lr=0.05, input_spec=data.input_spec, **memory)
    trainer = pl.Trainer(
        accelerator="cpu", strategy=strategy, devices=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        callbacks=[TaskReport(show_table=False)], default_root_dir=FOLDER,
    )
    trainer.fit(agent, datamodule=data)
    assert trainer.world_size == 2
    return torch.nn.utils.parameters_to_vector(agent.parameters()).detach(), agent.clock.matrix.compute()

def ddp():
    return DDPStrategy(cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo")

names = ("base", "icarl", "icarl_v1", "nil", "nil_v1", "nil_v3", "nil_v4", "nil_global")
for name in (*names, "derpp", "agem", "gem", "si", "bic"):
    kind = getattr(short_names, name)
    (ours, matrix), (theirs, other) = fit(kind, "horovod"), fit(kind, ddp())
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6, msg=name)
    torch.testing.assert_close(matrix, other, atol=0, rtol=0, equal_nan=True, msg=name)
"""


def test_agents_end_alike(tmp_path) -> None:
    assert_ended_well(run_workers(f"FOLDER = {str(tmp_path)!r}\n{CHECKS}", 2, deadline=240))
