"""Orders of classes by name and by seed, among them the two published ones of CIFAR-100."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dcl_lightning.data.seeds import SEEDS
from dcl_lightning.errors import ConfigurationError, suggestion, whole_number

__all__ = ["named_class_order", "shuffled_classes"]

# Printed in the benchmarks that follow iCaRL's own released code.
_ICARL_LIST = (
    "87 0 52 58 44 91 68 97 51 15 94 92 10 72 49 78 61 14 8 86 84 96 18 24 32 45 88 11 4 67 69 66 77 47 79 93 29 50 57 "
    "83 17 81 41 12 37 59 25 20 80 73 1 28 6 46 62 82 53 9 31 75 38 63 33 74 27 22 36 3 16 21 60 19 70 90 89 43 5 42 "
    "65 76 40 30 23 85 2 95 56 48 71 64 98 13 99 7 34 55 54 26 35 39"
)


def named_class_order(name: str) -> list[int]:
    """Return a published order of 100 classes: ``icarl_1993`` or ``icarl_list``."""
    if name == "icarl_list":
        return [int(word) for word in _ICARL_LIST.split()]
    if name == "icarl_1993":
        return list(shuffled_classes(range(100), 1993))
    raise ConfigurationError(
        f"data.class_order={name!r}: give a list of labels, a seed, random, or one of the published orders of "
        f"CIFAR-100, icarl_1993, icarl_list{suggestion(name, ('random', 'icarl_1993', 'icarl_list'))}"
    )


def shuffled_classes(labels: Sequence[Any], seed: int) -> list[Any]:
    """Return labels in the order of NumPy's legacy shuffle, by which published orders are made.

    Args:
        labels: in ascending order.
        seed: from 0 to below 2**32.

    Raises:
        ConfigurationError: a seed out of range.
    """
    places = np.arange(len(labels))
    np.random.RandomState(whole_number("data.class_order", seed, 0, SEEDS)).shuffle(places)
    return [labels[place] for place in places.tolist()]
