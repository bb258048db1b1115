"""MoE families of the installed transformers: quantized, saved, reloaded, compared.

Here one family of each kind of layout and routing; `make families` runs all of them.
"""

from importlib.util import find_spec

import pytest
import torch
from transformers import AutoTokenizer
from transformers.utils import logging

import qmoe
from qmoe import QuantConfig, Scheme
from qmoe.calibration.batches import sample_windows
from qmoe.calibration.text import load_texts
from qmoe.errors import UnsupportedModelError
from qmoe.families import CONFIG, check, families, layout, save_tiny
from qmoe.skeleton import inputs_of, model_class, read_config

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
KINDS = {
    "aria_text": "fused, transposed",
    "gpt_oss": "fused, transposed, interleaved, biased",
    "granitemoe": "fused, with names of its own",
    "inkling2_text": "names that look like packed ones",
    "jamba": "with Mamba layers",
    "llama4": "multimodal, tokens scaled before the experts",
    "longcat_flash": "identity experts",
    "minimax_m3_vl": "dense matrices fused in memory",
    "muse_spark": "a norm after each expert",
    "nemotron_h": "without gates",
    "nllb-moe": "encoder and decoder, a module per expert",
    "qwen3_next": "linear attention",
    "step3p7": "stored tensors split in memory",
}


@pytest.fixture(autouse=True)
def quiet():
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)


def test_there_are_as_many_as_there_were():
    assert len(FAMILIES) == 80 and REFUSED.keys() | KINDS.keys() < FAMILIES.keys()


@pytest.mark.filterwarnings("ignore")  # of families' own code
@pytest.mark.parametrize("name", KINDS)
def test_family(name, tmp_path):
    report = check(FAMILIES[name], tmp_path)
    assert report["bytes"]["experts 16-bit"] == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_every_other_family_is_known_or_refused_by_name(name):
    if name not in REFUSED:
        assert layout(FAMILIES[name])
    elif name == "inkling_mm_model" and find_spec("scipy"):
        pytest.skip("what it lacks is installed here")
    else:
        with pytest.raises(UnsupportedModelError, match=REFUSED[name]):
            layout(FAMILIES[name])


def ids_chosen(args, E):
    return torch.bincount(args[1].flatten(), minlength=E)[:E]


def rows_not_zero(args, E):
    return (args[0] != 0).any(-1).view(E, -1).sum(-1)


ROUTING = {
    "mixtral": ids_chosen,  # softmax, top-2
    "zaya": ids_chosen,  # top-1
    "deepseek_v3": ids_chosen,  # sigmoid with a correction bias, limited to groups
    "longcat_flash": ids_chosen,  # identity experts
    "llama4_text": rows_not_zero,
    "switch_transformers": None,  # capacity: tokens are dropped
    "nllb-moe": None,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ROUTING)
def test_tokens_are_counted_as_the_model_itself_routes_them(name, tmp_path):
    source = tmp_path / "source"
    save_tiny(FAMILIES[name], source)
    config = QuantConfig(experts=Scheme(4, 32), dense=None, calibration=CONFIG.calibration)
    report = qmoe.quantize(source, tmp_path / "quantized", config, progress=False)
    first = next(layer["experts"] for layer in report["layers"] if layer["experts"])
    (where, entry), *_ = first.items()  # nothing before the first experts is quantized
    model = model_class(read_config(source)).from_pretrained(source, dtype=torch.float32).eval()
    module, E = model.get_submodule(where), len(entry["tokens"])
    expected = torch.zeros(E, dtype=torch.long)

    def one(e):
        def hook(m, args):
            expected[e] += args[0].reshape(-1, args[0].shape[-1]).shape[0]

        return hook

    def whole(m, args):
        expected.add_(ROUTING[name](args, E))

    if ROUTING[name] is None:
        for e in range(E):
            module.get_submodule(f"expert_{e}").register_forward_pre_hook(one(e))
    else:
        module.register_forward_pre_hook(whole)
    c = config.calibration
    tokenizer = AutoTokenizer.from_pretrained(source)
    windows = sample_windows(tokenizer, load_texts(c.text), c.windows, c.window, c.seed)
    with torch.no_grad():
        for ids in windows.split(c.batch):
            model(**inputs_of(model, ids))
    assert entry["tokens"] == expected.tolist()
    assert sum(entry["tokens"]) > 0
