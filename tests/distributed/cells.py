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
        return supported(getattr(short_names, self.agent), *self[1:])


def cells(agent: str, strategy: str) -> list[Cell]:
    """Return the combinations of an agent and a strategy."""
    switches = (False, True)
    return [Cell(agent, strategy, *rest) for rest in itertools.product(PRECISIONS, switches, switches)]


ALL = [cell for agent in short_names.__all__ for strategy in STRATEGIES for cell in cells(agent, strategy)]

_INTRODUCTION = """# Strategies

**The budget is the job's.** `buffer_size` counts the samples that all workers store together. Where each worker fills a
memory of its own to the full size, N workers rehearse from N times the budget; published results had to be corrected
for this (the erratum of DyTox, Douillard et al., CVPR 2022). Here the numbers are the same on one worker and on many,
whatever the strategy: with a batch of B, N workers learn what one process learns with a batch of N B.

The table says of every agent which strategies it learns with. Each entry stands for {each} combinations: precision
{precisions}, with and without `accumulate_grad_batches`, with and without `model.compile`. **all** means that all of
them work: each is tested on two workers against one process with the double batch. The rest is refused before the first
step, on all workers, with one line and exit code 2; the letters stand for the lines below the table. Together these are
{total} combinations, of which {working} work.

"""

_NOTES = """
`auto` is one process. Two workers of `nil_global` have no one process with the same draws, so that the strategies are
compared with each other; `nil_v2` does not wait for its memory, and two runs of it differ. Values beside those of the
table are refused with `fsdp2` in the same way: `model.forward: separate`, `model.memory_format: channels_last`,
`trainer.sync_batchnorm`, and callbacks that average weights. 16-mixed is tested on a CPU with PyTorch's loss scaler;
given as `trainer.precision`, Lightning replaces it by bf16-mixed there.

## fsdp2

`--trainer.strategy fsdp2` is Lightning's `ModelParallelStrategy` with PyTorch's `fully_shard`: each worker keeps a part
of every weight, of its gradient and of the optimizer's state. The blocks of the backbone (members of `nn.Sequential`
and `nn.ModuleList`) are gathered one by one while they compute. What is not divided: the copy of the network from which
`icarl`, `lwf` and `bic` learn, and the whole network during evaluation, where workers have different numbers of
batches. The memory is that of every other strategy, local or global.

A checkpoint is one file beside which two folders may stand: `x.ckpt.memory` with the workers' memories,
`x.ckpt.weights` with their parts of the weights. A job can resume on any number of workers, and with another strategy.
`load_from_checkpoint` needs whole weights in the file, which
`--trainer.strategy.save_distributed_checkpoint false` writes.

`python -m tests.distributed.cells` generates this page.
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
        precisions=", ".join(f"`{p}`" for p in PRECISIONS[:-1]) + f" or `{PRECISIONS[-1]}`",
        total=f"{len(ALL):,}",
        working=f"{sum(cell.reason is None for cell in ALL):,}",
    )
    table = [head, ["---"] * len(head), *rows]
    lines = [f"- ({chr(ord('a') + i)}) `{reason}`" for i, reason in enumerate(reasons)]
    shown = ["| " + " | ".join(row) + " |" for row in table]
    return introduction + "\n".join([*shown, "", *lines, ""]) + _NOTES


if __name__ == "__main__":
    PAGE.write_text(markdown(), encoding="utf-8")
