"""transformers without qmoe beside qmoe: equal logits, or a rule that says why not."""

import pytest
import torch

from qmoe.errors import AuditError
from qmoe.measure.families import families
from qmoe.measure.plain_transformers import EQUAL, beside_plain, plain_client

FAMILIES = {family.model_type: family for family in families()}
pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_family_that_it_loads_and_two_that_it_does_not(tmp_path):
    found = {}
    with plain_client() as client:
        for name in ("mixtral", "gpt_oss", "longcat_flash"):
            found[name] = beside_plain(FAMILIES[name], tmp_path / name, client)
    assert found == {
        "mixtral": EQUAL,
        "gpt_oss": "refused by `qmoe check`: family",
        "longcat_flash": "refused by `qmoe check`: experts without weights",
    }


@pytest.mark.parametrize("said", ["RuntimeError: no", ""])
def test_what_no_rule_explains_is_an_error(said, tmp_path):
    def client(folder, kind):
        assert kind == "MixtralForCausalLM"
        torch.save(torch.ones(2, 32, 512), folder / "logits.pt")
        return said

    wrong = said or "logits are off by"
    with pytest.raises(AuditError, match=f"{wrong}.*finds no rule that is broken"):
        beside_plain(FAMILIES["mixtral"], tmp_path, client)
