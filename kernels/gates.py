"""The gates of an MoE layer: tokens -> logits, which kernels/router.py takes, whatever gate they come from.

The plain gate is a linear map, x W^T (kernels/linear.py). The gates here do more: they add
elementwise torch operations around that product, on any device, and the router after them is the same. Shape letters: T tokens,
D model, E experts, R the dimension in which tokens and experts are compared.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from kernels.linear import linear
from kernels.norm import rms_norm

SMALLEST_SQUARE = 1e-12  # added to the mean square of a vector, so that zero has a direction of length zero


def noisy_logits(logits_TE: Tensor, spread_TE: Tensor, normal_TE: Tensor) -> Tensor:
    """logits + normal * softplus(spread): noise whose size each token learns for each expert.

    Source: Shazeer et al., arXiv 1701.06538, equations 3 to 5, the gate of GShard-style layers. With softmax scores that are
    renormalised over the selected experts, the weights are that paper's softmax(KeepTopK(H, k)). `logits_TE` is x W_g^T,
    `spread_TE` x W_noise^T, and `normal_TE` holds independent standard normal numbers, constants to autograd.
    """
    return logits_TE + normal_TE * functional.softplus(spread_TE)


def cosine_logits(x_TD: Tensor, projection_RD: Tensor, experts_ER: Tensor, log_temperature_1: Tensor) -> Tensor:
    """cos(P x, e) / temperature, (T, E) float32 (float64 for float64): how near a token's direction is to each expert's.

    Source: Chi et al., "On the Representation Collapse of Sparse Mixture of Experts" (X-MoE), arXiv 2204.09179, section 3. The
    temperature is learned by its logarithm, which keeps it positive. A row's bits do not depend on the other rows.
    """
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    tokens_TR = directions(linear(x_TD, projection_RD, dtype=wide))
    experts_ER = directions(experts_ER.to(wide))
    return linear(tokens_TR, experts_ER) / log_temperature_1.to(wide).exp()


def directions(x_NR: Tensor) -> Tensor:
    """x / |x| for every row; that of a row of zeros is zero."""
    size = x_NR.shape[1]
    # The mean square of x / rms(x) is 1, so its length is the root of R.
    return rms_norm(x_NR, _ones(size, x_NR.dtype, x_NR.device), SMALLEST_SQUARE) / math.sqrt(size)


@cache
def _ones(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Made once: a kernel may read the weight of a norm before what was launched right before it is done (launches.py)."""
    with torch.inference_mode(False):  # whoever asks first, training reads it too
        return torch.ones(size, dtype=dtype, device=device)
