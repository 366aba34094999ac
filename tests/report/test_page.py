"""The page against numbers that are computed here from what lies in the report's folder."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import yaml

from dcl_lightning import cli
from dcl_lightning.callbacks.report import TaskReport
from dcl_lightning.report.page import PageRun, colours, page_text
from tests.callbacks.test_report import Clock, FakeAgent, make_trainer

VOID = {"meta", "link", "br", "img", "input", "hr"}
HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;{row}{task}"


class Element:
    """An element of a page."""

    def __init__(self, tag: str, attrs: dict[str, str | None], above: Element | None) -> None:
        self.tag, self.attrs, self.above = tag, attrs, above
        self.parts: list[Element | str] = []

    @property
    def text(self) -> str:
        return "".join(part if isinstance(part, str) else part.text for part in self.parts)

    def all(self, tag: str | None = None, kind: str | None = None) -> list[Element]:
        found = []
        for part in self.parts:
            if isinstance(part, Element):
                classes = (part.attrs.get("class") or "").split()
                if tag in (None, part.tag) and (kind is None or kind in classes):
                    found.append(part)
                found += part.all(tag, kind)
        return found


class Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = self.at = Element("", {}, None)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        new = Element(tag, dict(attrs), self.at)
        assert len(new.attrs) == len(attrs), f"an attribute twice in {tag}: {attrs}"
        self.at.parts.append(new)
        if tag not in VOID:
            self.at = new

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.at.parts.append(Element(tag, dict(attrs), self.at))

    def handle_endtag(self, tag: str) -> None:
        assert self.at.tag == tag, f"{self.at.tag} is closed by {tag}"
        assert self.at.above is not None
        self.at = self.at.above

    def handle_data(self, data: str) -> None:
        self.at.parts.append(data)


def parsed(text: str) -> Element:
    """Return a page as a tree; it is well formed, has one script, and nothing in it loads anything."""
    parser = Parser()
    parser.feed(text)
    parser.close()
    page = parser.root
    assert parser.at is page, "all elements are closed"
    every = page.all()
    (script,) = page.all("script")
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    policy = next(e.attrs["content"] for e in every if e.attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    for element in every:
        assert element.tag not in ("img", "iframe", "object", "embed", "base", "form")
        assert not [name for name in element.attrs if name.startswith("on") or name in ("src", "srcset", "data")]
        if element.tag == "link":
            assert element.attrs["href"] == "data:,"
        elif "href" in element.attrs:
            assert not re.match(r"\w+:|//", element.attrs["href"] or "")
    style = page.all("style")[0].text
    assert "url(" not in style
    assert "@import" not in style
    assert "http" not in script.text + style
    identifiers = [e.attrs["id"] for e in every if "id" in e.attrs]
    assert len(set(identifiers)) == len(identifiers)
    return page


def table(element: Element) -> tuple[list[str], dict[str, list[Element]]]:
    """Return the heads of a table's columns, and its rows' cells by their heads."""
    head = [cell.text for cell in element.all("thead")[0].all("th")]
    rows = element.all("tbody")[0].all("tr")
    return head, {row.all("th")[0].text: row.all("td") for row in rows}


def section(page: Element, title: str) -> Element:
    (found,) = [e for e in [*page.all("h2"), *page.all("summary")] if e.text == title]
    assert found.above is not None
    return found.above


def write_csv(file: Path, *lines: list[object]) -> None:
    with file.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows(["" if cell is None else cell for cell in line] for line in lines)


def written(folder: Path, seed: int = 0, agent: str = "er", labels: list[str] | None = None, **more: object) -> dict:
    """Write a report of four tasks of two classes, with a memory; return its facts."""
    rng = np.random.default_rng(seed)
    names = labels or [f"class {y}" for y in range(8)]
    matrix = [[round(float(rng.random()), 4) if j <= i else None for j in range(4)] for i in range(4)]
    facts = {
        "matrix": matrix, "average_accuracy": float(np.mean([v for v in matrix[3] if v is not None])),
        "pooled_accuracy": 0.5, "pooled_accuracy_after_task": [0.9, 0.7, 0.6, 0.5], "forgetting": -0.0312,
        "backward_transfer": 0.0312, "agent": agent, "dataset": "digits", "seed": seed, "world_size": 2,
        "evaluated_on": "test", "buffer_rows": {"nominal": 40, "stored": 32, "distinct": 30},
        "wall_time_s": {"train": 60.0, "task_end": 15.0, "evaluate": 25.0}, "tasks_known": False,
        "task_classes": [names[2 * t : 2 * t + 2] for t in range(4)], "task_samples": [50, 51, 52, 53],
        "task_test_samples": [10, 11, 12, 13], "task_epochs": [3, 3, 1, 3], "planned_epochs": [3] * 4,
        "versions": {"torch": "2.9"}, "peak_host_bytes": 3 << 20,
        "references": ["Someone, A Paper"], "cite": "dcl-lightning cite --model er",
    } | more  # fmt: skip
    report = folder / "report"
    report.mkdir(parents=True)
    (report / "accuracy_matrix.json").write_text(json.dumps(facts))
    config = {"seed_everything": seed, "model": {"class_path": agent, "init_args": {"lr": 0.1 + seed}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    classes = [[t] + [round(float(rng.random()), 3) if y < 2 * t + 2 else None for y in range(8)] for t in range(4)]
    write_csv(report / "accuracy_of_classes.csv", ["after_task", *names], *classes)
    counts = rng.integers(0, 9, (8, 8))
    write_csv(
        report / "confusion_matrix.csv", ["class", *names], *([n, *c] for n, c in zip(names, counts, strict=True))
    )
    held = [
        [t, w, names[y], y // 2, 4 + w + y, 4, 0.5, 1.5] for t in range(4) for y in range(2 * t + 2) for w in (0, 1)
    ]
    write_csv(
        report / "buffer.csv", ["task", "worker", "class", "origin_task", "rows", "distinct", "age", "drawn"], *held
    )
    return facts


def page_of(tmp_path: Path, *runs: Path) -> Element:
    file = tmp_path / "out" / "page.html"
    assert cli.main(["report", *map(str, runs), "--html", str(file)]) == 0
    text = file.read_text(encoding="utf-8")
    for link in (page := parsed(text)).all("a"):
        address = link.attrs["href"] or ""
        if address.startswith("#"):
            assert [e for e in page.all() if e.attrs.get("id") == address[1:]]
        else:
            assert (file.parent / unquote(address, errors="surrogateescape")).is_file()
    return page


def lines_of(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / "report" / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_headline_and_the_matrix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = written(tmp_path / "runs/mine/version_0")
    page = page_of(tmp_path, tmp_path / "runs/mine/version_0")
    assert capsys.readouterr().out == f"Page: {tmp_path / 'out/page.html'}\n"
    assert page.all("title")[0].text == f"er on digits: {100 * facts['average_accuracy']:.1f} % average accuracy"
    assert page.all("h1")[0].text == "er on digits"
    assert "mine/version_0" in page.all("header")[0].text
    tiles = {tile.all("dt")[0].text: tile.all("dd")[0].text for tile in page.all("dl")[0].all("div")}
    assert tiles == {
        "average accuracy": f"{100 * facts['average_accuracy']:.1f} %", "forgetting": "-3.1 %",
        "wall time": "1 min 40 s", "rows in memory": "32", "workers": "2",
    }  # fmt: skip
    head, rows = table(section(page, "Accuracy of each task").all("table")[0])
    assert head == ["0", "1", "2", "3"] == [*rows]
    for row, expected in zip(rows.values(), facts["matrix"], strict=True):
        assert [cell.text for cell in row] == ["" if v is None else f"{100 * v:.1f}" for v in expected]
        for cell, value in zip(row, expected, strict=True):
            assert cell.attrs.get("class") == (None if value is None else f"c{round(100 * value)}")
    cells = [cell for row in rows.values() for cell in row]
    assert [cell.attrs.get("tabindex") for cell in cells if cell.text] == ["0"] + [None] * 9, "one Tab stop a grid"


def test_curves_are_the_columns_of_the_matrix(tmp_path: Path) -> None:
    facts = written(tmp_path / "a")
    page = page_of(tmp_path, tmp_path / "a")
    figure = section(page, "Accuracy of each task").all("figure")[1]
    *tasks, mean = figure.all("g", "row")
    matrix = np.array(facts["matrix"], dtype=float)
    points = []  # value and place of each
    for j, curve in enumerate(tasks):
        marks = curve.all("path", "pt")
        expected = [f"task {j} after task {i}: {100 * matrix[i, j]:.1f} %" for i in range(j, 4)]
        assert [mark.attrs["aria-label"] for mark in marks] == expected
        places = [
            tuple(map(float, p.split())) for p in re.findall(r"[\d.]+ [\d.]+", curve.all("polyline")[0].attrs["points"])
        ]
        assert [mark.attrs["transform"] for mark in marks] == [f"translate({x:.1f} {y:.1f})" for x, y in places]
        points += [(i, matrix[i, j], x, y) for i, (x, y) in zip(range(j, 4), places, strict=True)]
    means = [
        tuple(map(float, p.split())) for p in re.findall(r"[\d.]+ [\d.]+", mean.all("polyline")[0].attrs["points"])
    ]
    points += [(i, matrix[i, : i + 1].mean(), x, y) for i, (x, y) in enumerate(means)]
    at, values, x, y = np.array(points).T
    for given, drawn in ((at, x), (values, y)):  # both scales are straight
        slope, base = np.polyfit(given, drawn, 1)
        assert np.abs(slope * given + base - drawn).max() < 0.06
    assert np.polyfit(values, y, 1)[0] < 0, "upwards is better"
    legend = [button.text for button in figure.all("button")]
    assert legend == ["task 0", "task 1", "task 2", "task 3", "mean"]
    over = section(page, "Over the tasks").all("figure")[0]
    said = [mark.attrs["aria-label"] for mark in over.all("path", "pt")]
    lost = [np.mean([np.nanmax(matrix[j:t, j]) - matrix[t, j] for j in range(t)]) for t in range(1, 4)]
    assert said[4:] == [
        f"accuracy over all samples after task {t}: {v} %" for t, v in enumerate((90.0, 70.0, 60.0, 50.0))
    ] + [f"forgetting after task {t}: {100 * v:.1f} %" for t, v in enumerate(lost, 1)]


def test_classes_memory_time_and_what_is_folded(tmp_path: Path) -> None:
    facts = written(tmp_path / "a")
    page = page_of(tmp_path, tmp_path / "a")
    head, rows = table(section(page, "Over the tasks").all("table")[0])
    found = lines_of(tmp_path / "a", "accuracy_of_classes.csv")
    assert head == ["0", "1", "2", "3"]
    for y in range(8):
        values = [line[f"class {y}"] for line in found]
        assert [c.text for c in rows[f"class {y}"]] == [f"{100 * float(v):.0f}" if v else "" for v in values]
    memory = section(page, "The memory")
    lines = lines_of(tmp_path / "a", "buffer.csv")
    _, rows = table(memory.all("table")[0])
    for y in range(8):
        stored = [
            sum(int(n["rows"]) for n in lines if n["task"] == str(t) and n["class"] == f"class {y}") for t in range(4)
        ]
        assert [c.text for c in rows[f"class {y}"]] == [str(n) if n else "" for n in stored]
    bars, heights = [g.all("rect") for g in memory.all("g")], []
    for t, stack in enumerate(bars):
        parts = [
            sum(int(n["rows"]) for n in lines if (n["task"], n["origin_task"]) == (str(t), str(o)))
            for o in range(t + 1)
        ]
        said = [f"after task {t}: {n} rows of task {o}, of {sum(parts)}" for o, n in enumerate(parts)]
        assert [bar.attrs["aria-label"] for bar in stack] == said
        heights += [(n, float(bar.attrs["height"] or 0)) for n, bar in zip(parts, stack, strict=True)]
    scale = {n: h / n for n, h in heights}
    assert max(scale.values()) - min(scale.values()) < 0.02
    assert "capacity: 40" in memory.text
    time = section(page, "Where the time went").all("tr")
    assert [[c.text for c in row.all() if c.tag in ("th", "td")] for row in time] == [
        ["train", "60.0 s", "60.0 %", ""], ["task end", "15.0 s", "15.0 %", ""], ["evaluate", "25.0 s", "25.0 %", ""]
    ]  # fmt: skip
    assert [row.all("i")[0].attrs["style"] for row in time] == ["width:60.0%", "width:15.0%", "width:25.0%"]
    confusion = lines_of(tmp_path / "a", "confusion_matrix.csv")
    _, rows = table(section(page, "Confusion matrix after the last task").all("table")[0])
    for line in confusion:
        counts = [int(line[f"class {k}"]) for k in range(8)]
        assert [c.text for c in rows[line["class"]]] == [f"{100 * n / sum(counts):.0f}" for n in counts]
    assert section(page, "Configuration").tag == "details"
    assert section(page, "Configuration").all("pre")[0].text == (tmp_path / "a/config.yaml").read_text()
    about = section(page, "Run and environment").text
    assert "torch 2.9" in about
    assert "3 MiB" in about
    assert "Someone, A Paper" in section(page, "To cite").text
    files = {a.text for a in section(page, "Files").all("a")}
    assert files == {
        "accuracy_matrix.json", "accuracy_of_classes.csv", "buffer.csv", "confusion_matrix.csv", "config.yaml"
    }  # fmt: skip
    (_, rows), metrics = (
        table(section(page, "Tasks").all("table")[0]),
        table(section(page, "Metrics").all("table")[0])[1],
    )
    assert [c.text for c in rows["1"]] == ["class 2, class 3", "51", "11", "3"]
    assert [c.text for c in rows["2"]] == ["class 4, class 5", "52", "12", "1 of 3, ended early"]
    assert metrics["forgetting"][1].text == "-3.1"
    assert facts["matrix"]


def test_what_a_report_lacks_is_left_out(tmp_path: Path) -> None:
    report = tmp_path / "a/report"
    report.mkdir(parents=True)
    facts = {"matrix": [[1.0, None], [0.5, 1.0]], "agent": "mine", "dataset": None}
    (report / "accuracy_matrix.json").write_text(json.dumps(facts))
    (report / "accuracy_of_classes.csv").write_text("after_task,0\n0,odd\n")
    (report / "confusion_matrix.csv").write_bytes(b"class,\xff\n0\n")
    (report / "buffer.csv").write_text("task,class,origin_task,rows\n0,1,0,7\n")  # of another fit: buffer_rows is null
    page = page_of(tmp_path, tmp_path / "a")
    titles = [e.text for e in [*page.all("h2"), *page.all("summary")]]
    assert titles == ["Accuracy of each task", "Over the tasks", "Metrics", "Run and environment", "Files"]
    assert page.all("title")[0].text == "mine on unnamed data"


def test_several_runs_are_compared(tmp_path: Path) -> None:
    places = {"er": "runs/er/version_0", "icarl": "runs/icarl/version_0", "other": "runs/other/version_0"}
    facts = {name: written(tmp_path / place, n, name) for n, (name, place) in enumerate(places.items())}
    page = page_of(tmp_path, *(tmp_path / place for place in places.values()))
    (compared,) = page.all("table", "sortable")
    assert all(len(th.all("button")) == 1 for th in compared.all("thead")[0].all("th"))
    head, rows = table(compared)
    assert [*rows] == [*places], "as far as the names of their folders differ"
    column = [name.strip() for name in head].index("average accuracy") - 1
    for name, row in rows.items():
        assert row[column].text == f"{100 * facts[name]['average_accuracy']:.1f}"
        assert float(row[column].attrs["data-v"] or 0) == facts[name]["average_accuracy"]
    curves = section(page, "Average accuracy over the tasks").all("g", "row")
    for curve, (name, content) in zip(curves, facts.items(), strict=True):
        matrix = np.array(content["matrix"], dtype=float)
        said = [f"{name} after task {i}: {100 * matrix[i, : i + 1].mean():.1f} %" for i in range(4)]
        assert [mark.attrs["aria-label"] for mark in curve.all("path", "pt")] == said
    for article, content in zip(page.all("article"), facts.values(), strict=True):
        _, cells = table(article.all("table", "heat")[0])
        assert [c.text for c in cells["3"]] == [f"{100 * v:.1f}" for v in content["matrix"][3]]
    _, keys = table(section(page, "What differs in the configurations").all("table")[0])
    assert [c.text for c in keys["model.lr"]] == ["0.1", "1.1", "2.1"]
    assert [*keys] == ["model.class_path", "model.lr", "seed_everything"]


def test_without_a_page_it_prints_what_the_fits_have_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = [written(tmp_path / name, seed, name) for seed, name in enumerate(("er", "gem"))]
    assert cli.main(["report", str(tmp_path)]) == 0
    first, second = capsys.readouterr().out.split("\n\n")
    for text, name, content in (first, "er", facts[0]), (second, "gem", facts[1]):
        title, _, _, *rows, result, report = text.splitlines()
        assert title == "Accuracy in % after 4 of 4 tasks"
        for t, (row, values) in enumerate(zip(rows, content["matrix"], strict=True)):
            known = [v for v in values if v is not None]
            shown = [*(f"{100 * v:.1f}" for v in known), *["-"] * (3 - t), f"{100 * np.mean(known):.1f}"]
            assert row.replace("|", " ").split() == [str(t), *shown]
        accuracy = f"{100 * content['average_accuracy']:.1f} % average accuracy"
        assert result == f"Result: {name} on digits: {accuracy}, forgetting -3.1, 0:01:40"
        assert report == f"Report: {tmp_path / name / 'report'}"


@pytest.mark.parametrize("copies", [1, 2])
def test_what_a_run_calls_itself_is_text(tmp_path: Path, copies: int) -> None:
    places = [tmp_path / f"<script>alert({n})<" / "ver & ' \" # % é" for n in range(copies)]
    for place in places:
        labels = [f"{HOSTILE}{y}" for y in range(8)]
        written(
            place, 0, HOSTILE, labels, dataset=HOSTILE, references=[HOSTILE], cite=HOSTILE, versions={HOSTILE: HOSTILE}
        )
    page = page_of(tmp_path, *places)
    assert HOSTILE in page.all("title")[0].text or copies == 2
    assert f"<script>alert({copies - 1})<" in page.all("main")[0].text
    assert HOSTILE in page.all("h1")[0].text or HOSTILE in page.all("article")[0].text
    assert HOSTILE in page.all("pre")[0].text
    if copies == 1:
        _, rows = table(section(page, "Over the tasks").all("table")[0])
        assert [*rows] == [f"{HOSTILE}{y}" for y in range(8)]


def test_a_long_stream_of_many_classes_stays_small(tmp_path: Path) -> None:
    size = 60
    matrix = [[0.5 if j <= i else None for j in range(size)] for i in range(size)]
    written(tmp_path / "a", matrix=matrix, task_classes=[], pooled_accuracy_after_task=[0.5] * size)
    names = [str(y) for y in range(300)]
    write_csv(
        tmp_path / "a/report/accuracy_of_classes.csv", ["after_task", *names], *([t, *[0.5] * 300] for t in range(size))
    )
    write_csv(tmp_path / "a/report/confusion_matrix.csv", ["class", *names], *([n, *[1] * 300] for n in names))
    page = page_of(tmp_path, tmp_path / "a")
    assert (tmp_path / "out/page.html").stat().st_size < 200_000
    assert "Confusion matrix after the last task" not in [e.text for e in page.all("summary")]
    assert len(section(page, "Over the tasks").all("table")) == 0
    numbers = [th.text for th in page.all("table", "dense")[0].all("th", "k")]
    assert numbers == ["0", "5", "10", "15", "20", "25", "30", "35", "40", "45", "50", "55"] * 2


def test_an_interrupted_stream_shows_the_tasks_so_far() -> None:
    facts = {"matrix": [[0.9, None, None], [0.6, 0.8, None], [None] * 3], "agent": "er", "average_accuracy": 0.7}
    page = parsed(page_text([PageRun("cut", facts)]))
    _, rows = table(page.all("table", "heat")[0])
    assert [[c.text for c in row] for row in rows.values()] == [["90.0", ""], ["60.0", "80.0"]]
    nothing = parsed(page_text([PageRun("none", facts | {"matrix": [[None]]})]))
    assert not nothing.all("table", "heat")


def test_colours_are_viridis_and_their_numbers_are_legible() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    viridis = matplotlib.colormaps["viridis"]
    for n in range(colours.SHADES + 1):
        ours = colours.shade(n / colours.SHADES)
        channels = [int(ours[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert np.abs(np.array(viridis(n / colours.SHADES)[:3]) - channels).max() < 0.025
        linear = np.where(
            np.array(channels) <= 0.04045, np.array(channels) / 12.92, ((np.array(channels) + 0.055) / 1.055) ** 2.4
        )
        light = float(linear @ [0.2126, 0.7152, 0.0722])
        ink = {"#000": 0.0, "#fff": 1.0}[colours.ink_on(ours)]
        low, high = sorted((light, ink))
        assert (high + 0.05) / (low + 0.05) >= 4.5, "WCAG 2.1, level AA"


def test_a_fit_writes_it_beside_the_other_files_and_outlives_its_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, Clock())
    TaskReport(pictures=False).on_train_end(trainer, FakeAgent())
    page = parsed((tmp_path / "report/index.html").read_text(encoding="utf-8"))
    _, rows = table(page.all("table", "heat")[0])
    assert [c.text for c in rows["2"]] == ["60.0", "80.0", "100.0"]
    addresses = {a.attrs["href"] for a in page.all("a")}
    assert addresses == {p.name for p in (tmp_path / "report").iterdir()} - {"index.html"}

    def broken(runs: list[PageRun]) -> str:
        raise RuntimeError("no page today")

    monkeypatch.setattr("dcl_lightning.callbacks.report.page_text", broken)
    other = make_trainer(tmp_path / "other", Clock())
    with pytest.warns(UserWarning, match="the page is left out"):
        TaskReport(pictures=False).on_train_end(other, FakeAgent())
    assert (tmp_path / "other/report/summary.md").exists()
    assert not (tmp_path / "other/report/index.html").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["a", "--html", "."], ["--html=.", "give the path of a file"]),
        (["a", "--html", "a/config.yaml/page.html"], ["--html=a/config.yaml/page.html cannot be written"]),
        (["nothing", "--html", "x.html"], ["nothing: no finished run"]),
    ],
)
def test_mistakes_are_one_line(
    args: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "a")
    try:
        code = cli.main(["report", *args])
    except SystemExit as end:
        code = int(end.code or 0)
    assert code == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert all(word in err for word in words)
    assert not (tmp_path / "x.html").exists()
