"""How far the quantized model's routers are from the original's, as a part of a loss.

The divergence of next-token probabilities alone lets routers drift: it is content with other
experts, where these give the same predictions on the text at hand.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qmoe.errors import CalibrationError
from qmoe.layer.routing import Parameters


def routing_loss(logits: Parameters, wanted: Parameters) -> Tensor:
    """Mean over tokens of the divergence from softmax(wanted) to softmax(logits), in nats, summed
    over routers. Both are router logits [T, E] by experts module. CalibrationError where the
    quantized layer's experts are given other tokens."""
    total = torch.zeros(())
    for name, aim in wanted.items():
        made = logits.get(name)
        if made is None or made.shape != aim.shape:
            found = None if made is None else tuple(made.shape)
            raise CalibrationError(
                f"{name}: its experts are given other tokens than the original's (logits {found}, "
                f"expected {tuple(aim.shape)}), so that the model cannot be distilled; use "
                "--set distill=0"
            )
        log_p, log_q = (x.float().log_softmax(-1) for x in (aim.to(made.device), made))
        total = total.to(made.device) + (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return total


class _WithLoss(torch.autograd.Function):
    """The first argument, unchanged; the gradient of the second, a loss, is one."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, loss: Tensor) -> Tensor:
        ctx.loss = loss.detach()
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor]:
        return slopes[0], torch.ones_like(ctx.loss)


def with_loss(output: Any, loss: Float[Tensor, ""]) -> Any:
    """A layer's output; a backward pass through its hidden states adds the gradient of `loss`."""
    if isinstance(output, tuple):
        parts = (with_loss(output[0], loss), *output[1:])
        return type(output)(*parts) if hasattr(output, "_fields") else parts
    return _WithLoss.apply(output, loss)  # type: ignore[no-untyped-call]
