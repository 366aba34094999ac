"""Every deterministic agent ends alike under horovod and under ddp, on the same two processes; so do compiled ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.programs import agents_under_ddp
from tests.distributed.workers import assert_ended_well, run_workers


def test_agents_end_alike(tmp_path: Path) -> None:
    assert_ended_well(run_workers(agents_under_ddp.ends_alike, 2, tmp_path, deadline=240))


@pytest.mark.parametrize(
    "name", ["agem", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("derpp", "er_ace"))]
)
def test_a_compiled_agent_ends_like_an_eager_one(name: str, tmp_path: Path) -> None:
    assert_ended_well(run_workers(agents_under_ddp.compiled_ends_alike, 2, tmp_path, name, deadline=240))
