"""Which folders qmoe takes in vLLM. Configurations are those that the writer writes."""

import pytest

from qmoe.config import CHANNEL, Scheme
from qmoe.errors import UnsupportedModelError
from qmoe.format.compressed_tensors import quantization_config
from qmoe.vllm_plugin.choose import takes

UNIFORM = quantization_config(Scheme(4, 128), Scheme(8, CHANNEL), None, [])
OTHERS = {
    "zero points": quantization_config(Scheme(4, 128, False), Scheme(8, CHANNEL), None, []),
    "3 bits": quantization_config(Scheme(3, 128), Scheme(8, CHANNEL), None, []),
    "rotation": quantization_config(
        Scheme(4, 128, rotation=64), Scheme(8, CHANNEL, rotation=64), None, []
    ),
    "a module of its own": quantization_config(
        Scheme(4, 128), Scheme(8, CHANNEL), None, [], {"model.layers.0.q_proj": Scheme(4, CHANNEL)}
    ),
}


def test_on_a_gpu_what_marlin_runs_is_left_to_vllm():
    assert takes(UNIFORM, None, gpu=False)
    assert not takes(UNIFORM, None, gpu=True)
    assert takes(UNIFORM, "qmoe", gpu=True)


@pytest.mark.parametrize("kind", OTHERS)
def test_what_marlin_does_not_run_is_qmoes(kind):
    assert takes(OTHERS[kind], None, gpu=True)
    assert not takes(OTHERS[kind], "compressed-tensors", gpu=True)


def test_folders_of_other_programs_are_left_alone():
    other = {name: value for name, value in UNIFORM.items() if name != "producer"}
    for entry in (other, other | {"producer": {"name": "modelopt"}}, {"quant_method": "awq"}):
        assert not takes(entry, None, gpu=False)
        assert not takes(entry, "qmoe", gpu=False)


def test_exl3_is_refused_with_the_remedy():
    with pytest.raises(UnsupportedModelError, match="without --format exl3"):
        takes({"quant_method": "exl3"}, None, gpu=True)


def test_the_producer_has_a_name_as_vllm_reads_it():
    """vLLM 0.32 asks `producer` of every folder for "name", and stops at a string."""
    assert UNIFORM["producer"].get("name") == "qmoe"
    assert takes(UNIFORM | {"producer": "qmoe"}, None, gpu=False)  # folders of early versions
