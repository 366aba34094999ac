"""Every callback of Lightning and every argument of its Trainer has the effect that it has in plain Lightning.

Or it is refused before the first step, or means something else where there are tasks; the table says which.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import lightning.pytorch.callbacks as callbacks_of_lightning
import pytest
import torch

from dcl_lightning.errors import ConfigurationError
from tests.conformance.lightning_support.fits import Row, Who, run
from tests.conformance.lightning_support.page import PAGE, markdown
from tests.conformance.lightning_support.tables import TABLES

# Of this release of Lightning; the tables are of the newest.
OFFERED = {
    "callback": set(callbacks_of_lightning.__all__),
    "argument": set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"},
}
TRIED = [
    (what, row) for what, rows in TABLES.items() for row in rows if row.given is not None and row.name in OFFERED[what]
]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark


def effect(who: Who, row: Row, folder: Path, with_it: bool = True) -> Any:
    assert row.effect is not None
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False
    folder = folder / f"{who}_{with_it}"
    folder.mkdir()
    return row.effect(run(who, row, folder, with_it))


@pytest.mark.parametrize(("what", "row"), TRIED, ids=[f"{what} {row.name}" for what, row in TRIED])
def test_the_effect_is_plain_lightnings_or_what_the_table_says(what: str, row: Row, tmp_path: Path) -> None:
    if row.package is not None:
        pytest.importorskip(row.package)
    plain = effect("plain", row, tmp_path)
    assert plain != effect("plain", row, tmp_path, with_it=False), "the table's effect is none"
    for who, kind in (("agent", row.agent), ("foreign", row.foreign)):
        if kind == "supported":
            assert effect(who, row, tmp_path) == plain, who
        elif kind == "per task":
            assert effect(who, row, tmp_path) == row.per_task != plain, who
        elif kind == "refused":
            with pytest.raises(ConfigurationError, match=row.words):
                effect(who, row, tmp_path)
            assert not list((tmp_path / f"{who}_True").rglob("*")), "something was written before the refusal"
        else:
            assert kind == "not tried"


@pytest.mark.parametrize("what", TABLES)
def test_nothing_of_lightnings_is_missing(what: str) -> None:
    rows = TABLES[what]
    assert not OFFERED[what] - {row.name for row in rows}, f"Lightning has a new {what}: give it a row"
    assert {row.name for row in rows if not row.since} <= OFFERED[what]


def test_every_row_says_why_it_is_no_plain_lightning() -> None:
    for row in (row for rows in TABLES.values() for row in rows):
        if (row.agent, row.foreign) != ("supported", "supported"):
            assert row.note, row.name
        assert (row.given is None) == ("not tried" in (row.agent, row.foreign)), row.name


def test_the_page_is_of_this_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), "run: python -m tests.conformance.lightning_support.page"
