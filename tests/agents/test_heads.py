"""The head of cosines: its formula, and every method with it."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from dcl_lightning.agents import short_names
from dcl_lightning.backbones import MLP, CosineHead
from dcl_lightning.errors import ConfigurationError
from tests.conformance.agents import NAMES, STREAMS, make
from tests.conformance.rehearsal_runs import same
from tests.conformance.small_stream import make_data, make_trainer

METHODS = [n for n in NAMES if "_v" not in n and n not in ("nil_global", "joint", "cumulative", "derpp_task_end")]


def head_of(seed: int = 0, scale: float = 4.0) -> CosineHead:
    torch.manual_seed(seed)
    return CosineHead(5, 3, scale)


def test_logits_are_scaled_cosines() -> None:
    head, features = head_of(), torch.randn(7, 5)
    f, w = features.numpy().astype(np.float64), head.weight.detach().numpy().astype(np.float64)
    cosines = (f @ w.T) / np.linalg.norm(f, axis=1)[:, None] / np.linalg.norm(w, axis=1)
    np.testing.assert_allclose(head(features).detach(), 4 * cosines, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head(1e-3 * features), head(features))
    assert [name for name, _ in head.named_parameters()] == ["weight"]
    torch.manual_seed(0)
    assert torch.equal(head.weight, nn.Linear(5, 3).weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_without_a_direction_and_very_long_ones_are_no_fault(dtype: torch.dtype) -> None:
    head = head_of().to(dtype)
    features = torch.stack([torch.zeros(5), torch.full((5,), 3e3)]).to(dtype).requires_grad_()
    logits = head(features)
    assert torch.equal(logits[0], torch.zeros(3, dtype=dtype))
    assert bool((logits.abs() <= 4.05).all())
    assert float(logits[1].abs().max()) > 0.1
    (1e-3 * logits.float().sum()).backward()
    assert torch.isfinite(features.grad).all()
    assert torch.isfinite(head.weight.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_stays_near(dtype: torch.dtype) -> None:
    head, features = head_of(), torch.randn(64, 5)
    with torch.autocast("cpu", dtype):
        logits = head(features)
    torch.testing.assert_close(logits.float(), head(features), atol=0.06, rtol=0)


def test_a_step_is_that_of_a_hand_made_network(tmp_path: Path) -> None:
    data = make_data(scenario="none", batch_size=42)
    agent = make("base", data, epochs_per_task=4, head="cosine", head_scale=3.0)
    hand = copy.deepcopy(agent.backbone)
    weight = agent.head.weight.detach().clone().requires_grad_()
    make_trainer(tmp_path, limit_val_batches=0).fit(agent, datamodule=data)
    optimizer = torch.optim.SGD([*hand.parameters(), weight], 0.05, 0.9)
    for _ in range(4):
        optimizer.zero_grad()
        logits = 3 * torch.cosine_similarity(hand(data.train_inputs)[:, None], weight[None], dim=2)
        nn.functional.cross_entropy(logits, data.train_targets).backward()
        optimizer.step()
    torch.testing.assert_close(agent.head.weight, weight, rtol=1e-3, atol=1e-5)
    for ours, theirs in zip(agent.backbone.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_with_it_and_resumes(name: str, tmp_path: Path) -> None:
    def fit(folder: Path, ckpt: Path | None = None, callbacks: tuple[pl.Callback, ...] = (), seed: int = 0):
        data = make_data(**{"batch_size": 7} | STREAMS.get(name, {}))
        agent = make(name, data, seed, head="cosine")
        make_trainer(folder, callbacks, limit_val_batches=0).fit(agent, datamodule=data, ckpt_path=ckpt)
        return agent, data

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
        agent, data = fit(tmp_path, callbacks=(saver,))
    assert not any("one by one" in str(w.message) for w in caught), "the gradients of single samples at once"
    assert agent.hparams["head_scale"] == 10
    logits = agent.head(agent.backbone(data.train_inputs))
    assert 0.5 < float(logits.abs().max()) <= 10.001
    resumed, _ = fit(tmp_path / "again", tmp_path / "step=5.ckpt", seed=1)
    assert same(resumed.state_dict(), agent.state_dict())
    loaded = type(agent).load_from_checkpoint(tmp_path / "step=5.ckpt", backbone=MLP([8]))
    assert loaded.head.scale == 10
    assert loaded.head.bias is None


def test_rows_of_classes_not_seen_yet_stay_as_they_are(tmp_path: Path) -> None:
    data = make_data(batch_size=7)
    agent = make("base", data, train_classes="seen", weight_decay=0.1, head="cosine")
    first, kept = agent.head.weight.detach().clone(), []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            unseen = ~module.seen_classes
            kept.append(int(unseen.sum()))
            assert torch.equal(module.head.weight[unseen], first[unseen])
            assert not torch.equal(module.head.weight[~unseen], first[~unseen])

    make_trainer(tmp_path, [Watch()], enable_checkpointing=False, limit_val_batches=0).fit(agent, datamodule=data)
    assert set(kept) == {4, 2, 0}


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"head_scale": 10.0}, r"model\.head_scale=10\.0 scales cosines: give model\.head=cosine, or leave head_scale"),
        ({"head": "cosine", "head_scale": 0.0}, r"model\.head_scale=0\.0: give a finite number, above 0"),
        ({"head": "cosines"}, r"model\.head='cosines': give linear, cosine; did you mean 'cosine'"),
    ],
)
def test_values_that_make_no_sense_are_refused(kwargs, words) -> None:
    with pytest.raises(ConfigurationError, match=words):
        short_names.er(MLP([4], 1, 4), 6, **kwargs)


def test_a_run_goes_on_with_its_own_head(tmp_path: Path) -> None:
    data = make_data()
    saver = ModelCheckpoint(tmp_path, save_last=True)
    make_trainer(tmp_path, [saver], max_steps=2, limit_val_batches=0).fit(
        make("base", data, head="cosine"), datamodule=data
    )
    for given, words in (
        ({}, r"head\.bias among them, are in this network alone: .* model\.head"),
        ({"head": "cosine", "head_scale": 5.0}, r"model\.head_scale=5\.0: the checkpoint's run had 10\.0"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            make_trainer(tmp_path).fit(make("base", data, **given), datamodule=data, ckpt_path=tmp_path / "last.ckpt")
    with pytest.raises(ConfigurationError, match=r"head\.bias"):
        make_trainer(tmp_path).test(make("base", data), datamodule=data, ckpt_path=tmp_path / "last.ckpt")
    given = {"head": "cosine", "head_scale": 10.0}  # said in full
    make_trainer(tmp_path).fit(make("base", data, **given), datamodule=data, ckpt_path=tmp_path / "last.ckpt")
