"""`python -m launch.bench router`: from logits to experts and weights, and the order in which dispatch takes the entries.

Softmax scores in float32, a selection bias, renormalised weights. This work moves bytes, so the limit is the rate of a copy.
The bytes are those that cannot be avoided: forward, logits (4 bytes each) are read and, for every entry, expert (8), weight
(4), entry and place (4 each) are written; backward, logits or scores and the weights' gradient are read, and the logits'
gradient is written. On a GPU a CUDA graph is replayed, since Python takes longer to launch these kernels than they run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor

from kernels.expert_order import expert_order
from kernels.router import route
from launch.benchmarks import peers
from launch.benchmarks.contest import Amount, Case, Difference, Inputs, Work, compete
from launch.benchmarks.options import TokenOptions
from launch.benchmarks.timing import Ceilings, sets_needed

BIAS_SCALE = 0.01  # large beside the gaps between scores, as late in a run
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "cuda": {"model": "qwen3_30b_a3b", "tokens": "8192,32768"},
    "cpu": {"model": "tiny", "tokens": "256"},
}
PEERS: Mapping[str, Callable[[], Work]] = {"torch": lambda: peers.torch_router}


class RouterOptions(TokenOptions):
    experts: PositiveInt | None = None
    top_k: PositiveInt | None = None


def measure(
    options: RouterOptions, contenders: Mapping[str, Callable[[], Work]], device: torch.device, ceilings: Ceilings
) -> Iterator[Case]:
    """One case for every model and number of tokens."""
    for name, shape in options.shapes().items():
        for tokens in options.tokens:
            generator = torch.Generator(device).manual_seed(options.seed)
            count = sets_needed(4 * tokens * shape.experts, device)
            sets = [draw_inputs(shape.experts, shape.top_k, tokens, generator) for _ in range(count)]
            logits, entries = 4.0 * tokens * shape.experts, float(tokens * shape.top_k)
            forward = logits + 20 * entries
            yield compete(
                work=f"router of {name}, {tokens:,} tokens",
                sizes={
                    "model": name,
                    "experts": shape.experts,
                    "top_k": shape.top_k,
                    "tokens": tokens,
                    "checked_tokens": tokens,
                },
                amount=Amount({"forward": forward, "forward+backward": forward + 2 * logits + 4 * entries}, "TB/s"),
                ours=partial(ours, top_k=shape.top_k),
                peers={peer: partial(_with_top_k, load, shape.top_k) for peer, load in contenders.items()},
                sets=sets,
                errors_of=partial(errors_of, inputs=sets[0], top_k=shape.top_k),
                matrices=set(),
                ceilings=ceilings,
                repeats=options.repeats,
                graphs=True,
            )


def _with_top_k(load: Callable[[], Work], top_k: int) -> Work:
    return partial(load(), top_k=top_k)


def ours(logits_TE: Tensor, bias_E: Tensor, top_k: int) -> Tensor:
    routing = route(logits_TE, top_k=top_k, scores="softmax", renormalize=True, scale=1.0, bias_E=bias_E, valid_T=None)
    expert_order(routing.experts_TK, logits_TE.shape[1])
    return routing.weights_TK


def draw_inputs(experts: int, top_k: int, tokens: int, generator: torch.Generator) -> Inputs:
    options: dict[str, Any] = {"generator": generator, "device": generator.device}
    logits_TE = torch.randn(tokens, experts, **options).requires_grad_()
    tensors = {"logits_TE": logits_TE, "bias_E": BIAS_SCALE * torch.randn(experts, **options)}
    return Inputs(tensors, pull=torch.randn(tokens, top_k, **options))


def errors_of(work: Work, inputs: Inputs, top_k: int) -> dict[str, float]:
    """Relative Frobenius norm of the difference from float64, of the weights and of the logits' gradient."""
    output = inputs.forward(work)
    gradients = inputs.backward(output)
    logits_TE = inputs.tensors["logits_TE"].detach().double().requires_grad_()
    expected = peers.torch_router(logits_TE, inputs.tensors["bias_E"].double(), top_k)
    differences = {"output": Difference(), "logits_TE": Difference()}
    differences["output"].add(output.detach(), expected.detach())
    differences["logits_TE"].add(gradients["logits_TE"], torch.autograd.grad(expected, logits_TE, inputs.pull.double())[0])
    return {name: difference.relative for name, difference in differences.items()}
