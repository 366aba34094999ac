"""The examples in docstrings give the results that they show."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import dcl_lightning

ROOT = Path(dcl_lightning.__file__).parent
FILES = [file for file in sorted(ROOT.rglob("*.py")) if ">>> " in file.read_text(encoding="utf-8")]
MODULES = [".".join(("dcl_lightning", *file.relative_to(ROOT).with_suffix("").parts)) for file in FILES]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried
    assert not failed


def test_every_metric_has_an_example() -> None:
    import dcl_lightning.metrics as metrics

    for name in metrics.__all__:
        assert ">>> " in getattr(metrics, name).__doc__, name
