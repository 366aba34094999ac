"""A job with one fault at one place: ``faulty_job.py WHAT RANK [COLLECTIVE_TIMEOUT]``."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time


def say(text: str) -> None:
    """One write, which lines of other workers cannot come into."""
    os.write(1, f"{text}\n".encode())


WHAT, RANK = sys.argv[1], int(sys.argv[2])
ME = int(os.environ.get("HOROVOD_RANK", "0"))  # none is set yet in the process that launches
COLLECTIVE_TIMEOUT = float(sys.argv[3]) if len(sys.argv) > 3 else 3 if WHAT in ("hang", "freeze") else 1800
if WHAT in ("never", "away", "late") and ME == RANK:
    say(f"PID {os.getpid()}")
    time.sleep(40 if WHAT == "late" else 3600)

import lightning.pytorch as pl  # noqa: E402 (a late worker is late before this)
import torch  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from dcl_lightning import HorovodStrategy  # noqa: E402
from dcl_lightning.comm import comm_of  # noqa: E402
from dcl_lightning.distributed.ranks import launched_by_horovod  # noqa: E402
from tests.distributed.toy import Toy, shard, trainer  # noqa: E402

STEP = 5  # the first in which something goes wrong


class Collector(pl.Callback):
    """Has state that takes all workers to gather, as the memory has."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        gathered = comm_of(self.trainer.strategy).allgather(torch.tensor([float(self.trainer.global_step)]))
        return {"steps": torch.cat(gathered)}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.trainer = trainer
        say(f"CLOCK {time.time()}")
        say(f"PID {os.getpid()}")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        say(f"STOPPED AFTER STEP {trainer.global_step} {type(exception).__name__}")


class Faulty(Toy):
    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor | None:
        if self.trainer.global_step >= STEP:
            if WHAT == "signal":
                time.sleep(0.05)
            elif self.global_rank == RANK and WHAT != "late":
                say(f"FAULT AT {time.time()}")
                self.fail()
        return super().training_step(batch, index)

    def fail(self) -> None:
        if WHAT == "raise":
            raise ValueError("no such luck")
        if WHAT == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif WHAT in ("hang", "stuck"):
            time.sleep(3600)
        elif WHAT == "freeze":  # no other thread of the process runs either
            ctypes.PyDLL(None).sleep(3600)


if __name__ == "__main__":
    strategy = HorovodStrategy(start_timeout=5 if WHAT == "never" else 120, collective_timeout=COLLECTIVE_TIMEOUT)
    callbacks = [
        Collector(),
        ModelCheckpoint("checkpoints", save_last=True, every_n_train_steps=2),
        ModelCheckpoint("exceptions", every_n_epochs=1000, save_on_exception=True),
        OnExceptionCheckpoint("exceptions"),
    ]
    t = trainer(
        strategy,
        devices=1 if launched_by_horovod() else 2,
        max_epochs=3 if WHAT == "late" else -1,
        enable_checkpointing=True,
        callbacks=callbacks,
        logger=CSVLogger("runs", "faulty"),
    )
    t.fit(Faulty(), shard(t.global_rank, t.world_size, 8))
    say(f"DONE {t.global_step}")
