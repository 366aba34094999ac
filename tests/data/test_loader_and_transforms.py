"""Batches: equal for any number of workers, resumable, each sample with its own augmentation."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
import torch
from torchvision.transforms import functional as tv

from dcl_lightning.data import transforms
from dcl_lightning.data.loader import PrefetchLoader, TaskLoader


def loader(indices, size=1, rank=0, batch_size=6, train=True):
    x, y = torch.arange(50.0)[:, None], torch.arange(50)
    return TaskLoader(x, y, y * 0, batch_size, torch.as_tensor(indices), rank, size, train=train, seed=3)


@pytest.mark.parametrize("count", [1, 2, 7, 12, 25])
@pytest.mark.parametrize("size", [2, 3])
def test_workers_together_see_what_one_sees_step_by_step(count: int, size: int) -> None:
    one = list(loader(range(count), batch_size=6 * size))
    many = [list(loader(range(count), size, rank)) for rank in range(size)]
    assert {len(m) for m in many} == {len(one)}
    for step, whole in enumerate(one):
        parts = [m[step] for m in many]
        real = torch.cat([p.sample_ids[p.weights > 0] for p in parts])
        assert sorted(real.tolist()) == sorted(whole.sample_ids.tolist())
        assert all(float(p.normalizer) == pytest.approx(len(whole.sample_ids) / size) for p in parts)


def test_evaluation_shards_are_exact() -> None:
    seen = [b.sample_ids for rank in range(3) for b in loader(range(10), 3, rank, train=False)]
    assert sorted(torch.cat(seen).tolist()) == list(range(10))


def test_place_within_an_epoch_resumes() -> None:
    first = loader(range(20))
    batches = []
    for batch in first:
        batches.append(batch.sample_ids.tolist())
        if len(batches) == 2:
            state = first.state_dict()
    again = loader(range(20))
    again.load_state_dict(state)
    assert [b.sample_ids.tolist() for b in again] == batches[2:]
    again.visit(again.indices, 1)
    again.load_state_dict(state)
    assert len(list(again)) == len(batches)


def test_augmentation_is_torchvisions_crop_and_flip() -> None:
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    ids = torch.arange(64)
    out = transforms.augment(images, ids, seed=1, epoch=2)
    tops, lefts, flips = (transforms.draws(ids, 1, 2, s, high) for s, high in ((0, 9), (1, 9), (2, 2)))
    for i in range(64):
        expected = tv.crop(tv.pad(images[i], 4), int(tops[i]), int(lefts[i]), 8, 8)
        expected = tv.hflip(expected) if flips[i] else expected
        assert torch.equal(out[i], expected)


def test_draws_are_uniform_and_do_not_depend_on_the_batch() -> None:
    ids = torch.arange(90_000)
    offsets = transforms.draws(ids, 0, 0, 0, 9)
    counts = torch.bincount(offsets, minlength=9).double()
    assert float(((counts - 10_000) ** 2 / 10_000).sum()) < 26.1  # chi-square, 8 degrees of freedom, p = 0.001
    assert torch.equal(transforms.draws(ids[500:510], 0, 0, 0, 9), offsets[500:510])
    assert not torch.equal(transforms.draws(ids, 0, 1, 0, 9), offsets)


def test_every_crop_and_mirroring_comes_equally_often() -> None:
    # Every pixel of an image has its own value, so that the result tells what was cut out, and how.
    size, pad, count = 6, 2, 50 * 400
    image = torch.arange(1, size * size + 1, dtype=torch.uint8).view(1, 1, size, size)
    outcomes = {}
    padded = tv.pad(image[0], pad)
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            crop = tv.crop(padded, top, left, size, size)
            outcomes[bytes(crop.numpy())] = top, left, 0
            outcomes[bytes(tv.hflip(crop).numpy())] = top, left, 1
    assert len(outcomes) == 50
    for epoch in (0, 3):
        out = transforms.augment(image.expand(count, 1, size, size), torch.arange(count), seed=5, epoch=epoch, pad=pad)
        found = Counter(outcomes[bytes(one.numpy())] for one in out)
        assert len(found) == 50
        assert sum((n - 400) ** 2 / 400 for n in found.values()) < 85.4  # chi-square, 49 degrees, p = 0.001


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (1, 1, 28, 28), (5, 3, 9, 14)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_augmentation_of_other_shapes_is_torchvisions_too(shape, dtype) -> None:
    images = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    ids = torch.arange(shape[0]) + 7
    for pad in (0, 4):
        out = transforms.augment(images, ids, 1, 2, pad)
        assert (out.shape, out.dtype) == (images.shape, dtype)
        tops, lefts, flips = (
            transforms.draws(ids, 1, 2, s, high) for s, high in ((0, 2 * pad + 1), (1, 2 * pad + 1), (2, 2))
        )
        for i in range(shape[0]):
            expected = tv.crop(tv.pad(images[i], pad), int(tops[i]), int(lefts[i]), *shape[2:])
            assert torch.equal(out[i], tv.hflip(expected) if flips[i] else expected)


@pytest.mark.parametrize("fill", [(0.0,), (0.2, 0.0, 0.9)])
def test_augmentation_does_not_depend_on_the_order_in_memory(fill: tuple[float, ...]) -> None:
    images, ids = torch.randint(0, 256, (5, 3, 6, 7), dtype=torch.uint8), torch.arange(5)
    found = transforms.augment(images.to(memory_format=torch.channels_last), ids, 0, 1, pad=2, fill=fill)
    assert torch.equal(found, transforms.augment(images, ids, 0, 1, pad=2, fill=fill))


def test_normalisation_is_torchvisions_and_leaves_its_input_alone() -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    pixels = torch.randint(0, 256, (4, 3, 5, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = torch.stack([tv.normalize(tv.to_tensor(one.permute(1, 2, 0).numpy()), mean, std) for one in pixels])
    assert torch.equal(transforms.normalise(pixels, mean, std), expected)
    floats = transforms.to_float(pixels)
    before = floats.clone()
    assert torch.equal(transforms.normalise(floats, mean, std), expected)
    assert torch.equal(floats, before)


def test_a_loader_ahead_gives_the_same_batches_and_its_place_is_that_of_the_last_one_given() -> None:
    plain = [b.sample_ids.tolist() for b in loader(range(20))]
    ahead = PrefetchLoader(loader(range(20)))
    states = []
    assert [(b.sample_ids.tolist(), states.append(ahead.state_dict()))[0] for b in ahead] == plain
    again = PrefetchLoader(loader(range(20)))
    again.load_state_dict(states[1])
    assert [b.sample_ids.tolist() for b in again] == plain[2:]
    before = threading.active_count()
    next(iter(PrefetchLoader(loader(range(20)))))
    assert threading.active_count() <= before + 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types_of_a_batch_do_not_depend_on_the_default_one(dtype: torch.dtype) -> None:
    """Under ``bf16-true`` a step sets that for all threads, also for the one that prepares the next batch meanwhile."""
    x, y = torch.arange(5.0)[:, None], torch.arange(5)
    loader = TaskLoader(x, y, y * 0, 2, torch.arange(3), train=True)
    loader.visit(torch.arange(3), 0, torch.tensor([3, 4]), 1)
    torch.set_default_dtype(dtype)
    try:
        batches = list(loader)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {(batch.weights.dtype, batch.normalizer.dtype) for batch in batches} == {(torch.float32, torch.float32)}
