"""``strategy=horovod`` on real workers: numbers and launch."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.accelerators import CUDAAccelerator

from dcl_lightning.distributed import HorovodStrategy
from dcl_lightning.distributed.horovod.environment import HorovodEnvironment
from dcl_lightning.errors import ConfigurationError, HorovodNotFoundError
from tests.distributed.workers import assert_ended_well, environment, run_script, run_workers


def test_without_horovod_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "horovod" else find(name, *a))
    with pytest.raises(HorovodNotFoundError, match=r"python -m dcl_lightning\.tools\.install_horovod"):
        HorovodStrategy()


def test_a_horovod_without_pytorch_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = ModuleSpec("horovod", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: spec)
    with pytest.raises(HorovodNotFoundError):
        HorovodStrategy()


def test_the_constructor_does_not_import_horovod_and_one_device_needs_no_launcher() -> None:
    code = (
        "import sys, lightning.pytorch as pl, dcl_lightning\n"
        "t = pl.Trainer(strategy='horovod', accelerator='cpu', devices=2, logger=False)\n"
        "assert 'horovod' not in sys.modules and t.world_size == 2 and t.strategy.launcher is not None\n"
        "t = pl.Trainer(strategy='horovod', accelerator='cpu', devices=1, logger=False)\n"
        "assert t.strategy.launcher is None and t.world_size == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(), timeout=120)


def test_open_mpi_variables_give_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 5, "SIZE": 6, "LOCAL_RANK": 1, "LOCAL_SIZE": 2, "NODE_RANK": 1}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", str(value))
    place = HorovodEnvironment()
    assert (place.global_rank(), place.world_size(), place.local_rank()) == (5, 6, 1)
    assert (place.node_rank(), place.num_nodes()) == (2, 3)


@pytest.mark.parametrize("launched", [False, True])
def test_gpus_need_a_horovod_that_was_built_for_them(launched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before a worker is started: Horovod's own thread would end the process on the first tensor."""
    import horovod.torch as hvd

    devices = [torch.device("cuda", k) for k in range(2)]
    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr(CUDAAccelerator, "auto_device_count", staticmethod(lambda: 2))
    monkeypatch.setattr(CUDAAccelerator, "parse_devices", staticmethod(lambda given: [0, 1][: int(given)]))
    monkeypatch.setattr(CUDAAccelerator, "get_parallel_devices", staticmethod(lambda given: devices[: len(given)]))
    if launched:
        for name, value in {"RANK": 0, "SIZE": 2, "LOCAL_RANK": 0, "LOCAL_SIZE": 2}.items():
            monkeypatch.setenv(f"HOROVOD_{name}", str(value))

    def trainer(devices: int = 1 if launched else 2) -> pl.Trainer:
        return pl.Trainer(strategy="horovod", accelerator="gpu", devices=devices, logger=False)

    for name in ("nccl_built", "cuda_built", "rocm_built"):
        monkeypatch.setattr(hvd, name, lambda: 0)
    with pytest.raises(ConfigurationError, match=r"install_horovod --gpu cuda`, or set trainer\.accelerator=cpu"):
        trainer()
    if not launched:
        assert trainer(devices=1).world_size == 1, "a worker alone asks nothing of Horovod"
    monkeypatch.setattr(hvd, "nccl_built", lambda: 21003)
    assert trainer().world_size == 2


def test_other_accelerators_are_refused_where_workers_would_exchange_tensors() -> None:
    with pytest.raises(ConfigurationError, match="works on cpu and gpu, not on mps"):
        HorovodStrategy(parallel_devices=[torch.device("mps", k) for k in range(2)])._configure_launcher()


def test_devices_other_than_the_launchers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_RANK", "0")
    monkeypatch.setenv("HOROVOD_LOCAL_SIZE", "2")
    for devices in ("auto", 1, 2):
        assert (
            pl.Trainer(strategy="horovod", accelerator="cpu", devices=devices, logger=False).strategy.launcher is None
        )
    with pytest.raises(ConfigurationError, match="started 2 workers"):
        pl.Trainer(strategy="horovod", accelerator="cpu", devices=3, logger=False)


def test_options_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="gradient_predivide_factor"):
        HorovodStrategy(op="sum", gradient_predivide_factor=2.0)
    with pytest.raises(ConfigurationError, match="start_timeout"):
        HorovodStrategy(start_timeout=0)


def test_numbers_of_two_workers() -> None:
    assert_ended_well(run_workers(NUMBERS, 2))


def test_a_plain_script_starts_its_workers_once(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(PLAIN)
    done, _ = run_script(script, "--word", "two words")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"horovod: 2 workers on 1 host, {threads()} each") == 1
    for fit in (1, 2):
        # Not line by line: a print of worker 0's may be cut by a line of the other's before its own end of line.
        assert done.stdout.count(f"FIT {fit} of 2 two words") == 2
        assert done.stdout.count(f"[rank 1] FIT {fit} of 2 two words") == 1
    assert "[rank 1] on stderr" in done.stderr.splitlines()


