"""Two agents on one stream, without and with a memory, and a prediction at the end.

python script.py
"""

from typing import Any

import lightning.pytorch as pl

from dcl_lightning import ERACE, ContinualDataModule, FineTuning
from dcl_lightning.backbones import MLP


def train(kind: type[Any], folder: str, **options: Any) -> tuple[Any, pl.Trainer, ContinualDataModule]:
    """Train an agent of this kind on five tasks of two digits each; return it with its trainer and its data."""
    pl.seed_everything(0)
    data = ContinualDataModule("digits", scenario="class", increment=2, batch_size=16)
    agent = kind(MLP(), epochs_per_task=3, lr=0.05, **options)
    # Any option of Lightning works: strategy="horovod", devices=4, precision="bf16-mixed", loggers, callbacks.
    trainer = pl.Trainer(
        max_epochs=-1, accelerator="cpu", default_root_dir=folder, logger=False, enable_progress_bar=False
    )
    trainer.fit(agent, datamodule=data)
    return agent, trainer, data


if __name__ == "__main__":
    forgetful, *_ = train(FineTuning, "runs/without_memory")
    agent, trainer, data = train(ERACE, "runs/with_memory", rehearsal={"buffer_size": 200, "num_samples": 16})
    for name, trained in (("without a memory", forgetful), ("with 200 stored samples", agent)):
        matrix = trained.results.matrix  # R[i, j]: accuracy on task j after task i
        figures = f"average accuracy {matrix.average_accuracy:.2f}, forgetting {matrix.forgetting:.2f}"
        print(f"{name}: {figures}")

    predictions: Any = trainer.predict(agent, datamodule=data)
    print("first test images are predicted to be", predictions[0][0].labels[:5])  # of test set 0, batch 0
