"""Properties of every agent, by its short name."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

import dcl_lightning
from dcl_lightning.agents import short_names
from dcl_lightning.backbones import MLP
from tests.conformance.agents import KEEPING, NAMES, REHEARSING, STREAMS, make
from tests.conformance.rehearsal_runs import memory_state, same
from tests.conformance.small_stream import make_data, make_trainer, matrix, weights

ROOT = Path(__file__).parent.parent.parent
# Its result depends on the time that things take.
REPEATING = [name for name in NAMES if name != "nil_v2"]
# One name for each method.
METHODS = [n for n in NAMES if "_v" not in n and n not in ("nil_global", "joint", "cumulative", "derpp_task_end")]


pytestmark = pytest.mark.usefixtures("one_thread")


def data_of(name: str, **kwargs):
    return make_data(**{"batch_size": 7} | STREAMS.get(name, {}) | kwargs)


class Watch(pl.Callback):
    """Losses, and classes of earlier tasks that were trained on, step by step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.old_classes: list[set[int]] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        task = module.clock.task_at(trainer.current_epoch)
        old = {y for t in module.clock.tasks[:task] for y in t.classes}
        self.old_classes.append(old & set(batch.targets.tolist()))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def num_stored(agent) -> int | None:
    if hasattr(agent, "exemplars"):
        return len(agent.exemplar_ids())
    return len(agent.rehearsal.manager.buffer) if hasattr(agent, "rehearsal") else None


def predictions(agent, data, folder: Path) -> torch.Tensor:
    parts = make_trainer(folder).predict(agent, datamodule=data)
    return torch.cat([b.probabilities for part in parts for b in (part if isinstance(part, list) else [part])])


