"""``op="adasum"`` on two workers of ``mpirun``: adds orthogonal gradients, keeps equal ones, and trains."""

from __future__ import annotations

from typing import Any

import horovod.torch as hvd
import torch

from dcl_lightning import HorovodStrategy
from tests.distributed.toy import Toy, samples, shard, trainer, weights


def main() -> None:
    """Check Horovod itself, then two fits."""
    hvd.init()
    assert hvd.mpi_enabled()
    assert hvd.mpi_built()
    assert hvd.gloo_built()
    assert hvd.size() == 2
    rank = hvd.rank()
    unit = torch.eye(2)[rank] * (rank + 1)
    assert torch.allclose(hvd.allreduce(unit, op=hvd.Adasum, name="orthogonal"), torch.tensor([1.0, 2.0]))
    equal = torch.tensor([3.0, -4.0])
    assert torch.allclose(hvd.allreduce(equal, op=hvd.Adasum, name="equal"), equal)
    x, y = samples().tensors
    model = Toy(seed=rank)
    before = 0.35
    windows: list[dict[str, Any]] = [{}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}]
    for options in windows:
        t = trainer(HorovodStrategy(op="adasum"), max_epochs=10, **options)
        t.fit(model, shard(rank, 2, 8))
        loss = torch.nn.functional.mse_loss(model.net(x), y).item()
        assert loss < before, (loss, before)
        before = loss
        both = t.strategy.all_gather(weights(model))
        assert torch.equal(both[0], both[1])
    print("ADASUM DONE", flush=True)


if __name__ == "__main__":
    main()
