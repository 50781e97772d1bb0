"""The router in two Triton kernels, forwards and backwards: launches and autograd. kernels/router.py says what they compute.

Shape letters: T tokens, E experts, K top-k.

Bounds, with b bytes a logit. Bytes: forwards T * (E * b + 12 K), backwards T * (2 E * b + 12 K): 5.0 MB and 9.2 MB at T=8192,
E=128, K=8 in float32, 1.2 and 2.2 us at 4.2 TB/s. Operations: the K passes over a tile cost about 6 T * E * K integer ones,
50 M in that case and below 5 us of an H200. Both lie under what launches cost, so the number of launches is what counts: one
forwards, beside the zeros of the counts (a fill of E numbers is cheaper than a launch that adds up the programs' counts), and
one backwards. The auxiliary sums take one more, which adds the partial sums of the programs in a fixed order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kernels.launches import cdiv, early, next_power_of_2
from kernels.triton_router_kernels import add_kernel, route_backward_kernel, route_kernel

TILE_NUMBERS = 2048  # of a program's tile, unless that means fewer than 16 tokens or more than 128
MAX_TILE_NUMBERS = 8192  # what registers hold


@dataclass(frozen=True)
class Settings:
    """What a router does with every batch; the meanings are those of `route`'s arguments."""

    num_experts: int
    top_k: int
    num_groups: int
    top_groups: int
    scores: str
    renormalize: bool
    scale: float
    auxiliary: bool
    smallest_sum: float

    @cached_property
    def group_padded(self) -> int:
        return max(2, next_power_of_2(self.num_experts // self.num_groups))

    @cached_property
    def groups_padded(self) -> int:
        return next_power_of_2(self.num_groups)

    @cached_property
    def experts_padded(self) -> int:
        return self.groups_padded * self.group_padded

    @cached_property
    def block_tokens(self) -> int:
        return min(128, max(16, TILE_NUMBERS // self.experts_padded), MAX_TILE_NUMBERS // self.experts_padded)

    def vector(self, dtype: torch.dtype) -> int:
        """How many logits a thread reads at once: 16 bytes, or what divides a group."""
        return math.gcd(self.num_experts // self.num_groups, 16 // dtype.itemsize)

    @cached_property
    def constants(self) -> dict[str, Any]:
        """What all kernels need to know when they are compiled."""
        return {
            "E": self.num_experts,
            "K": self.top_k,
            "SCORES": self.scores,
            "RENORMALIZE": self.renormalize,
            "BLOCK_T": self.block_tokens,
            "num_warps": min(16, max(4, self.block_tokens * self.experts_padded // 512)),
        }

    @cached_property
    def forward_constants(self) -> dict[str, Any]:
        return self.constants | {
            "K_PADDED": next_power_of_2(self.top_k),
            "GROUPS": self.num_groups,
            "GROUPS_PADDED": self.groups_padded,
            "GROUP_PADDED": self.group_padded,
            "TOP_GROUPS": self.top_groups,
        }

    @cached_property
    def backward_constants(self) -> dict[str, Any]:
        return self.constants | {"E_PADDED": max(2, next_power_of_2(self.num_experts))}


settings_of = lru_cache(maxsize=256)(Settings)  # working the constants out costs more than a launch


def route_with_kernels(
    logits_TE: Tensor, bias_E: Tensor | None, valid_T: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(experts_TK, weights_TK, counts_E, score_sums_E, z_loss) of kernels.router.Routing; any strides."""
    result: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
    vector = settings.vector(logits_TE.dtype)
    if logits_TE.stride(1) != 1 or logits_TE.stride(0) % vector or logits_TE.data_ptr() % (vector * logits_TE.itemsize):
        logits_TE = logits_TE.clone(memory_format=torch.contiguous_format)
    result = _Route.apply(logits_TE, bias_E, valid_T, settings)
    return result


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, logits_TE: Tensor, bias_E: Tensor | None, valid_T: Tensor | None, settings: Settings
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        experts_TK, weights_TK, counts_E, sums = launch_route(logits_TE, bias_E, valid_T, settings)
        score_sums_E, z_loss, num_valid = (None, None, None) if sums is None else sums
        ctx.mark_non_differentiable(experts_TK, counts_E)
        ctx.save_for_backward(logits_TE, experts_TK, valid_T, num_valid)  # type: ignore[arg-type]  # None is fine
        ctx.settings = settings  # type: ignore[attr-defined]
        return experts_TK, weights_TK, counts_E, score_sums_E, z_loss

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx,
        _experts: None,
        grad_weights_TK: Tensor | None,
        _counts: None,
        grad_score_sums_E: Tensor | None,
        grad_z_loss: Tensor | None,
    ) -> tuple[Tensor | None, None, None, None]:
        grads = (grad_weights_TK, grad_score_sums_E, grad_z_loss)
        if all(grad is None for grad in grads):
            return None, None, None, None
        logits_TE, experts_TK, valid_T, num_valid = ctx.saved_tensors  # type: ignore[attr-defined]
        settings = ctx.settings  # type: ignore[attr-defined]
        return launch_route_backward(logits_TE, experts_TK, valid_T, num_valid, grads, settings), None, None, None


def launch_route(
    logits_TE: Tensor, bias_E: Tensor | None, valid_T: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """(experts_TK, weights_TK, counts_E, (score_sums_E, z_loss, num_valid) where asked for), without autograd."""
    (tokens, experts), device, vector = logits_TE.shape, logits_TE.device, settings.vector(logits_TE.dtype)
    programs = cdiv(tokens, settings.block_tokens)
    experts_TK = torch.empty(tokens, settings.top_k, dtype=torch.int64, device=device)
    weights_TK = torch.empty(tokens, settings.top_k, dtype=torch.float32, device=device)
    counts_E = torch.zeros(experts, dtype=torch.int64, device=device)
    partial_sums = None  # of each program: the E sums of scores, then that of the squares, then the number of valid tokens
    if settings.auxiliary:
        partial_sums = torch.empty(programs, experts + 2, dtype=torch.float32, device=device)
    if tokens:
        route_kernel[(programs,)](
            logits_TE,
            None if bias_E is None else bias_E.contiguous(),
            None if valid_T is None else valid_T.contiguous(),
            experts_TK,
            weights_TK,
            counts_E,
            partial_sums,
            tokens,
            logits_TE.stride(0) // vector,
            settings.scale,
            settings.smallest_sum,
            VECTOR=vector,
            **settings.forward_constants,
            **early(device, tokens),
        )
    if partial_sums is None:
        return experts_TK, weights_TK, counts_E, None
    score_sums_E, z_loss, num_valid = (torch.empty(shape, device=device) for shape in ((experts,), (), ()))
    add_kernel[(cdiv(experts, 32),)](
        partial_sums, score_sums_E, z_loss, num_valid, programs, E=experts, BLOCK_P=128, BLOCK_E=32
    )
    return experts_TK, weights_TK, counts_E, (score_sums_E, z_loss, num_valid)


def launch_route_backward(
    logits_TE: Tensor,
    experts_TK: Tensor,
    valid_T: Tensor | None,
    num_valid: Tensor | None,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    settings: Settings,
) -> Tensor:
    """The gradient of the logits from those of (weights_TK, score_sums_E, z_loss), None where there is none."""
    vector = settings.vector(logits_TE.dtype)
    grad_logits_TE = torch.empty(logits_TE.shape, dtype=logits_TE.dtype, device=logits_TE.device)
    if not logits_TE.shape[0]:
        return grad_logits_TE
    route_backward_kernel[(cdiv(logits_TE.shape[0], settings.block_tokens),)](
        logits_TE,
        experts_TK,
        None if valid_T is None else valid_T.contiguous(),
        num_valid,
        *(None if grad is None else grad.contiguous() for grad in grads),
        grad_logits_TE,
        logits_TE.shape[0],
        logits_TE.stride(0) // vector,
        settings.scale,
        settings.smallest_sum,
        VECTOR=vector,
        **settings.backward_constants,
        **early(logits_TE.device, logits_TE.shape[0]),
    )
    return grad_logits_TE
