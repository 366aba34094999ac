"""Draws of the lattice on Horovod workers: the same ones on all workers, one after another, in one launch."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import logging
import os
import shutil
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

from dcl_lightning import HorovodStrategy
from tests.conformance.lattice.draws import Draw
from tests.conformance.lattice.examination import Examination

_DEADLINE_S = 120


class Exchange:
    """Objects of all workers, by files: it works also where a worker's Horovod has given up."""

    def __init__(self, folder: Path, rank: int, size: int) -> None:
        self.folder, self.rank, self.size, self.count = folder, rank, size, 0
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, mine: Any) -> list[Any]:
        self.count += 1
        paths = [self.folder / f"{self.count}.{rank}" for rank in range(self.size)]
        written = paths[self.rank].with_suffix(f".{self.rank}.new")
        torch.save(mine, written)
        written.rename(paths[self.rank])
        end = time.monotonic() + _DEADLINE_S
        while not all(path.exists() for path in paths):
            if time.monotonic() > end:
                raise TimeoutError("another worker did not come to this place")
            time.sleep(0.002)
        return [torch.load(path, weights_only=False) for path in paths]


def examined(drawn: Draw, folder: Path, exchange: Exchange) -> Examination:
    """Run one draw on all workers."""

    def more() -> dict[str, Any]:
        return {"strategy": HorovodStrategy(collective_timeout=_DEADLINE_S / 2), "devices": exchange.size}

    if exchange.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "run").mkdir(parents=True)
    exchange(None)
    found = Examination(drawn, folder / "run", more, exchange).run()
    found.faults = [text for faults in exchange(found.faults) for text in faults]
    return found


def run_all(folder: Path, draws: list[Draw]) -> None:
    """Run draws and leave what was found of each, in ``found.json``, a line each."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # As in tests/conftest.py: each trainer reads from all installed packages what they offer to Lightning.
    importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)  # type: ignore[assignment]
    torch.set_num_threads(1)
    rank, size = int(os.environ["HOROVOD_RANK"]), int(os.environ["HOROVOD_SIZE"])
    exchange = Exchange(folder / "exchange", rank, size)
    for drawn in draws:
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                found = examined(drawn, folder / "draw", exchange)
            line = {"draw": drawn, "refused": found.refused, "faults": found.faults}
        except Exception:
            line = {"draw": drawn, "refused": None, "faults": [traceback.format_exc()]}
        if rank == 0 or "Traceback" in str(line["faults"]):
            with open(folder / "found.json", "a") as file:
                file.write(json.dumps(line) + "\n")
        if "Traceback" in str(line["faults"]):  # the workers may be at different places now
            os._exit(1)
