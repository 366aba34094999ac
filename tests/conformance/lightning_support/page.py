"""Writes ``docs/lightning.md`` from the tables: ``python -m tests.conformance.lightning_support.page``."""

from __future__ import annotations

from pathlib import Path

from tests.conformance.lightning_support.tables import ARGUMENTS, CALLBACKS

PAGE = Path(__file__).parents[3] / "docs" / "lightning.md"
_INTRODUCTION = """# Compatibility with Lightning

This page lists every callback class of `lightning.pytorch.callbacks` and every argument of `Trainer`, and whether they
work with an agent on a `ContinualDataModule` and with a LightningModule of your own that uses the callback `Rehearsal`
and its own loaders. A test fits both, and a plain LightningModule, with and without each of them, and compares the
effects.

- **supported**: the effect is the same as in plain Lightning.
- **per task**: with an agent it applies to each task, in plain Lightning to the run.
- **refused**: an error before the first step suggests an alternative.
- **not tried**: the test does not cover it.

`python -m tests.conformance.lightning_support.page` generates this page.
"""


def markdown() -> str:
    """Return the page."""
    parts = [_INTRODUCTION]
    for title, rows in (("Callbacks", CALLBACKS), ("Arguments of the Trainer", ARGUMENTS)):
        parts.append(f"## {title}\n\n| name | agent | your module | difference |\n| --- | --- | --- | --- |\n")
        parts[-1] += "".join(f"| `{row.name}` | {row.agent} | {row.foreign} | {row.note} |\n" for row in rows)
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(markdown(), encoding="utf-8")
