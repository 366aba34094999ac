"""Row formats of a memory: inputs, indices of the data set, or augmented samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from dcl_lightning import ContinualDataModule
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.memory.config import RehearsalConfig, resolve
from tests.conformance.rehearsal_runs import buffer_of, fit, stored_rows
from tests.conformance.small_stream import make_data, weights
from tests.data import small_sets


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 7), ("val", 1)):
        for name in "abcdef":
            for i in range(count):
                # Noise: no two crops are alike.
                small_sets.image(root / split / name / f"{i}.png", (20 + i, 30 - i))
    return root


def files(root: Path, **options) -> ContinualDataModule:
    return ContinualDataModule(
        "folder", root=str(root), batch_size=5, num_workers=0, seed=0, source_options={"size": 12}, **options
    )


def images() -> ContinualDataModule:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(6).repeat(7)
    x = torch.randint(0, 256, (42, 3, 8, 8), generator=g, dtype=torch.uint8)
    return ContinualDataModule((x, y, x, y), batch_size=5, seed=0, augment=True)


def assert_same_fit(first, second) -> None:
    assert torch.equal(first[1], second[1]), (first[1], second[1])
    assert torch.equal(weights(first[0]), weights(second[0]))


CONFIGS: dict[str, dict[str, Any]] = {
    "arrays, inline": {},
    "arrays, global": {"execution": "blocking", "scope": "global"},
    "files, blocking": {"execution": "blocking", "policy": "reservoir"},
    "files, load": {"execution": "blocking", "prefetch": "batch", "policy": "class_balanced"},
    "files, passes": {"execution": "blocking", "policy": "class_balanced"},
    "files, task end": {"update": "task_end", "draw_from": "past"},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_references_are_rows_bit_for_bit(tmp_path: Path, pictures: Path, kind: str) -> None:
    passes = 3 if kind == "files, passes" else 1
    make = images if kind.startswith("arrays") else lambda: files(pictures, passes=passes)
    rows, references = (fit(tmp_path / kept, make(), row_format=kept, **CONFIGS[kind]) for kept in ("inputs", "index"))
    assert_same_fit(references, rows)
    assert buffer_of(references[0]).state.size > 6
    assert references[0].clock.samples_seen["rehearsed"] > 30
    kept, ids = stored_rows(rows[0]), stored_rows(references[0])
    assert "inputs" not in ids
    assert torch.equal(ids["sample_ids"], kept["sample_ids"])
    data = make()
    data.prepare_data()
    data.setup("fit")
    assert torch.equal(data.read_samples(ids["sample_ids"], ids["epochs"]), kept["inputs"])
    assert buffer_of(references[0]).store.num_bytes == 12 * 4 * 8


def test_references_by_reader_processes_and_without_augmentation(tmp_path: Path, pictures: Path) -> None:
    rows = fit(tmp_path, files(pictures), execution="blocking")
    data = files(pictures)
    data.num_workers = 2
    assert_same_fit(fit(tmp_path, data, execution="blocking", row_format="index"), rows)
    calm = fit(tmp_path, files(pictures, augment=False))
    assert_same_fit(fit(tmp_path, files(pictures, augment=False), row_format="index"), calm)
    assert not torch.equal(calm[1], rows[1])


def test_references_resume_as_rows_do(tmp_path: Path, pictures: Path) -> None:
    def run(folder: str, row_format: str, ckpt: Path | None = None):
        saving = ModelCheckpoint(tmp_path / folder, "{step}", save_top_k=-1, every_n_train_steps=1)
        config = {"row_format": row_format, "execution": "blocking", "policy": "class_balanced"}
        return fit(tmp_path, files(pictures), callbacks=[saving], ckpt=ckpt and str(ckpt), **config)

    rows, references = run("rows", "inputs"), run("whole", "index")
    assert_same_fit(references, rows)
    # Within a task, and at a task's end.
    for step in (7, 12):
        again = run(f"again{step}", "index", tmp_path / "whole" / f"step={step}.ckpt")
        assert torch.equal(weights(again[0]), weights(references[0])), step
        assert torch.equal(again[1], references[1][step:])
    with pytest.raises(ConfigurationError, match=r"rehearsal\.row_format=index: the checkpoint's run had inputs"):
        run("other", "index", tmp_path / "rows" / "step=7.ckpt")


def test_a_store_for_imagenet_shrinks_to_ids(tmp_path: Path) -> None:
    stored, pixels = 384_000, 3 * 224 * 224  # 30 % of it
    agent, _ = fit(tmp_path, images(), buffer_size=stored, row_format="index", trainer={"fast_dev_run": 1})
    assert buffer_of(agent).store.capacity == stored
    assert buffer_of(agent).num_bytes < 100 * stored < pixels * stored / 1000


def test_references_need_a_data_set_at_hand() -> None:
    config = RehearsalConfig(buffer_size=4, policy="reservoir", weighting="none", row_format="index")
    with pytest.raises(ConfigurationError, match=r"row_format=index needs an agent of ours.*row_format='inputs'"):
        resolve(config).check_without_agent(has_labels=True)


def test_transformed_samples_come_back_as_the_network_got_them(tmp_path: Path) -> None:
    given: dict[int, list[torch.Tensor]] = {}
    seen: list[tuple[int, torch.Tensor]] = []

    def look(module, batch, loss) -> None:
        for place, (sample, pixels) in enumerate(zip(batch.sample_ids.tolist(), batch.inputs, strict=True)):
            if place < batch.num_new:
                given.setdefault(sample, []).append(pixels.clone())
            else:
                seen.append((sample, pixels.clone()))

    config = {"row_format": "augmented", "policy": "reservoir"}
    inline = fit(tmp_path, images(), look, **config)
    assert len(seen) > 30
    assert all(any(torch.equal(pixels, one) for one in given[sample]) for sample, pixels in seen)
    assert stored_rows(inline[0])["inputs"].dtype == torch.float32
    for options in ({"execution": "blocking"}, {"execution": "blocking", "prefetch": "device"}):
        assert_same_fit(fit(tmp_path, images(), **config, **options), inline)
    # Rows that are augmented anew are others.
    assert not torch.equal(fit(tmp_path, images(), policy="reservoir")[1], inline[1])
    # Where nothing is augmented, when the rows are stored makes no difference.
    calm = [fit(tmp_path, make_data(), row_format=row_format) for row_format in ("inputs", "augmented")]
    assert_same_fit(*calm)


def test_transformed_samples_resume(tmp_path: Path) -> None:
    def run(folder: str, ckpt: Path | None = None):
        saving = ModelCheckpoint(tmp_path / folder, "{step}", save_top_k=-1, every_n_train_steps=1)
        return fit(
            tmp_path,
            images(),
            callbacks=[saving],
            ckpt=ckpt and str(ckpt),
            row_format="augmented",
            execution="blocking",
        )

    whole = run("whole")
    again = run("again", tmp_path / "whole" / "step=8.ckpt")
    assert torch.equal(weights(again[0]), weights(whole[0]))
    assert torch.equal(again[1], whole[1][8:])


def test_at_a_tasks_end_nothing_is_augmented() -> None:
    with pytest.raises(ConfigurationError, match="row_format=augmented does not go with update=task_end"):
        RehearsalConfig(row_format="augmented", update="task_end")
