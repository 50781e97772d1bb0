"""The record that carries tokens into a training step, in all stages: pretraining, supervised warm-up and RL."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TrainBatch:
    """Packed rows. A position predicts `targets` from what stands at and before it in the same document.

    `weights` are the shares of the loss, not normalised: the trainer minimises sum(weights * loss) / sum(weights) over all
    ranks. 1 for every learned token gives the token mean; 1 / length gives the mean over sequences. 0 learns nothing. A
    `denominator`, a number of the whole batch whatever rows are at hand, takes the place of sum(weights).
    """

    tokens_BS: Tensor  # int64
    targets_BS: Tensor  # int64; the next token
    documents_BS: Tensor  # int32; which document a token belongs to; -1 is padding
    weights_BS: Tensor  # float32
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # (B, S) each, for the objective: advantages, log-probs
    denominator: float | None = None
    # uint8 or int16; experts that were chosen when the tokens were generated, to be replayed (kernels/replay.py)
    routed_BSLK: Tensor | None = None
    host_documents_BS: Tensor | None = None  # `documents_BS` before it went to a device, so that nobody waits to read it there

    @property
    def num_rows(self) -> int:
        return self.tokens_BS.shape[0]

    def rows(self, first: int, last: int) -> TrainBatch:
        """Rows first..last-1, as views."""
        on_host = None if self.host_documents_BS is None else self.host_documents_BS[first:last]
        return replace(self._map(lambda t: t[first:last]), host_documents_BS=on_host)

    def padded_from(self, row: int) -> TrainBatch:
        """Row `row` and all after it are padding, which teaches nothing, counts nowhere, and goes to no expert."""
        kept_B1 = torch.arange(self.num_rows)[:, None] < row
        return replace(self, documents_BS=self.documents_BS.where(kept_B1, -1), weights_BS=self.weights_BS * kept_B1)

    def to(self, device: torch.device) -> TrainBatch:
        moved = self._map(lambda t: t.to(device, non_blocking=True))
        return moved if self.documents_BS.is_cuda else replace(moved, host_documents_BS=self.documents_BS)

    def _map(self, change: Callable[[Tensor], Tensor]) -> TrainBatch:
        return replace(
            self,
            tokens_BS=change(self.tokens_BS),
            targets_BS=change(self.targets_BS),
            documents_BS=change(self.documents_BS),
            weights_BS=change(self.weights_BS),
            extras={name: change(value) for name, value in self.extras.items()},
            routed_BSLK=None if self.routed_BSLK is None else change(self.routed_BSLK),
        )


@dataclass(frozen=True)
class Predictions:
    """What a forward pass says of every position; float32, (B, S) except for `inputs_BSP`."""

    logprobs_BS: Tensor  # of the targets
    entropy_BS: Tensor  # of the next-token distribution
    values_BS: Tensor | None = None  # of the value head, where there is one
    inputs_BSP: Tensor | None = None  # of the value head
    replaced_BS: Tensor | None = None  # of a replay: the share of a token's experts that the gates would not have chosen


@dataclass(frozen=True)
class TokenLoss:
    """What an objective returns: a loss for each position, and what to report; all (B, S) float32."""

    loss_BS: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    returns_BS: Tensor | None = None  # what the value head is to predict


# A pure function; it travels to the ranks by pickle.
Objective = Callable[[Predictions, TrainBatch], TokenLoss]


def cross_entropy(predicted: Predictions, batch: TrainBatch) -> TokenLoss:
    """The objective of pretraining and of the supervised warm-up: the negative log-probability of the next token."""
    return TokenLoss(loss_BS=-predicted.logprobs_BS)
