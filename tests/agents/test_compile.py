"""``model.compile``: compiled agents learn what eager ones learn, resume bit for bit, and are compiled once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from dcl_lightning import FineTuning
from dcl_lightning.agents.computation import compile_arguments
from dcl_lightning.backbones import MLP
from dcl_lightning.errors import ConfigurationError
from tests.conformance.agents import NAMES, STREAMS, make
from tests.conformance.small_stream import make_data, make_trainer, weights

# Not the version whose result depends on the time that things take.
METHODS = [name for name in NAMES if "_v" not in name and name not in ("nil_global", "joint", "derpp_task_end")]
# One for each way in which a method uses its network; the others take their time in `make test-exhaustive`.
WAYS = ("er", "gem", "mir", "icarl", "ewc")


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch.compiler.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Counts:
    """A backend for ``torch.compile`` that counts graphs and the calls of each, and computes as eager does."""

    def __init__(self) -> None:
        self.graphs = self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1

        def run(*values: Any) -> Any:
            self.calls += 1
            return graph(*values)

        return run


def fit(name: str, folder: Path, compile: Any, callbacks: Any = (), **resume: Any) -> Any:
    data = make_data(batch_size=7, **STREAMS.get(name, {}))
    agent = make(name, data, compile=compile)
    make_trainer(folder, list(callbacks)).fit(agent, datamodule=data, **resume)
    return agent


@pytest.mark.parametrize(
    "name", [name if name in WAYS else pytest.param(name, marks=pytest.mark.exhaustive) for name in METHODS]
)
def test_compiled_learns_what_eager_learns_and_resumes(name: str, tmp_path: Path) -> None:
    plain = fit(name, tmp_path / "plain", False)
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = fit(name, tmp_path / "whole", "default", [saver])
    torch.testing.assert_close(weights(whole), weights(plain), rtol=1e-4, atol=1e-5)
    steps = whole.trainer.global_step
    rest = fit(name, tmp_path / "rest", "default", ckpt_path=tmp_path / "saved" / f"step={steps // 2}.ckpt")
    assert rest.trainer.global_step == steps
    assert torch.equal(weights(rest), weights(whole))


class Marks(pl.Callback):
    """Notes graphs, compiled calls and calls of the backbone when each task begins, and at the end."""

    def __init__(self, counts: Counts) -> None:
        self.counts, self.calls, self.found = counts, 0, []

    def on_fit_start(self, trainer: pl.Trainer, agent: Any) -> None:
        call = agent.backbone._compiled_call_impl
        agent.backbone._compiled_call_impl = lambda *args: (self.note_call(), call(*args))[1]

    def note_call(self) -> None:
        self.calls += 1

    def on_task_start(self, trainer: pl.Trainer, agent: Any, task: object) -> None:
        self.found.append((self.counts.graphs, self.counts.calls, self.calls))

    def on_fit_end(self, trainer: pl.Trainer, agent: Any) -> None:
        self.on_task_start(trainer, agent, None)


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_compiled_after_the_second_task_and_all_that_trains_is_compiled(name: str, tmp_path: Path) -> None:
    counts = Counts()
    marks = Marks(counts)
    fit(name, tmp_path, {"backend": counts}, [marks])
    assert len(marks.found) == 4
    graphs, calls, passes = zip(*marks.found[2:], strict=True)
    assert graphs[0] == graphs[1]
    # Of a call of the backbone a graph is called, and mostly one of the head, too.
    uncompiled = 2 if name == "ewc" else 0  # its squared gradients take the network as it was written
    assert calls[1] - calls[0] >= passes[1] - passes[0] - uncompiled > 0


def test_names_and_copies_stay_as_they_are(tmp_path: Path) -> None:
    plain, compiled = (fit("base", tmp_path / str(how), how) for how in (False, {"backend": "eager"}))
    assert list(plain.state_dict()) == list(compiled.state_dict())
    assert copy.deepcopy(compiled.backbone)._compiled_call_impl is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("fast", "model.compile='fast': give false, default, reduce-overhead, max-autotune, or a dict"),
        ("max-autotunes", "did you mean 'max-autotune'"),
        (True, "model.compile=True: give false"),
        ({"modes": "default"}, "model.compile.modes: torch.compile has no such argument.*did you mean 'mode'"),
        ({"backend": "inductr"}, "model.compile=.*inductr"),
        ({"mode": "default", "options": {"max_autotune": True}}, "model.compile=.*mode"),
    ],
)
def test_wrong_values_are_refused(value: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        FineTuning(MLP([8]), 4, compile=value)


def test_nothing_to_compile() -> None:
    assert compile_arguments(False) is None
    assert compile_arguments("reduce-overhead") == {"mode": "reduce-overhead"}


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigurationError, match="compiler on a CPU, and there is no no-such-compiler: install one"):
        fit("base", tmp_path, "default")


def test_a_network_of_the_user_that_cannot_be_traced_whole_still_trains(tmp_path: Path) -> None:
    class Branching(nn.Module):
        feature_dim = 4

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            out = self.layer(inputs.flatten(1))
            return out if float(out.detach().sum()) > 0 else -out

    def learnt(compile: Any) -> Tensor:
        data = make_data(batch_size=7)
        pl.seed_everything(0)
        agent = FineTuning(Branching(), data.num_classes, lr=0.05, compile=compile)
        make_trainer(tmp_path).fit(agent, datamodule=data)
        return weights(agent)

    torch.testing.assert_close(learnt({"backend": "aot_eager"}), learnt(False))
