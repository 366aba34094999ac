"""``dcl-lightning cite --model NAME --data.dataset NAME``: BibTeX of an agent's and a data set's papers."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dcl_lightning.cli.messages import CommandParser
from dcl_lightning.errors import ConfigurationError, suggestion
from dcl_lightning.report.citations import DATASETS, PROJECT, papers_of, references

__all__ = ["main"]


def main(args: Sequence[str]) -> int:
    """Print the entries of method, data set and this project, and a notice on stderr for each without a paper.

    Args:
        args: that follow ``cite``.

    Returns:
        Exit code.

    Raises:
        ConfigurationError: an unknown name, or neither.
    """
    parser = CommandParser("cite", description=__doc__)
    parser.add_argument("--model", metavar="NAME", help="Agent by its short name, or by the name of its class.")
    parser.add_argument("--data.dataset", dest="dataset", metavar="NAME", help="Data set, as a fit names it.")
    given = parser.parse_args(args)
    if given.model is None and given.dataset is None:
        raise ConfigurationError(
            "cite: neither agent nor data set is given: give --model NAME, --data.dataset NAME or both"
        )
    keys: list[str] = []
    if given.model is not None:
        keys += _keys("model", given.model, _of_method(given.model))
    if given.dataset is not None:
        keys += _keys("data.dataset", given.dataset, _of_dataset(given.dataset))
    print("\n".join(reference.bibtex for reference in references([*keys, PROJECT])), end="")
    return 0


def _of_method(name: str) -> tuple[str, ...]:
    from dcl_lightning import agents

    short = agents.short_names.__all__
    kind = vars(agents.short_names if name in short else agents).get(name)
    papers = papers_of(kind) if isinstance(kind, type) else None
    if papers is None and name not in short:
        near = suggestion(name, [*short, *agents.__all__])
        raise ConfigurationError(f"--model={name}: give one of {', '.join(short)}{near}")
    return papers or ()


def _of_dataset(name: str) -> tuple[str, ...]:
    from dcl_lightning.data.sources.table import SOURCES

    if name not in SOURCES:
        near = suggestion(name, SOURCES)
        raise ConfigurationError(f"--data.dataset={name}: give one of {', '.join(SOURCES)}{near}")
    return DATASETS.get(name, ())


def _keys(flag: str, name: str, keys: tuple[str, ...]) -> tuple[str, ...]:
    if not keys:
        print(f"{flag}={name}: there is no paper to cite", file=sys.stderr)
    return keys
