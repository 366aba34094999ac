"""What SimpleCIL, streaming LDA and RanPAC have to find, by NumPy over all samples at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn

from dcl_lightning import ContinualDataModule
from dcl_lightning.agents import short_names
from dcl_lightning.backbones import MLP

NAMES = ("simplecil", "slda", "ranpac")
_RIDGES = [10.0**power for power in range(-8, 9)]


class Normed(nn.Sequential):
    """A network whose normalisation layer counts the batches of training."""

    feature_dim = 8

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Tanh())


class Truth(NamedTuple):
    """What an agent has to end with."""

    statistics: dict[str, Any]
    coefficients: Any
    offsets: Any
    scores: Any


def stream(**kwargs: Any) -> ContinualDataModule:
    """Return 67 samples of six classes, in tasks of two."""
    g = torch.Generator().manual_seed(0)
    y = torch.cat([torch.arange(6).repeat(11), torch.tensor([3])])
    x = torch.randn(6, 1, 4, 4, generator=g)[y] * 2 + torch.randn(len(y), 1, 4, 4, generator=g)
    return ContinualDataModule((x, y, x.clone(), y.clone()), **{"increment": 2, "batch_size": 5, "seed": 0} | kwargs)


def make(name: str, seed: int = 0, backbone: type[nn.Module] | None = None, **kwargs: Any) -> Any:
    """Return an agent with a small network."""
    pl.seed_everything(seed, verbose=False)
    own = {"projection_dim": 12} if name == "ranpac" else {}
    network = MLP([8]) if backbone is None else backbone()
    return getattr(short_names, name)(network, 6, (1, 4, 4), **own | kwargs)


def truth_of(agent: Any, data: ContinualDataModule) -> Truth:
    """Return the truth of an agent after its fit, of the data module's training samples."""
    network, inputs = agent.backbone.double().eval(), data.train_inputs
    assert isinstance(inputs, torch.Tensor)
    with torch.no_grad():
        features = network(inputs.double()).numpy()
    last = data.stream.train_indices(data.num_tasks - 1).numpy()
    projection = agent.projection.double().numpy() if hasattr(agent, "projection") else None
    return expected(agent.short_name, features, data.train_targets.numpy(), last, projection, agent)


def expected(name: str, features: Any, labels: Any, last: Any, projection: Any, agent: Any) -> Truth:
    """Return the truth, given features ``(n, d)``, labels ``(n,)``, the last task's ids and the projection."""
    classes, one_hot = range(6), np.eye(6)[labels]
    counts = one_hot.sum(0)
    sums = np.stack([features[labels == k].sum(0) for k in classes])
    if name == "simplecil":
        means = np.stack([features[labels == k].mean(0) for k in classes])
        directions = means / np.linalg.norm(means, axis=1, keepdims=True)
        cosines = features @ directions.T / np.linalg.norm(features, axis=1, keepdims=True)
        return Truth({"sums": sums, "counts": counts}, directions, np.zeros(6), cosines)
    if name == "slda":
        means = np.stack([features[labels == k].mean(0) for k in classes])
        around = features - means[labels]
        covariance = around.T @ around / len(labels)
        precision = np.linalg.inv((1 - 1e-4) * covariance + 1e-4 * np.eye(features.shape[1]))
        coefficients, offsets = means @ precision, -np.einsum("ki,ij,kj->k", means, precision, means) / 2
        found = {"sums": sums, "counts": counts, "moments": features.T @ features}
        return Truth(found, coefficients, offsets, features @ coefficients.T + offsets)
    hidden = np.maximum(features @ projection, 0)
    held = np.array([(int(i) * 2654435761) % 2**32 < 0.2 * 2**32 for i in last])
    fit, rest = last[~held], last[held]
    assert len(fit)
    assert len(rest)

    def solved(rows: Any, ridge: float) -> Any:
        gram = hidden[rows].T @ hidden[rows] + ridge * np.eye(hidden.shape[1])
        return np.linalg.solve(gram, hidden[rows].T @ one_hot[rows])

    errors = [((hidden[rest] @ solved(fit, ridge) - one_hot[rest]) ** 2).mean() for ridge in _RIDGES]
    ridge = agent.ridge or _RIDGES[int(np.argmin(errors))]
    weights = solved(np.arange(len(labels)), ridge)
    statistics = {
        "gram": hidden.T @ hidden, "correlations": hidden.T @ one_hot, "counts": counts, "ridge": ridge,
    }  # fmt: skip
    return Truth(statistics, weights.T, np.zeros(6), hidden @ weights)
