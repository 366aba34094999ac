"""What an agent says of the streams that it can learn from."""

import sys
import warnings
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "conformance"))
from streams import make_agent, make_data, make_trainer

from dcl_lightning import FineTuning
from dcl_lightning.errors import ConfigurationError


class ClassesOnly(FineTuning):
    scenarios = ("class",)


def test_a_scenario_that_a_method_cannot_learn_from_is_refused_before_training(tmp_path):
    from dcl_lightning.backbones import MLP

    data = make_data(scenario="domain", num_tasks=2)
    agent = ClassesOnly(MLP([4]), data.num_classes, data.input_spec)
    with pytest.raises(ConfigurationError, match=r"data\.scenario=domain: agent ClassesOnly .* class only"):
        make_trainer(tmp_path).fit(agent, datamodule=data)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "told"), [("icarl", True), ("base", False)])
def test_a_memory_beside_all_data_is_told_to_be_pointless(kind, told, tmp_path):
    data = make_data(concatenate_tasksets=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path, fast_dev_run=1).fit(make_agent(kind, data), datamodule=data)
    assert any("concatenate_tasksets" in str(w.message) for w in caught) == told
