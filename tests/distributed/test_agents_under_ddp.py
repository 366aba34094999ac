"""Every deterministic agent ends alike under horovod and under ddp, on the same two processes."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.programs import agents_under_ddp
from tests.distributed.workers import assert_ended_well, run_workers


def test_agents_end_alike(tmp_path: Path) -> None:
    assert_ended_well(run_workers(agents_under_ddp.ends_alike, 2, tmp_path, deadline=240))
