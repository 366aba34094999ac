"""Every figure of a stream by plain loops over counts, from its paper, as the reference."""

from __future__ import annotations

import numpy as np

NAN = float("nan")


def mean(values):
    values = [v for v in values if not np.isnan(v)]
    return float(np.mean(values)) if values else NAN


def figures(correct, total, baseline=None, skip_first=False):
    """All figures of counts ``(T, T)``, of the rows up to the last that was evaluated."""
    size = max((i + 1 for i in range(len(total)) if total[i].sum()), default=1)
    R = np.full((size, size), NAN)
    for i in range(size):
        for j in range(size):
            if total[i][j]:
                R[i, j] = correct[i][j] / total[i][j]
    a = []
    for i in range(size):
        right, samples = sum(correct[i][: i + 1]), sum(total[i][: i + 1])
        a.append(right / samples if samples else NAN)
    last = size - 1
    best, best_with_last = [], []
    for j in range(last):
        before = [R[step, j] for step in range(j, last) if not np.isnan(R[step, j])]
        after = [R[last, j]] if not np.isnan(R[last, j]) else []
        best.append(max(before) if before else NAN)
        best_with_last.append(max(before + after) if before + after else NAN)
    one = size == 1
    return {
        "average": mean(R[last]),
        "incremental": NAN if one else mean(a[int(skip_first) :]),
        "forgetting": NAN if one else mean(b - R[last, j] for j, b in enumerate(best)),
        "with_last": NAN if one else mean(b - R[last, j] for j, b in enumerate(best_with_last)),
        "first_last": NAN if one else mean(R[j, j] - R[last, j] for j in range(last)),
        "backward": NAN if one else mean(R[last, j] - R[j, j] for j in range(last)),
        "ahead": NAN if one or baseline is None else mean(R[j - 1, j] - baseline[j] for j in range(1, size)),
        "learning": NAN if one else mean(R[j, j] for j in range(size)),
    }


def classes(row, predicted, target, num_tasks, num_classes):
    """Accuracy of each class after each task ``(T, K)``."""
    result = np.full((num_tasks, num_classes), NAN)
    for i in range(num_tasks):
        for y in range(num_classes):
            here = (row == i) & (target == y)
            if here.any():
                result[i, y] = np.mean(predicted[here] == y)
    return result
