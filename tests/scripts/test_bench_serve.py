"""The text of a real server of transformers is that of `qmoe.load`."""

from importlib.util import find_spec

import bench_serve
import pytest


@pytest.mark.slow
@pytest.mark.skipif(find_spec("fastapi") is None, reason="transformers[serving] is not installed")
@pytest.mark.parametrize("options", [(), ("--continuous-batching", "--cb-num-blocks", "8")])
def test_text_over_http(options, quantized_short, tmp_path):
    expected = bench_serve.expected(quantized_short, bench_serve.PROMPTS[:2], 16)
    said = bench_serve.texts(quantized_short, bench_serve.OURS, options, tmp_path / "log")
    assert said == expected
