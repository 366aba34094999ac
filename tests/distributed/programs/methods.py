"""Methods on two workers against one process with the double batch; the warm-up of each task."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from dcl_lightning import ContinualDataModule, FineTuning
from dcl_lightning.agents import short_names
from dcl_lightning.backbones import MLP
from dcl_lightning.callbacks import TaskReport
from dcl_lightning.types import Batch
from tests.distributed.toy import trainer

NAMES = (
    "er", "er_ace", "mir", "scr", "pcr", "derpp", "derpp_task_end", "agem", "gem", "gdumb", "bic", "icarl_online",
    "lwf", "ewc", "si", "simplecil", "slda", "ranpac",
)  # fmt: skip
# Agent, values of its memory, and of itself.
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *((name, {}, {}) for name in NAMES),
    ("derpp", {"execution": "blocking"}, {}),
    ("derpp", {"scope": "global", "execution": "blocking", "num_samples": 54}, {}),
    *((name, {}, {"head": "per_task"}) for name in ("er", "agem", "gdumb")),
    ("er_ace", {}, {"unmet_classes": "open", "head": "cosine"}),
    ("derpp", {}, {"forward": "separate", "head": "cosine", "head_scale": 4.0}),
]


def as_one_process(folder: Path) -> None:
    """Weights and buffers of every method equal those of one process, where what is drawn is the same."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name, memory, own in CASES:
        two, rehearsed = fit(folder, name, 2, memory, own)
        if "scope" in memory:
            # One step older than a local draw, and so not that of one process; all rows of both came with their logits.
            assert rehearsed > 100
            continue
        one, _ = fit(folder, name, 1, memory, own)
        for key, value in one.state_dict().items():
            if value.is_floating_point():
                torch.testing.assert_close(two.state_dict()[key], value, atol=1e-5, rtol=1e-4, msg=f"{name}: {key}")
            else:
                assert torch.equal(two.state_dict()[key], value), f"{name}: {key}"


def halves(folder: Path) -> None:
    """With ``draws: separate`` each term of DER++ is a mean over its own rows of both workers, also of uneven numbers.

    No one process has these halves: where both workers have an odd number of rows, the distance has two more. So each
    step is compared with the formula, over the rows of both.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seen: set[tuple[int, int]] = set()

    def compare(agent: Any, batch: Batch, loss: Tensor, logits: Tensor) -> None:
        n, every = batch.num_new, agent.comm.allgather
        stored = batch.rehearsed.get("logits", logits[:0])
        assert len(stored) == len(batch.targets) - n
        real = batch.weights[:n] > 0
        new, distances, labelled = (
            torch.cat(every(part.detach().double()))
            for part in (
                F.cross_entropy(logits[:n][real], batch.targets[:n][real], reduction="none"),
                (logits[n::2] - stored[::2]).square().mean(1),
                F.cross_entropy(logits[n + 1 :: 2], batch.targets[n + 1 :: 2], reduction="none"),
            )
        )
        expected = new.mean() + sum(
            factor * (part.mean() if len(part) else 0.0) for factor, part in ((0.3, distances), (0.8, labelled))
        )
        torch.testing.assert_close(agent.comm.allreduce(loss.detach(), "mean").double(), expected, atol=1e-5, rtol=1e-4)
        seen.add((len(distances), len(labelled)))

    memory = {"buffer_size": 60, "num_samples": 10}
    fit(folder, "derpp", 2, memory, {"draws": "separate", "alpha": 0.3, "beta": 0.8}, compare)
    assert {(0, 0), (10, 10)} <= seen
    assert any(a > b for a, b in seen), "an odd number on some worker"


def fit(
    folder: Path,
    name: str,
    workers: int,
    memory: dict[str, Any],
    own: dict[str, Any] | None = None,
    look: Callable[[Any, Batch, Tensor, Tensor], None] | None = None,
) -> tuple[Any, int]:
    """Return the agent, and how many rows came with logits that say whose they are (of a global memory)."""
    pl.seed_everything(0, verbose=False)
    g = torch.Generator().manual_seed(0)
    # One sample more in the first task: of it the workers' memories hold different numbers.
    y = torch.cat([torch.arange(6).repeat(9), torch.tensor([0])])
    x = torch.randn(6, 1, 4, 4, generator=g)[y] * 2 + torch.randn(len(y), 1, 4, 4, generator=g)
    own = own or {}
    # Without augmentation both views of SCR would be the same.
    data = ContinualDataModule(
        (x, y, x.clone(), y.clone()), increment=2, batch_size=8 // workers, seed=0,
        augment=name in ("scr", "pcr"),  # which makes two views of each sample
    )  # fmt: skip
    kind = getattr(short_names, name)
    options: dict[str, Any] = {"epochs_per_task": 2}
    if kind.rehearses:
        # Room for every sample, and all are drawn; in one epoch each comes once.
        options = {"epochs_per_task": 1, "rehearsal": {"buffer_size": 216, "num_samples": 108} | memory}
    if name == "mir":
        options["num_rehearsed"] = 6 // workers
    if name == "ranpac":
        options["projection_dim"] = 12
    agent = kind(MLP([8]), data.num_classes, lr=0.05, input_spec=data.input_spec, **options | own)
    inner, rehearsed = agent.training_loss, 0

    def labelled(batch: Batch) -> tuple[Tensor, Tensor]:
        """Make the first logit of a stored row say whose it is."""
        nonlocal rehearsed
        if batch.rehearsed:
            assert torch.equal(batch.rehearsed["logits"][:, 0].long(), batch.sample_ids[batch.num_new :])
            rehearsed += len(batch.targets) - batch.num_new
        found: tuple[Tensor, Tensor] = inner(batch)
        agent._logits[:, 0] = batch.sample_ids[: batch.num_new]
        return found

    def looked_at(batch: Batch) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = inner(batch)
        assert look is not None
        look(agent, batch, *found)
        return found

    if "scope" in memory:
        agent.training_loss = labelled
    elif look is not None:
        agent.training_loss = looked_at
    pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0, devices=workers,
        callbacks=[TaskReport(show_table=False)], default_root_dir=folder,
        strategy="horovod" if workers > 1 else "auto",
    ).fit(agent, datamodule=data)  # fmt: skip
    assert agent.comm.size == workers
    return agent, rehearsed


class Rates(pl.Callback):
    """Records the learning rate of each step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def warm_up() -> None:
    """Tasks of 8 and 16 samples: two and four steps an epoch, in which the rate rises from one worker's to two's."""
    y = torch.tensor([0] * 8 + [1] * 16)
    x = torch.rand(24, 1, 2, 2)
    data = ContinualDataModule((x, y, x, y), increment=1, batch_size=2)
    agent = FineTuning(
        MLP([4]), 2, input_spec=data.input_spec, epochs_per_task=2, lr=0.1, scale_lr="linear", warmup_epochs=1
    )
    found = Rates()
    trainer("horovod", max_epochs=-1, callbacks=[found]).fit(agent, datamodule=data)
    expected = [0.1 + 0.1 * k / n if k < n else 0.2 for n in (2, 4) for k in range(1, 2 * n + 1)]
    torch.testing.assert_close(torch.tensor(found.rates), torch.tensor(expected))
