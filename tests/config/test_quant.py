import pytest

from qmoe import CalibrationConfig, QuantConfig, Scheme
from qmoe.errors import ConfigError


def test_round_trip_through_dict():
    config = QuantConfig("awq", Scheme(3, 64, False), None, Scheme(8, -1), damp=0.1)
    assert QuantConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Scheme(bits=5), r"bits: expected one of \(2, 3, 4, 8\), got 5"),
        (lambda: Scheme(group_size=100), r"group size: expected one of .*, got 100"),
        (lambda: QuantConfig(damp=0.0), "damp: expected a share between 0 and 1, got 0.0"),
        (lambda: QuantConfig(min_tokens=-1), "min_tokens: expected 0 or more, got -1"),
        (lambda: CalibrationConfig(samples=0), "calibration samples: expected at least 1, got 0"),
        (
            lambda: QuantConfig.from_dict({"bit": 4}),
            "unknown key 'bit'; the nearest is 'experts.bits'",
        ),
        (
            lambda: QuantConfig.from_dict({"experts": {"bitz": 4}}),
            "unknown key 'experts.bitz'; the nearest is 'experts.bits'",
        ),
    ],
)
def test_a_setting_that_cannot_work_is_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    "scheme, bits",
    [
        (Scheme(4, 128, True), 4 + 16 / 128),
        (Scheme(4, 128, False), 4 + 20 / 128),
        (Scheme(2, 32, False), 2 + 18 / 32),
        (Scheme(8, -1, True), 8 + 16 / 256),
    ],
)
def test_bits_per_weight_counts_scales_and_zero_points(scheme, bits):
    assert scheme.bits_per_weight(256) == bits


def test_an_unknown_method_is_named(forks):
    # In a process of its own: under the tests' type checker the annotation would refuse it first.
    code = "import qmoe; qmoe.QuantConfig('magic')"
    status, _, err = forks.run(code)
    assert status == 1
    assert "method: expected one of ('rtn', 'gptq', 'awq', 'awq-gptq'), got" in err
