"""`qmoe check`: what is shown, and the exit status."""

import json

from engine_folders import make_folder

from qmoe.cli.main import main


def test_a_good_and_a_bad_folder(tmp_path, capsys):
    good, bad = str(make_folder(tmp_path / "good")), str(make_folder(tmp_path / "bad", inner=192))
    command = ["--engine", "vllm", "--tp", "2"]
    assert main(["check", good, *command]) == 0
    assert "vllm 0.32.0: all rules are kept." in capsys.readouterr().out
    assert main(["check", bad, *command]) == 1
    shown = capsys.readouterr().out
    assert "experts.0.down_proj" in shown and "a device has 96 inputs" in shown
    assert "create_weights" in shown and "1 rule is broken" in shown and "without a plugin" in shown
    assert main(["check", bad, *command, "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["passes"] is False and result["broken"][0]["count"] == 1
    assert main(["check", str(tmp_path / "none"), *command]) == 1
    assert "no such folder" in capsys.readouterr().err
