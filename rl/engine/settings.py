"""What an engine needs to know besides the model, and which models can generate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kernels.errors import UserError
from rl.engine.sampler import Sampling
from rl.engine.stops import Stops
from rl.trajectory import Sample
from trainer.config.model import ExpertChoiceRouter, ModelConfig


def check_generates(config: ModelConfig) -> None:
    """Raises UserError for a model whose tokens need those after them."""
    if isinstance(config.router, ExpertChoiceRouter):
        raise UserError(
            "model.router.kind=expert_choice lets experts choose among all tokens of a batch, those after a token included, "
            "and in generation there are none yet: such a model cannot generate, nor go into RL; pretrain one with "
            "model.router.kind=top_k, noisy_top_k, cosine or group_limited"
        )


@dataclass(frozen=True)
class EngineSettings:
    """What an engine needs to know besides the model; picklable, the same for every engine of a pool."""

    slots: int  # sequences decoded at once
    max_length: int  # prompt and response tokens of a sequence
    max_new_tokens: int  # response tokens of a sample, interruptions included
    cache_tokens: int | None  # that the cache holds; None: max_length for every slot
    sampling: Sampling
    eos_id: int
    stop_ids: frozenset[int] = frozenset()  # tokens that end a turn besides <eos>
    stops: Stops | None = None  # and strings that do
    record_routing: bool = False  # keeps the experts of every token for the trainer

    def ends(self, token: int) -> bool:
        """Whether the token ends a turn, whatever text is before it."""
        return token == self.eos_id or token in self.stop_ids

    def check(self, samples: Sequence[Sample]) -> None:
        """Raises UserError when one may grow beyond `max_length`."""
        for sample in samples:
            assert not sample.done, f"sample {sample.uid} is {sample.status} already"
            if len(sample.prompt_ids) + self.max_new_tokens > self.max_length:
                raise UserError(
                    f"a prompt of {len(sample.prompt_ids)} tokens and rollout.max_new_tokens = {self.max_new_tokens} "
                    f"exceed loop.sequence_length = {self.max_length}; raise it or lower rollout.max_new_tokens"
                )
