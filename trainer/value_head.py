"""The value model of PPO: one linear map of the policy's last hidden state.

It shares the policy's trunk. A value model of its own would be a second sparse model with experts to place, twice the memory
and twice the passes, while its D + 1 numbers come with the pass that gives the log-probabilities. The price is that its loss
moves the trunk too, as in PPO's paper (1707.06347, section 5), so it enters with a coefficient.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from parallel.adamw import AdamWSettings, zero_state
from parallel.topology import World


class ValueHead:
    """value = weight . hidden + bias in float32, the same on every rank. It starts at 0.

    It has an AdamW of its own, because a rate that suits the policy is far too small for numbers that start from nothing. Its
    gradient is not part of the joint norm.
    """

    def __init__(self, hidden_size: int, world: World, settings: AdamWSettings, lr: float) -> None:
        self.world = world
        self.weight_D, self.bias_1 = (torch.zeros(n, device=world.device, requires_grad=True) for n in (hidden_size, 1))
        self._named = {"value.weight": self.weight_D, "value.bias": self.bias_1}
        self._optimizer = torch.optim.AdamW(
            list(self._named.values()), lr=lr, betas=settings.betas, eps=settings.eps, weight_decay=0.0
        )
        for parameter in self._named.values():
            self._optimizer.state[parameter].update(zero_state(parameter))

    def __call__(self, hidden_BSD: Tensor) -> Tensor:
        """values_BS: what the policy may still expect before each target."""
        values_BS: Tensor = hidden_BSD.float() @ self.weight_D + self.bias_1
        return values_BS

    def step(self) -> None:
        """One update, if the objective asked for values; local losses were multiplied by the world size. Collective."""
        for parameter in self._named.values():
            if parameter.grad is not None:
                parameter.grad = self.world.sum(parameter.grad) / self.world.size
        self._optimizer.step()
        self.drop()

    def drop(self) -> None:
        """Forgets the gradients."""
        self._optimizer.zero_grad()

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of everything to go on with, the same on every rank. Views."""
        for name, parameter in self._named.items():
            yield name, parameter.detach()
            for key, tensor in self._optimizer.state[parameter].items():
                yield f"{name}.{key}", tensor
