"""Jobs under fsdp2: their checkpoints, evaluation with uneven batches, and what else looks at whole weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from dcl_lightning import ContinualDataModule
from dcl_lightning.agents import short_names
from dcl_lightning.backbones import MLP
from dcl_lightning.callbacks import TaskReport
from dcl_lightning.comm import own_part
from dcl_lightning.errors import CheckpointError
from tests.distributed.programs.place import elastic_ddp, elastic_fsdp2, rank, size
from tests.distributed.programs.strategies import weights_of

_SEEN = {"scope": "global", "buffer_size": 24, "num_samples": 5}
ROWS = 12  # of a step, over all workers


def checkpoints(folder: Path) -> None:
    """What fsdp2 saves goes on bit for bit, also under ddp, and what ddp saves goes on under fsdp2."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    options: dict[str, Any] = {"rehearsal": _SEEN, "train_classes": "seen", "momentum": 0.9, "milestones": [1]}
    agent, ended = fit(folder / "fsdp2", "derpp", elastic_fsdp2(), options)
    assert own_part(agent.head.weight).shape == (3, 8), "each worker has its half"
    _, expected = fit(folder / "ddp", "derpp", elastic_ddp(), options)
    _close(ended, expected)
    saved = folder / "fsdp2" / "7.ckpt"
    (weights,), (memories,) = (list(Path(f"{saved}.{kind}").iterdir()) for kind in ("weights", "memory"))
    for files in weights, memories:
        assert {file.name for file in files.iterdir()} == {"rank_0", "rank_1"}
    _, again = fit(folder / "again", "derpp", elastic_fsdp2(), options, saved)
    assert torch.equal(again, ended)
    _close(fit(folder / "to_ddp", "derpp", elastic_ddp(), options, saved)[1], expected)
    _close(fit(folder / "to_fsdp2", "derpp", elastic_fsdp2(), options, folder / "ddp" / "7.ckpt")[1], expected)
    with pytest.raises(CheckpointError, match="save_distributed_checkpoint=False"):
        short_names.derpp.load_from_checkpoint(saved, backbone=MLP([8]))
    fit(folder / "whole", "derpp", elastic_fsdp2(apart=False), options)
    assert not Path(f"{folder}/whole/7.ckpt.weights").exists()
    loaded = short_names.derpp.load_from_checkpoint(folder / "whole" / "last.ckpt", backbone=MLP([8]))
    assert torch.equal(weights_of(loaded), ended)
    broken = weights / f"rank_{size() - 1}"
    agent.comm.barrier()
    if rank() == 0:
        broken.write_bytes(broken.read_bytes()[:-1] + b"x")
    agent.comm.barrier()
    for number, strategy in enumerate((elastic_fsdp2(), elastic_ddp())):  # on both workers alike
        with pytest.raises(CheckpointError, match="is damaged"):
            fit(folder / f"damaged_{number}", "derpp", strategy, options, saved)


def part(folder: Path, number: int) -> None:
    """One part of a job of iCaRL that goes on with other numbers of workers, and in the end as one process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    options = {"rehearsal": {"buffer_size": 36}, "momentum": 0.9}
    before = folder / str(number - 1) / f"{4 * number}.ckpt" if number else None
    if size() > 1:
        fit(folder / str(number), "icarl", elastic_fsdp2(), options, before)
        return
    _, ended = fit(folder / str(number), "icarl", "auto", options, before)
    _close(ended, fit(folder / "undisturbed", "icarl", "auto", options)[1])


def _close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def fit(
    folder: Path, name: str, strategy: str | Strategy, options: dict[str, Any], path: Path | None = None
) -> tuple[Any, Tensor]:
    """Return agent and weights; a checkpoint of each step is in the folder."""
    pl.seed_everything(0, verbose=False)
    g = torch.Generator().manual_seed(0)
    y = torch.arange(6).repeat(10)
    x = torch.randn(6, 1, 4, 4, generator=g)[y] * 2 + torch.randn(len(y), 1, 4, 4, generator=g)
    data = ContinualDataModule(
        # One worker has a batch of evaluation more than another.
        (x, y, x[:55].clone(), y[:55].clone()), increment=2, batch_size=ROWS // size(), eval_batch_size=3, seed=0,
        validate_on="test", select_on_test=True,
    )  # fmt: skip
    torch.manual_seed(rank())  # the job's weights are worker 0's
    agent = getattr(short_names, name)(
        MLP([8]), data.num_classes, lr=0.05, input_spec=data.input_spec, epochs_per_task=2, **options
    )
    saver = ModelCheckpoint(
        folder, "{step}", every_n_train_steps=1, save_top_k=-1, save_last=True, auto_insert_metric_name=False
    )
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, devices=size(), callbacks=[TaskReport(show_table=False), saver],
        default_root_dir=folder, strategy=strategy, gradient_clip_val=0.5,
    )  # fmt: skip
    trainer.fit(agent, datamodule=data, ckpt_path=path)
    weights = weights_of(agent)
    tested = trainer.test(agent, data, verbose=False)[0]
    assert tested["test/acc"] == pytest.approx(trainer.validate(agent, data, verbose=False)[0]["val/acc"])
    return agent, weights
