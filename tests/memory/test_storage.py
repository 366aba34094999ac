"""Stored rows: in memory and in files, of every type."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch

from dcl_lightning.errors import ConfigurationError, DataError
from dcl_lightning.memory import storage
from dcl_lightning.memory.pytree import concat, flatten, map_tensors, num_rows, rebuild
from dcl_lightning.memory.storage import RowStore, refuse_lack_of_space


class Pair(NamedTuple):
    inputs: torch.Tensor
    targets: torch.Tensor


def rows(n: int, shift: int = 0) -> dict:
    return {"image": (torch.arange(n * 12).view(n, 3, 2, 2) + shift).to(torch.uint8), "y": torch.arange(n) + shift}


def test_nest_keeps_structure_and_names():
    nest = {"a": torch.zeros(2, 3), "b": [torch.ones(2), Pair(torch.zeros(2, 1), torch.ones(2))]}
    assert [name for name, _ in flatten(nest)] == ["a", "b.0", "b.1.inputs", "b.1.targets"]
    assert num_rows(nest) == 2
    doubled = map_tensors(lambda t: t * 2, nest)
    assert isinstance(doubled["b"][1], Pair)
    assert doubled["b"][0].tolist() == [2, 2]
    assert num_rows(concat(nest, doubled)) == 4
    assert [name for name, _ in flatten(torch.zeros(1), "x")] == ["x"]


def test_nest_says_what_is_wrong():
    with pytest.raises(TypeError, match=r"'b\.0' is a str"):
        flatten({"a": torch.zeros(1), "b": ["word"]})
    with pytest.raises(ValueError, match="first dimensions differ"):
        num_rows((torch.zeros(1), torch.zeros(2)))
    with pytest.raises(ValueError, match="no dimension"):
        num_rows((torch.tensor(1.0),))
    with pytest.raises(ValueError, match="no tensor"):
        num_rows(())
    with pytest.raises(ValueError, match="nests differ"):
        concat({"a": torch.zeros(1)}, {"b": torch.zeros(1)})
    with pytest.raises(ValueError, match="nest of 2"):
        rebuild((torch.zeros(1), torch.zeros(1)), [torch.zeros(1)])


@pytest.mark.parametrize("place", ["cpu", "folder"])
def test_reads_what_it_wrote(place, tmp_path):
    store = RowStore(rows(1), 10, tmp_path / "memory" if place == "folder" else "cpu")
    store.insert(torch.tensor([7, 2, 9]), rows(3, 5))
    got = store.gather(torch.tensor([9, 7, 9]))
    wanted = map_tensors(lambda t: t[[2, 0, 2]], rows(3, 5))
    assert all(torch.equal(got[k], wanted[k]) for k in wanted)
    store.insert(torch.empty(0, dtype=torch.int64), rows(0))
    assert num_rows(store.gather(torch.empty(0, dtype=torch.int64))) == 0
    assert store.num_bytes == 10 * (12 + 8)
    if place == "folder":
        assert not list((tmp_path / "memory").iterdir())  # its file has no name


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool],
)
@pytest.mark.parametrize("shape", [(), (3,), (4,), (3, 4, 2), (0,)])
def test_every_dtype_and_row_size(dtype, shape):
    store = RowStore((torch.empty(0, *shape, dtype=dtype, device="meta"),), 6)
    values = torch.randint(0, 2, (5, *shape)).to(dtype)
    store.insert(torch.tensor([5, 0, 3]), (values[1:4],))
    assert torch.equal(store.gather(torch.tensor([3, 5]))[0], values[[3, 1]])
    strided = torch.randint(0, 2, (*shape, 5)).to(dtype).movedim(-1, 0)
    store.insert(torch.tensor([1, 2]), (strided[[4, 0]],))
    assert torch.equal(store.gather(torch.tensor([2]))[0], strided[[0]])


def test_refuses_other_rows():
    store = RowStore(rows(1), 4)
    with pytest.raises(ValueError, match="have the columns"):
        store.insert(torch.tensor([0]), {"y": torch.zeros(1)})
    with pytest.raises(ValueError, match="column 'y' has rows"):
        store.insert(torch.tensor([0]), {**rows(1), "y": torch.zeros(1)})


def test_refuses_what_does_not_fit(monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "available_bytes", lambda device: 100)
    with pytest.raises(ConfigurationError, match=r"needs 120 bytes on cpu, where 100"):
        RowStore(rows(1), 6)
    with pytest.raises(ConfigurationError, match="120 bytes"):
        RowStore(rows(1), 6, tmp_path)
    RowStore(rows(1), 5)
    with pytest.raises(ConfigurationError, match="at least 1"):
        RowStore(rows(1), 0)


def test_asks_the_system(tmp_path):
    assert storage.available_bytes(tmp_path) > 0
    with pytest.raises(ConfigurationError, match="available"):
        RowStore(rows(1), 2**50)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "complex32", "bfloat16"])
@pytest.mark.parametrize("shape", [(6,), (6, 3)])
def test_types_that_numpy_does_not_know_keep_their_bits(name: str, shape: tuple[int, ...], tmp_path) -> None:
    dtype = getattr(torch, name)
    bits = torch.arange(1, 1 + torch.Size(shape).numel() * dtype.itemsize, dtype=torch.uint8)
    values = bits.view(dtype).view(shape)
    for device in ("cpu", tmp_path):
        store = RowStore({"a": values[:0]}, 10, device)
        store.insert(torch.tensor([7, 2, 9]), {"a": values}, torch.tensor([5, 0, 3]))
        found = store.gather(torch.tensor([2, 7, 9]))["a"]
        assert found.dtype == dtype
        assert torch.equal(found.view(torch.uint8), values[torch.tensor([0, 5, 3])].view(torch.uint8))


def test_conjugate_and_negative_views_are_stored_as_they_are_seen() -> None:
    numbers = torch.randn(6, 2, dtype=torch.complex64)
    rows = {"conjugate": numbers.conj(), "negative": numbers.conj().imag}
    store = RowStore(rows, 6)
    store.insert(torch.arange(6), rows)
    found = store.gather(torch.arange(6))
    assert torch.equal(found["conjugate"], torch.complex(numbers.real, -numbers.imag))
    assert torch.equal(found["negative"], -numbers.imag)


def test_a_sparse_column_is_refused_by_name() -> None:
    for column in (torch.eye(4).to_sparse(), torch.eye(4).to_sparse_csr()):
        with pytest.raises(DataError, match=r"column 'words' is a torch\.sparse.*to_dense"):
            RowStore({"words": column}, 4)
    store = RowStore({"words": torch.eye(4)}, 4)
    with pytest.raises(DataError, match=r"column 'words' is a torch\.sparse"):
        store.insert(torch.arange(4), {"words": torch.eye(4).to_sparse()})


def test_stores_in_one_folder_share_nothing_and_leave_nothing(tmp_path) -> None:
    first, second = (RowStore({"a": torch.zeros(0, 3)}, 4, tmp_path / "rows") for _ in range(2))
    first.insert(torch.arange(4), {"a": torch.ones(4, 3)})
    assert not second.gather(torch.arange(4))["a"].any()
    again = copy.deepcopy(first)
    again.insert(torch.tensor([0]), {"a": torch.full((1, 3), 7.0)})
    assert first.gather(torch.arange(4))["a"].tolist() == [[1.0] * 3] * 4
    assert again.gather(torch.arange(4))["a"].tolist() == [[7.0] * 3] + [[1.0] * 3] * 3
    # Whatever becomes of the process, there is no file to be found by another.
    assert not list((tmp_path / "rows").iterdir())


def test_the_stores_of_a_host_have_to_fit_together(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(storage, "available_bytes", lambda device: 100)
    for place in ("cpu", tmp_path):
        assert refuse_lack_of_space(torch.zeros(1, dtype=torch.uint8), 40, place, workers=2) == 40
        with pytest.raises(ConfigurationError, match="each of 3 workers"):
            refuse_lack_of_space(torch.zeros(1, dtype=torch.uint8), 40, place, workers=3)