@pytest.mark.parametrize("name", NAMES)
def test_resume_equals_uninterrupted_and_the_memory_works(name: str, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "steps", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    data, watch = data_of(name, validate_on="test"), Watch()
    agent = make(name, data)
    trainer = make_trainer(tmp_path, [watch, saver])
    trainer.fit(agent, datamodule=data)

    # Loss and weights are numbers, and every task was evaluated.
    assert all(torch.isfinite(torch.tensor(watch.losses)))
    tasks = 1 if name == "joint" else 3
    assert torch.isfinite(matrix(agent)).sum() == tasks * (tasks + 1) // 2
    names = {"val/acc", "val/loss", "val/acc_task_0", "train/loss", "train/acc"}
    assert names <= set(trainer.callback_metrics)

    # The memory is full and no fuller, and what it holds of earlier classes is trained on.
    rehearsed = [old for old in watch.old_classes if old]
    if name in KEEPING:
        assert num_stored(agent) == 12
        assert len(set().union(*rehearsed)) >= (3 if name in REPEATING else 1)
    else:
        assert num_stored(agent) is None
        assert bool(rehearsed) == (name == "cumulative")

    # From the last step of a task, and from the next one's first.
    last = trainer.global_step
    if name in REPEATING:
        for step in (4, 5) if name != "joint" else (last // 2,):
            again = make(name, data, seed=5)
            other = data_of(name, seed=9)
            make_trainer(tmp_path).fit(again, datamodule=other, ckpt_path=tmp_path / "steps" / f"step={step}.ckpt")
            assert torch.equal(matrix(again).nan_to_num(-1), matrix(agent).nan_to_num(-1)), step
            assert same(again.state_dict(), agent.state_dict()), step
            if name in REHEARSING:
                managers = memory_state(again.rehearsal.manager), memory_state(agent.rehearsal.manager)
                assert same(*managers), step

    # A lone checkpoint predicts.
    loaded = type(agent).load_from_checkpoint(tmp_path / "steps" / f"step={last}.ckpt", backbone=MLP([8]))
    assert same(dict(loaded.hparams), dict(agent.hparams))
    assert torch.equal(predictions(loaded, data, tmp_path), predictions(agent, data, tmp_path))


@pytest.mark.parametrize("name", REPEATING)
def test_a_fit_leaves_no_trace(name: str, tmp_path: Path) -> None:
    def fit(agent, data):
        pl.seed_everything(0)
        make_trainer(tmp_path, limit_val_batches=0).fit(agent, datamodule=data)
        return copy.deepcopy(agent.state_dict()), matrix(agent)

    data = data_of(name)
    expected = fit(make(name, data), data)
    known = {key: value for key, value in vars(data).items() if key not in ("trainer", "task_id")}
    if name not in ("joint", "cumulative"):
        fit(make("icarl", data), data)  # its exemplars are part of later tasks' training sets
    agent = make(name, data)
    start, trained = copy.deepcopy(agent.state_dict()), fit(agent, data)
    assert same(trained[0], expected[0])
    assert torch.equal(trained[1].nan_to_num(-1), expected[1].nan_to_num(-1))
    # The agent itself, from its first weights, begins anew as well.
    agent.load_state_dict(start)
    again = fit(agent, data)
    assert same(again[0], expected[0])
    assert torch.equal(again[1].nan_to_num(-1), expected[1].nan_to_num(-1))
    now = {key: value for key, value in vars(data).items() if key not in ("trainer", "task_id")}
    assert now.keys() == known.keys()
    assert all(now[key] is known[key] or now[key] == known[key] for key in now if "_reader_pool" not in key)


@pytest.mark.parametrize("name", ["derpp", "derpp_task_end", "agem", "gdumb", "mir", "scr", "pcr"])
def test_blocking_equals_inline_bit_for_bit_under_either_scope(name: str, tmp_path: Path) -> None:
    found = []
    fixed = {"quota": "fixed"}  # under which rows stay, as a global draw needs
    for memory in (
        {},
        {"execution": "blocking", "prefetch": "device"},
        {"scope": "global"} | fixed,
        {"scope": "global", "execution": "blocking"} | fixed,
    ):
        data = data_of(name)
        agent = make(name, data, memory=memory)
        make_trainer(tmp_path, limit_val_batches=0).fit(agent, datamodule=data)
        assert agent.clock.samples_seen["rehearsed"] > 12
        found.append((weights(agent), memory_state(agent.rehearsal.manager)))
    assert same(found[0], found[1])
    assert same(found[2], found[3])


@pytest.mark.parametrize("name", METHODS)
def test_mixed_precision_and_a_hand_made_trainer(name: str, tmp_path: Path) -> None:
    data, watch = data_of(name), Watch()
    agent = make(name, data, epochs_per_task=1)
    # A Trainer as anybody makes it: its own callbacks, its own loggers, all of Lightning's defaults.
    trainer = pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", precision="bf16-mixed", callbacks=[watch],
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=5.0,
    )  # fmt: skip
    trainer.fit(agent, datamodule=data)
    assert all(torch.isfinite(torch.tensor(watch.losses)))
    assert torch.isfinite(weights(agent)).all()
    assert all(p.dtype == torch.float32 for p in agent.parameters())
    assert (tmp_path / "lightning_logs/version_0/report/accuracy_matrix.json").exists()


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
@pytest.mark.parametrize("name", METHODS)
def test_true_precision(name: str, precision: str, dtype: torch.dtype, tmp_path: Path) -> None:
    data, watch = data_of(name), Watch()
    agent = make(name, data, epochs_per_task=1)
    make_trainer(tmp_path, [watch], limit_val_batches=0, precision=precision).fit(agent, datamodule=data)
    assert all(torch.isfinite(torch.tensor(watch.losses)))
    assert all(p.dtype == dtype for p in agent.parameters())
    assert torch.isfinite(weights(agent)).all()


def test_every_name_is_in_the_package_and_has_its_file(tmp_path: Path) -> None:
    kinds = {base for n in NAMES for base in getattr(short_names, n).__mro__ if base.__module__.startswith("dcl_light")}
    kinds = {
        kind
        for kind in kinds
        if kind.__module__ != short_names.__name__ and issubclass(kind, dcl_lightning.ContinualAgent)
    }
    kinds = {kind for kind in kinds if not inspect.isabstract(kind)}
    assert {kind.__name__ for kind in kinds} <= set(dcl_lightning.agents.__all__)
    # An agent without a paper may stay out of the package's exports and of README: docs/guides/agent.md, "Publish it".
    cited = {kind.__name__ for kind in kinds if getattr(kind, "papers", ())}
    assert cited <= set(dcl_lightning.__all__)
    models = [yaml.safe_load(f.read_text()).get("model") for f in (ROOT / "configs").glob("*_digits.yaml")]
    with_files = {model["class_path"] for model in models if isinstance(model, dict)}
    # These are told from the name before them by a key or two.
    assert set(NAMES) - with_files <= {"icarl_v1", "nil", "nil_v2", "nil_v3", "nil_v4", "nil_global"}
    table = (ROOT / "README.md").read_text()
    published = [
        name
        for name in NAMES
        if getattr(short_names, name).method() in dcl_lightning.__all__ and not name.startswith("nil_v")
    ]
    assert len(published) >= 18
    assert all(f"`{name}`" in table for name in published)


def test_a_foreign_loader_is_told_what_is_missing(tmp_path: Path) -> None:
    data = make_data()
    loader = DataLoader(TensorDataset(torch.zeros(4, 1, 4, 4), torch.zeros(4, dtype=torch.long)))
    with pytest.raises(dcl_lightning.errors.ConfigurationError, match="ContinualDataModule"):
        make_trainer(tmp_path).fit(make("er", data), loader)
