"""Records of what was done are the same after they were written and read."""

import json

import pytest

from qmoe.layer.records import ExpertsRecord, LayerRecord, MatrixRecord

MATRIX = MatrixRecord([0.5, 0.0], {1: 0.1}, [0], {1: 3}, "float16")
EXPERTS = ExpertsRecord([4, 0], [1.5, 0.0], [1], {"down_proj": MATRIX}, {"solved": 0.75})
LAYER = LayerRecord(
    "layers.0",
    0.25,
    {"layers.0.experts": EXPERTS},
    {"layers.0.q_proj": MatrixRecord([0.125])},
    {"layers.0.router": "router"},
    ["layers.0.norm"],
    {"solved": 0.3, "tuned": 0.25},
    True,
    "gptq",
)


@pytest.mark.parametrize("record", [LAYER, LayerRecord("layers.1")], ids=["all", "nothing"])
def test_a_record_comes_back_from_json(record):
    back = LayerRecord.from_json(json.loads(json.dumps(record.to_json())))
    assert back.to_json() == record.to_json()
    assert back.experts == {} or back.experts["layers.0.experts"].tokens == [4, 0]


def test_what_is_empty_is_left_out_and_a_zero_is_not():
    assert MatrixRecord([0.0]).to_json(linear=True) == {"error": 0.0}
    assert MatrixRecord().to_json(linear=False) == {}
    assert ExpertsRecord().to_json() == {}
    assert ExpertsRecord([0, 0], borrowed=[]).to_json() == {"tokens": [0, 0], "borrowed": []}
    assert MATRIX.to_json(linear=False) == {
        "error": [0.5, 0.0],
        "damped": {"1": 0.1},
        "rounded": [0],
        "bounded": {"dtype": "float16", "rows": {"1": 3}},
    }
