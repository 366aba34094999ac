"""Streams on two real Horovod workers: the same tasks on both, and what each stores."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.distributed.programs import streams
from tests.distributed.workers import assert_ended_well, run_workers


def test_fixed_shards_make_memories_disjoint(tmp_path: Path) -> None:
    assert_ended_well(run_workers(streams.shards, 2, tmp_path))
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))

    def both(key, name):
        return [set(worker[key][name].tolist()) for worker in (one, other)]

    trained = set(range(47)) - both(("fixed", "step"), "held")[0]
    for key in one:
        for name in ("parts", "held", "weights"):
            assert torch.equal(one[key][name], other[key][name]), (key, name)
        assert one[key]["labels"] == other[key]["labels"]
        assert torch.isfinite(one[key]["matrix"]).sum() == 6
        met = both(key, "met")
        assert met[0] | met[1] == trained
        fixed = key[0] == "fixed"
        assert bool(met[0] & met[1]) is not fixed
        stored = both(key, "stored")
        assert all(stored[rank] <= met[rank] for rank in range(2))
        assert all(stored)
        # What is met by one worker in one epoch and by the other in the next is stored by both.
        assert bool(stored[0] & stored[1]) is not fixed