def threads() -> str:
    count = int(os.environ.get("OMP_NUM_THREADS", max(1, len(os.sched_getaffinity(0)) // 2)))
    return "1 thread" if count == 1 else f"{count} threads"


NUMBERS = """
import os, torch, lightning.pytorch as pl
from torch import nn
from torch.distributed import ReduceOp
from tests.distributed.toy import Toy, shard, trainer, weights
from dcl_lightning import HorovodStrategy

rank = int(os.environ["HOROVOD_RANK"])
one = Toy()
trainer("auto").fit(one, shard(0, 1, 16))
accumulated = Toy()
trainer("auto", accumulate_grad_batches=3, gradient_clip_val=0.5).fit(accumulated, shard(0, 1, 16))

os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ["TORCH_PORT"],
                  WORLD_SIZE="2", NODE_RANK="0", LOCAL_RANK=str(rank))
ddp = Toy(seed=rank)
trainer("ddp", devices=2).fit(ddp, shard(rank, 2, 8))
torch.distributed.destroy_process_group()
for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "NODE_RANK", "LOCAL_RANK"):
    os.environ.pop(name, None)

# Two workers with half the batch do what one does with the whole, and what ddp does.
two = Toy(seed=rank)
t = trainer("horovod", devices=2)
assert (t.world_size, t.global_rank, t.is_global_zero) == (2, rank, rank == 0)
t.fit(two, shard(rank, 2, 8))
assert two.flags.all(), "buffers come from worker 0"
torch.testing.assert_close(weights(two), weights(one), atol=1e-6, rtol=1e-6)
torch.testing.assert_close(weights(two), weights(ddp), atol=1e-7, rtol=1e-6)
assert not torch.distributed.is_initialized()
gathered = t.strategy.all_gather(two.seen)
assert torch.equal(gathered[0], gathered[1]), "gradients are averaged when backward returns"

# Accumulation with a short last window, clipping, and a module that was fitted before.
again = Toy(seed=rank)
trainer("horovod", accumulate_grad_batches=3, gradient_clip_val=0.5).fit(again, shard(rank, 2, 8))
torch.testing.assert_close(weights(again), weights(accumulated), atol=1e-6, rtol=1e-6)
trainer("horovod").fit(again, shard(rank, 2, 8))
trainer("auto").fit(accumulated, shard(0, 1, 16))
torch.testing.assert_close(weights(again), weights(accumulated), atol=2e-6, rtol=2e-6)

# Options.
for options, tolerance in (({"gradient_predivide_factor": 2.0}, 1e-6), ({"compression": "fp16"}, 5e-3),
                           ({"compression": "bf16"}, 5e-2)):
    other = Toy(seed=rank)
    trainer(HorovodStrategy(**options)).fit(other, shard(rank, 2, 8))
    torch.testing.assert_close(weights(other), weights(one), atol=tolerance, rtol=tolerance)

# A head that one worker uses stays equal on both; one that nobody uses does not move, nor decay.
heads = Toy(unused=True)
before = heads.extra[1].weight.detach().clone()
t = trainer(HorovodStrategy(find_unused_parameters=True))
t.fit(heads, shard(rank, 2, 8))
assert torch.equal(heads.extra[1].weight, before) and heads.extra[1].weight.grad is None
mine = t.strategy.all_gather(weights(heads))
assert torch.equal(mine[0], mine[1])

# Collectives of the strategy.
s = t.strategy
found = s.reduce(torch.tensor(3 + rank))
assert found.dtype == torch.float64 and found == 3.5
assert s.reduce("text") == "text"
x = torch.tensor([2.0 + rank])
for op, wanted in (("mean", 2.5), ("AVG", 2.5), (None, 2.5), ("sum", 5), ("max", 3), ("min", 2), ("product", 6),
                   (ReduceOp.SUM, 5), (ReduceOp.MAX, 3), (ReduceOp(ReduceOp.SUM), 5), (ReduceOp(ReduceOp.MIN), 2)):
    assert s.reduce(x, reduce_op=op).item() == wanted, op
assert s.broadcast("name" if rank == 0 else None) == "name"
assert s.broadcast(["name"] if rank == 1 else 3, src=1) == ["name"]
assert s.reduce_boolean_decision(rank == 0, all=False) and not s.reduce_boolean_decision(rank == 0)
assert s.distributed_sampler_kwargs == {"num_replicas": 2, "rank": rank}
y = torch.tensor([1.0, 2.0], requires_grad=True)
out = s.all_gather(y, sync_grads=True)
assert out.shape == (2, 2)
(out * torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * (rank + 1)).sum().backward()
assert y.grad.tolist() == [[3.0, 6.0], [9.0, 12.0]][rank], "summed over workers, as ddp does"
assert not s.all_gather(y).requires_grad
s.barrier()

# Logged metrics and values over uneven shards: 40 samples on worker 0, 24 on worker 1.
from torch.utils.data import DataLoader, Subset
from torchmetrics import MeanSquaredError
from tests.distributed.toy import samples
class Measured(Toy):
    def __init__(self):
        super().__init__()
        self.error = MeanSquaredError()
    def validation_step(self, batch, index):
        out = self.net(batch[0])
        self.error(out, batch[1])
        self.log("error", self.error)
        self.log("loss", nn.functional.mse_loss(out, batch[1]), sync_dist=True, batch_size=len(out))
def loader(a, b):
    return DataLoader(Subset(samples(), range(a, b)), batch_size=8)
wanted = trainer("auto").validate(Measured(), loader(0, 64), verbose=False)[0]
found = trainer("horovod").validate(Measured(), loader(*[(0, 40), (40, 64)][rank]), verbose=False)[0]
assert abs(found["error"] - wanted["error"]) < 1e-6, (found, wanted)
assert abs(found["loss"] - wanted["loss"]) < 1e-6, (found, wanted)
"""

PLAIN = """
import sys
import dcl_lightning
from tests.distributed.toy import Toy, shard, trainer
model = Toy()
for fit in (1, 2):
    t = trainer("horovod", devices=2)
    t.fit(model, shard(t.global_rank, t.world_size, 8))
    print(f"FIT {fit} of {t.world_size} {sys.argv[2]}", flush=True)
if t.global_rank == 1:
    print("on stderr", file=sys.stderr)
"""
