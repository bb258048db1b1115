"""Tasks of lm-eval, from files on this machine alone. Without lm-eval only what is said then."""

import json
import sys

import pytest

import qmoe
from qmoe import QuantConfig, Scheme
from qmoe.cli.commands import show_eval
from qmoe.cli.main import main
from qmoe.errors import ConfigError
from qmoe.measure.tasks import Tasks, rows

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: 0
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


@pytest.fixture
def task(tmp_path):
    """The first choice is right, and by far the likelier one for any model of text."""
    pytest.importorskip("lm_eval.tasks", exc_type=ImportError)
    lines = [
        {"question": f"There were {n} of", "choices": [" the", " the the qxz zzqq"]}
        for n in ("two", "three", "four", "five")
    ]
    data = tmp_path / "choices.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    path = tmp_path / "choices.yaml"
    path.write_text(TASK.format(name="choices", data=data))
    return path


@pytest.mark.filterwarnings("ignore")
def test_results_in_the_shape_of_lm_eval(task, demo, tmp_path, capsys):
    folder = tmp_path / "packed"
    qmoe.quantize(demo, folder, QuantConfig("rtn", Scheme(4, 32)), progress=False)
    command = ["eval", str(folder), "--against", str(demo), "--samples", "1", "--seqlen", "32"]
    command += ["--text", "heldout:austen", "--tasks", str(task), "--task-limit", "3", "--json"]
    assert main([*command, "--save"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["tasks"]) == ["original", "qmoe"]
    for found in result["tasks"].values():
        assert found["results"]["choices"]["acc,none"] == 1
        assert found["n-samples"]["choices"] == {"original": 4, "effective": 3}
        assert found["versions"]["choices"] == 1
    kept = json.loads((folder / "qmoe_measured.json").read_text())["eval"]["tasks"]
    assert kept == result["tasks"]
    show_eval(result)
    assert "choices acc" in capsys.readouterr().out


def test_a_row_for_each_metric():
    one = {"results": {"t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.25}}}
    other = {"results": {"t": {"alias": "t", "acc,none": 0.75, "acc_stderr,none": "N/A"}}}
    assert rows({"a": one, "b": other, "c": {"results": {}}}) == [
        ["t acc", "0.5000 +- 0.2500", "0.7500", "-"]
    ]


def test_errors_before_any_model_is_loaded(task, tmp_path):
    with pytest.raises(ConfigError, match="none.yaml: no such file"):
        Tasks([str(tmp_path / "none.yaml")])
    with pytest.raises(ConfigError, match="lm-eval has no task 'helaswag'"):
        Tasks(["helaswag"])
    with pytest.raises(ConfigError, match="task_limit: expected at least 1, got 0"):
        Tasks([str(task)], 0)


def test_without_lm_eval(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match=r"pip install 'qmoe\[eval\]'"):
        Tasks(["any.yaml"])
