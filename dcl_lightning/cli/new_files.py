"""The files that ``dcl-lightning new`` writes: an agent named Fading, and a comparison named NAME."""

from __future__ import annotations

__all__ = ["AGENT", "EXPERIMENT"]

# By file name. The guide docs/guides/agent.md shows the same agent and the same test.
AGENT = {
    "fading.py": '''\
"""Fading replay: a sample counts less the older its task is. There is no paper."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from dcl_lightning.agents.replay import RehearsingAgent
from dcl_lightning.types import Batch

__all__ = ["Fading"]


class Fading(RehearsingAgent):
    """Replay in which a sample from ``age`` tasks ago has the weight ``keep ** age``.

    Args:
        *args: arguments of ``RehearsingAgent``, by place.
        keep: factor for each task that has passed, in (0, 1].
        **kwargs: arguments of ``RehearsingAgent``, by name.
    """

    short_name = "fading"

    def __init__(self, *args: Any, keep: float = 0.9, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keep = keep

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss over the step's samples of all workers, and the logits."""
        logits = self.outputs(batch)
        losses = F.cross_entropy(logits, batch.targets, reduction="none")
        age = batch.task_ids.max() - batch.task_ids
        return (batch.weights * self.keep**age * losses).sum() / batch.normalizer, logits
''',
    "fading_digits.yaml": """\
# Fading on digits, five tasks of two classes, 200 samples stored in total.
seed_everything: 0
model:
  class_path: fading.Fading
  init_args:
    backbone: mlp
    keep: 0.9
    rehearsal: {buffer_size: 200, num_samples: 16}
    epochs_per_task: 10
    lr: 0.05
data:
  class_path: ContinualDataModule
  init_args:
    dataset: digits
    scenario: class
    increment: 2
    batch_size: 16
trainer:
  accelerator: cpu
  logger:
    class_path: CSVLogger
    init_args: {save_dir: runs, name: fading_digits}
""",
    "test_fading.py": '''\
"""The loss of fading replay equals its formula in plain NumPy."""

import numpy as np
import torch
from fading import Fading

from dcl_lightning.backbones import MLP
from dcl_lightning.types import Batch


def test_samples_of_older_tasks_count_less():
    torch.manual_seed(0)
    agent = Fading(MLP([4], in_channels=1, input_size=2), 3, keep=0.5)
    inputs, targets, tasks = torch.randn(4, 1, 2, 2), torch.tensor([2, 2, 0, 1]), torch.tensor([2, 2, 0, 1])
    ids = torch.arange(4)
    batch = Batch(inputs, targets, tasks, ids, torch.ones(4), torch.tensor(4.0), ids, num_new=2)
    loss, logits = agent.training_loss(batch)
    scores = logits.detach().numpy().astype(np.float64)
    losses = np.log(np.exp(scores).sum(1)) - scores[np.arange(4), targets]
    np.testing.assert_allclose(loss.item(), (losses * [1, 1, 0.25, 0.5]).sum() / 4, rtol=1e-5)
''',
}

EXPERIMENT = {
    "README.md": """\
# NAME

Compares fine-tuning (`base`), experience replay (`er`) and DER++ (`derpp`) on scikit-learn's digits: five tasks of two
classes, three seeds each, 200 samples in each memory.

```bash
sh run.sh
```

A repeated call skips finished runs and resumes interrupted ones. `comparison/` then has the tables and the picture,
`runs/AGENT/SEED/report/` what each run found.

| to change | edit |
|---|---|
| the data set, the tasks, the network, the optimizer | `experiment.yaml`; `dcl-lightning data` lists data sets |
| the agents, and what each has for itself | `run.sh`; `dcl-lightning fit --model.help er` shows the options of one |
| the agents by one of your own | the same: put its file here, and name it as `--model smooth.Smooth` |

Changed configurations need new folders: give other names after `--out`, or remove `runs/`.
""",
    "experiment.yaml": """\
# What all agents of the comparison share; run.sh names them.
seed_everything: 0
model:
  class_path: base
  init_args:
    backbone: mlp
    epochs_per_task: 5
    lr: 0.05
data:
  class_path: ContinualDataModule
  init_args:
    dataset: digits
    scenario: class
    increment: 2
    batch_size: 16
trainer:
  accelerator: cpu
""",
    "run.sh": """\
#!/bin/sh
# Every agent over three seeds, then the comparison.
set -e
cd "$(dirname "$0")"
dcl-lightning repeat experiment.yaml --seeds 0..2 --out runs/base
dcl-lightning repeat experiment.yaml --seeds 0..2 --out runs/er --model er --model.rehearsal.buffer_size 200
dcl-lightning repeat experiment.yaml --seeds 0..2 --out runs/derpp --model derpp --model.rehearsal.buffer_size 200
dcl-lightning compare runs/base runs/er runs/derpp --out comparison
""",
}
