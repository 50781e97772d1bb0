"""The value model of PPO: a linear map of the policy's hidden states at several depths, fitted by least squares.

It shares the policy's trunk. A separate value model would be a second sparse model with experts to place, twice the memory and
twice the passes, while these values come with the pass that gives the log-probabilities. A rank keeps P^2 numbers of float64:
134 MB where a hidden state has 1,024.

Why it is not trained by gradient steps: such a head predicts nothing (measured in tests/benchmarks/rl.md), for three reasons.

- The last hidden state is trained to predict the next token and knows little of the reward. Several depths together know
  more, so the head reads DEPTHS of them.
- A round has some hundred rewards, each shared by the tokens of a response. Such correlated inputs would need far more gradient
  steps than a policy takes. So the head solves for the end point directly: ridge regression on all data so far, in which older
  updates count less (the linear baseline of 1604.06778, with forgetting).
- How much of a fit is noise changes from round to round. So each new batch, before it is learned, scores several ridges, among
  them an infinite one that predicts only the mean, and the best one so far gives the values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from parallel.topology import World

DEPTHS = 4  # hidden states that the head reads: of layers spread evenly, the last one among them
# Relative to the mean square of the inputs, which is 1. The most cautious first: it gives the values until others are judged.
RIDGES = (math.inf, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
EPS = 1e-6


def depths_read(num_layers: int) -> tuple[int, ...]:
    """The layers whose output the head reads."""
    count = min(DEPTHS, num_layers)
    return tuple(num_layers * (place + 1) // count - 1 for place in range(count))


class ValueHead:
    """value = weight . inputs, the same on every rank. It starts at 0.

    Shape letters: P inputs, the hidden states of all depths, each scaled to mean square 1, and a constant; C ridges. `decay` is
    what the tokens of an update still count in the fit of the next one.
    """

    def __init__(self, hidden_size: int, num_layers: int, world: World, decay: float) -> None:
        self.world, self.decay = world, decay
        self.depths = depths_read(num_layers)
        inputs = hidden_size * len(self.depths) + 1
        self.weight_P = torch.zeros(inputs, device=world.device)
        zeros = partial(torch.zeros, dtype=torch.float64, device=world.device)
        self._products_PP, self._targets_P = zeros((inputs, inputs)), zeros(inputs)
        self._weights_CP, self._errors_C = zeros((len(RIDGES), inputs)), zeros(len(RIDGES))
        self.drop()

    def inputs(self, hidden_BSD: Sequence[Tensor]) -> Tensor:
        """(B, S, P) float32, from the hidden states of `depths`."""
        scaled = [h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + EPS) for h in (x.float() for x in hidden_BSD)]
        return torch.cat([*scaled, torch.ones_like(scaled[0][..., :1])], dim=-1)

    def __call__(self, inputs_BSP: Tensor) -> Tensor:
        """values_BS: what the policy may still expect before each target."""
        values_BS: Tensor = inputs_BSP @ self.weight_P
        return values_BS

    @torch.no_grad()
    def observe(self, inputs_BSP: Tensor, returns_BS: Tensor, weights_BS: Tensor) -> None:
        """Takes in what the learned tokens of this rank, those with a weight, returned; `step` learns it."""
        learned_BS = weights_BS > 0
        x_TP, y_T, w_T = (t[learned_BS].double() for t in (inputs_BSP, returns_BS, weights_BS))
        weighted_TP = x_TP * w_T[:, None]
        self._new_PP += weighted_TP.T @ x_TP
        self._new_P += weighted_TP.T @ y_T
        self._new_square += (w_T * y_T.square()).sum()

    def step(self) -> None:
        """Learns what was observed on all ranks, if anything was. Collective."""
        new_PP, new_P, square = (self.world.sum(t) for t in (self._new_PP, self._new_P, self._new_square))
        count = new_PP[-1, -1]  # the constant input is 1
        if count > 0:
            # The mean squared error of each fit on tokens that it has not seen, from sums alone.
            products_C = ((self._weights_CP @ new_PP) * self._weights_CP).sum(dim=1)
            errors_C = (square - 2 * self._weights_CP @ new_P + products_C) / count
            self._errors_C = self.decay * self._errors_C + errors_C
            self._products_PP = self.decay * self._products_PP + new_PP / count
            self._targets_P = self.decay * self._targets_P + new_P / count
            self._weights_CP = torch.stack([self._fit(ridge) for ridge in RIDGES])
            errors = self._errors_C.tolist()
            self.weight_P = self._weights_CP[errors.index(min(errors))].float()
        self.drop()

    def _fit(self, ridge: float) -> Tensor:
        """argmin_w sum of (w . x - y)^2 + ridge * mass * |w|^2, the constant's weight free."""
        mass = self._products_PP[-1, -1]
        if math.isinf(ridge):
            weight_P = torch.zeros_like(self._targets_P)
            weight_P[-1] = self._targets_P[-1] / mass
            return weight_P
        penalty_P = torch.full_like(self._targets_P, ridge) * mass
        penalty_P[-1] = 0
        fitted: Tensor = torch.linalg.solve(self._products_PP + penalty_P.diag(), self._targets_P)
        return fitted

    def drop(self) -> None:
        """Forgets what was observed and not learned."""
        self._new_PP, self._new_P = torch.zeros_like(self._products_PP), torch.zeros_like(self._targets_P)
        self._new_square = torch.zeros((), dtype=torch.float64, device=self.world.device)

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of everything to go on with, the same on every rank. Views."""
        yield "value.weight", self.weight_P
        yield "value.weights", self._weights_CP
        yield "value.errors", self._errors_C
        yield "value.products", self._products_PP
        yield "value.targets", self._targets_P
