"""Which modules are RMS norms, and what becomes of them."""

import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from qmoe.fused.norms import fuse_norms, recognize_norm
from qmoe.kernels.cpu.library import library

pytestmark = pytest.mark.skipif(library() is None, reason="installed without a C compiler")
FAMILIES = [(MixtralRMSNorm, 0.0, True), (GptOssRMSNorm, 0.0, False), (Gemma2RMSNorm, 1.0, False)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family, shift, early", FAMILIES)
def test_how_families_write_it(family, shift, early, dtype):
    norm = family(96, 1e-5).to(dtype)
    nn.init.normal_(norm.weight, 1)
    kind = recognize_norm(norm)
    assert kind is not None and (kind.epsilon, kind.shift) == (1e-5, shift)
    if dtype == torch.bfloat16:
        assert kind.early == early
    model = nn.Sequential(copy.deepcopy(norm).requires_grad_(False))
    assert fuse_norms(model) == 1 and isinstance(model[0], family)
    x = torch.randn(3, 5, 96).to(dtype)
    torch.testing.assert_close(
        model(x), norm(x), rtol=8e-3 if dtype == torch.bfloat16 else 1e-6, atol=1e-6
    )
    assert model.state_dict().keys() == {"0.weight"}
    assert copy.deepcopy(model)(x).equal(model(x))
    assert model(x[:0]).shape == (0, 5, 96)
    # Gradients go through the family's own code.
    x.requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0


class Doubled(MixtralRMSNorm):
    def __init__(self):
        super().__init__(32)
        nn.init.normal_(self.weight)

    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(32),
        nn.Linear(32, 1, bias=False),
        Doubled(),
        Qwen3NextRMSNormGated(32),
        nn.Embedding(32, 4),
        MixtralRMSNorm(32).to("meta"),
    ],
    ids=lambda m: type(m).__name__,
)
def test_what_is_none(module):
    assert recognize_norm(module) is None
