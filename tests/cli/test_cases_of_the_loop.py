"""Cases of cases.md, groups C and G, that no other test has: what a run of several tasks and an install must do."""

from __future__ import annotations

import re
import sys
from importlib.metadata import requires
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from dcl_lightning import Rehearsal, RehearsalConfig, cli
from tests.conformance.small_stream import make_agent, make_data, make_trainer

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("reset", [True, False])
def test_case_c25_momentum_is_empty_at_a_boundary_unless_it_is_to_be_kept(reset: bool, tmp_path: Path) -> None:
    data = make_data()
    agent = make_agent("base", data, milestones=[1], optimizer_reset=reset)
    empty: list[bool] = []
    rates: list[float] = []

    class Spy(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.current_epoch % 2 == 0 and batch_idx == 0:
                empty.append(not trainer.optimizers[0].state)
                rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    # After the clock's own hook, which starts the task.
    trainer = make_trainer(tmp_path)
    agent.configure_callbacks = lambda: [agent.clock, agent.report, Spy()]
    trainer.fit(agent, datamodule=data)
    assert empty == ([True] * 3 if reset else [True, False, False])
    assert rates[0] == 0.05
    assert (rates[1] == 0.05) is reset


class Theirs(pl.LightningModule):
    """A module that knows nothing of this package, with hooks and hyperparameters of its own."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(width, 3)
        self.calls: list[str] = []

    def on_train_start(self) -> None:
        self.calls.append("start")

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        self.calls.append("batch")

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        self.calls.append("validation")

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_case_c26_hooks_of_a_users_module_are_called_once_and_evaluation_leaves_the_memory_alone(
    tmp_path: Path,
) -> None:
    x, y = torch.randn(24, 4), torch.arange(24) % 3
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=6)
    memory = Rehearsal(RehearsalConfig(buffer_size=8, policy="reservoir", weighting="none", num_samples=2))
    module = Theirs()
    trainer = make_trainer(tmp_path, [memory], max_epochs=2, enable_checkpointing=False)
    trainer.validate(module, loader, verbose=False)
    assert memory.manager is None
    trainer.fit(module, loader)
    assert module.calls == ["validation"] * 4 + ["start"] + ["batch"] * 8
    before = len(memory.manager.buffer), memory.manager.buffer.state.offers
    trainer.test(module, loader, verbose=False)
    assert (len(memory.manager.buffer), memory.manager.buffer.state.offers) == before == (8, 8)
    assert dict(module.hparams) == {"width": 4}


def test_case_g41_what_continuum_imports_and_does_not_declare_is_declared_here() -> None:
    needed = {re.split(r"[^\w-]", line)[0] for line in requires("dcl-lightning") or [] if "extra ==" not in line}
    assert {"continuum", "six"} <= needed
    assert not {"horovod", "optuna", "matplotlib", "tensorboard", "timm", "rich"} & needed


def test_case_g42_without_horovod_asking_for_it_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("horovod", "horovod.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["fit", "--trainer.strategy", "horovod", "--trainer.accelerator", "cpu"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "python -m dcl_lightning.tools.install_horovod" in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["[0,1,2,3,4,5,6,7,8,9]", '["0","1","2","3","4","5","6","7","8","9"]'])
def test_case_g44_lists_of_numbers_may_be_quoted_and_a_rate_may_be_written_as_a_power(
    value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    with pytest.raises(SystemExit) as end:
        cli.main(["fit", "--data.class_order", value, "--model.lr", "1e-2", "--print_config"])
    assert end.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert [int(y) for y in config["data"]["init_args"]["class_order"]] == list(range(10))
    assert config["model"]["init_args"]["lr"] == 0.01
