"""The examples of the documents run as printed and show what the text claims."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.data import small_sets
from tests.documents import ROOT

EXAMPLES = ROOT / "docs" / "examples"


def run(name: str, monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.chdir(folder)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_the_script_keeps_what_it_forgets_without_a_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run("script.py", monkeypatch, tmp_path, capsys)
    found = re.findall(r": average accuracy ([\d.]+), forgetting (-?[\d.]+)", out)
    without, stored = [[float(figure) for figure in pair] for pair in found]
    assert without[0] < 0.4
    assert stored[0] > without[0] + 0.2
    assert stored[1] < without[1] - 0.3
    assert re.search(r"predicted to be \[\d(, \d){4}\]", out)
    assert (tmp_path / "runs/with_memory/report/summary.md").exists()


def test_a_module_of_mnist_gains_by_one_callback_whatever_its_batches_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_sets.mnist_of_digits(tmp_path / "datasets", times=2)
    out = run("embedding.py", monkeypatch, tmp_path, capsys)
    accuracy = {name: float(figure) for name, figure in re.findall(r"^([a-z, ]+): ([\d.]+)$", out, re.MULTILINE)}
    assert accuracy["with a memory"] > accuracy["as it was"] + 0.1
    assert accuracy["the same, of dicts"] == accuracy["with a memory"]


def test_the_notebook_runs_and_shows_the_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    nbformat.validate(notebook)
    stored = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    client = NotebookClient(notebook, timeout=240, kernel_name="python3")
    client.resources = {"metadata": {"path": str(tmp_path)}}
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    text = "".join(output["text"] for output in outputs if output.get("name") == "stdout")
    without, kept = (float(figure) for figure in re.findall(r"average accuracy ([\d.]+)", text))
    assert without < 0.4 < 0.7 < kept
    # What the file shows to who does not run it: both pictures, the figures, and nothing of the machine it ran on.
    assert sum("image/png" in output.get("data", {}) for output in stored) == 2
    assert any("average accuracy" in output.get("text", "") for output in stored)
    assert not re.search(r"(?<![\w.])/(home|work|tmp|root|usr)/", json.dumps(stored))


@pytest.mark.parametrize("name", ["script.py", "embedding.py", "notebook.ipynb"])
def test_pages_show_what_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    from examples_page import on_page_markdown

    path = EXAMPLES / name
    page = SimpleNamespace(file=SimpleNamespace(abs_src_path=str(path.with_suffix(".md"))))
    shown = on_page_markdown(path.with_suffix(".md").read_text(encoding="utf-8"), page)
    content = path.read_text(encoding="utf-8")
    parts = [content]
    if path.suffix == ".ipynb":
        parts = ["".join(cell["source"]) for cell in json.loads(content)["cells"]]
        assert shown.count("](data:image/png;base64,") == 2
    assert all(part in shown for part in parts)
    assert f"examples/{path.stem}.md" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_the_page_of_results_shows_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    from examples_page import on_page_markdown

    path = ROOT / "docs" / "results.md"
    page = SimpleNamespace(file=SimpleNamespace(abs_src_path=str(path)))
    shown = on_page_markdown(path.read_text(encoding="utf-8"), page)
    assert (ROOT / "RESULTS.md").read_text(encoding="utf-8") in shown
