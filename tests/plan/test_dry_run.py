"""What a cache is said to take, beside transformers' own cache after a real forward pass."""

import pytest
import torch
from helpers import slow

from qmoe.checkpoint.model_config import model_class
from qmoe.errors import UnsupportedModelError
from qmoe.fused.int8_cache import to_int8
from qmoe.measure.families import families, tiny_config
from qmoe.model.skeleton import build
from qmoe.plan.dry_run import dry_run

KNOWN = {family.model_type: family for family in families()}
# Family, what its tiny config needs for two kinds of layers, and the kinds of its cache.
CASES = [
    ("mixtral", {}, {"full"}),
    ("gpt_oss", {}, {"full", "sliding window"}),
    ("llama4_text", {}, {"full", "sliding window"}),
    ("deepseek_v3", {}, {"full"}),  # MLA: a latent vector
    ("deepseek_v32", {}, {"indexed"}),
    ("qwen3_next", {}, {"full", "linear attention"}),
    ("lfm2_moe", {}, {"full", "linear attention"}),  # convolutions
    ("nemotron_h", {}, {"full", "linear attention"}),  # Mamba 2
    ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1}, {"full", "linear attention"}),
]
HYBRID = ("granitemoehybrid", {"layer_types": ["mamba", "attention"]}, {})


def config_of(family, changes):
    config = tiny_config(KNOWN[family])
    config = type(config).from_dict(config.to_dict() | changes)
    config.architectures = [KNOWN[family].head]
    return config


def tensors_in(value):
    """Every tensor that can be reached from the attributes of a cache, each storage once."""
    found, waiting = {}, [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            found[value.untyped_storage().data_ptr()] = value
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
        elif hasattr(value, "__dict__") and type(value).__module__.startswith("transformers"):
            waiting += vars(value).values()
    return [tensor for tensor in found.values() if tensor.numel()]


@pytest.mark.filterwarnings("ignore")  # of transformers, about kernels that are not installed
@pytest.mark.parametrize("context", [slow(1), 40])
@pytest.mark.parametrize("family, changes, kinds", CASES, ids=[case[0] for case in CASES])
def test_the_cache_is_as_large_as_transformers_own(family, changes, kinds, context):
    config = config_of(family, changes)
    found = dry_run(build(config, torch.float32), context, 2, torch.bfloat16, at_once=16)
    real = model_class(config)._from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        cache = real(torch.ones(2, context, dtype=torch.long), use_cache=True).past_key_values
    assert {kind.name for kind in found.cache} == kinds
    assert found.cache_bytes == sum(tensor.nbytes for tensor in tensors_in(cache.layers))
    assert set(found.chosen.values()) == {2}


def test_a_full_cache_by_hand():
    config = config_of("mixtral", {})
    H, L = config.num_key_value_heads, config.num_hidden_layers
    size = config.hidden_size // config.num_attention_heads
    (kind,) = dry_run(build(config, torch.float32), 300, 3, torch.bfloat16).cache
    assert kind.nbytes == 2 * 2 * 3 * 300 * L * H * size and kind.layers == L


def test_a_cache_in_8_bits_by_hand():
    """A byte a number, and two for the scale of each token and head. A sliding window stays as it
    is."""
    config = config_of("mixtral", {})
    H, L = config.num_key_value_heads, config.num_hidden_layers
    size = config.hidden_size // config.num_attention_heads
    (kind,) = dry_run(build(config, torch.float32), 300, 3, torch.bfloat16, 16, to_int8).cache
    assert kind.nbytes == 2 * 3 * 300 * L * H * (size + 2) and kind.name == "full in 8 bits"
    model = build(config_of("gpt_oss", {"sliding_window": 20}), torch.float32)
    plain, small = (
        {k.name: k.nbytes for k in dry_run(model, 100, 1, torch.bfloat16, 16, keep).cache}
        for keep in (None, to_int8)
    )
    assert plain["sliding window"] == small["sliding window"]
    assert small["full in 8 bits"] < 0.7 * plain["full"]


def test_a_sliding_window_does_not_grow():
    model = build(config_of("gpt_oss", {"sliding_window": 20}), torch.float32)
    grown = {}
    for context in (100, 200):
        grown[context] = {k.name: k.nbytes for k in dry_run(model, context, 1, torch.float32).cache}
    assert grown[100]["sliding window"] == grown[200]["sliding window"]
    assert 2 * grown[100]["full"] == grown[200]["full"]


def test_activations_are_those_of_a_part_of_the_prompt():
    """A token more takes the same whatever is before it, but for the mask."""
    model = build(config_of("mixtral", {}), torch.float32)
    short, long = (
        [dry_run(model, context, 1, torch.float32, n).activations for n in (16, 32, 64)]
        for context in (100, 200)
    )
    assert short[2] - short[1] == pytest.approx(2 * (short[1] - short[0]), rel=0.1)
    assert all(a < b < 2 * a for a, b in zip(short, long, strict=True))


def test_the_model_is_as_it_was():
    model = build(config_of("llama4_text", {}), torch.float32)  # an adapter sets forward there
    before = [vars(module).get("forward") for module in model.modules()]
    dry_run(model, 20, 1, torch.float32)
    assert [vars(module).get("forward") for module in model.modules()] == before
    assert any(before) and all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    "family, said", [("jetmoe", "without running"), ("switch_transformers", "two texts")]
)
def test_what_cannot_be_found_is_refused(family, said):
    with pytest.raises(UnsupportedModelError, match=said):
        dry_run(build(config_of(family, {}), torch.float32), 20, 1, torch.float32)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_families_that_are_refused():
    """docs/architecture/plan.md names them."""
    changes, refused = {case[0]: case[1] for case in [*CASES, HYBRID]}, set()
    for family in KNOWN:
        try:
            model = build(config_of(family, changes.get(family, {})), torch.float32)
            dry_run(model, 20, 1, torch.float32)
        except UnsupportedModelError:
            refused.add(family)
    looks = {"glm5_next", "jetmoe", "qwen4_exp", "qwen4_exp_text"}
    assert refused == looks | {"nllb-moe", "switch_transformers"}
