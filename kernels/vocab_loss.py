"""Log-probabilities of target tokens and the entropy of the prediction, without the (T, V) logits in memory.

Shape letters: T tokens, D model, V vocabulary. Rows are taken `chunk` at a time and their logits computed again in the
backward pass, so at most (chunk, V) numbers exist at once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

CPU_CHUNK_LOGITS = 1 << 18  # 1 MiB of float32: the logits of a chunk stay in the cache
GPU_CHUNK_LOGITS = 1 << 28  # 1 GiB of float32: large enough that the products run at full speed
MIN_CHUNK = 64  # tokens; below it the matrix products get slow


def token_logprobs(
    hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, *, temperature: float = 1.0, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """(log p(target), entropy of p) in nats, p = softmax(hidden @ head^T / temperature); both (T,), float32, differentiable.

    `targets_T` is int64 in 0..V-1. Logits are float32 whatever the dtype of `hidden_TD` and `head_VD`, which must agree
    (float64 stays float64). `chunk` is in tokens; None takes what suits the device.
    """
    if chunk is None:
        chunk = max(MIN_CHUNK, (GPU_CHUNK_LOGITS if head_VD.is_cuda else CPU_CHUNK_LOGITS) // head_VD.shape[0])
    logprobs_T, entropy_T = _TokenLogprobs.apply(hidden_TD, head_VD, targets_T, temperature, chunk)
    return logprobs_T, entropy_T


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right with a float32 result (float64 for float64)."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right)


class _TokenLogprobs(torch.autograd.Function):
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
            logits = _product(hidden[rows], head.t())
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
            logits = _product(hidden[rows], head.t())
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
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = torch.mm(grad, head)
            if grad_head is not None:
                if grad_head.dtype == grad.dtype:
                    grad_head.addmm_(grad.t(), hidden[rows])
                else:
                    grad_head += _product(grad.t(), hidden[rows])
        return grad_hidden, None if grad_head is None else grad_head.to(head_VD.dtype), None, None, None


def _operands(hidden_TD: Tensor, head_VD: Tensor) -> tuple[Tensor, Tensor]:
    """What the products take: as they are, or float32 where the device has no half-precision product with float32 result."""
    if hidden_TD.is_cuda or hidden_TD.dtype in (torch.float32, torch.float64):
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
