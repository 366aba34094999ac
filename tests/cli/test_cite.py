"""Citations: every agent and data set has its papers, entries are complete, and docstrings agree with them."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
import yaml

import dcl_lightning
from dcl_lightning import agents, cli
from dcl_lightning.agents import short_names
from dcl_lightning.data.sources.table import SOURCES
from dcl_lightning.report import citations
from dcl_lightning.report.citations import DATASETS, PROJECT, method_of, references

ROOT = Path(__file__).parent.parent.parent
TEXT = Path(citations.__file__).with_name("references.bib").read_text(encoding="utf-8")
# What an entry of a kind must have, as BibTeX's manual says.
REQUIRED = {
    "article": {"author", "title", "journal", "year"},
    "inproceedings": {"author", "title", "booktitle", "year"},
    "techreport": {"author", "title", "institution", "year"},
    "misc": {"author", "title", "year"},
}
METHODS = {name: getattr(agents, name).papers for name in agents.__all__ if hasattr(getattr(agents, name), "papers")}
KEYS = sorted({key for keys in (*METHODS.values(), *DATASETS.values()) for key in keys})


def plain(text: str) -> str:
    """Return lower-case words: docstrings break lines, and titles are set in several ways."""
    return " ".join(re.findall(r"\w+", text.lower()))


def docstring_of(method: str) -> str:
    return importlib.import_module(getattr(dcl_lightning, method).__module__).__doc__ or ""


def test_every_agent_and_data_set_has_an_entry() -> None:
    for name in short_names.__all__:
        kind = getattr(short_names, name).__mro__[1]
        quoted = re.findall(r'"\w[^"]{10,}"', importlib.import_module(kind.__module__).__doc__ or "")
        assert bool(quoted) == bool(METHODS.get(method_of(kind) or "", ())), name
    assert len({method_of(getattr(short_names, name)) for name in short_names.__all__}) >= len(METHODS)
    assert set(DATASETS) <= set(SOURCES)
    # No entry that nothing asks for, none that is asked for and missing.
    assert sorted({*KEYS, PROJECT}) == sorted(re.findall(r"^@\w+\{(\S+),$", TEXT, re.MULTILINE))


def test_the_file_is_made_of_entries_alone() -> None:
    whole = references([PROJECT, *KEYS])
    assert sum(len(entry.bibtex) for entry in whole) + len(whole) - 1 == len(TEXT)
    assert "\t" not in TEXT


@pytest.mark.parametrize("key", KEYS)
def test_entries_are_whole(key: str) -> None:
    (entry,) = references([key])
    assert set(entry.fields) >= REQUIRED[entry.kind], key
    assert len(entry.fields) == entry.bibtex.count(" = {")
    assert re.fullmatch(r"[12]\d{3}", entry.fields["year"])
    assert all("," in author for author in entry.fields["author"].split(" and "))
    assert ("eprint" in entry.fields) == ("archiveprefix" in entry.fields)
    assert re.fullmatch(r"\d{4}\.\d{4,5}", entry.fields.get("eprint", "1234.56789"))
    for value in entry.fields.values():
        depth = 0
        for place, letter in enumerate(value):
            depth += {"{": 1, "}": -1}.get(letter, 0)
            assert depth >= 0, value
            assert letter not in "&%#" or value[place - 1] == "\\", value
        assert depth == 0, value


@pytest.mark.parametrize("method", METHODS)
def test_docstrings_of_methods_name_the_same_papers(method: str) -> None:
    said = plain(docstring_of(method))
    entries = references(METHODS[method])
    for entry in entries:
        # "Progress & Compress" stands there without its second half.
        assert plain(entry.title.partition(": A scalable")[0]) in said, entry.key
        assert all(plain(name) in said for name in entry.names) or f"{plain(entry.names[0])} et al" in said, entry.key
        assert plain(entry.fields["year"]) in said
        if "eprint" in entry.fields:
            assert plain(entry.fields["eprint"]) in said
    # A file can hold a method and its variant.
    module = getattr(dcl_lightning, method).__module__
    others = [papers for name, papers in METHODS.items() if getattr(dcl_lightning, name).__module__ == module]
    assert len(re.findall(r'"\w[^"]{10,}"', docstring_of(method))) == len({key for keys in others for key in keys})


def test_the_project_is_cited_as_its_citation_file_says() -> None:
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    (entry,) = references([PROJECT])
    assert entry.title == cff["title"]
    assert entry.names == [author["name"] for author in cff["authors"]]
    assert entry.fields["note"] == f"Version {cff['version']}" == f"Version {dcl_lightning.__version__}"
    (paper,) = references(["bouvier2024"])
    (cited,) = cff["references"]
    assert (paper.title, paper.fields["year"]) == (cited["title"], str(cited["year"]))
    assert paper.names == [author["family-names"] for author in cited["authors"]]


@pytest.mark.parametrize(
    ("args", "keys", "without"),
    [
        ("--model nil_v3 --data.dataset candle", ["munoz2020", "bouvier2024", "grossman2016"], ""),
        ("--data.dataset imagenet_blurred", ["yang2022", "russakovsky2015"], ""),
        ("--model ICaRL", ["rebuffi2017"], ""),
        ("--data.dataset mnist", ["lecun1998"], ""),
        ("--model joint --data.dataset digits", ["alpaydin1998"], "model=joint: there is no paper"),
        ("--model ewc --data.dataset folder", ["kirkpatrick2017", "schwarz2018"], "data.dataset=folder: there is no"),
    ],
)
def test_what_is_printed(args: str, keys: list[str], without: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cite", *args.split()]) == 0
    out, err = capsys.readouterr()
    assert re.findall(r"^@\w+\{(\S+),$", out, re.MULTILINE) == [*keys, PROJECT]
    assert without in err


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ("--model icrl", "did you mean 'icarl'?"),
        ("--model ContinualAgent", "--model=ContinualAgent: give one of"),
        ("--data.dataset cifar1000", "did you mean 'cifar100'?"),
        ("", "neither agent nor data set is given"),
    ],
)
def test_mistakes_are_one_line(args: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cite", *args.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert word in line


def test_the_summary_of_a_run_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["--data.increment", "5", "--trainer.limit_train_batches", "1", "--trainer.accelerator", "cpu"]
    assert cli.main(["fit", "--model", "icarl_v1", "--data.dataset", "digits", *args]) == 0
    capsys.readouterr()
    folder = tmp_path / "runs/dcl/version_0/report"
    summary = (folder / "summary.md").read_text(encoding="utf-8")
    assert "- Rebuffi et al., iCaRL: Incremental Classifier and Representation Learning, CVPR 2017\n" in summary
    assert "- Alpaydin and Kaynak, Optical Recognition of Handwritten Digits" in summary
    command = json.loads((folder / "accuracy_matrix.json").read_text())["cite"]
    assert f"`{command}`" in summary
    assert cli.main(command.split()[1:]) == 0
    assert "@inproceedings{rebuffi2017," in capsys.readouterr().out
