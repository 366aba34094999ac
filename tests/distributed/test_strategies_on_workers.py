"""Combinations of agent, strategy, precision, accumulation and compilation on two workers; checkpoints under fsdp2.

The exhaustive test adds what it finds to the file ``STRATEGIES_LOG``, if that is set, and leaves out what is there.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

from dcl_lightning import FSDP2Strategy, HorovodStrategy
from dcl_lightning.agents import short_names
from dcl_lightning.agents.strategies import name_of_strategy, refuse_name, refuse_strategy, supported
from dcl_lightning.backbones import MLP
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.types import InputSpec
from tests.distributed.cells import ALL, ON_WORKERS, PAGE, Cell, markdown
from tests.distributed.programs import sharded, strategies
from tests.distributed.workers import assert_ended_well, run_workers

TRIED = [cell for cell in ALL if cell.strategy in ON_WORKERS]
LOG = os.environ.get("STRATEGIES_LOG")
PART = 54


def sample() -> list[Cell]:
    """Return some cells of each strategy that learn, and refused ones; ``STRATEGIES_SEED=n`` draws others."""
    draw = random.Random(int(os.environ.get("STRATEGIES_SEED", 0)))
    working = {s: [c for c in TRIED if c.strategy == s and c.reason is None] for s in ON_WORKERS}
    refused = [c for c in TRIED if c.reason is not None]
    asked = [Cell(name, "fsdp2", "32-true", False, False) for name in ("nil_global", "derpp", "icarl")]
    drawn = [cell for s, cells in working.items() for cell in draw.sample(cells, 1 if s == "auto" else 2)]
    return list(dict.fromkeys([*asked, *drawn, *draw.sample(refused, 3)]))


def check(cells: list[Cell], folder: Path, deadline: float) -> None:
    ended = run_workers(strategies.run, 2, folder, cells, deadline=deadline)
    found = folder / "found.json"
    lines = [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []
    if LOG:
        with open(LOG, "a") as log:
            log.writelines(json.dumps(line) + "\n" for line in lines)
    faults = [f"{line['cell']}: {line['fault']}" for line in lines if line["fault"]]
    assert not faults, "\n".join(faults)
    assert_ended_well(ended)
    assert len(lines) == len(cells)


def test_the_page_is_generated() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), "python -m tests.distributed.cells"


@pytest.mark.parametrize(("given", "refused"), [
    ("ddp_spawn", "ddp_spawn"), ("ddp_fork_find_unused_parameters_true", "ddp_spawn"), ("ddp_notebook", "ddp_spawn"),
    ("fsdp", "fsdp"), ("fsdp_cpu_offload", "fsdp"), ("deepspeed", "deepspeed"),
    ("deepspeed_stage_3_offload", "deepspeed"),
])  # fmt: skip
def test_a_strategy_without_an_agent_is_refused_by_its_name(given: str, refused: str) -> None:
    reason = supported(short_names.base, refused)
    assert reason is not None
    with pytest.raises(ConfigurationError) as error:
        refuse_name(given)
    assert str(error.value) == reason.replace(f"={refused} ", f"={given} ")


@pytest.mark.parametrize("given", ["auto", "ddp", "ddp_find_unused_parameters_true", "horovod", "fsdp2", DDPStrategy()])
def test_other_strategies_are_not(given: object) -> None:
    refuse_name(given)


@pytest.mark.parametrize(("strategy", "name"), [
    (DDPStrategy(), "ddp"), (DDPStrategy(start_method="spawn"), "ddp_spawn"), (FSDPStrategy(), "fsdp"),
    (HorovodStrategy(), "horovod"), (FSDP2Strategy(), "fsdp2"), (ModelParallelStrategy(), "fsdp2"),
    (SingleDeviceStrategy("cpu"), "auto"),
])  # fmt: skip
def test_a_strategy_that_a_script_has_made_has_a_name(strategy: Strategy, name: str) -> None:
    assert name_of_strategy(strategy) == name


@pytest.mark.parametrize(("strategy", "values", "options", "words"), [
    (FSDP2Strategy, {"forward": "separate"}, {}, "give model.forward=joint"),
    (FSDP2Strategy, {"memory_format": "channels_last"}, {}, "give model.memory_format=auto"),
    (FSDP2Strategy, {}, {"sync_batchnorm": True}, "leave it out"),
    (FSDP2Strategy, {}, {"callbacks": [StochasticWeightAveraging(0.1)]}, "StochasticWeightAveraging copies"),
    (ModelParallelStrategy, {}, {}, "give trainer.strategy=fsdp2"),
    (partial(DDPStrategy, start_method="spawn"), {}, {}, "give ddp"),
])  # fmt: skip
def test_what_else_is_refused_before_the_first_step(
    strategy: Callable[[], Strategy], values: dict[str, object], options: dict[str, Any], words: str
) -> None:
    agent = short_names.er(MLP([8]), 6, input_spec=InputSpec(1, 4, 4))
    trainer = pl.Trainer(accelerator="cpu", devices=2, logger=False, strategy=strategy(), **options)
    with pytest.raises(ConfigurationError, match=re.escape(words)):
        refuse_strategy(agent, trainer, values)


def test_a_few_combinations(tmp_path: Path) -> None:
    check(sample(), tmp_path, deadline=240)


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.parametrize("first", range(0, len(TRIED), PART))
def test_every_combination(first: int, tmp_path: Path) -> None:
    known = Path(LOG).read_text().splitlines() if LOG and Path(LOG).exists() else []
    done = [Cell(*line["cell"]) for line in map(json.loads, known) if not line["fault"]]
    if cells := [cell for cell in TRIED[first : first + PART] if cell not in done]:
        check(cells, tmp_path, deadline=840)


def test_checkpoints_of_shards(tmp_path: Path) -> None:
    assert_ended_well(run_workers(sharded.checkpoints, 2, tmp_path, deadline=240))


@pytest.mark.exhaustive
def test_shards_go_on_with_other_workers(tmp_path: Path) -> None:
    for number, workers in enumerate((2, 3, 1)):
        assert_ended_well(run_workers(sharded.part, workers, tmp_path, number))
