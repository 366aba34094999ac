"""Every combination of agent, strategy, precision, accumulation and compilation, as ``agents/strategies.py`` declares.

``python -m tests.distributed.cells`` writes ``docs/strategies.md``.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

from dcl_lightning.agents import short_names
from dcl_lightning.agents.strategies import PRECISIONS, STRATEGIES, supported

PAGE = Path(__file__).parents[2] / "docs" / "strategies.md"
# Those of which a job on two workers can be made: the others are refused before there is one.
ON_WORKERS = ("auto", "ddp", "horovod", "fsdp2")


class Cell(NamedTuple):
    """One combination."""

    agent: str
    strategy: str
    precision: str
    accumulate: bool
    compile: bool

    @property
    def reason(self) -> str | None:
        """Why it is refused; None if it learns."""
        return supported(getattr(short_names, self.agent), self.strategy, self.precision)


def cells(agent: str, strategy: str) -> list[Cell]:
    """Return the combinations of an agent and a strategy."""
    switches = (False, True)
    return [Cell(agent, strategy, *rest) for rest in itertools.product(PRECISIONS, switches, switches)]


ALL = [cell for agent in short_names.__all__ for strategy in STRATEGIES for cell in cells(agent, strategy)]

_INTRODUCTION = """# Strategies

**The budget is the job's.** `buffer_size` counts the samples that all workers store together. Where each worker selects
exemplars of its own, N workers store up to N times the budget, and their results cannot be compared with those of one
worker: [DyTox](https://github.com/arthurdouillard/dytox/blob/main/erratum_distributed.md) had to correct its published
results for this reason. Here N workers with a batch of B learn what one process learns with a batch of N B, under every
strategy of this table.

Each entry stands for {each} combinations: the precisions {precisions}, with and without
`accumulate_grad_batches`, with and without `model.compile`. **all** means that the agent learns with all of them; each
is tested on two workers against one process with the double batch. What is refused ends before the first step, on all
workers, with one line and exit code 2; the letters refer to these lines, below the table. Of {total} combinations
{working} work.

"""

_NOTES = """
`auto` is one process. Three things differ from the table's rule. No single process draws the samples that two workers
of `nil_global` draw, so its strategies are compared with each other. `nil_v2` does not wait for its memory, so two runs
of it differ. On a CPU Lightning replaces `16-mixed` by `bf16-mixed`; the tests bring PyTorch's loss scaler for a CPU.

`ddp_spawn` also stands for `ddp_fork` and `ddp_notebook`, `fsdp` and `deepspeed` for all names that begin with them.

## FSDP2

`--trainer.strategy fsdp2` is Lightning's `ModelParallelStrategy` with PyTorch's `fully_shard` (PyTorch 2.6 or later):
each worker keeps a part of every weight, of its gradient and of the optimizer's state. The members of `nn.Sequential`
and `nn.ModuleList` in the backbone are gathered one by one while they compute. Two things stay whole on every worker:
the copy of the network from which `icarl`, `lwf` and `bic` distil, and the network during evaluation, where workers may
have different numbers of batches. The rehearsal memory is that of every other strategy, local or global.

These are refused, too: `model.forward: separate`, `model.memory_format: channels_last`, `trainer.sync_batchnorm`, and
callbacks that average weights.

A checkpoint `x.ckpt` stands beside `x.ckpt.memory/`, the workers' memories, and `x.ckpt.weights/`, their parts of the
weights and of the optimizer's state. A job resumes from it on any number of workers and with any strategy.
`load_from_checkpoint` needs whole weights in the file, which `FSDP2Strategy(save_distributed_checkpoint=False)` writes.

`tests/distributed/cells.py` generates this page.
"""


def markdown() -> str:
    """Return the page."""
    reasons: list[str] = []

    def entry(agent: str, strategy: str) -> str:
        found = [cell.reason for cell in cells(agent, strategy)]
        refused = list(dict.fromkeys(reason for reason in found if reason is not None))
        reasons.extend(reason for reason in refused if reason not in reasons)
        letters = ", ".join(chr(ord("a") + reasons.index(reason)) for reason in refused)
        working = found.count(None)
        if not refused:
            return "all"
        return f"{working} of {len(found)} ({letters})" if working else f"refused ({letters})"

    rows = [[f"`{agent}`", *(entry(agent, s) for s in STRATEGIES)] for agent in short_names.__all__]
    head = ["agent", *(f"`{strategy}`" for strategy in STRATEGIES)]
    each = len(cells(ALL[0].agent, "auto"))
    introduction = _INTRODUCTION.format(
        each=each,
        precisions=", ".join(f"`{p}`" for p in PRECISIONS[:-1]) + f" and `{PRECISIONS[-1]}`",
        total=f"{len(ALL):,}",
        working=f"{sum(cell.reason is None for cell in ALL):,}",
    )
    table = [head, ["---"] * len(head), *rows]
    lines = [f"- ({chr(ord('a') + i)}) `{reason}`" for i, reason in enumerate(reasons)]
    shown = ["| " + " | ".join(row) + " |" for row in table]
    return introduction + "\n".join([*shown, "", *lines, ""]) + _NOTES


if __name__ == "__main__":
    PAGE.write_text(markdown(), encoding="utf-8")
