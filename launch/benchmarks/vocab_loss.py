"""`python -m launch.bench vocab_loss`: from the last hidden states to the log-probability of every target, and back.

The time is that from hidden (N, H), head (V, H) and targets (N,) to a loss per token and, backward, for a random gradient per
token, to the gradients of hidden and head. Ours also computes the entropy of every prediction. FLOPs are 2 N H V forward and
4 N H V backward; recomputation does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn import functional

from kernels.vocab_loss import token_logprobs
from launch.benchmarks import peers
from launch.benchmarks.contest import Amount, Case, Difference, Inputs, Work, compete
from launch.benchmarks.options import Listed, Shape, TokenOptions
from launch.benchmarks.timing import Ceilings, nbytes, sets_needed

CHECKED_TOKENS = 1024
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "cuda": {"model": "qwen3_30b_a3b", "tokens": "8192"},
    "cpu": {"model": "tiny", "tokens": "256"},
}
PEERS: Mapping[str, Callable[[], Work]] = {
    "naive": lambda: peers.naive_vocab_loss,
    "chunked": lambda: peers.chunked_vocab_loss,
    "cce": peers.cce_vocab_loss,
    "cce_exact": peers.cce_exact_vocab_loss,
    "liger": peers.liger_vocab_loss,
    "liger_sm90": peers.liger_sm90_vocab_loss,
}


class VocabLossOptions(TokenOptions):
    hidden: PositiveInt | None = None
    vocabulary: PositiveInt | None = None
    peers: Listed[Literal["cce", "cce_exact", "liger", "liger_sm90"]] | None = Field(
        None, description="besides torch; not given: all that are installed"
    )


def measure(
    options: VocabLossOptions, contenders: Mapping[str, Callable[[], Work]], device: torch.device, ceilings: Ceilings
) -> Iterator[Case]:
    """One case for every model and number of tokens."""
    for name, shape in options.shapes().items():
        for tokens in options.tokens:
            generator = torch.Generator(device).manual_seed(options.seed)
            sets = [draw_inputs(shape, tokens, generator)]
            sets += [draw_inputs(shape, tokens, generator) for _ in range(sets_needed(_nbytes(sets[0]), device) - 1)]
            check = draw_inputs(shape, min(tokens, CHECKED_TOKENS), generator, sets[0].tensors["head_VD"])
            products = tokens * shape.hidden * shape.vocabulary
            yield compete(
                work=f"vocabulary loss of {name}, {tokens:,} tokens",
                sizes={
                    "model": name,
                    "hidden": shape.hidden,
                    "vocabulary": shape.vocabulary,
                    "tokens": tokens,
                    "checked_tokens": len(check.pull),
                },
                amount=Amount({"forward": 2.0 * products, "forward+backward": 6.0 * products}, "TF/s"),
                ours=ours,
                peers=contenders,
                sets=sets,
                errors_of=partial(errors_of, inputs=check),
                matrices={"head_VD"},
                ceilings=ceilings,
                repeats=options.repeats,
            )


def ours(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
    logprobs_T, _ = token_logprobs(hidden_TD, head_VD, targets_T)
    return -logprobs_T


def draw_inputs(shape: Shape, tokens: int, generator: torch.Generator, head_VD: Tensor | None = None) -> Inputs:
    """Hidden states ~ N(0, 1) and a head ~ N(0, 1 / sqrt(H)), so that logits are ~ N(0, 1); bfloat16 on a GPU."""
    device = generator.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden_TD = torch.randn(tokens, shape.hidden, generator=generator, device=device, dtype=dtype)
    if head_VD is None:
        head_VD = torch.randn(shape.vocabulary, shape.hidden, generator=generator, device=device, dtype=dtype)
        head_VD.mul_(shape.hidden**-0.5).requires_grad_()
    targets_T = torch.randint(shape.vocabulary, (tokens,), generator=generator, device=device)
    pull = torch.randn(tokens, generator=generator, device=device)
    return Inputs({"hidden_TD": hidden_TD.requires_grad_(), "head_VD": head_VD, "targets_T": targets_T}, pull)


def _nbytes(inputs: Inputs) -> int:
    return nbytes(list(inputs.leaves.values()))


def errors_of(work: Work, inputs: Inputs) -> dict[str, float]:
    """Relative Frobenius norm of the difference from float32, of the losses and of both gradients."""
    output = inputs.forward(work)
    gradients = inputs.backward(output)
    leaves = {name: leaf.detach().float().requires_grad_() for name, leaf in inputs.leaves.items()}
    logits_TV = functional.linear(leaves["hidden_TD"], leaves["head_VD"])
    losses_T = functional.cross_entropy(logits_TV, inputs.tensors["targets_T"], reduction="none")
    expected = dict(zip(leaves, torch.autograd.grad(losses_T, list(leaves.values()), inputs.pull), strict=True))
    differences = {name: Difference() for name in ("output", *expected)}
    differences["output"].add(output.detach(), losses_T.detach())
    for name, gradient in gradients.items():
        differences[name].add(gradient, expected[name])
    return {name: difference.relative for name, difference in differences.items()}
