"""Every MoE family of the installed transformers: quantized, saved, reloaded, compared."""

from importlib.util import find_spec

import pytest
from transformers.utils import logging

from qmoe.errors import UnsupportedModelError
from qmoe.families import check, families, layout

# Why the others are refused; anything not here must pass.
REFUSED = {
    "dbrx": "found no routed experts",
    "diffusion_gemma": "tied to another part",
    "doge": "found no routed experts",
    "ernie4_5_vl_moe": "together with those of another module",
    "inkling_mm_model": "scipy",
    "jetmoe": "found no routed experts",
}
FAMILIES = {family.model_type: family for family in families()}


@pytest.fixture(autouse=True)
def quiet():
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)


def test_there_are_as_many_as_there_were():
    assert len(FAMILIES) == 80 and REFUSED.keys() < FAMILIES.keys()


@pytest.mark.filterwarnings("ignore")  # of families' own code
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - REFUSED.keys()))
def test_family(name, tmp_path):
    report = check(FAMILIES[name], tmp_path)
    assert report["bytes"]["experts 16-bit"] == 0
    assert not [line for line in report["fallbacks"] if "no usable statistics" in line]


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_is_refused_by_name(name):
    if name == "inkling_mm_model" and find_spec("scipy"):
        pytest.skip("what it lacks is installed here")
    with pytest.raises(UnsupportedModelError, match=REFUSED[name]):
        layout(FAMILIES[name])
