"""Workers that would not train the same thing are refused before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.programs import agreement
from tests.distributed.workers import assert_ended_well, run_workers


@pytest.mark.parametrize("strategy", ["horovod", "ddp"])
def test_what_differs_between_workers_is_named_by_all(strategy: str, tmp_path: Path) -> None:
    assert_ended_well(run_workers(agreement.refused, 2, tmp_path, strategy))
