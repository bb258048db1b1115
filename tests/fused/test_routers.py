"""Which modules are routers that decode as one operation, and what becomes of them."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from qmoe.fused.routers import fuse_routers, recognize_router
from qmoe.kernels.cpu.library import library
from qmoe.kernels.cpu.router import FEW, Routing

pytestmark = pytest.mark.skipif(library() is None, reason="installed without a C compiler")
SIZES = {"num_experts": 24, "num_local_experts": 24, "num_experts_per_tok": 4, "hidden_size": 96}
FAMILIES = [
    (MixtralTopKRouter, {}, Routing(4, True, True)),
    (Qwen3MoeTopKRouter, {"norm_topk_prob": True}, Routing(4, True, False)),
    (Qwen3MoeTopKRouter, {"norm_topk_prob": False}, Routing(4, False, False)),
    (GptOssTopKRouter, {}, Routing(4, True, False)),
]


def made(cls, changes, dtype):
    module = cls(SimpleNamespace(**SIZES, **changes))
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    return module.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls, changes, kind", FAMILIES)
def test_how_families_write_it(cls, changes, kind, dtype):
    original = made(cls, changes, dtype)
    found = recognize_router(original)
    # In float32 there is no difference between the dtype of x and float32.
    assert found == (kind if dtype == torch.bfloat16 else Routing(4, kind.normed, True))
    module = copy.deepcopy(original)
    assert fuse_routers([module]) == 1 and isinstance(module, cls)
    for shape in ((1, 96), (FEW, 96), (FEW + 1, 96)):
        x = torch.randn(shape).to(dtype)
        logits, scores, ids = module(x)
        wanted = original(x)
        close = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(logits, wanted[0], rtol=close, atol=close)
        assert scores.dtype == wanted[1].dtype and ids.shape == wanted[2].shape
        same = (ids == wanted[2]).all(1)  # a tie within rounding may fall either way
        assert same.float().mean() > 0.8
        torch.testing.assert_close(scores[same], wanted[1][same], rtol=close, atol=close)
    assert module.state_dict().keys() == original.state_dict().keys()
    # Gradients go through the family's own code.
    x = torch.randn(2, 96).to(dtype).requires_grad_()
    module(x)[1].float().sum().backward()
    assert x.grad is not None


class Scaled(MixtralTopKRouter):
    def forward(self, hidden_states):
        logits, scores, ids = super().forward(hidden_states)
        return logits, 2.5 * scores, ids


class Shifted(MixtralTopKRouter):
    def forward(self, hidden_states):
        return super().forward(hidden_states + 1)


DEEPSEEK = {"routed_scaling_factor": 2.5, "n_group": 4, "topk_group": 2, "norm_topk_prob": True}


@pytest.mark.parametrize(
    "module",
    [
        made(Scaled, {}, torch.float32),
        made(Shifted, {}, torch.float32),
        made(DeepseekV3TopkRouter, DEEPSEEK, torch.float32),
        made(MixtralTopKRouter, {}, torch.float32).to("meta"),
        nn.Linear(96, 24, bias=False),
    ],
    ids=lambda m: f"{type(m).__name__}-{m.weight.device}",
)
def test_what_is_none(module):
    assert recognize_router(module) is None
