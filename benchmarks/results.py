"""RESULTS.md, made anew: every agent on the reference protocol on digits, beside published and peers' figures.

Each case runs in a process of its own, over seeds from 100 on; what it measured goes to benchmarks/results.json, from
which the table is written. ``--only`` measures some cases again and leaves the others as they were.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import protocol
import torch

from dcl_lightning import __version__

ROOT = Path(__file__).parent.parent
FIGURES = Path(__file__).with_name("results.json")
FIRST_SEED = 100
# Final accuracies of untuned peers under the same protocol, memory 50 and 200.
PEERS = {
    "naive": "19.2",
    "cumulative": "93.3 (Avalanche)",
    "er": "78.7 / 83.2 (Mammoth's reservoir)",
    "er of the tasks' ends": "83.6 / 88.0 (Avalanche)",
    "derpp": "85.3 / 92.2 (Mammoth)",
    "derpp_task_end": "92.4 / 94.4 (Avalanche)",
    "icarl": "79.6 / 79.8 (Avalanche)",
}
# Cases with an optimizer of their own: what is joint under it.
JOINT = {"icarl": "joint, momentum 0.9", "icarl, 16 a step": "joint, momentum 0.9"}
JOINT |= {
    name: "joint, lr 0.02, momentum 0.9"
    for name in ("nil, tuned", "er of the tasks' ends, sum, tuned", "derpp_task_end, tuned")
}
NOT_RUN = ("icarl_cifar100", "nil_cifar100", "icarl_tinyimagenet_domain", "nil_imagenet_blurred")


def family(case: str) -> tuple[str, str]:
    """Return a case's name without its size, and the size, empty if there is none."""
    words = [word for word in case.split(", ") if not word.endswith((" stored", " exemplars"))]
    sizes = [word.split()[0] for word in case.split(", ") if word.endswith((" stored", " exemplars"))]
    return ", ".join(words), "".join(sizes)


def measure(case: str, seeds: int) -> list[dict[str, Any]]:
    """Return what the report of each seed says."""
    found = []
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        with tempfile.TemporaryDirectory() as folder:
            protocol.final_accuracy(protocol.CASES[case], seed, folder)
            report = json.loads(next(Path(folder).rglob("accuracy_matrix.json")).read_text())
        found.append(
            {
                "seed": seed,
                "final": 100 * report["pooled_accuracy"],
                "incremental": _percent(report["average_incremental_accuracy"]),
                "forgetting": _percent(report["forgetting"]),
                "train_s": report["wall_time_s"]["train"],
                "peak_mib": report["peak_host_bytes"] / 2**20,
                "buffer_bytes": report["buffer_bytes"],
            }
        )
    return found


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def spread(rows: list[dict[str, Any]], key: str, digits: int = 1) -> str:
    """Return mean and deviation over the seeds."""
    values = [row[key] for row in rows if row[key] is not None]
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def table(figures: dict[str, list[dict[str, Any]]]) -> str:
    """Return the lines of the table, a case each."""
    lines = [
        "| case | memory | final | incremental | forgetting | gap to joint | train s | peak MiB | seeds | peers |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in protocol.CASES:
        rows = figures.get(case)
        if not rows:
            continue
        name, size = family(case)
        best = [] if name.startswith("joint") else figures.get(JOINT.get(name, "joint"), [])
        gap = statistics.mean(r["final"] for r in best) - statistics.mean(r["final"] for r in rows) if best else None
        lines.append(
            f"| `{name}` | {size} | {spread(rows, 'final')} | {spread(rows, 'incremental')} | "
            f"{spread(rows, 'forgetting')} | {'' if gap is None else f'{gap:+.1f}'} | {spread(rows, 'train_s')} | "
            f"{max(r['peak_mib'] for r in rows):.0f} | {len(rows)} | {PEERS.get(name, '')} |"
        )
    return "\n".join(lines)


def page(figures: dict[str, list[dict[str, Any]]]) -> str:
    """Return the whole of RESULTS.md."""
    place = f"{os.cpu_count()} cores ({platform.machine()}), one thread, torch {torch.__version__}"
    waiting = "\n".join(
        f"| `configs/{name}.yaml` | not yet run: data not at hand | `python cli.py fit --config configs/{name}.yaml` |"
        for name in NOT_RUN
    )
    return f"""# Results

Made by `python benchmarks/results.py` with dcl_lightning {__version__} on {place}; nothing here is written by hand.

## Digits

The reference protocol: scikit-learn's digits, five tasks of two classes in order, one head of ten, MLP 64-100-100,
batch 16, 16 rehearsed beside each batch, ten epochs a task, SGD with lr 0.05 without momentum. One process. `icarl` has
momentum 0.9, what is called tuned lr 0.02 and momentum 0.9, chosen on `digits_dev` as were the factors of `der`,
`derpp` and `derpp_task_end`; everything else, and every peer, is untuned. The cases stand in `benchmarks/protocol.py`,
runnable ones in `configs/NAME_digits.yaml`. Accuracies in %, over all test images: final, and the average incremental
one; mean ± deviation over seeds from {FIRST_SEED} on. The gap is to all data at once under the same optimizer and as
many epochs. Peak memory is the process's, PyTorch included; times depend on what else ran.

{table(figures)}

Peers' figures are of other seeds, on the same split, order and network: memory 50 / 200.

## Not yet run

| configuration | status | command |
|---|---|---|
{waiting}
"""


def main() -> None:
    """Measure, keep the figures, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name starts so; the others keep their figures")
    parser.add_argument("--json", type=Path, help="where the final accuracies go, too, as every benchmark's figures")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a network this small only loses by more
    if options.case:
        options.json.write_text(json.dumps(measure(options.case, options.seeds)))
        return
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for case in protocol.CASES:
        if protocol.CASES[case].workers > 1 or not case.startswith(options.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "case.json")
            command = [sys.executable, __file__, "--case", case, "--seeds", str(options.seeds), "--json", str(file)]
            subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
            figures[case] = json.loads(file.read_text())
        print(f"{case}: {spread(figures[case], 'final')}", flush=True)
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
        (ROOT / "RESULTS.md").write_text(page(figures))
    if options.json:
        rows = [
            {"name": n, "value": statistics.mean(r["final"] for r in rs), "unit": "%", "baseline": None, "ratio": None}
            for n, rs in figures.items()
        ]
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
