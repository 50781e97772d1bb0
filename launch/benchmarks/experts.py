"""`python -m launch.bench experts`: a whole layer of experts, from the routing to the combined output.

The time is that of everything between (x, experts, weights) and y: ordering of the entries, gather, SwiGLU MLP and weighted
combine; backward, the gradients of x, of the combine weights and of both weight matrices. FLOPs are those of the products
alone: 6 T K D F forward and 12 T K D F backward.

Shape letters: T tokens, D model, F expert hidden, E experts, K top-k, C = 2F, R rows of one expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn import functional

from kernels.expert_mlp import expert_mlp
from kernels.expert_order import expert_order
from launch.benchmarks import peers
from launch.benchmarks.contest import Amount, Case, Difference, Inputs, Work, compete
from launch.benchmarks.options import Listed, OneOrMore, Shape, TokenOptions
from launch.benchmarks.timing import Ceilings, nbytes, sets_needed

Routing = Literal["even", "zipf", "uniform"]
MATRICES = {"gate_up_ECD", "down_EDF"}
CHECKED_TOKENS = 1024
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "cuda": {"model": "qwen3_30b_a3b", "tokens": "8192,32768", "routing": "even,zipf"},
    "cpu": {"model": "tiny", "tokens": "256", "routing": "even,zipf"},
}
PEERS: Mapping[str, Callable[[], Work]] = {
    "torch": lambda: peers.torch_experts,
    "liger": peers.liger_experts,
    "scattermoe": peers.scattermoe_experts,
    "sonicmoe": peers.sonicmoe_experts,
}


class ExpertsOptions(TokenOptions):
    hidden: PositiveInt | None = None
    expert_hidden: PositiveInt | None = None
    experts: PositiveInt | None = None
    top_k: PositiveInt | None = None
    routing: OneOrMore[Routing]
    peers: Listed[Literal["liger", "scattermoe", "sonicmoe"]] | None = Field(
        None, description="besides torch; not given: all that are installed"
    )


def measure(
    options: ExpertsOptions, contenders: Mapping[str, Callable[[], Work]], device: torch.device, ceilings: Ceilings
) -> Iterator[Case]:
    """One case for every model, number of tokens and routing."""
    for name, shape in options.shapes().items():
        yield from _of_model(name, shape, options, contenders, device, ceilings)


def _of_model(
    name: str,
    shape: Shape,
    options: ExpertsOptions,
    contenders: Mapping[str, Callable[[], Work]],
    device: torch.device,
    ceilings: Ceilings,
) -> Iterator[Case]:
    generator = torch.Generator(device).manual_seed(options.seed)
    matrices = [draw_matrices(shape, generator)]
    matrices += [draw_matrices(shape, generator) for _ in range(sets_needed(nbytes(list(matrices[0].values())), device) - 1)]
    for tokens in options.tokens:
        for routing in options.routing:
            check = draw_inputs(shape, min(tokens, CHECKED_TOKENS), routing, generator, matrices[0])
            yield compete(
                work=f"experts of {name}, {tokens:,} tokens, {routing} routing",
                sizes={"model": name, **vars(shape), "tokens": tokens, "routing": routing, "checked_tokens": len(check.pull)},
                amount=expert_amount(shape, tokens),
                ours=ours,
                peers=contenders,
                sets=[draw_inputs(shape, tokens, routing, generator, one) for one in matrices],
                errors_of=partial(errors_of, inputs=check),
                matrices=MATRICES,
                ceilings=ceilings,
                repeats=options.repeats,
            )


def ours(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, gate_up_ECD: Tensor, down_EDF: Tensor) -> Tensor:
    return expert_mlp(x_TD, expert_order(experts_TK, down_EDF.shape[0]), weights_TK, gate_up_ECD, down_EDF)


def expert_amount(shape: Shape, tokens: int) -> Amount:
    products = tokens * shape.top_k * shape.hidden * shape.expert_hidden
    return Amount({"forward": 6.0 * products, "forward+backward": 18.0 * products}, "TF/s")


# ---------------------------------------------------------------- data


def draw_matrices(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    """Weights ~ N(0, 1 / sqrt(fan-in)); bfloat16 on a GPU, float32 on a CPU."""
    return {
        "gate_up_ECD": _normal((shape.experts, 2 * shape.expert_hidden, shape.hidden), generator, scale=shape.hidden**-0.5),
        "down_EDF": _normal((shape.experts, shape.hidden, shape.expert_hidden), generator, scale=shape.expert_hidden**-0.5),
    }


def draw_inputs(
    shape: Shape, tokens: int, routing: Routing, generator: torch.Generator, matrices: Mapping[str, Tensor]
) -> Inputs:
    x_TD = _normal((tokens, shape.hidden), generator)
    logits_TK = torch.randn(tokens, shape.top_k, generator=generator, device=generator.device)
    experts_TK = draw_experts(shape, tokens, routing, generator)
    tensors = {"x_TD": x_TD, "experts_TK": experts_TK, "weights_TK": logits_TK.softmax(dim=-1).requires_grad_(), **matrices}
    return Inputs(tensors, pull=_normal((tokens, shape.hidden), generator).detach())


def _normal(size: tuple[int, ...], generator: torch.Generator, scale: float = 1.0) -> Tensor:
    dtype = torch.bfloat16 if generator.device.type == "cuda" else torch.float32
    return torch.randn(size, generator=generator, device=generator.device, dtype=dtype).mul_(scale).requires_grad_()


def draw_experts(shape: Shape, tokens: int, routing: Routing, generator: torch.Generator) -> Tensor:
    """(T, K) int64, K different experts a token.

    even: every expert gets T K / E entries, or one more where that does not divide. uniform: each token draws K experts, all
    alike. zipf: each token draws K experts without putting back, the expert of rank s with probability proportional to 1 / s;
    which expert has which rank is random.
    """
    options: dict[str, Any] = {"generator": generator, "device": generator.device}
    if routing == "even":
        return _even(shape.experts, shape.top_k, tokens, options)
    if routing == "uniform":
        return torch.rand(tokens, shape.experts, **options).topk(shape.top_k, dim=-1).indices
    names_E = torch.randperm(shape.experts, **options)
    return names_E[zipf_ranks(shape, tokens, generator)]


def zipf_ranks(shape: Shape, tokens: int, generator: torch.Generator) -> Tensor:
    """(T, K) int64: K different ranks a token, rank s (from 0) drawn with probability proportional to 1 / (s + 1)."""
    share_E = 1.0 / torch.arange(1, shape.experts + 1, device=generator.device)
    return torch.multinomial(share_E.expand(tokens, -1), shape.top_k, generator=generator)


def _even(experts: int, top_k: int, tokens: int, options: dict[str, Any]) -> Tensor:
    """Deals 0, 1, ..., E - 1, 0, 1, ... to the tokens in turn, renames the experts again for each full deal, and shuffles."""
    deal = math.lcm(experts, top_k)  # entries after which a token begins with expert 0 again
    deals = -(-tokens * top_k // deal)
    names = torch.rand(deals, experts, **options).argsort(dim=1)
    dealt = torch.arange(deal, device=options["device"]).remainder(experts).expand(deals, -1)
    experts_TK = names.gather(1, dealt).view(-1, top_k)[:tokens]
    return experts_TK[torch.randperm(tokens, **options)].contiguous()


# ---------------------------------------------------------------- check


def errors_of(work: Work, inputs: Inputs) -> dict[str, float]:
    """Relative Frobenius norm of the difference from float32, of the output and of every gradient.

    The reference goes expert by expert, so that its float32 copies of the matrices never exist at once.
    """
    output = inputs.forward(work)
    gradients = inputs.backward(output)
    x_TD, experts_TK, weights_TK, gate_up_ECD, down_EDF = (tensor.detach() for tensor in inputs.tensors.values())
    y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    grad_x_TD, grad_weights_TK = torch.zeros_like(y_TD), torch.zeros_like(weights_TK)
    differences = {name: Difference() for name in ("output", *gradients)}
    for expert in range(len(down_EDF)):
        token_R, choice_R = (experts_TK == expert).nonzero(as_tuple=True)
        rows = [x_TD[token_R], weights_TK[token_R, choice_R], gate_up_ECD[expert], down_EDF[expert]]
        leaves = [tensor.float().requires_grad_() for tensor in rows]
        y_RD = _float32_rows(*leaves)
        grad_x, grad_weights, grad_gate_up, grad_down = torch.autograd.grad(y_RD, leaves, inputs.pull[token_R].float())
        y_TD.index_add_(0, token_R, y_RD.detach())
        grad_x_TD.index_add_(0, token_R, grad_x)
        grad_weights_TK[token_R, choice_R] = grad_weights
        differences["gate_up_ECD"].add(gradients["gate_up_ECD"][expert], grad_gate_up)
        differences["down_EDF"].add(gradients["down_EDF"][expert], grad_down)
    differences["output"].add(output.detach(), y_TD)
    differences["x_TD"].add(gradients["x_TD"], grad_x_TD)
    differences["weights_TK"].add(gradients["weights_TK"], grad_weights_TK)
    return {name: difference.relative for name, difference in differences.items()}


def _float32_rows(x_RD: Tensor, weights_R: Tensor, gate_up_CD: Tensor, down_DF: Tensor) -> Tensor:
    gate_RF, up_RF = functional.linear(x_RD, gate_up_CD).chunk(2, dim=-1)
    return functional.linear(functional.silu(gate_RF) * up_RF, down_DF) * weights_R[:, None]
