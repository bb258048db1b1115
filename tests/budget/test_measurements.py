"""What measurements say a choice costs, and what is not taken for measurements."""

import json

import numpy as np
import pytest

from qmoe.budget.measurements import FILE, Measured, Measurements
from qmoe.config import BITS
from qmoe.errors import CheckpointError, ConfigError

ERRORS = [[0.16, 0.04, 0.01, 0.0001], [0.32, 0.08, 0.02, 0.0002], [0.16, 0.04, 0.01, 0.0001]]


def measurements(tokens=(1000, 1000, 1000), energy=(1.0, 1.0, 1.0)):
    stack = Measured(
        "l.experts.down_proj", "l", "l.experts.down_proj", [*tokens], ERRORS, [*energy]
    )
    linear = Measured("l.q_proj", "l", "l.q_proj", [3000], [[0.4, 0.1, 0.02, 0.001]], [1.0])
    return Measurements({"model": "a"}, [stack, linear], {stack.group: 0.8, linear.group: 0.3})


def test_a_group_at_the_probes_bits_costs_what_was_measured():
    costs = measurements().costs()
    probe = BITS.index(3)
    assert costs["l.experts.down_proj"][:, probe].sum() == pytest.approx(0.8)
    assert costs["l.q_proj"][0] == pytest.approx([1.2, 0.3, 0.06, 0.003])


def test_the_error_and_the_output_of_an_expert_are_its_share():
    alike = measurements().costs()["l.experts.down_proj"]
    assert alike[:, 0] == pytest.approx(np.array([0.16, 0.32, 0.16]) * 0.8 / 0.16)
    loud = measurements(energy=(3.0, 1.0, 1.0)).costs()["l.experts.down_proj"]
    assert loud[0, 0] / loud[2, 0] == pytest.approx(3)


def test_an_expert_that_saw_little_is_counted_by_an_upper_bound():
    """20 tokens may be 30 another time, and other text may bring more; 0 are not nothing."""
    part = measurements(tokens=(20, 0, 10_000)).parts[0]
    mean = (20 + 10_000) / 3
    rare, unseen, busy = part.weights(mean)
    assert rare == pytest.approx(20 + 2 * 21**0.5 + mean / 16)
    assert unseen == pytest.approx(2 + mean / 16)
    assert 1.0 < busy / 10_000 < 1.05


def test_experts_that_are_modules_are_compared_by_their_tokens():
    seen = {"a": 900, "b": 0}
    parts = [Measured(n, "l", "l.experts", [t], ERRORS[:1], [1.0]) for n, t in seen.items()]
    costs = Measurements({}, parts, {"l.experts": 1.0}).costs()
    assert costs["a"][0, 1] + costs["b"][0, 1] == pytest.approx(1.0)
    bound = [900 + 2 * 901**0.5 + 450 / 16, 2 + 450 / 16]
    assert costs["a"][0, 0] / costs["b"][0, 0] == pytest.approx(bound[0] / bound[1])


def test_a_group_without_any_error_costs_nothing():
    part = Measured("q", "l", "q", [5], [[0.0] * 4], [1.0])
    assert not Measurements({}, [part], {"q": 0.1}).costs()["q"].any()


def test_what_is_read_is_what_was_written(tmp_path):
    made = measurements()
    (tmp_path / FILE).write_text(json.dumps(made.to_json()))
    assert Measurements.read(tmp_path) == made
    made.check({"model": "a"}, tmp_path)
    with pytest.raises(ConfigError, match="another run .model was a, is b.*--measurements"):
        made.check({"model": "b"}, tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda told: told.pop("kl"),
        lambda told: told["parts"][0].pop("tokens"),
        lambda told: told["parts"][0]["errors"].pop(),
        lambda told: told["parts"][0]["errors"].__setitem__(0, [1, 2]),
        lambda told: told["kl"].clear(),
        lambda told: told["kl"].update({"l.q_proj": "much"}),
        lambda told: told.update(parts=3),
    ],
)
def test_damaged_measurements_are_refused(tmp_path, damage):
    told = measurements().to_json()
    damage(told)
    (tmp_path / FILE).write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match="damaged .*measures again"):
        Measurements.read(tmp_path)
