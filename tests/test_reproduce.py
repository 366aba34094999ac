"""Published numbers: the comparison with them, the table, and runs that are left out, resumed and begun anew.

Avalanche is not installed here: fakes stand for it.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import reproduce
import reproduce_peer
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from reproduce import Published, Target
from scipy import stats

from dcl_lightning import cli

ACCURACIES = st.lists(st.floats(0, 100), min_size=2, max_size=6).filter(lambda values: statistics.stdev(values) > 0.01)
PAPER = Published("average_accuracy", 40.0, 2.0, 3, "a paper")
ROUNDED = Published("average_accuracy", 40.0, None, 1, "a table")


def target(*published: Published, seeds: tuple[int, ...] = (0, 1, 2), **config: Any) -> Target:
    return Target("case", "A case", published or (PAPER,), seeds, config, "digest")


def runs(*values: float, seconds: float = 60.0) -> dict[int, dict[str, Any]]:
    return {
        seed: {
            "figures": {"average_accuracy": value, "forgetting": 90.0 - value},
            "seconds": {"train": seconds, "eval": 5.0, "all": 2 * seconds},
            "versions": {"avalanche": "0.6.0"},
        }
        for seed, value in enumerate(values)
    }


# -- the comparison ------------------------------------------------------------------------------------------------


@given(ours=ACCURACIES, theirs=ACCURACIES)
def test_the_ends_of_the_interval_are_where_welchs_test_has_five_per_cent(
    ours: list[float], theirs: list[float]
) -> None:
    published = Published("", statistics.mean(theirs), statistics.stdev(theirs), len(theirs), "")
    found = reproduce.compare(ours, published)
    assert found.difference == pytest.approx(statistics.mean(ours) - statistics.mean(theirs), abs=1e-9)
    for end in (found.low, found.high):
        moved = [value - end for value in ours]
        assert stats.ttest_ind(moved, theirs, equal_var=False).pvalue == pytest.approx(0.05, abs=1e-6)
    assert found.reproduced == (found.high >= 0)


def test_one_run_of_ours_takes_their_deviation() -> None:
    # The interval of one more value of the same normal distribution: Student's t with two degrees of freedom is 4.303.
    half = 4.3027 * 2.0 * (1 + 1 / 3) ** 0.5
    found = reproduce.compare([41.0], PAPER)
    assert (found.low, found.high) == (pytest.approx(1 - half, abs=1e-3), pytest.approx(1 + half, abs=1e-3))


def test_equal_values_without_any_deviation() -> None:
    exact = PAPER._replace(deviation=0.0)
    assert reproduce.compare([41.0, 41.0], exact) == (1.0, 1.0, 1.0, True)
    assert reproduce.compare([39.0, 39.0], exact) == (-1.0, -1.0, -1.0, False)


@pytest.mark.parametrize(
    ("ours", "reproduced"), [([37.0], True), ([36.9], False), ([43.0], True), ([43.1], False), ([36.0, 42.0], True)]
)
def test_one_rounded_value_is_reproduced_within_three_points(ours: list[float], reproduced: bool) -> None:
    found = reproduce.compare(ours, ROUNDED)
    assert found.reproduced == reproduced
    assert math.isnan(found.low)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (runs(), "not yet run: `python benchmarks/reproduce.py --only case`"),
        (runs(40.0, 41.0), "running: 2 of 3"),
        (runs(39.0, 40.0, 40.5), "reproduced"),
        (runs(60.0, 61.0, 62.0), "reproduced"),  # the interval lies above 0
        (runs(20.0, 21.0, 22.0), "missed: another order"),
    ],
)
def test_verdicts(found: dict[int, dict[str, Any]], said: str) -> None:
    assert reproduce.verdict(target(), PAPER, found, {"case": "another order", "other": "no"}) == said


def test_a_miss_without_a_cause_says_so_and_a_case_without_a_number_is_measured() -> None:
    assert reproduce.verdict(target(), PAPER, runs(1.0, 1.1, 1.2), {}) == "missed: the cause is not known yet"
    without = PAPER._replace(value=None, deviation=None, runs=0)
    assert reproduce.verdict(target(without), without, runs(1.0, 2.0, 3.0), {}) == "measured"


def test_a_peer_is_said_how_to_run_and_then_how_it_differs() -> None:
    [peer] = reproduce.of_peer([target()], {"case": "another loss"})
    assert reproduce.verdict(peer, PAPER, runs(), {}) == (
        "not yet run: `python benchmarks/reproduce.py --peer avalanche --only case`"
    )
    assert reproduce.verdict(peer, PAPER, runs(1.0), {}) == "running: 1 of 3"
    assert reproduce.verdict(peer, PAPER, runs(1.0, 2.0, 3.0), {"case": "another loss"}) == "another loss"


def test_notes_are_lines_with_a_name(tmp_path: Path) -> None:
    file = tmp_path / "misses.txt"
    file.write_text("# of what was missed\n\nfirst: its head: grows\nsecond:no crop\n")
    assert reproduce.read_notes(file) == {"first": "its head: grows", "second": "no crop"}


# -- the heads of the configurations -------------------------------------------------------------------------------


def write_config(folder: Path, head: str, content: str = "model: {}\n") -> Path:
    path = folder / "case.yaml"
    path.write_text(f"# A case.\n{head}{content}")
    return path


GOOD = "# published: average_accuracy 40.00 ± 2.08 (3 runs): a program, its file\n# seeds: 0 1 2\n"


def test_the_head_of_a_configuration_has_its_numbers(tmp_path: Path) -> None:
    more = "# published: pooled_accuracy 41 (1 run): a table\n# measured: top5.pooled_accuracy: not published\n"
    found = reproduce.read_target(write_config(tmp_path, GOOD + more))
    assert (found.name, found.title, found.seeds) == ("case", "A case", (0, 1, 2))
    assert found.published == (
        Published("average_accuracy", 40.0, 2.08, 3, "a program, its file"),
        Published("pooled_accuracy", 41.0, None, 1, "a table"),
        Published("top5.pooled_accuracy", None, None, 0, "not published"),
    )
    again = reproduce.read_target(write_config(tmp_path, GOOD + more + "# Another word.\n"))
    assert again.digest == found.digest
    changed = reproduce.read_target(write_config(tmp_path, GOOD, "model: {lr: 1}\n"))
    assert changed.digest != found.digest


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("# seeds: 0\n", "needs lines '# published:'"),
        ("# published: average_accuracy 40 (1 run): a table\n", "and '# seeds:'"),
        (GOOD.replace("(3 runs)", "(1 run)"), "a deviation of one run"),
        (GOOD.replace("(3 runs)", ""), "write '# published: FIGURE VALUE"),
    ],
)
def test_a_head_that_cannot_be_read_is_refused(head: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        reproduce.read_target(write_config(tmp_path, head))


def test_every_configuration_is_of_a_known_figure_and_writes_its_memory_out() -> None:
    known = {*reproduce.FIGURES, "top5.pooled_accuracy"}
    found = reproduce.targets()
    assert len(found) > 30
    for one in found:
        assert {theirs.figure for theirs in one.published} <= known, one.name
        memory = one.config["model"]["init_args"].get("rehearsal", {})
        if "policy" in memory:
            assert memory.keys() >= {"num_samples", "update", "draw_from", "loss", "weighting"}, one.name
    names = {one.name for one in found}
    assert reproduce.read_notes(reproduce.MISSES).keys() <= names
    peers = reproduce.of_peer(found, reproduce.read_notes(reproduce.DIFFERENCES))
    assert {one.name for one in peers} == reproduce.read_notes(reproduce.DIFFERENCES).keys()
    assert {one.config["model"]["class_path"] for one in peers} == reproduce_peer.STRATEGIES.keys()
    assert not {one.label for one in peers} & names


def test_names_are_chosen_whole_or_by_their_beginnings() -> None:
    assert [one.name for one in reproduce.targets(["aml_joint_cifar10"])] == ["aml_joint_cifar10"]
    claim = [one.name for one in reproduce.targets(["claim"])]
    assert claim == [f"claim_{kind}_tinyimagenet" for kind in ("incremental", "nil", "scratch")]
    with pytest.raises(SystemExit, match="--only nonsense: no configuration begins so: give one of aml_"):
        reproduce.targets(["nonsense"])


# -- the table -----------------------------------------------------------------------------------------------------


def test_the_table_by_hand() -> None:
    cases = [
        target(),
        target(ROUNDED, ROUNDED._replace(figure="pooled_accuracy"))._replace(name="two", title="Two"),
    ]
    found = {"case": runs(39.0, 40.0, 41.0), "two": {}}
    # Means 40 and 40, deviations 1 and 2 of three runs each: Welch's degrees of freedom are 50 / 17.
    half = float(stats.t.ppf(0.975, 50 / 17)) * (5 / 3) ** 0.5
    waits = "|  |  |  |  |  | not yet run: `python benchmarks/reproduce.py --only two` |"
    assert reproduce.table(cases, found, {}, {}).splitlines()[2:] == [
        f"| A case (`case`) | a paper | 40.00 ± 2.00 (3) | 40.00 ± 1.00 (3) | +0.00 [{-half:+.2f}, {half:+.2f}] "
        "| 50.00 ± 1.00 | 0 1 2 | 60 + 5 | reproduced |",
        f"| Two: average accuracy (`two`) | a table | 40.00 (1) {waits}",
        f"| Two: pooled accuracy (`two`) | a table | 40.00 (1) {waits}",
    ]


def test_the_claim_has_its_runs_beside_each_other() -> None:
    measured = PAPER._replace(figure="top5.pooled_accuracy", value=None, deviation=None, runs=0)
    cases = [target(measured, seeds=(0,))._replace(name=name, title=name) for name in sorted(reproduce.CLAIM)]

    def run(top5: float, top1: float, seconds: float, processor: str = "a GPU") -> dict[int, dict[str, Any]]:
        figures = {"top5.pooled_accuracy": top5, "pooled_accuracy": top1, "forgetting": 10.0}
        times = {"train": seconds, "eval": 10.0, "all": seconds + 30}
        return {0: {"figures": figures, "seconds": times, "processor": processor, "threads": 1}}

    scratch, incremental, nil = reproduce.CLAIM
    found = {scratch: run(80.0, 60.0, 400.0), incremental: run(30.0, 12.5, 160.0), nil: run(70.0, 50.0, 190.0)}
    assert reproduce.claim([target(), *cases], found).splitlines()[2:] == [
        f"| {scratch} (`{scratch}`) | a paper | 80.00 (1) | 60.00 (1) | 400 | 100 % | 0 | measured |",
        f"| {incremental} (`{incremental}`) | a paper | 30.00 (1) | 12.50 (1) | 160 | 40 % | 0 | measured |",
        f"| {nil} (`{nil}`) | a paper | 70.00 (1) | 50.00 (1) | 190 | 48 % | 0 | measured |",
    ]
    # Times of different machines are not compared, and a case that was not run has no figures.
    found = {scratch: run(80.0, 60.0, 400.0), nil: run(70.0, 50.0, 190.0, "another")}
    *_, second, third = reproduce.claim(cases, found).splitlines()
    assert second.endswith(
        f"| a paper |  |  |  |  |  | not yet run: `python benchmarks/reproduce.py --only {incremental}` |"
    )
    assert third.endswith("| 70.00 (1) | 50.00 (1) | 190 |  | 0 | measured |")


def test_a_peer_has_a_row_below_ours_with_its_own_runs() -> None:
    cases = [target(ROUNDED), target(ROUNDED)._replace(name="two", title="Two")]
    found = {
        "case": runs(40.0, 41.0, 42.0),
        "avalanche-case": runs(35.0, 36.0, 37.0, seconds=80.0),
        "avalanche-two": runs(99.0),  # of a configuration that it runs no more
    }
    ours, peer, last = reproduce.table(cases, found, {}, {"case": "another loss"}).splitlines()[2:]
    assert ours == (
        "| A case (`case`) | a table | 40.00 (1) | 41.00 ± 1.00 (3) | +1.00 | 49.00 ± 1.00 | 0 1 2 | 60 + 5 "
        "| reproduced |"
    )
    assert peer == (
        "| Avalanche 0.6.0 on the same |  |  | 36.00 ± 1.00 (3) | -4.00 | 54.00 ± 1.00 | 0 1 2 | 80 + 5 "
        "| another loss |"
    )
    assert last.startswith("| Two (`two`) |")
    found["case"][0]["figures"]["forgetting"] = None  # of one task
    assert "| +1.00 |  | 0 1 2 |" in reproduce.table(cases[:1], found, {}, {})


def test_the_part_of_the_page_is_replaced_and_nothing_else() -> None:
    page = f"# Results\n\nFirst.\n\n{reproduce.HEADING}\n\nold\n\n## The quick check\n\nlast\n"
    new = f"{reproduce.HEADING}\n\nnew\n\n"
    expected = f"# Results\n\nFirst.\n\n{new}## The quick check\n\nlast\n"
    assert reproduce.with_section(page, new) == expected
    assert reproduce.with_section(expected, new) == expected


def test_the_page_opens_with_the_published_numbers() -> None:
    page = reproduce.RESULTS.read_text(encoding="utf-8")
    assert page.index(reproduce.HEADING) < page.index("## The quick check") < page.index("## Digits")
    assert page.split(reproduce.HEADING)[0].count("\n") < 10
    part = page[page.index(reproduce.HEADING) : page.index("## The quick check")]
    assert all(f"(`{one.name}`)" in part for one in reproduce.targets())


def test_runs_of_another_configuration_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "FOUND", tmp_path)
    for seed, digest in ((0, "digest"), (1, "before")):
        reproduce.write(tmp_path / f"case-{seed}.json", {"digest": digest, "seed": seed})
    assert list(reproduce.found_of(target())) == [0]
    assert not list(tmp_path.glob("*.tmp"))


# -- the runs ------------------------------------------------------------------------------------------------------

REPORT = {
    "average_accuracy": 0.5, "pooled_accuracy": 0.5, "average_incremental_accuracy": 0.75, "forgetting": None,
    "matrix": [[1.0, None], [0.25, 0.75]],
    "versions": {"torch": "2", "lightning": "2", "dcl_lightning": "1", "python": "3"}, "peak_device_bytes": None,
    "wall_time_s": {
        "train": 1.0, "data": 0.5, "rehearse": 0.25, "checkpoint": 1.25, "task_end": 0.5, "select": 1.0,
        "evaluate": 1.5,
    },
}  # fmt: skip
# A command line that is killed after its first checkpoint, and ends when it goes on from there.
KILLED_ONCE = f"""
import json, os, sys, yaml
from pathlib import Path
args = sys.argv[1:]
options = yaml.safe_load(Path([b for a, b in zip(args, args[1:]) if a == "--config"][1]).read_text())
logger = options["trainer"]["logger"]["init_args"]
folder = Path(logger["save_dir"], logger["name"], "version_0")
print(" ".join(args), os.environ["OMP_NUM_THREADS"], flush=True)
if "--ckpt_path" not in args:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "task.ckpt").write_text("")
    os.kill(os.getpid(), 9)
