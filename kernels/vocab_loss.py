"""Log-probabilities of target tokens and the entropy of the prediction, without the (T, V) logits in memory.

Shape letters: T tokens, D model, V vocabulary, W columns of a chunk of the vocabulary. The reference takes tokens `chunk` at a
time; bfloat16 on a Hopper GPU takes the products of kernels/hopper/vocabulary.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kernels.errors import UserError
from kernels.limits import require_hopper, require_multiple, takes_kernels
from kernels.linear import product

CPU_CHUNK_LOGITS = 1 << 18  # 1 MiB of float32: the logits of a chunk stay in the cache
GPU_CHUNK_LOGITS = 1 << 28  # 1 GiB of float32: large enough that the products run at full speed
MIN_CHUNK = 64  # tokens; below it the matrix products get slow
GRADIENT_BYTES = 1 << 29  # of a chunk of the logits' gradient on Hopper
ALIGNMENT = 64  # of D on Hopper: the depth of a step of its product


def token_logprobs(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(log p(target), entropy of p) in nats, p = softmax(hidden @ head^T / temperature); both (T,), float32, differentiable.

    `targets_T` is int64 in 0..V-1. Logits are float32 whatever the dtype of `hidden_TD` and `head_VD`, which must agree
    (float64 stays float64). bfloat16 on a GPU takes kernels/hopper/vocabulary.py: D must be a multiple of 64, a token's results
    do not depend on the other tokens, and backward needs 0.5 GB and 8 T D bytes beside the gradients.
    """
    if takes_kernels(hidden_TD):
        _check_hopper(hidden_TD, head_VD, targets_T)
        if (
            hidden_TD.stride(1) != 1
            or hidden_TD.stride(0) < hidden_TD.shape[1]
            or hidden_TD.stride(0) % 8
            or hidden_TD.data_ptr() % 16
        ):
            hidden_TD = hidden_TD.clone(memory_format=torch.contiguous_format)  # .contiguous() keeps what only starts unaligned
        logprobs_T, entropy_T = _HopperLogprobs.apply(hidden_TD, head_VD, targets_T, temperature)
        return logprobs_T, entropy_T
    logits = GPU_CHUNK_LOGITS if head_VD.is_cuda else CPU_CHUNK_LOGITS
    return chunked_logprobs(hidden_TD, head_VD, targets_T, temperature, max(MIN_CHUNK, logits // head_VD.shape[0]))


def chunked_logprobs(
    hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, temperature: float, chunk: int
) -> tuple[Tensor, Tensor]:
    """The reference of `token_logprobs`, `chunk` tokens at a time; their logits are computed again in the backward pass."""
    logprobs_T, entropy_T = _ChunkedLogprobs.apply(hidden_TD, head_VD, targets_T, temperature, chunk)
    return logprobs_T, entropy_T


def _check_hopper(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> None:
    if hidden_TD.dtype != torch.bfloat16 or head_VD.dtype != torch.bfloat16 or targets_T.dtype != torch.int64:
        raise UserError(
            f"the vocabulary's kernels take bfloat16 and int64 targets; hidden is {hidden_TD.dtype}, head {head_VD.dtype}, "
            f"targets {targets_T.dtype}; convert them, or use float32, which takes the reference"
        )
    require_hopper(hidden_TD.device, "the vocabulary's")
    if not hidden_TD.device == head_VD.device == targets_T.device:
        raise UserError(
            f"hidden is on {hidden_TD.device}, head on {head_VD.device}, targets on {targets_T.device}; move them to one device"
        )
    (tokens, hidden), (_, head_hidden) = hidden_TD.shape, head_VD.shape
    if hidden != head_hidden or targets_T.shape != (tokens,):
        raise UserError(
            f"hidden is {tuple(hidden_TD.shape)}, head {tuple(head_VD.shape)}, targets {tuple(targets_T.shape)}; "
            f"expected (T, D), (V, D) and (T,)"
        )
    require_multiple("hidden_size", hidden, ALIGNMENT, "the vocabulary's")
    if not head_VD.is_contiguous() or head_VD.data_ptr() % 16:
        raise UserError(
            f"the head has strides {head_VD.stride()}; the vocabulary's kernels read whole rows: call .contiguous()"
        )


class _HopperLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        from kernels.hopper import vocabulary  # here, because CPU machines may lack Triton

        ctx.set_materialize_grads(False)
        ctx.temperature = temperature
        if hidden_TD.shape[0] == 0:
            nothing = hidden_TD.new_empty(0, dtype=torch.float32)
            ctx.save_for_backward(hidden_TD, head_VD, targets_T, nothing, nothing)
            return nothing, nothing.clone()
        targets_T = targets_T.contiguous()
        logprobs_T, entropy_T, log_sum_T = vocabulary.statistics_of(hidden_TD, head_VD, targets_T, temperature)
        ctx.save_for_backward(hidden_TD, head_VD, targets_T, log_sum_T, entropy_T)
        return logprobs_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs_T: Tensor | None, grad_entropy_T: Tensor | None) -> tuple[Tensor | None, ...]:
        from kernels.hopper import vocabulary

        hidden_TD, head_VD, targets_T, log_sum_T, entropy_T = ctx.saved_tensors
        need_hidden, need_head = ctx.needs_input_grad[:2]
        (tokens, _), vocab = hidden_TD.shape, head_VD.shape[0]
        if tokens == 0 or (grad_logprobs_T is None and grad_entropy_T is None):
            return torch.zeros_like(hidden_TD), torch.zeros_like(head_VD), None, None
        constants_4T = _gradient_constants(log_sum_T, entropy_T, grad_logprobs_T, grad_entropy_T, ctx.temperature)
        # By columns of the vocabulary, so that one product makes the head's gradient of a chunk whole.
        width = vocabulary.chunk_width(tokens, vocab, GRADIENT_BYTES)
        dz_TW = hidden_TD.new_empty(tokens, width)
        d_hidden = hidden_TD.new_zeros(hidden_TD.shape, dtype=torch.float32) if need_hidden else None
        d_head = torch.empty_like(head_VD) if need_head else None
        for first in range(0, vocab, width):
            vocabulary.logit_gradients(hidden_TD, head_VD, targets_T, ctx.temperature, constants_4T, first, dz_TW)
            dz = dz_TW[:, : min(width, vocab - first)]
            if d_head is not None:
                torch.mm(dz.t(), hidden_TD, out=d_head[first : first + width])
            if d_hidden is not None:
                d_hidden += torch.mm(dz, head_VD[first : first + width], out_dtype=torch.float32)
        return None if d_hidden is None else d_hidden.to(hidden_TD.dtype), d_head, None, None


def _gradient_constants(
    log_sum_T: Tensor, entropy_T: Tensor, grad_logprobs_T: Tensor | None, grad_entropy_T: Tensor | None, temperature: float
) -> Tensor:
    """(4, T): log2 of the sum, and a, b, c of dz = p (a (z - log2 sum) + b) + c at the target, z in base 2.

    From g (onehot - p) - h p (log p + H), g and h the upstream gradients of the log-probability and of the entropy H.
    """
    zero_T = torch.zeros_like(log_sum_T)
    of_logprob_T = zero_T if grad_logprobs_T is None else grad_logprobs_T.float() / temperature
    of_entropy_T = zero_T if grad_entropy_T is None else grad_entropy_T.float() / temperature
    return torch.stack([log_sum_T, -math.log(2) * of_entropy_T, -of_logprob_T - of_entropy_T * entropy_T, of_logprob_T])


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        hidden, head = _operands(hidden_TD, head_VD)
        result_dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs_T = hidden.new_empty(hidden.shape[0], dtype=result_dtype)
        log_sum_T, entropy_T = torch.empty_like(logprobs_T), torch.empty_like(logprobs_T)
        for first in range(0, hidden.shape[0], chunk):
            rows = slice(first, first + chunk)
            logits = product(hidden[rows], head, hidden.dtype)
            if temperature != 1.0:
                logits.div_(temperature)
            log_sum_T[rows] = logits.logsumexp(dim=-1)
            log_p = logits.sub_(log_sum_T[rows, None])
            logprobs_T[rows] = log_p.gather(1, targets_T[rows, None]).squeeze(1)
            entropy_T[rows] = -log_p.exp().mul_(log_p).sum(dim=-1)
        ctx.save_for_backward(hidden_TD, head_VD, targets_T, log_sum_T, entropy_T)
        ctx.temperature, ctx.chunk = temperature, chunk  # type: ignore[attr-defined]
        return logprobs_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_logprobs_T: Tensor | None, grad_entropy_T: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_TD, head_VD, targets_T, log_sum_T, entropy_T = ctx.saved_tensors  # type: ignore[attr-defined]
        temperature, chunk = ctx.temperature, ctx.chunk  # type: ignore[attr-defined]
        need_hidden, need_head = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        hidden, head = _operands(hidden_TD, head_VD)
        grad_hidden = torch.empty_like(hidden_TD) if need_hidden else None
        grad_head = head.new_zeros(head.shape, dtype=log_sum_T.dtype) if need_head else None
        for first in range(0, hidden.shape[0], chunk):
            rows = slice(first, first + chunk)
            logits = torch.mm(hidden[rows], head.t())
            if temperature != 1.0:
                logits.div_(temperature)
            grad = _grad_logits(
                logits.sub_(log_sum_T[rows, None]),
                targets_T[rows],
                None if grad_logprobs_T is None else grad_logprobs_T[rows],
                None if grad_entropy_T is None else grad_entropy_T[rows],
                entropy_T[rows],
            )
            if temperature != 1.0:
                grad.div_(temperature)
            if grad_hidden is not None:
                grad_hidden[rows] = torch.mm(grad, head)
            if grad_head is not None:
                grad_head.addmm_(grad.t(), hidden[rows])
        return grad_hidden, None if grad_head is None else grad_head.to(head_VD.dtype), None, None, None


def _operands(hidden_TD: Tensor, head_VD: Tensor) -> tuple[Tensor, Tensor]:
    """What the products take: float32, or float64 as it is."""
    if hidden_TD.dtype == torch.float64:
        return hidden_TD, head_VD
    return hidden_TD.float(), head_VD.float()


def _grad_logits(
    log_p: Tensor, targets: Tensor, grad_logprob: Tensor | None, grad_entropy: Tensor | None, entropy: Tensor
) -> Tensor:
    """The gradient of a chunk's logits z: d log p_t / dz = onehot_t - p, dH / dz = -p (log p + H). Overwrites `log_p`."""
    if grad_entropy is None:
        grad = log_p.exp_()
        if grad_logprob is None:
            return grad.zero_()
        grad.mul_(-grad_logprob[:, None])
    else:
        p = log_p.exp()
        share = entropy * grad_entropy if grad_logprob is None else entropy * grad_entropy + grad_logprob
        grad = log_p.mul_(grad_entropy[:, None]).add_(share[:, None]).mul_(p).neg_()
    if grad_logprob is not None:
        grad.scatter_add_(1, targets[:, None], grad_logprob[:, None])
    return grad
