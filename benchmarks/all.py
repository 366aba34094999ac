"""Runs the benchmarks one after the other, each in a process of its own, and writes what they print to RESULTS.md here.

One that fails is named on the page, the others run all the same, and the exit code is that of the first that failed.
Left out are those that take long. ``--only`` leaves the other parts of the page as they are.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
# Run by themselves: each trains hundreds of networks.
LONG = ("peers.py", "protocol.py", "reproduce.py", "results.py", "search.py")
PACKAGES = ("torch", "lightning", "horovod", "dcl-lightning")


class Outcome(NamedTuple):
    """What a benchmark did.

    Args:
        path: of its file.
        command: that ran it.
        text: what it printed.
        code: its exit code, 128 + n after signal n.
        error: the last line on stderr, if it failed.
    """

    path: Path
    command: str
    text: str
    code: int
    error: str


def benchmarks(folder: Path) -> list[Path]:
    """Return the benchmarks of a folder that do not take long: the scripts that have a ``main``."""
    paths = [path for path in sorted(folder.glob("*.py")) if path.name not in (*LONG, Path(__file__).name)]
    return [path for path in paths if "\ndef main(" in path.read_text(encoding="utf-8")]


def run(path: Path, quick: bool) -> Outcome:
    """Run a benchmark, and show what it prints while it does.

    Args:
        path: of its file.
        quick: whether to give it ``--quick``, if it knows that.
    """
    options = ["--quick"] if quick and '"--quick"' in path.read_text(encoding="utf-8") else []
    command, lines = f"python benchmarks/{' '.join([path.name, *options])}", []
    print(f"\n{command}", flush=True)
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, str(path), *options], stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1
        )
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        code = process.wait()
        errors.seek(0)
        told = errors.read()
    if code:
        print(told, file=sys.stderr, flush=True)
    last = told.strip().splitlines()[-1:] if code else []
    return Outcome(path, command, "".join(lines), code if code >= 0 else 128 - code, "".join(last))


def spaced(text: str) -> str:
    """Return lines with an empty one before and behind each table, as Markdown wants it."""
    spaced: list[str] = []
    for line in text.strip().splitlines():
        if spaced and spaced[-1] and spaced[-1].startswith("|") != line.startswith("|") and line:
            spaced.append("")
        spaced.append(line)
    return "\n".join(spaced)


def machine() -> str:
    """Return processor, cores that this process may use, and memory."""
    models = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    kibibytes = [int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    memory = f"{kibibytes[0] / 2**20:.0f} GiB" if kibibytes else "memory unknown"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{models[0] if models else platform.machine()}, {cores} cores, {memory}"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def versions() -> str:
    """Return the versions of Python and of what the benchmarks use."""
    found = [f"python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def section(outcome: Outcome) -> str:
    """Return the part of a benchmark: its command, when and where it ran, and what it printed."""
    title = (ast.get_docstring(ast.parse(outcome.path.read_text(encoding="utf-8"))) or "").splitlines()[:1]
    now = datetime.datetime.now(datetime.timezone.utc)
    where = f"{now:%Y-%m-%d %H:%M} UTC, {machine()}, {versions()}"
    parts = [f"## {outcome.path.name}", *title, f"`{outcome.command}`, {where}"]
    parts += [spaced(outcome.text)] if outcome.text.strip() else []
    parts += [f"**Failed** with exit code {outcome.code}: `{outcome.error}`"] if outcome.code else []
    return "\n\n".join(parts) + "\n"


def sections(page: str) -> dict[str, str]:
    """Return the parts of a page by the names of their files."""
    parts = re.split(r"^(?=## )", page, flags=re.MULTILINE)[1:]
    return {part.split(maxsplit=2)[1]: part.rstrip() + "\n" for part in parts}


def page(parts: dict[str, str]) -> str:
    """Return the page of parts by the names of their files."""
    left_out = ", ".join(f"`{name}`" for name in LONG)
    head = (
        "# Benchmarks\n\nMade by `make bench`; nothing here is written by hand. What the sides of each are, how many "
        "rounds it takes and what it leaves out stands at its top; how numbers are compared, in `docs/measured.md`. "
        f"{left_out} take long and are run by themselves: their figures stand in README and the root's RESULTS.md.\n"
    )
    return "\n".join([head, *(parts[name] for name in sorted(parts))])


def main(folder: Path = FOLDER) -> int:
    """Run the benchmarks of a folder, write its RESULTS.md, and return the first exit code that is not 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="whether they run, no figures: to those that know --quick")
    parser.add_argument("--only", nargs="+", help="names of files; the page keeps its other parts")
    parser.add_argument("--out", type=Path, default=folder / "RESULTS.md")
    options = parser.parse_args()
    outcomes: list[Outcome] = []
    parts = sections(options.out.read_text(encoding="utf-8")) if options.only and options.out.exists() else {}
    for path in benchmarks(folder):
        if options.only is None or path.name in options.only:
            outcomes.append(run(path, options.quick))
            # After each: what is interrupted keeps what there is.
            parts[path.name] = section(outcomes[-1])
            options.out.write_text(page(parts), encoding="utf-8")
    failed = [outcome for outcome in outcomes if outcome.code]
    for outcome in failed:
        print(f"{outcome.path.name} failed with exit code {outcome.code}", file=sys.stderr)
    return failed[0].code if failed else 0


if __name__ == "__main__":
    sys.exit(main())
