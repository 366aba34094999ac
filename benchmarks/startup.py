"""Start-up: what the package adds to Lightning's own, as user seconds of whole processes, in turn."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAIRS = {
    "import dcl_lightning": (["-c", "import dcl_lightning"], ["-c", "import lightning.pytorch"]),
    "cli.py --help": ([str(ROOT / "cli.py"), "--help"], ["-c", "import lightning.pytorch.cli"]),
}


def cpu_seconds(arguments: list[str]) -> float:
    """Return the processor seconds of one Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print the table; with --json also write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for name, (ours, theirs) in PAIRS.items():
        pairs = [(cpu_seconds(ours), cpu_seconds(theirs)) for _ in range(options.runs)]
        value, baseline = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{name}: {value:.2f} s, Lightning alone {baseline:.2f} s, ratio {ratio:.2f}")
        rows.append({"name": name, "value": value, "unit": "s", "baseline": baseline, "ratio": ratio})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
