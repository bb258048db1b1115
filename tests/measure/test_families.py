"""MoE families of the installed transformers: quantized, saved, reloaded, compared.

Here one family of each kind of layout and routing; `make families` runs all of them.
"""

import json
from dataclasses import replace

import pytest
import torch
from helpers import ONE_DOMAIN, mostly_slow
from transformers import AutoTokenizer

import qmoe.measure.evaluate
from qmoe import Scheme
from qmoe.calibration.batches import choose_samples
from qmoe.calibration.text import load_texts
from qmoe.checkpoint.model_config import model_class, read_config
from qmoe.checkpoint.reader import Checkpoint
from qmoe.errors import CheckpointError, UnsupportedModelError
from qmoe.measure.families import families, layout, save_tiny
from qmoe.measure.family_check import CONFIG, check
from qmoe.model.skeleton import inputs_of
from qmoe.packed.audit import audit_model

# Why the others are refused; anything not here must pass.
REFUSED = {
    "diffusion_gemma": "tied to another part",
    "ernie4_5_vl_moe": "together with those of another module",
}
# No search, which knows no families; `make families` has it.
TEXT = replace(CONFIG.calibration, text=ONE_DOMAIN)
FAST = replace(CONFIG, search_grid=False, calibration=TEXT)
FAMILIES = {family.model_type: family for family in families()}
KINDS = {
    "aria_text": "fused, transposed",
    "dbrx": "experts one below the other",
    "gpt_oss": "fused, transposed, interleaved, biased",
    "granitemoe": "fused, with names of its own",
    "inkling2_text": "names that look like packed ones",
    "jamba": "with Mamba layers",
    "jetmoe": "experts in attention, a list of linears here and a stack on disk",
    "llama4": "multimodal, tokens scaled before the experts",
    "longcat_flash": "identity experts",
    "minimax_m3_vl": "dense matrices fused in memory",
    "muse_spark": "a norm after each expert",
    "nemotron_h": "without gates",
    "nllb-moe": "encoder and decoder, a module per expert",
    "qwen3_next": "linear attention",
    "step3p7": "stored tensors split in memory",
}


FEW = ("gpt_oss",)  # `make families` checks all

pytestmark = pytest.mark.usefixtures("quiet")


def test_there_are_as_many_as_there_were():
    assert len(FAMILIES) == 80 and REFUSED.keys() | KINDS.keys() < FAMILIES.keys()


@pytest.mark.filterwarnings("ignore")  # of families' own code
@pytest.mark.parametrize("name", mostly_slow([(n,) for n in KINDS], lambda name: name in FEW))
def test_family(name, tmp_path):
    report = check(FAMILIES[name], tmp_path, FAST)
    assert report["bytes"]["experts 16-bit"] == 0


@pytest.mark.filterwarnings("ignore")
def test_experts_that_are_no_matrices_are_kept_and_reported(tmp_path):
    report = check(FAMILIES["doge"], tmp_path, FAST)
    tables = 2 * 2 * 6 * 64 * 2  # layers, tables, experts, hidden size, bytes
    assert report["bytes"]["experts 16-bit"] == tables
    said = [line for line in report["fallbacks"] if "looked up, not a matrix" in line]
    assert len(said) == 4 and "mlp.down_embed: not quantized" in said[0]
    assert audit_model(qmoe.load(tmp_path / "quantized")[0], "").bytes["experts 16-bit"] == tables


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", mostly_slow([("dbrx",), ("doge",), ("jetmoe",)], lambda name: name == "jetmoe")
)
def test_experts_in_another_form_with_awq_and_compared_with_the_original_streamed(name, tmp_path):
    """At 8 bits little but AWQ's folding is left to see, and in a random model tokens that rounding
    sends to another expert; a wrong fold costs nats."""
    source, quantized = tmp_path / "source", tmp_path / "quantized"
    save_tiny(FAMILIES[name], source)
    config = replace(FAST, method="awq", refit=False, experts=Scheme(8, 32))
    qmoe.quantize(source, quantized, config, progress=False)
    result = qmoe.measure.evaluate.evaluate(quantized, against=source, samples=2, seqlen=64)
    assert 0 < result["overall"]["qmoe"]["kl"] < 0.2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cut", [{"ffn_hidden_size": 64}, {"moe_num_experts": 5}])
def test_experts_in_another_form_of_another_size_are_refused(cut, tmp_path):
    save_tiny(FAMILIES["dbrx"], tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    config["ffn_config"] |= cut
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="by config.json"):
        qmoe.quantize(tmp_path / "source", tmp_path / "quantized", FAST, progress=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_other_family_is_known_or_refused_by_name(name):
    if name not in REFUSED:
        assert layout(FAMILIES[name])
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
@pytest.mark.parametrize(
    "name",
    mostly_slow([(n,) for n in ROUTING], lambda n: n in ("zaya", "llama4_text")),
)
def test_tokens_are_counted_as_the_model_itself_routes_them(name, tmp_path):
    source = tmp_path / "source"
    save_tiny(FAMILIES[name], source)
    config = replace(FAST, dense=None)
    report = qmoe.quantize(source, tmp_path / "quantized", config, progress=False)
    first = next(layer["experts"] for layer in report["layers"] if layer["experts"])
    (where, entry), *_ = first.items()  # nothing before the first experts is quantized
    model = (
        model_class(read_config(Checkpoint(source)))
        .from_pretrained(source, dtype=torch.float32)
        .eval()
    )
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
    samples, _ = choose_samples(tokenizer, load_texts(c.text), c.samples, c.seqlen, c.seed)
    with torch.no_grad():
        for ids in samples.split(c.batch):
            model(**inputs_of(model, ids))
    assert entry["tokens"] == expected.tolist()
    assert sum(entry["tokens"]) > 0
