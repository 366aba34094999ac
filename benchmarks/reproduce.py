"""The field's published numbers, run anew: each file of configs/reproduce over its seeds, and the table of RESULTS.md.

A run is ``python cli.py fit`` in a process of its own. It saves a checkpoint at the end of each task and every five
minutes; called again, this command goes on with a run that was killed and leaves out one that has ended. A run whose
configuration has changed since is run anew. What a run found goes to ``benchmarks/reproduced/NAME-SEED.json``, its log
and checkpoints below ``runs/reproduce``. The head of each configuration has the published numbers, which are read from
there, and ``configs/reproduce/misses.txt`` the causes that were found of numbers that were missed.

With ``--peer avalanche`` the runs are Avalanche's on the same images and seeds, for the configurations that
``configs/reproduce/peers.txt`` names: ``reproduce_peer.py`` in place of ``cli.py``, which saves a state at the end of
each task. They go to ``benchmarks/reproduced/avalanche-NAME-SEED.json`` and have rows of their own below ours.

Several of these commands may run at once: a run belongs to the one that began it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import yaml
from scipy.stats import t as student

ROOT = Path(__file__).parent.parent
CONFIGS, FOUND, RUNS = ROOT / "configs" / "reproduce", ROOT / "benchmarks" / "reproduced", ROOT / "runs" / "reproduce"
MISSES, DIFFERENCES = CONFIGS / "misses.txt", CONFIGS / "peers.txt"
PEER = "avalanche"
RESULTS = ROOT / "RESULTS.md"
HEADING = "## Published numbers"
# One statement about three runs, in the order of its table: the first is what the others are compared with.
CLAIM = ("claim_scratch_tinyimagenet", "claim_incremental_tinyimagenet", "claim_nil_tinyimagenet")
COMMAND = "python benchmarks/reproduce.py"
# A published value without a deviation is one run, often rounded: so far from it ours may lie, in points.
ROUNDED = 3.0
SAVE_EVERY = "0:05:00"
# Of a report, beside those that are compared.
FIGURES = ("average_accuracy", "pooled_accuracy", "average_incremental_accuracy", "forgetting")
_NUMBER = r"(\d+(?:\.\d+)?)"
_PUBLISHED = re.compile(rf"# published: ([\w.]+) {_NUMBER}(?: ± {_NUMBER})? \((\d+) runs?\): (.+)")
_MEASURED = re.compile(r"# measured: ([\w.]+): (.+)")
_SEEDS = re.compile(r"# seeds: (\d+(?: \d+)*)")


class Published(NamedTuple):
    """One published number.

    Args:
        figure: key of the report that is compared with it; ``top5.pooled_accuracy`` for a key within ``top5``.
        value: in %; None if none was published for this case, which is then measured only.
        deviation: standard deviation over the runs; None for one value.
        runs: number of runs, at least 2 with a deviation.
        source: paper, or program and file.
    """

    figure: str
    value: float | None
    deviation: float | None
    runs: int
    source: str


class Target(NamedTuple):
    """One configuration of configs/reproduce.

    Args:
        name: of the file.
        title: first line of its head.
        published: what it is compared with.
        seeds: of its runs.
        config: content of the file.
        digest: of that content, without comments.
        peer: the library that runs it; ours if empty.
    """

    name: str
    title: str
    published: tuple[Published, ...]
    seeds: tuple[int, ...]
    config: dict[str, Any]
    digest: str
    peer: str = ""

    @property
    def label(self) -> str:
        """Name of its runs, without the seed."""
        return f"{self.peer}-{self.name}" if self.peer else self.name

    @property
    def options(self) -> str:
        """What its command has behind the name of the program."""
        return f"{f'--peer {self.peer} ' if self.peer else ''}--only {self.name}"


class Comparison(NamedTuple):
    """Ours less theirs, in points.

    Args:
        difference: of the means.
        low: lower end of the 95 % interval; NaN if theirs has no deviation.
        high: upper end.
        reproduced: whether the interval holds 0 or lies above it; without an interval, whether both are near.
    """

    difference: float
    low: float
    high: float
    reproduced: bool


def read_target(path: Path) -> Target:
    """Read a configuration and the lines ``# published:`` or ``# measured:`` and ``# seeds:`` of its head.

    Args:
        path: of the file.

    Raises:
        ValueError: a line is missing or has another form.
    """
    text = path.read_text(encoding="utf-8")
    head = [line for line in text.splitlines() if line.startswith("#")]
    published = []
    for line in head:
        if found := _PUBLISHED.fullmatch(line):
            figure, value, deviation, runs, source = found.groups()
            if deviation is not None and int(runs) < 2:
                raise ValueError(f"{path}: a deviation of one run: {line}")
            published.append(
                Published(figure, float(value), None if deviation is None else float(deviation), int(runs), source)
            )
        elif found := _MEASURED.fullmatch(line):
            published.append(Published(found[1], None, None, 0, found[2]))
        elif line.startswith(("# published:", "# measured:")):
            raise ValueError(f"{path}: write '# published: FIGURE VALUE ± DEVIATION (N runs): SOURCE', not: {line}")
    seeds = next(filter(None, map(_SEEDS.fullmatch, head)), None)
    if not published or seeds is None:
        raise ValueError(f"{path}: the head needs lines '# published:' or '# measured:', and '# seeds:'")
    config = yaml.safe_load(text)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
    title = head[0].removeprefix("# ").removesuffix(".")
    return Target(path.stem, title, tuple(published), tuple(map(int, seeds[1].split())), config, digest)


def targets(only: Sequence[str] = ()) -> list[Target]:
    """Return the configurations in the order of their names.

    Args:
        only: names, or beginnings of names, of those that count; all if empty.

    Raises:
        SystemExit: no name begins so.
    """
    paths = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
    chosen = {name for name in paths if not only}
    for word in only:
        meant = {word} & paths.keys() or {name for name in paths if name.startswith(word)}
        if not meant:
            raise SystemExit(f"--only {word}: no configuration begins so: give one of {', '.join(paths)}")
        chosen |= meant
    return [read_target(path) for name, path in paths.items() if name in chosen]


# -- the comparison ------------------------------------------------------------------------------------------------


def compare(ours: Sequence[float], theirs: Published) -> Comparison:
    """Compare our runs with a published number by Welch's t interval of the difference of the means.

    One run of ours has no deviation: theirs is then taken for both.

    Args:
        ours: values of our runs in %, at least one.
        theirs: with a value.
    """
    assert theirs.value is not None
    difference = statistics.mean(ours) - theirs.value
    if theirs.deviation is None:
        return Comparison(difference, math.nan, math.nan, abs(difference) <= ROUNDED + 1e-9)
    variance, known = theirs.deviation**2 / theirs.runs, len(ours) > 1
    own = (statistics.variance(ours) if known else theirs.deviation**2) / len(ours)
    if known:
        spread = own**2 / (len(ours) - 1) + variance**2 / (theirs.runs - 1)
        freedom = (own + variance) ** 2 / spread if spread else 1.0
    else:
        freedom = theirs.runs - 1
    half = float(student.ppf(0.975, freedom)) * (own + variance) ** 0.5
    return Comparison(difference, difference - half, difference + half, difference + half >= 0)


def verdict(target: Target, theirs: Published, runs: Mapping[int, Mapping[str, Any]], notes: Mapping[str, str]) -> str:
    """Return what a row of the table says.

    Args:
        target: the configuration.
        theirs: the number.
        runs: what the runs of the target's seeds found, by seed.
        notes: by the names of the configurations why numbers were missed; for a peer how it differs.
    """
    if not runs:
        return f"not yet run: `{COMMAND} {target.options}`"
    if len(runs) < len(target.seeds):
        return f"running: {len(runs)} of {len(target.seeds)}"
    if target.peer:
        return notes[target.name]
    if theirs.value is None:
        return "measured"
    if compare(_values(runs, theirs), theirs).reproduced:
        return "reproduced"
    return f"missed: {notes.get(target.name, 'the cause is not known yet')}"


def _values(runs: Mapping[int, Mapping[str, Any]], theirs: Published) -> list[float]:
    return [run["figures"][theirs.figure] for _, run in sorted(runs.items())]


def read_notes(file: Path) -> dict[str, str]:
    """Return the notes of a file with a line ``NAME: note`` for each; empty lines and those with # are left out."""
    text = file.read_text(encoding="utf-8")
    lines = (line.strip() for line in text.splitlines())
    pairs = (line.partition(":") for line in lines if line and not line.startswith("#"))
    return {name.strip(): note.strip() for name, _, note in pairs}


