"""Distilling a finished model: its scales, norms and biases against the original's predictions.

Everything before this looks at one layer. Here the loss is what counts in the end, the KL
divergence from the original's next-token probabilities to those of the quantized model, on the
calibration text and on what the model writes itself. Integers stay as they were solved (the
end-to-end phase of EfficientQAT, Chen et al., 2024, arXiv 2407.11062, with the original's
probabilities in place of the text's tokens, and with norms beside the scales). So do routers: where
they move, other experts are chosen, and predictions on held-out text are no better for it.

A part of the text is held out: of the steps at which its KL is measured, the best is kept, the
first among them, at which nothing has moved.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qmoe.distill.student import Student
from qmoe.distill.teacher import Teacher
from qmoe.model.backward import backward, forward
from qmoe.model.last_layer import last_outputs, logits_of
from qmoe.model.skeleton import inputs_of
from qmoe.system.progress import progress

HELD_OUT = 8  # one sample in so many
EVERY = 10  # steps between two looks at the samples that are held out
# Adam's rates at the first step for two bits; they fall to zero in equal steps. With every bit more
# the error of rounding halves, and so do the rates: there is less to make up for.
SCALES, UNQUANTIZED = 0.003, 0.0005
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Samples:
    """Batches of token ids [B, L], in an order drawn by the seed."""

    train: list[Int[Tensor, "_ L"]]
    held_out: list[Int[Tensor, "_ L"]]

    @classmethod
    def of(cls, samples: Int[Tensor, "n L"], batch: int, seed: int) -> "Samples":
        """One in HELD_OUT is held out, at least one; the rest is for training."""
        drawn = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
        out = max(1, len(samples) // HELD_OUT)
        held_out, train = samples[drawn[:out]], samples[drawn[out:]]
        return cls(list(train.split(batch)), list(held_out.split(batch)))


def kl(wanted: Float[Tensor, "B L V"], found: Float[Tensor, "B L V"]) -> Float[Tensor, ""]:
    """Mean over tokens of the divergence from softmax(wanted) to softmax(found), in nats."""
    log_p, log_q = wanted.float().log_softmax(-1), found.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


@dataclass(frozen=True)
class Training:
    """A student, which has begun, and the original's outputs for batches of `samples`, those to
    train on first. steps: of one batch each, in an order drawn by the seed."""

    student: Student
    teacher: Teacher
    samples: Samples
    steps: int
    seed: int

    @property
    def model(self) -> Any:
        return self.student.source.model

    @property
    def layers(self) -> list[nn.Module]:
        return self.student.source.stages()

    def held_out(self) -> float:
        """KL on the text that is held out, of the student as it is."""
        first, model, batches = len(self.samples.train), self.model, self.samples.held_out
        inputs = [inputs_of(model, ids) for ids in batches]
        with self.student.outside():
            outputs = last_outputs(model, self.layers, inputs, self.student.run)
        lost = 0.0
        for i, ids in enumerate(batches):
            wanted = self.teacher.logits(first + i)
            with self.student.outside():
                found = logits_of(model, self.layers, inputs[i], outputs[i])
            lost += float(kl(wanted, found)) * ids.numel()
        return lost / sum(ids.numel() for ids in batches)

    def logits_follow(self) -> bool:
        """Whether the model's logits follow from what comes out of its last layer alone. Of a model
        for which they do not, neither its teacher nor what is held out would be known."""
        inputs = inputs_of(self.model, self.samples.held_out[0][:1])
        with self.student.outside():
            output, passed = forward(self.model, self.layers, inputs, self.student.run, _same)
            again = logits_of(self.model, self.layers, inputs, passed[-1].output)
        return torch.equal(output.logits, again)

    def step(self, i: int) -> float:
        """Add the gradient on batch i to the student's leaves; returns the loss."""
        model, run = self.model, self.student.run
        wanted = self.teacher.logits(i)
        with torch.enable_grad(), self.student.outside():
            inputs = inputs_of(model, self.samples.train[i])
            output, passed = forward(model, self.layers, inputs, run, self.student.scratch.keep)
            loss = kl(wanted, output.logits)
            backward(loss, passed, run)
        return float(loss.detach())

    def train(self) -> dict[str, Any]:
        """Move the student's leaves to where KL on held-out text is least; returns what the report
        says of it."""
        if not self.logits_follow():
            return {"left_out": "its logits do not follow from its last layer alone"}
        student = self.student
        leaves = [*student.factors.values(), *student.values.values()]
        rate = 2.0 ** (2 - student.config.experts.bits)
        groups = [
            {"params": [*student.factors.values()], "lr": SCALES * rate},
            {"params": [*student.values.values()], "lr": UNQUANTIZED * rate},
        ]
        optimizer = torch.optim.Adam(groups, betas=BETAS)
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / self.steps)
        order = _order(len(self.samples.train), self.steps, self.seed)
        curve = {0: self.held_out()}
        best = [leaf.detach().clone() for leaf in leaves]
        stopped: dict[str, str] = {}
        for n, i in enumerate(progress(order, "distilling"), 1):
            optimizer.zero_grad()
            if not math.isfinite(self.step(i)):
                stopped = {"stopped": f"the loss of step {n} was not finite"}
                break  # what was best before is kept
            optimizer.step()
            falling.step()
            if n % EVERY and n < self.steps:
                continue
            curve[n] = self.held_out()
            if curve[n] == min(curve.values()):
                best = [leaf.detach().clone() for leaf in leaves]
        for leaf, kept in zip(leaves, best, strict=True):
            leaf.data.copy_(kept)
        kept_at = min(curve, key=lambda n: curve[n])
        return {
            "steps": self.steps,
            "kept_step": kept_at,
            "held_out_samples": sum(map(len, self.samples.held_out)),
            "held_out_kl": {str(n): round(value, 6) for n, value in curve.items()},
            **stopped,
        }


def _same(value: Any) -> Any:
    return value


def _order(batches: int, steps: int, seed: int) -> list[int]:
    """Which batch each step takes: all of them in an order of their own, again and again."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-steps // batches)
    drawn = torch.cat([torch.randperm(batches, generator=generator) for _ in range(rounds)])
    order: list[int] = drawn[:steps].tolist()
    return order
