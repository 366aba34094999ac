"""What to cite: the papers of methods and data sets, as BibTeX from ``references.bib``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

__all__ = ["DATASETS", "PROJECT", "Reference", "method_of", "papers_of", "references"]

PROJECT = "dcl_lightning"
# Keys of references.bib by the name of ``data.dataset``; an agent has its own as ``papers``.
DATASETS: dict[str, tuple[str, ...]] = {
    "digits": ("alpaydin1998",),
    "digits_dev": ("alpaydin1998",),
    "synthetic": (),
    "mnist": ("lecun1998",),
    "mnist5k": ("lecun1998",),
    "cifar10": ("krizhevsky2009",),
    "cifar100": ("krizhevsky2009",),
    "tinyimagenet": ("le2015", "russakovsky2015"),
    "imagenet": ("russakovsky2015",),
    "imagenet_blurred": ("yang2022", "russakovsky2015"),
    "imagenet100": ("russakovsky2015",),
    "imagenet100small": ("russakovsky2015",),
    "core50": ("lomonaco2017",),
    "folder": (),
    "candle": ("grossman2016",),
}

_ENTRY = re.compile(r"@(\w+)\{([\w-]+),\n((?:  \w+ = \{.*\},\n)+)\}\n")
_FIELD = re.compile(r"  (\w+) = \{(.*)\},\n")


class Reference(NamedTuple):
    """One entry of ``references.bib``.

    Args:
        key: by which it is cited.
        kind: BibTeX's type of entry, such as ``article``.
        fields: values by name, as they stand in the file.
        bibtex: the whole entry.
    """

    key: str
    kind: str
    fields: dict[str, str]
    bibtex: str

    @property
    def names(self) -> list[str]:
        """Family names of the authors."""
        return [author.partition(",")[0].strip("{}") for author in self.fields["author"].split(" and ")]

    @property
    def title(self) -> str:
        """The title without TeX's braces and backslashes."""
        return re.sub(r"[{}\\]", "", self.fields["title"])

    @property
    def short(self) -> str:
        """Authors, title, venue and year in one line of plain text."""
        *others, last = self.names
        who = f"{', '.join(others)} and {last}" if others else last
        if len(others) > 2:
            who = f"{others[0]} et al."
        venue = next((self.fields[key] for key in ("booktitle", "journal", "institution") if key in self.fields), None)
        venue = venue or self.fields.get("howpublished") or f"arXiv {self.fields['eprint']}"
        brief = re.search(r"\(([A-Za-z]+)\)$", venue)
        return f"{who}, {self.title}, {brief[1] if brief else venue} {self.fields['year']}"


@cache
def _bibliography() -> dict[str, Reference]:
    text = Path(__file__).with_name("references.bib").read_text(encoding="utf-8")
    found = {}
    for match in _ENTRY.finditer(text):
        kind, key, body = match.groups()
        found[key] = Reference(key, kind, dict(_FIELD.findall(body)), match[0])
    return found


def references(keys: Iterable[str]) -> list[Reference]:
    """Return entries of ``references.bib``, each once.

    Args:
        keys: of agents, ``DATASETS`` or ``PROJECT``.
    """
    return [_bibliography()[key] for key in dict.fromkeys(keys)]


def method_of(kind: type) -> str | None:
    """Return the class that names the papers of an agent's method; None for one without ``papers``, even empty ones.

    Args:
        kind: class of the agent; the nearest of its bases counts.
    """
    base = _base_with_papers(kind)
    return None if base is None else base.__name__


def papers_of(kind: type) -> tuple[str, ...] | None:
    """Return the keys of the papers of an agent's method; None for a class without ``papers``.

    Args:
        kind: class of the agent; the nearest of its bases counts.
    """
    base = _base_with_papers(kind)
    return None if base is None else vars(base)["papers"]


def _base_with_papers(kind: type) -> type | None:
    return next((base for base in kind.__mro__ if "papers" in vars(base)), None)