def of_peer(chosen: Sequence[Target], differences: Mapping[str, str]) -> list[Target]:
    """Return those of the configurations that the peer runs, as its own.

    Args:
        chosen: ours.
        differences: how the peer differs, by the name of each that it runs.
    """
    return [target._replace(peer=PEER) for target in chosen if target.name in differences]


# -- the table -----------------------------------------------------------------------------------------------------


def found_of(target: Target) -> dict[int, dict[str, Any]]:
    """Return what the runs of a target's seeds found, by seed, without those of another configuration."""
    runs = {}
    for seed in target.seeds:
        file = FOUND / f"{target.label}-{seed}.json"
        run = json.loads(file.read_text()) if file.exists() else {}
        if run.get("digest") == target.digest:
            runs[seed] = run
    return runs


def table(
    chosen: Sequence[Target],
    found: Mapping[str, Mapping[int, Mapping[str, Any]]],
    causes: Mapping[str, str],
    differences: Mapping[str, str],
) -> str:
    """Return the lines of the table: for each published number a row of ours, and of the peer where it runs, too.

    Args:
        chosen: the configurations.
        found: what their runs found, by label and seed.
        causes: why numbers were missed, by name.
        differences: how the peer differs from the protocol, by name.
    """
    lines = [
        "| target | source | published | measured | difference [95 %] | forgetting | seeds | seconds | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for target in chosen:
        for theirs in target.published:
            title = target.title if len(target.published) == 1 else f"{target.title}: {_words(theirs.figure)}"
            runs = found.get(target.label, {})
            cells = [f"{title} (`{target.name}`)", theirs.source, _theirs(theirs)]
            cells += [*_measured(runs, theirs), verdict(target, theirs, runs, causes)]
            lines.append(f"| {' | '.join(cells)} |")
            for peer in of_peer([target], differences):
                runs = found.get(peer.label, {})
                versions = sorted({run["versions"][peer.peer] for run in runs.values()})
                cells = [" ".join([peer.peer.title(), *versions, "on the same"]), "", ""]
                cells += [*_measured(runs, theirs), verdict(peer, theirs, runs, differences)]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _words(figure: str) -> str:
    return figure.replace("_", " ").replace(".", ", ")


def _theirs(theirs: Published) -> str:
    if theirs.value is None:
        return ""
    deviation = "" if theirs.deviation is None else f" ± {theirs.deviation:.2f}"
    return f"{theirs.value:.2f}{deviation} ({theirs.runs})"


def _measured(runs: Mapping[int, Mapping[str, Any]], theirs: Published) -> tuple[str, ...]:
    """Return the cells with mean, difference, forgetting, seeds and seconds; empty without runs."""
    if not runs:
        return ("",) * 5
    values = _values(runs, theirs)
    difference = ""
    if theirs.value is not None:
        compared = compare(values, theirs)
        interval = "" if math.isnan(compared.low) else f" [{compared.low:+.2f}, {compared.high:+.2f}]"
        difference = f"{compared.difference:+.2f}{interval}"
    forgotten = [run["figures"]["forgetting"] for run in runs.values()]
    forgetting = "" if None in forgotten else _mean(forgotten)
    train, test = (statistics.mean(run["seconds"][part] for run in runs.values()) for part in ("train", "eval"))
    mean = f"{_mean(values)} ({len(values)})"
    return mean, difference, forgetting, " ".join(map(str, sorted(runs))), f"{train:.0f} + {test:.0f}"


def _mean(values: Sequence[float]) -> str:
    """Return the mean in words, of several values with their deviation."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def claim(chosen: Sequence[Target], found: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> str:
    """Return the lines of the table of the runs of ``CLAIM``, accuracy and time of each beside those from scratch.

    Times are of training alone, without evaluation and start-up. Their ratio is left out for runs on another processor,
    or with another number of threads.

    Args:
        chosen: the configurations, those of ``CLAIM`` among them.
        found: what their runs found, by name and seed.
    """
    lines = [
        "| training | source | top-5 accuracy | accuracy | s of training | of that from scratch | seeds | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    scratch = found.get(CLAIM[0], {})
    for target in sorted((one for one in chosen if one.name in CLAIM), key=lambda one: CLAIM.index(one.name)):
        (theirs,) = target.published
        runs = found.get(target.name, {})
        cells = [f"{target.title} (`{target.name}`)", theirs.source]
        cells += [_measured(runs, theirs._replace(figure=name))[0] for name in (theirs.figure, "pooled_accuracy")]
        cells += [f"{_training_s(runs):.0f}" if runs else "", _share_of_time(runs, scratch)]
        cells += [" ".join(map(str, sorted(runs))), verdict(target, theirs, runs, {})]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _training_s(runs: Mapping[int, Mapping[str, Any]]) -> float:
    return statistics.mean(run["seconds"]["train"] for run in runs.values())


def _share_of_time(runs: Mapping[int, Mapping[str, Any]], scratch: Mapping[int, Mapping[str, Any]]) -> str:
    machines = {(run["processor"], run["threads"]) for run in [*runs.values(), *scratch.values()]}
    if not runs or not scratch or len(machines) > 1:
        return ""
    return f"{100 * _training_s(runs) / _training_s(scratch):.0f} %"


def section() -> str:
    """Return the part of RESULTS.md with the published numbers, from its heading to the empty line at its end."""
    chosen, differences = targets(), read_notes(DIFFERENCES)
    found = {target.label: found_of(target) for target in [*chosen, *of_peer(chosen, differences)]}
    return f"""{HEADING}

`{COMMAND}` runs the protocols of published numbers: each file of `configs/reproduce`
has one, with its number, its source and the differences that stay in its head. Accuracies are in %, means ± standard
deviations, with the number of runs in brackets. The interval of the difference is Welch's with both deviations. A
number counts as reproduced if the interval holds 0 or lies above it; one value without a deviation, if ours lies within
{ROUNDED:.0f} points of it. Forgetting, in points, is the mean over all tasks but the last of the best accuracy before
the last task less that after it. Seconds of training and of evaluation are means over the runs; they depend on the
machine and its other load. `benchmarks/reproduced` has a file for each run, with its accuracy matrix, versions,
commits, processor and times.

Rows of Avalanche have its own strategies on the same images, hold-outs, seeds, network and optimizer, as its users run
them: `{COMMAND} --peer {PEER}`, with the extra `peers`. Their difference is that from the
published number above them; their last column says how they differ from its protocol.

{table([target for target in chosen if target.name not in CLAIM], found, read_notes(MISSES), differences)}

The claim of Bouvier et al. (CCGrid 2024) in small: with NIL, incremental training is nearly as accurate as training
from scratch on all tasks so far, and takes about the time of incremental training without a memory.
`{COMMAND} --only claim` runs the three.

{claim(chosen, found)}

"""


def with_section(page: str, text: str) -> str:
    """Return a page with the part that ``section`` returns replaced, up to the next heading of its rank.

    Args:
        page: that has the heading.
        text: the new part.
    """
    before, after = page.split(f"{HEADING}\n", 1)
    _, mark, rest = after.partition("\n## ")
    return f"{before}{text}{mark[1:]}{rest}"


# -- the runs ------------------------------------------------------------------------------------------------------


def options_of(target: Target, run: str) -> dict[str, Any]:
    """Return what a run adds to its configuration: its folder, its checkpoints, and a quiet screen.

    Args:
        target: the configuration.
        run: name of the run's folder.
    """
    epochs = target.config["model"]["init_args"].get("epochs_per_task", 1)
    every = math.gcd(*epochs) if isinstance(epochs, list) else epochs
    savers: list[dict[str, Any]] = [
        {"filename": "task-{epoch}-{step}", "every_n_epochs": every, "save_on_train_epoch_end": True},
        {"filename": "time-{epoch}-{step}", "train_time_interval": SAVE_EVERY},
    ]
    return {
        "trainer": {
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(RUNS), "name": run}},
            "callbacks": [{"class_path": "ModelCheckpoint", "init_args": saver} for saver in savers],
        }
    }


def command_of(target: Target, seed: int, root: str | None, folder: Path) -> list[str]:
    """Return the command of a run, which begins it or goes on with it.

    Args:
        target: the configuration.
        seed: of the run.
        root: folder of the data sets; the configuration's if None.
        folder: of the run; gets a file with ``options_of`` if the run is ours.
    """
    config = str(CONFIGS / f"{target.name}.yaml")
    if target.peer:
        command = [sys.executable, str(ROOT / "benchmarks" / "reproduce_peer.py"), "--config", config]
        command += ["--seed", str(seed), "--folder", str(folder)]
        return command + ([] if root is None else ["--root", root])
    options = folder / "options.yaml"
    options.write_text(yaml.safe_dump(options_of(target, folder.name)))
    command = [sys.executable, str(ROOT / "cli.py"), "fit", "--config", config, "--config", str(options)]
    command += ["--seed_everything", str(seed)]
    command += ["--data.root", root] if root is not None else []
    return command + (["--ckpt_path", "last"] if any(folder.rglob("*.ckpt")) else [])


def run_one(target: Target, seed: int, threads: int, root: str | None) -> str:
    """Run one seed, or go on with it; return what there is to say.

    Args:
        target: the configuration.
        seed: of the run.
        threads: of the process.
        root: folder of the data sets; the configuration's if None.

    Raises:
        ChildProcessError: the run has failed; the message ends with the last line of its log.
    """
    if seed in found_of(target._replace(seeds=(seed,))):
        return "done"
    name = f"{target.label}-{seed}"
    folder = RUNS / name
    RUNS.mkdir(parents=True, exist_ok=True)
    with _claimed(RUNS / f"{name}.lock") as lock:
        if lock is None:
            return "another process runs it"
        digest = folder / "digest"
        if folder.exists() and not (digest.exists() and digest.read_text() == target.digest):
            shutil.rmtree(folder)  # of another configuration
        folder.mkdir(exist_ok=True)
        digest.write_text(target.digest)
        if _report(folder) is None:
            command = command_of(target, seed, root, folder)
            with (folder / "commits").open("a") as commits:
                commits.write(f"{commit()}\n")
            _execute(command, folder, threads, lock)
        report = _report(folder)
        if report is None:
            raise ChildProcessError(f"{name}: no report in {folder}")
        found = record(target, seed, threads, json.loads(report.read_text()))
        found["commits"] = [*dict.fromkeys((folder / "commits").read_text().split())]
        found["seconds"]["all"] = _seconds(folder)
        write(FOUND / f"{name}.json", found)
    return "done now"


def _report(folder: Path) -> Path | None:
    """Return the report of a run that has ended; a run that was begun again has a folder for each beginning."""
    files = folder.glob("version_*/report/accuracy_matrix.json")
    return max(files, key=lambda file: file.stat().st_mtime, default=None)


@contextlib.contextmanager
def _claimed(file: Path) -> Iterator[IO[str] | None]:
    """Yield the open file if no other process has it, else None; the claim ends with all that inherit the file."""
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield lock


def _execute(command: list[str], folder: Path, threads: int, lock: IO[str]) -> None:
    """Run a command to its end and count its seconds; it is told to end when this process is."""
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    before, started = _seconds(folder), time.monotonic()
    with (folder / "log.txt").open("a") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | limits, pass_fds=[lock.fileno()]
        )
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                (folder / "seconds").write_text(str(before + time.monotonic() - started))
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        said = [line for line in (folder / "log.txt").read_text().splitlines() if line.strip()]
        raise ChildProcessError(f"{folder.name}: {said[-1] if said else 'nothing said'} ({folder / 'log.txt'})")


def _seconds(folder: Path) -> float:
    file = folder / "seconds"
    return float(file.read_text() or 0) if file.exists() else 0.0


def record(target: Target, seed: int, threads: int, report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is kept of a run's report.

    Args:
        target: the configuration.
        seed: of the run.
        threads: of the process.
        report: content of its ``accuracy_matrix.json``.
    """
    training = training_seconds(report["wall_time_s"])
    figures = dict.fromkeys([*FIGURES, *(theirs.figure for theirs in target.published)])
    return {
        "name": target.label,
        "seed": seed,
        "digest": target.digest,
        "versions": report["versions"],
        "processor": processor(on_gpu=report["peak_device_bytes"] is not None),
        "threads": threads,
        "seconds": {
            "train": training,
            "eval": sum(report["wall_time_s"].values()) - training,
        },
        "figures": {figure: _percent(report, figure) for figure in figures},
        "matrix": [[None if value is None else 100 * value for value in row] for row in report["matrix"]],
    }


def training_seconds(wall_time: Mapping[str, float]) -> float:
    """Return the seconds of a fit's training: without those of validation, of a task's end and of its evaluation."""
    return sum(seconds for phase, seconds in wall_time.items() if phase not in ("task_end", "select", "evaluate"))


def _percent(report: Mapping[str, Any], figure: str) -> float | None:
    value: Any = functools.reduce(lambda part, key: part[key], figure.split("."), report)
    return None if value is None else 100 * value


def commit() -> str:
    """Return the commit of the code, with a plus sign if files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "dcl_lightning")
    return git("rev-parse", "HEAD") + ("+" if changed else "")


def processor(on_gpu: bool = False) -> str:
    """Return the name of the GPU or the CPU."""
    if on_gpu:
        import torch

        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def write(file: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that readers see the old file or the new one, whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps(content, indent=1) + "\n")
    draft.replace(file)


def check_data(chosen: Sequence[Target], root: str | None) -> None:
    """Refuse to begin without the data sets.

    Args:
        chosen: the configurations.
        root: folder of the data sets; the configurations' if None.

    Raises:
        SystemExit: one is missing; with code 2, after a line that names it and the command that fetches it.
    """
    from dcl_lightning.data.sources.table import SOURCES, check_files
    from dcl_lightning.errors import DatasetNotFoundError

    for target in chosen:
        data = target.config["data"]["init_args"]
        try:
            check_files(data["dataset"], root or data.get("root", "datasets"), False)
        except DatasetNotFoundError as error:
            fetch = f"python cli.py fit --config configs/reproduce/{target.name}.yaml --data.download true"
            fetched = f": `{fetch} --trainer.fast_dev_run true` fetches it"
            print(f"{error}{fetched if SOURCES[data['dataset']].downloadable else ''}", file=sys.stderr)
            raise SystemExit(2) from None


def main() -> int:
    """Run what is asked for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="configurations of this name, or else whose name begins so",
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="in place of those in the head of each configuration")
    parser.add_argument("--threads", type=int, default=1, help="of each run (default: 1)")
    parser.add_argument("--root", help="folder of the data sets (default: that of the configurations, datasets)")
    parser.add_argument("--peer", choices=[PEER], default="", help="run this library in place of ours, where it can")
    parser.add_argument("--list", action="store_true", help="print the configurations and how far they are")
    parser.add_argument("--table", action="store_true", help="write the table into RESULTS.md from what was run so far")
    options = parser.parse_args()
    chosen = targets(options.only)
    if options.peer:
        differences = read_notes(DIFFERENCES)
        chosen = of_peer(chosen, differences)
        if not chosen:
            parser.error(f"--peer {options.peer}: give --only one of {', '.join(differences)}")
    if options.list:
        for target in chosen:
            print(f"{target.label}: {target.title}; {len(found_of(target))} of {len(target.seeds)} runs")
    if options.table:
        RESULTS.write_text(with_section(RESULTS.read_text(encoding="utf-8"), section()), encoding="utf-8")
    if options.list or options.table:
        return 0
    if options.peer and importlib.util.find_spec(options.peer) is None:
        parser.error(f"--peer {options.peer}: it is not installed: pip install 'dcl-lightning[peers]'")
    check_data(chosen, options.root)
    failed = False
    for target in chosen:
        for seed in options.seeds or target.seeds:
            try:
                said = run_one(target, seed, options.threads, options.root)
            except ChildProcessError as error:
                said, failed = f"failed: {error}", True
            print(f"{target.label}, seed {seed}: {said}", flush=True)
    return int(failed)


if __name__ == "__main__":
    # Ends the run that this process has started, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
