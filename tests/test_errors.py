"""Words outside the allowed ones are refused in Python as on the command line."""

from __future__ import annotations

from typing import Any

import pytest

from dcl_lightning import FineTuning, ICaRL, RehearsalConfig
from dcl_lightning.agents.short_names import icarl_v1, nil
from dcl_lightning.backbones import MLP
from dcl_lightning.errors import ConfigurationError


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"loss": "summ"}, r"rehearsal\.loss='summ': give mean, sum; did you mean 'sum'\?"),
        ({"scope": "Global"}, r"rehearsal\.scope='Global': give local, global; did you mean 'global'\?"),
        ({"policy": "lifo"}, r"rehearsal\.policy='lifo': give nil, .*; did you mean 'fifo'\?"),
        ({"update": "task-end"}, r"rehearsal\.update='task-end': give step, task_end"),
    ],
)
def test_words_of_a_memory(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        RehearsalConfig(**words)
    with pytest.raises(ConfigurationError, match=message):
        nil(MLP([4]), 4, input_spec=(1, 2, 2), rehearsal=words)


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        (FineTuning, {"train_classes": "new"}, r"model\.train_classes='new': give all, seen"),
        (FineTuning, {"scale_lr": "squared"}, r"model\.scale_lr='squared': give none, "),
        (ICaRL, {"execution": "nonblocking"}, r"model\.execution='nonblocking': give inline, blocking"),
        (ICaRL, {"exemplars": "per-step"}, r"model\.exemplars='per-step': give union, per_step"),
        (icarl_v1, {"bce_reduction": "max"}, r"model\.bce_reduction='max': give mean, sum"),
    ],
)
def test_words_of_an_agent(kind: Any, words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        kind(MLP([4]), 4, input_spec=(1, 2, 2), **words)
