"""Two Horovod workers learn what one process learns with the double batch, where what is drawn is the same."""

from __future__ import annotations

from tests.distributed.workers import assert_ended_well, run_workers

CHECKS = """
import warnings
import lightning.pytorch as pl, torch
from dcl_lightning import ContinualDataModule
from dcl_lightning.agents import short_names
from dcl_lightning.backbones import MLP
from dcl_lightning.callbacks import TaskReport

torch.set_num_threads(1)
warnings.simplefilter("ignore")
g = torch.Generator().manual_seed(0)
# One sample more in the first task: of it the workers' memories hold different numbers.
y = torch.cat([torch.arange(6).repeat(9), torch.tensor([0])])
x = torch.randn(6, 1, 4, 4, generator=g)[y] * 2 + torch.randn(len(y), 1, 4, 4, generator=g)

def fit(name, workers, **memory):
    pl.seed_everything(0, verbose=False)
    data = ContinualDataModule((x, y, x.clone(), y.clone()), increment=2, batch_size=8 // workers, seed=0)
    kind = getattr(short_names, name)
    options = {}
    if kind.rehearses:
        # Room for every sample, and all are drawn; in one epoch each comes once.
        options = {"rehearsal": {"buffer_size": 216, "num_samples": 108} | memory}
    epochs = 1 if kind.rehearses else 2
    agent = kind(MLP([8]), data.num_classes, epochs_per_task=epochs, lr=0.05, input_spec=data.input_spec, **options)
    # The first logit of a stored row says whose it is.
    inner = agent.training_loss
    def loss(batch):
        if batch.rehearsed and "scope" in memory:
            assert torch.equal(batch.rehearsed["logits"][:, 0].long(), batch.sample_ids[batch.num_new :])
            told.append(len(batch.targets) - batch.num_new)
        found = inner(batch)
        if "scope" in memory:
            agent._logits[:, 0] = batch.sample_ids[: batch.num_new]
        return found
    agent.training_loss = loss
    place = {"strategy": "horovod", "devices": 2} if workers > 1 else {"devices": 1}
    pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        callbacks=[TaskReport(show_table=False)], default_root_dir=FOLDER, **place,
    ).fit(agent, datamodule=data)
    assert agent.comm.size == workers
    return agent

told = []
NAMES = ("er", "er_ace", "derpp", "derpp_task_end", "agem", "gem", "gdumb", "bic", "lwf", "ewc", "si")
CASES = [(name, {}) for name in NAMES] + [("derpp", {"execution": "blocking"})]
CASES += [("derpp", {"scope": "global", "execution": "blocking", "num_samples": 54})]
for name, memory in CASES:
    told.clear()
    two = fit(name, 2, **memory)
    if "scope" in memory:
        # One step older than a local draw, and so not that of one process; all rows of both came with their logits.
        assert sum(told) > 100, told
        continue
    one = fit(name, 1, **memory)
    for key, value in one.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(two.state_dict()[key], value, atol=1e-5, rtol=1e-4, msg=f"{name}: {key}")
"""


def test_methods_do_not_depend_on_the_number_of_workers(tmp_path) -> None:
    assert_ended_well(run_workers(f"FOLDER = {str(tmp_path)!r}\n{CHECKS}", 2, deadline=240))


def test_each_task_warms_up_by_its_own_number_of_steps() -> None:
    assert_ended_well(run_workers(WARM_UP, 2))


WARM_UP = """
import torch, lightning.pytorch as pl
from tests.distributed.toy import trainer
from dcl_lightning import ContinualDataModule, FineTuning
from dcl_lightning.backbones import MLP

# Tasks of 8 and 16 samples: two and four steps an epoch, by which the rate rises from one worker's to two workers'.
y = torch.tensor([0] * 8 + [1] * 16)
data = ContinualDataModule((torch.rand(24, 1, 2, 2), y) * 2, increment=1, batch_size=2)
agent = FineTuning(
    MLP([4]), 2, input_spec=data.input_spec, epochs_per_task=2, lr=0.1, scale_lr="linear", warmup_epochs=1
)
rates = []

class Look(pl.Callback):
    def on_before_optimizer_step(self, trainer, agent, optimizer):
        rates.append(optimizer.param_groups[0]["lr"])

trainer("horovod", max_epochs=-1, callbacks=[Look()]).fit(agent, datamodule=data)
expected = [0.1 + 0.1 * k / n if k < n else 0.2 for n in (2, 4) for k in range(1, 2 * n + 1)]
torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected))
"""
