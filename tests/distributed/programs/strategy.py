"""``strategy=horovod`` on two workers against one process and ``ddp``: weights, collectives, logged values."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.distributed import ReduceOp
from torch.utils.data import DataLoader, Subset
from torchmetrics import MeanSquaredError

from dcl_lightning import HorovodStrategy
from tests.distributed.programs.place import rank
from tests.distributed.toy import Toy, samples, shard, trainer, weights


def numbers() -> None:
    """Two workers with half the batch do what one does with the whole, and what ddp does."""
    one = Toy()
    trainer("auto").fit(one, shard(0, 1, 16))
    ddp = fitted_by_ddp()
    two = Toy(seed=rank())
    t = trainer("horovod", devices=2)
    assert (t.world_size, t.global_rank, t.is_global_zero) == (2, rank(), rank() == 0)
    t.fit(two, shard(rank(), 2, 8))
    assert two.flags.all(), "buffers come from worker 0"
    torch.testing.assert_close(weights(two), weights(one), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(weights(two), weights(ddp), atol=1e-7, rtol=1e-6)
    assert not torch.distributed.is_initialized()
    gathered = t.strategy.all_gather(two.seen)
    assert torch.equal(gathered[0], gathered[1]), "gradients are averaged when backward returns"
    check_accumulation()
    check_options(one)
    check_collectives(check_unused_heads())
    check_logged()


def fitted_by_ddp() -> Toy:
    """Fit under Lightning's ``ddp``, and leave no trace of it."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ["TORCH_PORT"], "WORLD_SIZE": "2", "NODE_RANK": "0",
             "LOCAL_RANK": str(rank())}  # fmt: skip
    os.environ.update(place)
    module = Toy(seed=rank())
    trainer("ddp", devices=2).fit(module, shard(rank(), 2, 8))
    torch.distributed.destroy_process_group()
    for name in place:
        os.environ.pop(name, None)
    return module


def check_accumulation() -> None:
    """A short last window, clipping, and a module that was fitted before."""
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}
    alone, again = Toy(), Toy(seed=rank())
    trainer("auto", **options).fit(alone, shard(0, 1, 16))
    trainer("horovod", **options).fit(again, shard(rank(), 2, 8))
    torch.testing.assert_close(weights(again), weights(alone), atol=1e-6, rtol=1e-6)
    trainer("horovod").fit(again, shard(rank(), 2, 8))
    trainer("auto").fit(alone, shard(0, 1, 16))
    torch.testing.assert_close(weights(again), weights(alone), atol=2e-6, rtol=2e-6)


def check_options(one: Toy) -> None:
    """None of them changes more than its precision."""
    strategies = (
        (HorovodStrategy(gradient_predivide_factor=2.0), 1e-6),
        (HorovodStrategy(compression="fp16"), 5e-3),
        (HorovodStrategy(compression="bf16"), 5e-2),
    )
    for strategy, tolerance in strategies:
        other = Toy(seed=rank())
        trainer(strategy).fit(other, shard(rank(), 2, 8))
        torch.testing.assert_close(weights(other), weights(one), atol=tolerance, rtol=tolerance)


def check_unused_heads() -> Strategy:
    """A head that one worker uses stays equal on both; one that nobody uses neither moves nor decays."""
    heads = Toy(unused=True)
    assert heads.extra is not None
    spare = heads.extra[1].weight
    assert isinstance(spare, nn.Parameter)
    before = spare.detach().clone()
    t = trainer(HorovodStrategy(find_unused_parameters=True))
    t.fit(heads, shard(rank(), 2, 8))
    assert torch.equal(spare, before)
    assert spare.grad is None
    both = t.strategy.all_gather(weights(heads))
    assert torch.equal(both[0], both[1])
    return t.strategy


def check_collectives(s: Strategy) -> None:
    """Reductions by every name, broadcasts, decisions, and gathering with gradients."""
    assert isinstance(s, HorovodStrategy)
    found = s.reduce(torch.tensor(3 + rank()))
    assert isinstance(found, Tensor)
    assert found.dtype == torch.float64
    assert found == 3.5
    assert s.reduce("text") == "text"
    x = torch.tensor([2.0 + rank()])
    for op, wanted in (
        ("mean", 2.5), ("AVG", 2.5), (None, 2.5), ("sum", 5), ("max", 3), ("min", 2), ("product", 6),
        (ReduceOp.SUM, 5), (ReduceOp.MAX, 3), (ReduceOp(ReduceOp.SUM), 5), (ReduceOp(ReduceOp.MIN), 2),
    ):  # fmt: skip
        assert s.reduce(x, reduce_op=op).item() == wanted, op
    assert s.broadcast("name" if rank() == 0 else None) == "name"
    assert s.broadcast(["name"] if rank() == 1 else 3, src=1) == ["name"]
    assert s.reduce_boolean_decision(rank() == 0, all=False)
    assert not s.reduce_boolean_decision(rank() == 0)
    assert s.distributed_sampler_kwargs == {"num_replicas": 2, "rank": rank()}
    y = torch.tensor([1.0, 2.0], requires_grad=True)
    out = s.all_gather(y, sync_grads=True)
    assert out.shape == (2, 2)
    torch.autograd.backward((out * torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * (rank() + 1)).sum())
    assert y.grad is not None
    assert y.grad.tolist() == [[3.0, 6.0], [9.0, 12.0]][rank()], "summed over workers, as ddp does"
    assert not s.all_gather(y).requires_grad
    s.barrier()


class Measured(Toy):
    """Logs a metric object, and a value that Lightning averages over workers."""

    def __init__(self) -> None:
        super().__init__()
        self.error = MeanSquaredError()

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        out = self.net(batch[0])
        self.error(out, batch[1])
        self.log("error", self.error)
        self.log("loss", nn.functional.mse_loss(out, batch[1]), sync_dist=True, batch_size=len(out))


def check_logged() -> None:
    """Over uneven shards: 40 samples on worker 0, 24 on worker 1."""

    def loader(first: int, last: int) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(Subset(samples(), range(first, last)), batch_size=8)

    (wanted,) = trainer("auto").validate(Measured(), loader(0, 64), verbose=False)
    (found,) = trainer("horovod").validate(Measured(), loader(*[(0, 40), (40, 64)][rank()]), verbose=False)
    assert abs(found["error"] - wanted["error"]) < 1e-6, (found, wanted)
    assert abs(found["loss"] - wanted["loss"]) < 1e-6, (found, wanted)
