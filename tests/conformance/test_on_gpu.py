"""On a GPU: the memory's own CUDA stream changes no result and never makes the host wait."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from dcl_lightning import NIL, ContinualDataModule
from dcl_lightning.memory.manager import MemoryManager
from tests.conformance.rehearsal_runs import assert_same_run, buffer_of, fit, stored_rows
from tests.conformance.small_stream import weights

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

GPU: dict[str, Any] = {"accelerator": "gpu", "devices": 1}
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("storage", ["cpu", "cuda", "folder"])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_every_stage_in_the_background_is_inline_bit_for_bit(tmp_path: Path, storage: str, scope: str) -> None:
    def run(number: int, **config: Any) -> Any:
        place = str(tmp_path / f"rows{number}") if storage == "folder" else storage
        return fit(tmp_path, trainer=GPU, storage=place, scope=scope, **config)

    inline = run(0)
    assert inline[0].rehearsal.manager.device.type == "cuda"
    assert len(buffer_of(inline[0])) > 6
    for number, prefetch in enumerate(("draw", "device", "batch"), 1):
        assert_same_run(inline, run(number, execution="blocking", prefetch=prefetch))


def test_the_memory_holds_what_it_holds_on_a_cpu(tmp_path: Path) -> None:
    ours, theirs = fit(tmp_path, trainer=GPU), fit(tmp_path, trainer={"accelerator": "cpu"})
    for name, column in stored_rows(theirs[0]).items():
        assert torch.equal(stored_rows(ours[0])[name], column), name
    torch.testing.assert_close(weights(ours[0]).cpu(), weights(theirs[0]), rtol=1e-3, atol=1e-5)


def test_a_run_goes_on_without_the_gpu(tmp_path: Path) -> None:
    config: dict[str, Any] = {"execution": "blocking", "prefetch": "device"}
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    whole = fit(tmp_path, trainer=GPU, callbacks=[saver], **config)
    again = fit(tmp_path, trainer={"accelerator": "cpu"}, ckpt=str(tmp_path / "step=4.ckpt"), **config)
    for name, column in stored_rows(whole[0]).items():
        assert torch.equal(stored_rows(again[0])[name], column), name
    torch.testing.assert_close(weights(again[0]), weights(whole[0]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("storage", ["cpu", "cuda"])
@pytest.mark.parametrize("prefetch", ["draw", "device"])
@pytest.mark.parametrize("slow", ["training", "memory", "none"])
def test_rows_arrive_whole_whichever_stream_is_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str, prefetch: str, slow: str
) -> None:
    """Each rehearsed image is compared, on the device, with the data set's; freed memory is taken again at once."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (3000, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.arange(3000) % 10
    data = ContinualDataModule(
        (images, labels, images[:10], labels[:10]), scenario="none", batch_size=16, seed=0, augment=False
    )
    truth = images.cuda().float().div_(255)
    wrong, compared = torch.zeros((), device="cuda"), 0
    advance = MemoryManager.advance

    def behind(self: MemoryManager, *args: Any, **kwargs: Any) -> Any:
        drawn = advance(self, *args, **kwargs)
        if slow == "memory":
            torch.cuda._sleep(1_000_000)
        return drawn

    def look(agent: Any, batch: Any, loss: Any) -> None:
        nonlocal compared
        if slow == "training":
            torch.cuda._sleep(1_000_000)
        wrong.add_((batch.inputs != truth[batch.sample_ids]).sum())
        wrong.add_((batch.targets != batch.sample_ids % 10).sum())
        compared += len(batch.targets) - batch.num_new
        torch.full((16, 3, 32, 32), 3, dtype=torch.uint8, device="cuda")

    monkeypatch.setattr(MemoryManager, "advance", behind)
    fit(
        tmp_path, data, look, trainer=GPU, execution="blocking", prefetch=prefetch, storage=storage, num_samples=16,
        buffer_size=200,
    )  # fmt: skip
    assert compared > 5000
    assert wrong.item() == 0


def test_the_host_waits_for_nobody_and_the_memory_works_beside_the_network(tmp_path: Path) -> None:
    file = tmp_path / "overlap.json"
    command = [sys.executable, "benchmarks/overlap.py", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    figures = {row["name"]: row["value"] for row in json.loads(file.read_text())}
    for case in ("cpu, 32 px", "cuda, 32 px", "cpu, 224 px", "cuda, 224 px"):
        assert figures[f"cudaDeviceSynchronize calls, {case}"] == 0
        assert figures[f"waits of the training thread, {case}"] == 0
        assert figures[f"memory's operations on its own stream, {case}"] >= 1
        assert figures[f"of it within a backward pass, %, {case}"] > 90
        if "224" in case:  # with small images the device idles between kernels
            assert figures[f"of it beside the network's kernels, %, {case}"] > 0


def test_a_step_whose_values_are_read_waits_for_none_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, rates = NIL.training_step, []

    def watched(self: NIL, batch: Any, batch_idx: int) -> Any:
        torch.cuda.set_sync_debug_mode("error" if batch_idx else "default")
        try:
            return step(self, batch, batch_idx)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    class Reads(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            rates.append(float(trainer.callback_metrics["train/lr"]))

    monkeypatch.setattr(NIL, "training_step", watched)
    agent, losses = fit(tmp_path, trainer=GPU, callbacks=[Reads()])
    assert rates == [pytest.approx(agent.lr)] * len(losses)
