"""Rehearsal in one process: what is stored, what is drawn, and reproducibility."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F

from dcl_lightning import ContinualDataModule
from dcl_lightning.checkpoint.buffer_files import RowsFile
from dcl_lightning.data.loader import TaskLoader
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.memory.replay import Replay
from dcl_lightning.memory.rows import BatchCodec, Candidates
from tests.conformance.rehearsal_runs import assert_same_run, buffer_of, fit, stored_rows
from tests.conformance.small_stream import make_data, matrix

pytestmark = pytest.mark.usefixtures("one_thread")


# -- one result, whoever does the work -------------------------------------------------------------


@pytest.mark.parametrize("policy", ["nil", "class_balanced", "reservoir", "fifo"])
@pytest.mark.parametrize("mode", ["fixed", "adaptive", "global", "past task_end"])
def test_blocking_is_inline_bit_for_bit(tmp_path: Path, policy: str, mode: str) -> None:
    config: dict[str, Any] = {"policy": policy}
    if mode == "adaptive":
        config["quota"] = "adaptive"
    elif mode == "global":
        config["scope"] = "global"
    elif mode == "past task_end":
        config |= {"draw_from": "past", "update": "task_end", "loss": "sum"}
    inline = fit(tmp_path, **config)
    assert_same_run(inline, fit(tmp_path, execution="blocking", **config))
    assert len(buffer_of(inline[0])) > 6
    assert inline[0].clock.samples_seen["rehearsed"] > 30


def test_background_work_begins_before_the_backward_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[bool] = []
    submit, networks = Replay._submit, []

    def spy(replay: Replay, candidates: Candidates | None, draw: bool) -> None:
        if candidates is not None:
            begun.append(networks[0].head.weight.grad is None)
        submit(replay, candidates, draw)

    def look(agent: Any, batch: Any, loss: Any) -> None:
        networks[:] = [agent]

    monkeypatch.setattr(Replay, "_submit", spy)
    losses = fit(tmp_path, look=look, execution="blocking")[1]
    assert begun == [True] * len(losses)
    begun.clear()
    fit(tmp_path, look=look, execution="inline")
    assert begun == [False] * len(losses)


def test_stages_equal_sample_runs_repeat_and_seeds_differ(tmp_path: Path) -> None:
    sample = fit(tmp_path, execution="blocking")
    for config in ({"prefetch": "draw"}, {"prefetch": "device"}, {"prefetch": "batch"}):
        assert_same_run(sample, fit(tmp_path, execution="blocking", **config))
    assert_same_run(fit(tmp_path), fit(tmp_path))
    other = fit(tmp_path, **{"execution": "blocking", "num_samples": 4})
    assert not torch.equal(other[1], sample[1])
    # The memory has a seed of its own: that of seed_everything unless given.
    assert_same_run(fit(tmp_path, execution="blocking", **{"seed": 0, "rehearsal_seed": 0}), sample)
    assert not torch.equal(fit(tmp_path, execution="blocking", **{"seed": 0, "rehearsal_seed": 7})[1], sample[1])
    for scope in ("local", "global"):
        draws = [fit(tmp_path, seed=seed, scope=scope)[0].rehearsal.manager for seed in (0, 1)]
        assert draws[0].buffer.generator.bit_generator.state != draws[1].buffer.generator.bit_generator.state
        assert [manager.seed for manager in draws] == [0, 1]


def test_nonblocking_ends_and_says_how_stale_it_was(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    seen: list[int] = []
    agent, losses = fit(
        tmp_path,
        trainer={"logger": logger, "log_every_n_steps": 1},
        look=lambda module, batch, loss: seen.append(len(batch.targets) - batch.num_new),
        execution="nonblocking",
    )
    assert len(losses) == 18
    assert torch.isfinite(losses).all()
    assert max(seen) <= 3
    assert agent.clock.samples_seen["rehearsed"] == sum(seen) > 0
    header, *lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    names = header.split(",")
    assert {"buffer/staleness", "buffer/fill", "buffer/bytes", "buffer/wait_ms"} <= set(names)
    column, step = names.index("buffer/staleness"), names.index("step")
    stale = {int(line.split(",")[step]): line.split(",")[column] for line in lines if line.split(",")[column]}
    assert sorted(stale) == list(range(18))
    assert all(float(value) >= 0 for value in stale.values())


def test_all_loggers_show_the_same_figures_of_the_memory(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, name) for name in ("first", "second")]
    fit(tmp_path, trainer={"logger": loggers, "log_every_n_steps": 2}, execution="blocking")
    first, second = (Path(logger.log_dir, "metrics.csv").read_text() for logger in loggers)
    assert "buffer/wait_ms" in first
    assert first == second


# -- resume ----------------------------------------------------------------------------------------

_KINDS: dict[str, dict[str, Any]] = {
    "nil": {},
    "nil_v1": {"execution": "blocking"},
    "nil_v4": {"execution": "blocking", "prefetch": "batch"},
    "nil_global": {"execution": "blocking", "scope": "global"},
    "past": {"draw_from": "past", "loss": "sum", "quota": "adaptive", "policy": "class_balanced"},
    "task_end": {"update": "task_end", "execution": "blocking", "policy": "fifo"},
}


@pytest.mark.parametrize("kind", list(_KINDS))
def test_every_step_resumes_to_the_same_end(tmp_path: Path, kind: str) -> None:
    config = _KINDS[kind]
    saver = ModelCheckpoint(tmp_path / "steps", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    config = config | {"agent": {"epochs_per_task": [2, 1, 1]}}
    agent, losses = fit(tmp_path, callbacks=[saver], **config)
    assert len(losses) == 12
    # What every ModelCheckpoint asks of the memory changes nothing.
    assert_same_run((agent, losses), fit(tmp_path, **config))
    steps = range(1, 12) if kind in ("nil", "nil_v1", "nil_global") else (2, 3, 6, 8, 9)
    for step in steps:
        path = tmp_path / "steps" / f"step={step}.ckpt"
        again, rest = fit(tmp_path / "again", seed=5, ckpt=path, **config)
        assert torch.equal(rest, losses[step:]), f"losses differ after resume from step {step}"
        assert_same_run((again, rest), (agent, losses[step:]))
        assert torch.equal(matrix(again).nan_to_num(-1), matrix(agent).nan_to_num(-1)), step
        assert again.clock.samples_seen == agent.clock.samples_seen
    (file,) = (tmp_path / "steps" / "step=8.ckpt.memory").glob("*/rank_0")
    assert len(RowsFile(file).header["in_flight"][1]) == 3 or kind == "past"


def test_another_memory_than_the_saved_one_is_refused(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True)
    fit(tmp_path, callbacks=[saver], trainer={"max_steps": 8})
    with pytest.raises(ConfigurationError, match="quota"):
        fit(tmp_path, ckpt=tmp_path / "last.ckpt", quota="adaptive")


# -- what is stored and given ----------------------------------------------------------------------


def test_memory_keeps_its_budget_and_old_classes_are_rehearsed(tmp_path: Path) -> None:
    for config in ({}, {"quota": "adaptive", "buffer_size": 13}, {"execution": "blocking", "scope": "global"}):
        old: dict[int, set[int]] = {}
        counts: list[tuple[int, int]] = []
        fills: list[int] = []

        def look(agent, batch, loss, old=old, counts=counts, fills=fills, config=config):
            task = agent.clock.task_at(agent.trainer.current_epoch)
            old.setdefault(task, set()).update(batch.targets[batch.num_new :].tolist())
            counts.append((batch.num_new, len(batch.targets) - batch.num_new))
            assert set(batch.targets[: batch.num_new].tolist()) <= {2 * task, 2 * task + 1}
            if config.get("execution") is None:
                fills.append(len(buffer_of(agent)))

        agent, _ = fit(tmp_path, look=look, num_samples=6, **config)
        buffer = buffer_of(agent)
        budget = config.get("buffer_size", 12)
        assert max([*fills, len(buffer)]) <= budget == buffer.store.capacity
        assert len(buffer) == int(buffer.class_counts.sum())
        assert buffer.class_counts.tolist() == ([3, 2, 2, 2, 2, 2] if budget == 13 else [2] * 6)
        assert old[1] >= {0, 1}
        assert old[2] >= {0, 1, 2, 3}
        assert counts[0] == (5, 0)
        assert max(r for _, r in counts) == 6
        assert agent.clock.samples_seen == {"new": 84, "rehearsed": sum(r for _, r in counts)}
        assert buffer.state.seen == 84
        assert int(buffer.state.offered.sum()) == 6 * (4 + 4 + 4) * 1


def test_rehearse_past_gives_no_class_of_the_task(tmp_path: Path) -> None:
    mixed: list[bool] = []

    def look(agent, batch, loss):
        task = agent.clock.task_at(agent.trainer.current_epoch)
        rehearsed = batch.targets[batch.num_new :]
        assert (rehearsed < 2 * task).all()
        mixed.append(bool(len(rehearsed)))

    fit(tmp_path, look=look, draw_from="past", execution="blocking")
    assert mixed == [False] * 6 + [True] * 12


@pytest.mark.parametrize("scope", ["local", "global"])
def test_rehearse_past_where_every_task_has_every_class(tmp_path: Path, scope: str) -> None:
    """What is past is told by tasks, not by classes."""
    options = {"scenario": "domain", "num_tasks": 3, "increment": 1}
    with pytest.raises(ConfigurationError, match="update=task_end"):
        fit(tmp_path, data=make_data(**options), draw_from="past")
    origins: list[tuple[int, set[int]]] = []

    def look(agent, batch, loss):
        origins.append((int(batch.task_ids[0]), set(batch.task_ids[batch.num_new :].tolist())))

    fit(tmp_path, data=make_data(**options), look=look, draw_from="past", update="task_end", scope=scope)
    assert all(origin < task for task, drawn in origins for origin in drawn)
    assert set.union(*(drawn for task, drawn in origins if task == 2)) == {0, 1}


def test_hold_outs_are_never_stored_and_rows_are_those_of_the_data_set(tmp_path: Path) -> None:
    for config in ({"update": "step"}, {"update": "task_end", "policy": "reservoir"}):
        data = make_data(val_ratio=0.3)
        agent, _ = fit(tmp_path, data=data, buffer_size=60, trainer={"limit_val_batches": 1.0}, **config)
        rows = stored_rows(agent)
        allowed = torch.cat([data.train_indices(t) for t in range(3)])
        assert 0 < len(allowed) < 42
        assert torch.isin(rows["sample_ids"], allowed).all()
        assert len(rows["sample_ids"].unique()) > 20
        assert torch.equal(rows["inputs"], data.train_inputs[rows["sample_ids"]])
        assert torch.equal(rows["targets"], data.train_targets[rows["sample_ids"]])
        assert torch.equal(rows["task_ids"], rows["targets"] // 2)


def test_padding_rows_are_never_offered() -> None:
    x, y = torch.arange(5.0)[:, None], torch.arange(5)
    loader = TaskLoader(x, y, y * 0, 2, torch.arange(5), rank=1, size=2, train=True)
    batches = list(loader)
    assert [b.weights.tolist() for b in batches] == [[1.0, 1.0], [0.0]]
    offers = [BatchCodec().encode(b, epoch=0) for b in batches]
    assert [len(o.labels) for o in offers] == [2, 0]
    assert [len(o.rows["inputs"]) for o in offers] == [2, 0]


def test_stored_is_raw_and_each_draw_is_augmented_anew(tmp_path: Path) -> None:
    options = {"num_classes": 4, "size": 8, "per_class": 20}
    data = ContinualDataModule("synthetic", increment=2, batch_size=8, augment=True, seed=0, source_options=options)
    looks: dict[tuple[int, int], list[bytes]] = {}

    def look(agent, batch, loss):
        ids = batch.sample_ids[batch.num_new :].tolist()
        for i, image in zip(ids, batch.inputs[batch.num_new :], strict=True):
            looks.setdefault((agent.trainer.current_epoch, i), []).append(image.cpu().numpy().tobytes())

    agent, _ = fit(tmp_path, data=data, look=look, buffer_size=4, num_samples=4, execution="blocking")
    rows = stored_rows(agent)
    assert rows["inputs"].dtype == torch.uint8
    assert torch.equal(rows["inputs"], data.train_inputs[rows["sample_ids"]])
    again = [images for images in looks.values() if len(images) > 2]
    assert len(again) > 3
    assert all(len(set(images)) > 1 for images in again)


@pytest.mark.parametrize("scope", ["local", "global"])
def test_weights_are_those_of_the_definition(tmp_path: Path, scope: str) -> None:
    """max(ln(n_y b / (c |S|)), 1) in NumPy, on both sides of the maximum; new samples weigh 1."""
    branches: set[bool] = set()
    states = [(0, np.zeros(6))]  # rows stored and candidates offered, as seen at each step
    exchanges = [states[0]]  # the same when each global draw began

    def look(agent, batch, loss):
        state = buffer_of(agent).state
        states.append((state.size, state.offered.copy()))
        # Inline, the memory is now as it was drawn from; a global draw was begun before the last step's rows
        # entered, but for the first of an epoch, and knows what the one before it told.
        exchanges.append(states[-2] if agent.trainer.fit_loop.batch_idx else states[-1])
        stored, offered = exchanges[-2] if scope == "global" else states[-1]
        labels = batch.targets[batch.num_new :].cpu().numpy()
        with np.errstate(divide="ignore"):
            expected = np.maximum(np.log(offered[labels] * 5 / (4 * max(stored, 1))), 1.0)
        got = batch.weights.cpu().numpy()
        assert (got[: batch.num_new] == 1).all()
        np.testing.assert_allclose(got[batch.num_new :], expected, rtol=1e-6)
        np.testing.assert_allclose(float(batch.normalizer), got.sum(), rtol=1e-6)
        branches.update((expected > 1).tolist())

    fit(tmp_path, look=look, buffer_size=6, scope=scope, agent={"epochs_per_task": 8})
    assert branches == {False, True}


@pytest.mark.parametrize("weighting", ["nil", "none"])
def test_loss_mean_and_sum_by_hand(tmp_path: Path, weighting: str) -> None:
    checked: list[int] = []

    def look(agent, batch, loss):
        with torch.no_grad():
            each = F.cross_entropy(agent(batch.inputs), batch.targets, reduction="none")
        new, old = each[: batch.num_new], each[batch.num_new :]
        w = batch.weights[batch.num_new :]
        if agent.rehearsal.config.weighting == "none" and agent.rehearsal.config.loss == "mean":
            assert (w == 1).all()
        if agent.rehearsal.config.loss == "sum":
            expected = new.mean() + (w * old).sum() / w.sum() if len(old) else new.mean()
        else:
            expected = (new.sum() + (w * old).sum()) / (len(new) + w.sum())
        torch.testing.assert_close(loss, expected)
        checked.append(len(old))

    for kind in ("sum", "mean"):
        fit(tmp_path, look=look, loss=kind, weighting=weighting, buffer_size=6, agent={"epochs_per_task": 3})
    assert sum(n > 0 for n in checked) == 2 * 26