(folder / "report").mkdir()
(folder / "report" / "accuracy_matrix.json").write_text({json.dumps(REPORT)!r})
"""


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have the script work in a folder of its own; its repository stays the project's."""
    for name, folder in (("CONFIGS", "configs"), ("FOUND", "found"), ("RUNS", "runs")):
        monkeypatch.setattr(reproduce, name, tmp_path / folder)
    (tmp_path / "configs").mkdir()
    return tmp_path


def test_a_killed_run_goes_on_and_one_that_has_ended_is_left_out(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = iter(["abc", "def", "ghi"])
    monkeypatch.setattr(reproduce, "commit", lambda: next(commits))
    monkeypatch.setattr(reproduce, "ROOT", places)
    (places / "cli.py").write_text(KILLED_ONCE)
    case = reproduce.read_target(
        write_config(places / "configs", GOOD, "model: {init_args: {epochs_per_task: [20, 30]}}\n")
    )
    with pytest.raises(ChildProcessError, match=r"case-1: .*--seed_everything 1.* 3 \("):
        reproduce.run_one(case, 1, 3, "/data")
    assert not list((places / "found").glob("*"))
    assert reproduce.run_one(case, 1, 3, "/data") == "done now"
    first, second = (places / "runs/case-1/log.txt").read_text().splitlines()
    assert "--data.root /data" in first
    assert "--ckpt_path last" in second
    savers = yaml.safe_load((places / "runs/case-1/options.yaml").read_text())["trainer"]["callbacks"]
    assert savers[0]["init_args"]["every_n_epochs"] == 10  # divides 20 and 30
    found = json.loads((places / "found/case-1.json").read_text())
    assert (found["seed"], found["threads"], found["digest"]) == (1, 3, case.digest)
    assert found["commits"] == ["abc", "def"]
    assert found["figures"] == {
        "average_accuracy": 50.0, "pooled_accuracy": 50.0, "average_incremental_accuracy": 75.0, "forgetting": None
    }  # fmt: skip
    assert found["matrix"] == [[100.0, None], [25.0, 75.0]]
    assert (found["seconds"]["train"], found["seconds"]["eval"]) == (3.0, 3.0)
    assert found["seconds"]["all"] > 0
    assert found["processor"]
    assert reproduce.run_one(case, 1, 3, "/data") == "done"

    # The same name with another content begins anew, without the other's checkpoints.
    changed = reproduce.read_target(write_config(places / "configs", GOOD, "model: {init_args: {lr: 1}}\n"))
    with pytest.raises(ChildProcessError):
        reproduce.run_one(changed, 1, 1, None)
    assert len((places / "runs/case-1/log.txt").read_text().splitlines()) == 1


def test_a_run_belongs_to_the_process_that_began_it(places: Path) -> None:
    reproduce.RUNS.mkdir()
    with reproduce._claimed(reproduce.RUNS / "case-0.lock") as lock:
        assert lock is not None
        assert reproduce.run_one(target(), 0, 1, None) == "another process runs it"


# A peer's program that is killed at its first start, and ends at its second.
PEER_KILLED_ONCE = f"""
import json, os, sys
from pathlib import Path
args = sys.argv[1:]
folder = Path(args[args.index("--folder") + 1])
print(" ".join(args), os.environ["OMP_NUM_THREADS"], flush=True)
if not (folder / "task_end.pt").exists():
    (folder / "task_end.pt").write_text("")
    os.kill(os.getpid(), 9)
(folder / "version_0" / "report").mkdir(parents=True)
(folder / "version_0" / "report" / "accuracy_matrix.json").write_text({json.dumps(REPORT)!r})
"""


def test_a_peers_run_is_resumed_and_left_out_beside_ours(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "commit", lambda: "abc")
    monkeypatch.setattr(reproduce, "ROOT", places)
    (places / "benchmarks").mkdir()
    (places / "benchmarks" / "reproduce_peer.py").write_text(PEER_KILLED_ONCE)
    ours = reproduce.read_target(write_config(places / "configs", GOOD))
    [case] = reproduce.of_peer([ours], {"case": "another loss"})
    with pytest.raises(ChildProcessError, match=r"avalanche-case-1: .*--seed 1 .* 1 \("):
        reproduce.run_one(case, 1, 1, "/data")
    assert reproduce.run_one(case, 1, 1, "/data") == "done now"
    assert reproduce.run_one(case, 1, 1, "/data") == "done"
    config, folder = places / "configs" / "case.yaml", places / "runs" / "avalanche-case-1"
    said = f"--config {config} --seed 1 --folder {folder} --root /data 1"
    assert (folder / "log.txt").read_text().splitlines() == [said, said]
    found = json.loads((places / "found/avalanche-case-1.json").read_text())
    assert (found["name"], found["digest"], found["commits"]) == ("avalanche-case", ours.digest, ["abc"])
    assert not reproduce.found_of(ours)
    assert list(reproduce.found_of(case)) == [1]


def test_a_peer_is_chosen_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def say(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["reproduce.py", "--peer", "avalanche", *words])
        with pytest.raises(SystemExit) as end:
            reproduce.main()
        assert end.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "give --only one of aml_er_cifar10_m100, " in say("--only", "aml_joint_cifar10")
    monkeypatch.setattr(reproduce, "PEER", "not_installed_here")
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--peer", "not_installed_here"])
    with pytest.raises(SystemExit):
        reproduce.main()
    assert "it is not installed: pip install 'dcl-lightning[peers]'" in capsys.readouterr().err


class FakeStrategy:
    """Knows what it was trained on; its accuracy on a task is a random number of quarters."""

    def __init__(self) -> None:
        self.trained: list[int] = []

    def train(self, experience: int, **options: Any) -> None:
        self.trained.append(experience)

    def eval(self, tests: Sequence[Any]) -> dict[str, float]:
        name = "Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp{:03d}"
        return {name.format(task): torch.randint(5, ()).item() / 4 for task in range(len(tests))}


class FakeStream:
    """Three tasks, each tested on four samples."""

    train_stream = (0, 1, 2)
    test_stream = tuple(SimpleNamespace(dataset=range(4)) for _ in train_stream)


def test_a_peer_goes_on_behind_the_last_task_with_the_same_random_numbers(tmp_path: Path) -> None:
    def learn(folder: Path, killed_in: int) -> dict[str, Any]:
        def experiences(task: int) -> Iterator[int]:
            yield 2 * task
            if task == killed_in:
                raise ChildProcessError
            yield 2 * task + 1

        folder.mkdir(exist_ok=True)
        torch.manual_seed(1)
        return reproduce_peer.learn(FakeStrategy(), FakeStream(), experiences, folder)

    whole = learn(tmp_path / "whole", -1)
    with pytest.raises(ChildProcessError):
        learn(tmp_path / "cut", 2)
    resumed = learn(tmp_path / "cut", 0)  # the first tasks are not learnt again
    assert resumed["matrix"] == whole["matrix"]
    assert [sum(value is not None for value in row) for row in whole["matrix"]] == [1, 2, 3]
    last = pytest.approx(statistics.mean(whole["matrix"][-1]))
    assert (whole["average_accuracy"], whole["pooled_accuracy"]) == (last, last)
    saved = torch.load(tmp_path / "cut" / reproduce_peer.STATE, weights_only=False)
    assert saved["strategy"].trained == [0, 1, 2, 3, 4, 5]


def test_missing_data_are_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["reproduce.py", "--only", "aml_er_cifar10_m100", "--root", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        reproduce.main()
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "data set 'cifar10' not found" in line
    assert "--config configs/reproduce/aml_er_cifar10_m100.yaml --data.download true" in line


def test_the_real_command_line_takes_what_a_run_adds(
    places: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = """
model: {class_path: base, init_args: {backbone: mlp, epochs_per_task: 2}}
data: {class_path: ContinualDataModule, init_args: {dataset: digits, increment: 5}}
trainer:
  {accelerator: cpu, limit_train_batches: 2, logger: {class_path: CSVLogger, init_args: {save_dir: x, name: y}}}
"""
    case = reproduce.read_target(write_config(places / "configs", GOOD, content))

    def here(command: list[str], folder: Path, threads: int, lock: object) -> None:
        assert cli.main(command[2:]) == 0
        (folder / "seconds").write_text("1.5")

    monkeypatch.setattr(reproduce, "_execute", here)
    assert reproduce.run_one(case, 3, 1, None) == "done now"
    found = json.loads((places / "found/case-3.json").read_text())
    assert [sum(value is not None for value in row) for row in found["matrix"]] == [1, 2]
    assert found["seconds"]["all"] == 1.5
    saved = {path.name.partition("-")[0] for path in places.rglob("*.ckpt")}
    assert saved == {"task"}  # no run of five minutes
    assert reproduce.table([case], {case.name: {3: found}}, {}, {}).endswith("| running: 1 of 3 |")
