"""Learning-rate factors against numbers worked by hand."""

import pytest

from dcl_lightning.functional import lr_factor, lr_scale, warmup_divisor


@pytest.mark.parametrize(
    ("rule", "one", "four", "many"),
    [("none", 1, 1, 1), ("linear", 1, 4, 100), ("sqrt", 1, 2, 10), ("capped", 1, 4, 64)],
)
def test_scale(rule, one, four, many):
    assert [lr_scale(rule, n) for n in (1, 4, 100)] == [one, four, many]


@pytest.mark.parametrize(("rule", "start"), [("none", 0.01), ("linear", 1.0), ("sqrt", 1.0), ("capped", 1.0)])
def test_warm_up_begins_with_one_workers_rate(rule, start):
    # In units of the given rate; with ``none`` it is already that of 100 workers together.
    first = lr_scale(rule, 100) * lr_factor(0.0, [], 0.1, 5, warmup_divisor(rule, 100))
    assert first == pytest.approx(start)


@pytest.mark.parametrize(
    ("progress", "factor"), [(0.0, 0.25), (0.5, 0.325), (2.5, 0.625), (4.999, 0.99985), (5.0, 1.0), (9.0, 1.0)]
)
def test_warm_up_is_even_in_epochs_and_never_above_its_end(progress, factor):
    # 1/4 + (3/4) progress / 5
    assert lr_factor(progress, [], 0.1, 5, 4) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("progress", "factor"), [(20.9, 1.0), (21.0, 0.5), (25.9, 0.5), (26.0, 0.05), (28.0, 0.01), (99.0, 0.01)]
)
def test_one_factor_for_each_milestone(progress, factor):
    assert lr_factor(progress, [21, 26, 28], [0.5, 0.1, 0.2], 0, 1) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("milestones", "rates"),
    [
        # The original's regimes of ResNets: of CIFAR's and of ImageNet's size.
        ([81, 122, 164], {0: 0.1, 80: 0.1, 81: 0.01, 122: 0.001, 164: 0.0001}),
        ([30, 45, 80], {5: 0.1, 29: 0.1, 30: 0.01, 45: 0.001, 80: 0.0001}),
    ],
)
def test_phases_of_the_original(milestones, rates):
    for epoch, rate in rates.items():
        assert 0.1 * lr_factor(epoch, milestones, 0.1, 0, 1) == pytest.approx(rate)


def test_a_gamma_too_few_is_no_schedule():
    with pytest.raises(ValueError, match="shorter"):
        lr_factor(0, [1, 2], [0.5], 0, 1)
