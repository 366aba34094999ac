"""Batches of image files behave as batches of tensors, with reader processes that survive over tasks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from dcl_lightning import NIL, FineTuning, ICaRL
from dcl_lightning.backbones import MLP
from dcl_lightning.data import ContinualDataModule, transforms
from dcl_lightning.data.images import ImageFiles, ReaderPool
from dcl_lightning.data.loader import PrefetchLoader, TaskLoader
from dcl_lightning.memory.config import MemorySize, RehearsalConfig
from tests.data import small_sets


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 7), ("val", 3)):
        for name in ("a", "b", "c", "d"):
            for i in range(count):
                small_sets.image(base / split / name / f"{i}.png", (30 + i, 40 - i))
    return base


@pytest.fixture(scope="module")
def readers():
    pool = ReaderPool(2)
    yield pool
    pool.close()


def loader(root: Path, pool: ReaderPool, rank: int = 0, size: int = 1, train: bool = True, batch_size: int = 5):
    names = [f"train/{c}/{i}.png" for c in "abcd" for i in range(7)]
    files = ImageFiles(str(root), names, 16)
    files.reader_pool = pool
    rows = torch.arange(28)
    result = TaskLoader(files, rows // 7, rows * 0, batch_size, rows, rank, size, train=train, seed=3, epoch=2)
    result.augment = True
    return result


def same(left, right) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.inputs, b.inputs) and a.sample_ids.tolist() == b.sample_ids.tolist()
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("train", [True, False])
def test_processes_read_what_one_process_reads_in_the_same_order(root: Path, readers: ReaderPool, train: bool) -> None:
    one = list(loader(root, ReaderPool(0), train=train))
    assert same(list(loader(root, readers, train=train)), one)
    assert same(list(PrefetchLoader(loader(root, readers, train=train))), one)
    tensor = torch.arange(28)
    plain = TaskLoader(tensor, tensor // 7, tensor * 0, 5, tensor, train=train, seed=3, epoch=2)
    assert [b.sample_ids.tolist() for b in plain] == [b.sample_ids.tolist() for b in one]
    assert all(b.inputs.shape == (len(b.sample_ids), 3, 16, 16) and b.inputs.dtype == torch.uint8 for b in one)


def test_shards_hold_what_one_worker_sees_step_by_step(root: Path, readers: ReaderPool) -> None:
    whole = {}
    for batch in loader(root, readers, batch_size=15):
        whole |= dict(zip(batch.sample_ids.tolist(), batch.inputs, strict=True))
    seen = []
    for rank in range(3):
        for batch in loader(root, readers, rank, 3):
            real = batch.weights > 0
            seen += batch.sample_ids[real].tolist()
            for row, pixels in zip(batch.sample_ids.tolist(), batch.inputs, strict=True):
                assert torch.equal(pixels, whole[row])
    assert sorted(seen) == list(range(28))
    exact = [b.sample_ids for rank in range(3) for b in loader(root, readers, rank, 3, train=False)]
    assert sorted(torch.cat(exact).tolist()) == list(range(28))


@pytest.mark.parametrize("stop", [0, 1, 3, 6])
def test_a_place_within_an_epoch_resumes_with_prefetched_batches(root: Path, readers: ReaderPool, stop: int) -> None:
    whole = list(loader(root, readers))
    first = loader(root, readers)
    walk = iter(first)
    for _ in range(stop):
        next(walk)
    state = first.state_dict()
    again = loader(root, readers)
    again.load_state_dict(state)
    assert same(list(again), whole[stop:])


def test_loaders_may_take_turns_and_be_left(root: Path, readers: ReaderPool) -> None:
    training, test = iter(loader(root, readers)), iter(loader(root, readers, train=False))
    expected = list(loader(root, ReaderPool(0))), list(loader(root, ReaderPool(0), train=False))
    mixed = [(next(training), next(test)) for _ in range(3)]
    training.close()
    assert same([a for a, _ in mixed], expected[0][:3])
    assert same([b for _, b in mixed] + list(test), expected[1])


def test_a_worker_without_rows_gets_a_batch_without_images(root: Path, readers: ReaderPool) -> None:
    one = loader(root, readers, 5, 9, train=False)
    one.indices, one.for_all = torch.arange(3), True
    (batch,) = one
    assert batch.inputs.shape == (0, 3, 16, 16)


def test_exemplars_of_one_epoch_are_cropped_anew_at_each_step(root: Path, readers: ReaderPool) -> None:
    one = loader(root, readers)
    one.visit(torch.arange(14), 2, torch.tensor([20]), 1)
    pixels = [b.inputs[b.sample_ids == 20][0] for b in one]
    assert len(pixels) == 3
    assert not torch.equal(pixels[0], pixels[1])


class TwoEpochsATask:
    def task_at(self, epoch: int) -> int:
        return epoch // 2


def module(root: Path, **kwargs) -> ContinualDataModule:
    options = {"source_options": {"size": 16}, "batch_size": 5, "num_workers": 2, "increment": 2}
    return ContinualDataModule("folder", root=str(root), **(options | kwargs))


def at(epoch: int) -> SimpleNamespace:
    on_cpu = SimpleNamespace(root_device=torch.device("cpu"))
    state = SimpleNamespace(fn=TrainerFn.FITTING)
    return SimpleNamespace(
        current_epoch=epoch, global_rank=0, world_size=1, training=True, strategy=on_cpu, state=state
    )


def test_processes_live_on_over_tasks_and_evaluation(root: Path) -> None:
    data = module(root, val_ratio=0.2)
    data.setup()
    data.attach_clock(TwoEpochsATask())
    alive = set()
    for epoch in range(4):
        data.trainer = at(epoch)
        loader = data.train_dataloader()
        ids = torch.cat([b.sample_ids for b in loader])
        assert sorted(ids.tolist()) == data.train_indices(epoch // 2).tolist()
        for loaders in (data.val_dataloader(), data.test_dataloader()):
            assert sum(len(b.inputs) for part in loaders for b in part) > 0
        alive.add(frozenset(data._reader_pool._pools[0]._processes))
    assert len(alive) == 1
    assert len(next(iter(alive))) == 2
    data.teardown("fit")
    assert data._reader_pool._pools == []


def test_training_is_cropped_by_readers_and_mirrored_on_the_device(root: Path) -> None:
    data = module(root, num_workers=0)
    data.setup()
    data.attach_clock(TwoEpochsATask())
    data.trainer = at(0)
    batch = next(iter(data.train_dataloader()))
    plain = next(iter(data.train_eval_loader(batch.sample_ids)))
    assert not torch.equal(batch.inputs, plain.inputs)
    flips = transforms.draws(batch.draw_ids, data.seed, 0, 2, 2).bool()
    expected = torch.stack([x.flip(-1) if f else x for x, f in zip(batch.inputs, flips, strict=True)])
    found = transforms.augment(batch.inputs, batch.draw_ids, data.seed, 0, pad=0)
    assert torch.equal(found, expected)
    calm = module(root, num_workers=0, augment=False)
    calm.setup()
    calm.attach_clock(TwoEpochsATask())
    calm.trainer = data.trainer
    assert torch.equal(next(iter(calm.train_dataloader())).inputs, plain.inputs)


AGENTS = {
    "base": lambda **kwargs: FineTuning(MLP([8]), **kwargs),
    "nil": lambda **kwargs: NIL(
        MLP([8]), rehearsal=RehearsalConfig(buffer_size=8, num_samples=3, num_candidates=3), **kwargs
    ),
    "icarl": lambda **kwargs: ICaRL(MLP([8]), rehearsal=MemorySize(buffer_size=8), **kwargs),
}


@pytest.mark.parametrize("kind", AGENTS)
def test_a_stream_of_files_is_learnt_and_resumed_alike_with_and_without_processes(
    root: Path, tmp_path: Path, kind: str
) -> None:
    def fit(num_workers: int, folder: str, ckpt_path: str | None = None) -> torch.Tensor:
        pl.seed_everything(0)
        data = module(root, num_workers=num_workers)
        agent = AGENTS[kind](num_classes=data.num_classes, input_spec=data.input_spec, epochs_per_task=1)
        saving = ModelCheckpoint(tmp_path / folder, "{step}", save_top_k=-1, every_n_train_steps=1)
        trainer = pl.Trainer(
            default_root_dir=tmp_path,
            max_epochs=-1,
            logger=False,
            enable_progress_bar=False,
            accelerator="cpu",
            callbacks=[saving],
        )
        trainer.fit(agent, datamodule=data, ckpt_path=ckpt_path)
        assert trainer.global_step >= 6
        assert data._reader_pool._pools == []
        return torch.cat([p.detach().flatten() for p in agent.parameters()])

    whole = fit(2, "whole")
    assert torch.equal(fit(0, "alone"), whole)
    assert torch.equal(fit(2, "again", str(tmp_path / "whole" / "step=5.ckpt")), whole)


def _end(code: int) -> None:
    os._exit(code)


def test_a_reader_that_dies_says_so_and_the_next_ones_start() -> None:
    pool = ReaderPool(1)
    with pytest.raises(RuntimeError, match=r"reads images has ended.*data\.num_workers"):
        pool.result(pool.submit(_end, 9))
    assert pool.result(pool.submit(os.getpid)) != os.getpid()
    pool.close()


_PARENT = """
import multiprocessing, os, time
from dcl_lightning.data import images

def main():
    pools = []
    for method, count in (("fork", 2), ("forkserver", 1)):
        images._context = lambda: multiprocessing.get_context(method)
        pools.append(images.ReaderPool(count))
        found = [pools[-1].submit(os.getpid) for _ in range(8)]
        found = {pools[-1].result(one) for one in found}
        print(*found, flush=True)
    time.sleep(100)

if __name__ == "__main__":
    main()
"""


def test_readers_ignore_signals_to_the_job_and_end_with_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(_PARENT)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE, text=True)
    found = [int(word) for _ in range(2) for word in parent.stdout.readline().split()]
    assert len(found) >= 2
    for reader in found:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(reader, number)
    time.sleep(0.2)
    for reader in found:
        os.kill(reader, 0)
    parent.kill()
    parent.wait()
    until = time.monotonic() + 20
    while any(map(_runs, found)):
        assert time.monotonic() < until, "a reader outlived its parent"
        time.sleep(0.1)


def _runs(process: int) -> bool:
    state = Path(f"/proc/{process}/stat")
    try:
        return state.read_text().split()[2] != "Z"
    except OSError:
        return False
