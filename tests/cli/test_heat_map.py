"""Bits of every layer and expert in the terminal."""

from qmoe.cli.heat_map import heat_map, is_mixed
from qmoe.cli.main import main


def test_an_expert_is_a_character():
    widths = {"l.experts.gate_up_proj": [2, 3, 4, 8], "l.experts.down_proj": [8] * 130}
    widths |= {"l.q_proj": [8], "l.k_proj": [4], "lm_head": [8]}
    lines = heat_map(widths)
    assert lines[1] == "  l.experts.gate_up_proj ░▒▓█"
    assert lines[2] == "  l.experts.down_proj    " + "█" * 128
    assert lines[3].strip() == "██"
    assert lines[5:] == ["  l: q_proj 8, k_proj 4", "  model: lm_head 8"]
    assert is_mixed(widths) and not is_mixed({"a": [4, 4], "b": [8]})


def test_inspect_draws_what_is_mixed(tmp_path, short, capsys):
    command = ["quantize", str(short), str(tmp_path / "out"), "--method", "rtn"]
    config = tmp_path / "c.toml"
    config.write_text('[widths]\n"model.layers.0.mlp.experts.down_proj" = "' + "28" * 8 + '"\n')
    assert main([*command, "--config", str(config)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "░█░█░█░█░█░█░█░█" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "out"), "--config"]) == 0
    config.write_text(capsys.readouterr().out)
    again = ["quantize", str(short), str(tmp_path / "again"), "--config", str(config)]
    assert main(again) == 0
    files = [sorted((tmp_path / name).glob("*.safetensors")) for name in ("out", "again")]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
