"""Nests of tensors: tuples, lists, named tuples and dicts whose tensors share their first dimension."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from copy import copy

import torch
from torch import Tensor

from dcl_lightning.errors import DataError
from dcl_lightning.types import PyTree

__all__ = ["concat", "flatten", "map_tensors", "num_rows", "rebuild", "refuse_another_row"]


def _children(nest: PyTree) -> list[tuple[str, PyTree]] | None:
    """Return the named parts of a container, or None for a leaf."""
    if isinstance(nest, MutableMapping):
        return [(str(key), value) for key, value in nest.items()]
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return list(zip(nest._fields, nest, strict=True))
    if isinstance(nest, tuple | list):
        return [(str(index), value) for index, value in enumerate(nest)]
    return None


def flatten(nest: PyTree, name: str = "") -> list[tuple[str, Tensor]]:
    """Return the tensors of a nest with their dotted names, in the order of the nest.

    Args:
        nest: the nest; a single tensor is a nest of one, named ``name``.
        name: prefix of the names.

    Raises:
        TypeError: a leaf is not a tensor; the message names it.
    """
    if isinstance(nest, Tensor):
        return [(name, nest)]
    if type(nest) is dict and not name and all(type(value) is Tensor for value in nest.values()):
        return [(str(key), value) for key, value in nest.items()]
    children = _children(nest)
    if children is None:
        raise TypeError(
            f"rows: leaf '{name}' is a {type(nest).__name__}; only tensors with one row per sample can be stored: "
            "leave it out or make it a tensor"
        )
    prefix = f"{name}." if name else ""
    return [leaf for key, child in children for leaf in flatten(child, prefix + key)]


def rebuild(example: PyTree, tensors: list[Tensor]) -> PyTree:
    """Return a nest like the example with other tensors.

    Args:
        example: gives the structure and the container types.
        tensors: as many as the example has, in the order of :func:`flatten`.

    Raises:
        ValueError: their number differs.
    """
    wanted = len(flatten(example))
    if wanted != len(tensors):
        raise ValueError(f"{len(tensors)} tensors given for a nest of {wanted}")
    return _fill(example, iter(tensors).__next__)


def _fill(example: PyTree, following: Callable[[], Tensor]) -> PyTree:
    if isinstance(example, Tensor):
        return following()
    if type(example) is dict:
        return {key: _fill(value, following) for key, value in example.items()}
    if isinstance(example, MutableMapping):
        mapping = copy(example)
        for key in example:
            mapping[key] = _fill(example[key], following)
        return mapping
    values = [_fill(child, following) for child in example]
    if hasattr(example, "_fields"):
        return type(example)(*values)
    return type(example)(values)


def map_tensors(function: Callable[[Tensor], Tensor], nest: PyTree) -> PyTree:
    """Return the nest with the function applied to each tensor.

    Raises:
        TypeError: a leaf is not a tensor.
    """
    return rebuild(nest, [function(tensor) for _, tensor in flatten(nest)])


def num_rows(nest: PyTree) -> int:
    """Return the first dimension that all tensors share.

    Raises:
        TypeError: a leaf is not a tensor.
        DataError: there is no tensor, one has no dimension, or first dimensions differ.
    """
    leaves = flatten(nest)
    if not leaves:
        raise DataError("rows: the nest holds no tensor")
    sizes = {tensor.shape[:1] for _, tensor in leaves}
    if len(sizes) == 1 and (size := sizes.pop()):
        return size[0]
    scalars = [name for name, tensor in leaves if tensor.ndim == 0]
    if scalars:
        raise DataError(f"rows: leaf '{scalars[0]}' has no dimension; each tensor needs one row per sample")
    raise DataError(f"rows: first dimensions differ: { {name: tensor.shape[0] for name, tensor in leaves} }")


def refuse_another_row(name: str, ours: tuple[torch.Size, torch.dtype], given: tuple[torch.Size, torch.dtype]) -> None:
    """Refuse a row whose shape or dtype differs from that of the rows of its column.

    Args:
        name: of the column.
        ours: shape and dtype of the column's rows.
        given: shape and dtype of the new row.

    Raises:
        DataError: they differ; the message has the remedy.
    """
    if given != ours:
        remedy = "use one dtype for all batches"
        if given[0] != ours[0]:
            remedy = "bring all samples to one shape (pad or crop them in the collate function)"
        raise DataError(
            f"column '{name or 'batch'}' has rows of {list(given[0])} {given[1]}, but earlier rows have "
            f"{list(ours[0])} {ours[1]}: all rows of a memory have one shape and dtype; {remedy}"
        )


def concat(first: PyTree, second: PyTree) -> PyTree:
    """Return the rows of the first nest followed by those of the second.

    Args:
        first: gives the structure.
        second: same names, dtypes, devices and shapes, but for the number of rows.

    Raises:
        TypeError: a leaf is not a tensor.
        DataError: their names, shapes or types differ.
    """
    ours, theirs = flatten(first), flatten(second)
    if [name for name, _ in ours] != [name for name, _ in theirs]:
        raise DataError(f"nests differ: {[name for name, _ in ours]} and {[name for name, _ in theirs]}")
    for (name, a), (_, b) in zip(ours, theirs, strict=True):
        refuse_another_row(name, (b.shape[1:], b.dtype), (a.shape[1:], a.dtype))
    return rebuild(first, [torch.cat((a, b)) for (_, a), (_, b) in zip(ours, theirs, strict=True)])
