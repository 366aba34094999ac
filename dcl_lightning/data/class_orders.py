"""The two published orders of CIFAR-100's classes; reports name the one that was used."""

from __future__ import annotations

import numpy as np

from dcl_lightning.errors import ConfigurationError

__all__ = ["named_class_order"]

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
        order = np.arange(100)
        np.random.RandomState(1993).shuffle(order)
        return [int(label) for label in order]
    raise ConfigurationError(
        f"data.class_order={name!r}: give a list of labels, or one of the published orders icarl_1993, icarl_list"
    )
