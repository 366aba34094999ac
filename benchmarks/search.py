"""Choices on ``digits_dev``: the accuracy of each candidate on images held out of the training set.

Which rate and momentum the cases called tuned have in ``protocol.py``, and which factors DER and DER++: every candidate
of a small grid with 50 and with 200 stored, over seeds from 0 on. No test image of ``digits`` is read. What was found
is kept in benchmarks/search.json, which ``results.py`` writes into RESULTS.md. The hold-outs are of all tasks, which a
learner of a stream would not have: it is a choice made afterwards.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import keep, mean_and_deviation
from protocol import AT_TASK_ENDS, TUNED, Case, agent, final_accuracy, nil

FIGURES = Path(__file__).with_name("search.json")
SIZES = (50, 200)
SUMMED = AT_TASK_ENDS | {"loss": "sum"}
RATES = [(0.05, 0.0), (0.1, 0.0), (0.01, 0.9), (0.02, 0.9), (0.05, 0.9)]
FACTORS = (0.5, 1.0)
# What the cases of protocol.py have.
CHOSEN = (f"lr {TUNED['lr']}, momentum {TUNED['momentum']}", "alpha 1.0", "alpha 1.0, beta 1.0")
# Makes a case for so many stored samples.
Build = Callable[[int], Case]


def candidates() -> dict[str, dict[str, Build]]:
    """Return each agent's candidates, by what is chosen: its rate and momentum, then its factors at the protocol's."""
    found: dict[str, dict[str, Build]] = {"nil": {}, "er of the tasks' ends, sum": {}, "derpp_task_end": {}}
    for lr, momentum in RATES:
        name, rate = f"lr {lr}, momentum {momentum}", {"lr": lr, "momentum": momentum}
        found["nil"][name] = partial(nil, **rate)
        found["er of the tasks' ends, sum"][name] = partial(agent, "er", memory=SUMMED, **rate)
        found["derpp_task_end"][name] = partial(agent, "derpp_task_end", alpha=1.0, beta=1.0, **rate)
    for alpha in FACTORS:
        found.setdefault("der, factors", {})[f"alpha {alpha}"] = partial(agent, "der", alpha=alpha)
        for name in ("derpp", "derpp_task_end"):
            for beta in FACTORS:
                build = partial(agent, name, alpha=alpha, beta=beta)
                found.setdefault(f"{name}, factors", {})[f"alpha {alpha}, beta {beta}"] = build
    return found


def table(figures: dict[str, dict[str, list[float]]]) -> str:
    """Return the lines of the table of what was measured, a candidate each.

    Args:
        figures: accuracies in %, seed by seed, by agent and by candidate and size.
    """
    columns = " | ".join(f"{size} stored" for size in SIZES)
    lines = [f"| agent | candidate | {columns} | chosen | seeds |", "|---|---|" + "---|" * len(SIZES) + "---|---|"]
    for name, builds in candidates().items():
        for choice in builds:
            values = [figures.get(name, {}).get(f"{choice}, {size} stored", []) for size in SIZES]
            if all(values):
                means = " | ".join(mean_and_deviation(v) for v in values)
                mark = "yes" if choice in CHOSEN else ""
                lines.append(f"| `{name}` | {choice} | {means} | {mark} | {len(values[0])} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and keep the figures; with --json also write the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="", help="agents whose name starts so; the others keep their figures")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # a network this small only loses by more
    folder, rows = tempfile.mkdtemp(), []
    print("| agent | candidate | stored | accuracy in % |\n|---|---|---|---|")
    for name, builds in candidates().items():
        if not name.startswith(options.only):
            continue
        for choice, build in builds.items():
            for size in SIZES:
                seeds = range(options.seeds)
                values = [final_accuracy(build(size), seed, folder, "digits_dev") for seed in seeds]
                keep(FIGURES, name, f"{choice}, {size} stored", [round(value, 3) for value in values])
                print(f"| {name} | {choice} | {size} | {mean_and_deviation(values)} |", flush=True)
                told = {"name": f"{name}, {choice}, {size} stored", "value": statistics.mean(values), "unit": "%"}
                rows.append(told | {"baseline": None, "ratio": None})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
