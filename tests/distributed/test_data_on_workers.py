"""Data of two workers of a host: copied by one of them, references like rows, under horovod and under ddp."""

from __future__ import annotations

from pathlib import Path

from tests.data import small_sets
from tests.distributed.workers import assert_ended_well, run_workers

CHECKS = """
import os
rank = os.environ["HOROVOD_RANK"]
os.environ |= {
    "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ["TORCH_PORT"],
}
import shutil, warnings
from pathlib import Path
import lightning.pytorch as pl, torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from dcl_lightning import NIL, ContinualDataModule
from dcl_lightning.backbones import MLP
from dcl_lightning.callbacks import TaskReport

torch.set_num_threads(1)
warnings.simplefilter("ignore")
inner, here = shutil.copyfile, Path(FOLDER)

def copyfile(source, target):
    with open(here / "copied", "a") as file:
        file.write(f"{source}\\n")
    inner(source, target)

shutil.copyfile = copyfile

def fit(strategy, stage_to=None, **memory):
    pl.seed_everything(0, verbose=False)
    data = ContinualDataModule(
        "imagenet", root=FOLDER, stage_to=stage_to and str(here / stage_to), batch_size=4, num_workers=0,
        source_options={"num_classes": 4, "size": 8},
    )
    agent = NIL(
        MLP([8]), 4, {"buffer_size": 12, "num_candidates": 3, "num_samples": 3, **memory}, epochs_per_task=2, lr=0.01,
        input_spec=data.input_spec,
    )
    losses, loss_of = [], agent.training_loss
    def spy(batch):
        loss, logits = loss_of(batch)
        losses.append(loss.detach().clone())
        return loss, logits
    agent.training_loss = spy
    pl.Trainer(
        accelerator="cpu", strategy=strategy, devices=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        callbacks=[TaskReport(show_table=False)], default_root_dir=FOLDER,
    ).fit(agent, datamodule=data)
    assert data.train_inputs.folder.startswith(str(here / stage_to) if stage_to else str(here / "ImageNet"))
    return torch.stack(losses), torch.nn.utils.parameters_to_vector(agent.parameters()).detach()

def same(ours, theirs):
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), (ours, theirs)

ddp = DDPStrategy(cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo")
plain = fit("horovod")
same(fit("horovod", "a", row_format="index"), plain)
torch.testing.assert_close(fit(ddp, "b", execution="blocking"), plain, atol=1e-5, rtol=1e-5)
everyones = {"scope": "global", "execution": "blocking"}
same(fit("horovod", "a", row_format="index", **everyones), fit("horovod", **everyones))
"""


def test_one_worker_copies_and_references_are_rows(tmp_path: Path) -> None:
    base = tmp_path / "ImageNet"
    for split, count in (("train", 6), ("val", 1)):
        for name in small_sets.SYNSETS:
            for i in range(count):
                small_sets.image(base / split / name / f"{i}.png", (12 + i, 20 - i))
    assert_ended_well(run_workers(f"FOLDER = {str(tmp_path)!r}\n{CHECKS}", 2, deadline=240))
    copied = (tmp_path / "copied").read_text().split()
    there = [str(path) for path in base.rglob("*.png")]
    # Once for each of the two places, whichever worker was asked first.
    assert sorted(copied) == sorted(there * 2)
