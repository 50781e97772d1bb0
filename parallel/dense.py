"""The dense parameters: data parallel, optimizer state sharded by DeepSpeed ZeRO, clipped by the joint gradient norm.

Gradients of several ranks are averaged in slices under the backward pass (gradient_slices.py) or, without them, by ZeRO after
it.

Source: Rajbhandari et al., "ZeRO", arXiv 1910.02054. DeepSpeed sees the dense module only; experts live in `ExpertShards`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parallel.adamw import MOMENTS, AdamW, AdamWSettings, adamw, set_lr, zero_state
from parallel.expert_shards import ExpertShards
from parallel.gradient_slices import GradientSlices
from parallel.placement import TransportKind
from parallel.topology import World


def import_deepspeed() -> Any:
    """The package, without what training here does not use. After RANK and WORLD_SIZE are set; it also takes a second."""
    import deepspeed
    from deepspeed.runtime import compiler
    from deepspeed.runtime.zero import utils

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # The shared-memory all-reduce of the CPU backend serves inference only, and would be compiled on first use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # ZeRO imports Muon whatever the optimizer is, and Muon imports all of torch.compile by decorating functions with it.
    compiler.compile = lambda: lambda function: function
    utils.ZERO_SUPPORTED_OPTIMIZERS = [AdamW]  # it looks for the class itself, not for what is derived from it
    return deepspeed


class DenseZeRO:
    """A dense module under ZeRO stage 1 or 2. ZeRO averages gradients over the ranks, so a rank passes its part of the global
    loss times the world size."""

    def __init__(
        self,
        module: nn.Module,
        world: World,
        dtype: torch.dtype,
        settings: AdamWSettings,
        stage: int,
        frozen: Sequence[Tensor],
        places: int,
        kind: TransportKind,
    ) -> None:
        """Parameters of the module that are `frozen` keep their values: their gradients are 0 and they never decay.

        ZeRO keeps their masters and moments like all others, so checkpoints are the same with and without. `places`: of the
        backward pass where slices of gradients may be sent, by `kind`; with none, ZeRO reduces after it.
        """
        deepspeed = import_deepspeed()
        deepspeed.init_distributed(dist_backend="nccl" if world.device.type == "cuda" else "gloo", verbose=False)
        for parameter in frozen:
            parameter.register_hook(torch.zeros_like)  # before ZeRO sees the gradient
        self.world = world
        self.clip_norm = settings.clip_norm
        self.module = module
        self.engine, self.zero, _, _ = deepspeed.initialize(
            model=module,
            optimizer=adamw(list(module.parameters()), settings, frozen),
            config={
                "train_micro_batch_size_per_gpu": 1,  # DeepSpeed asks for it; rows are counted by the trainer
                "gradient_accumulation_steps": 1,
                "gradient_clipping": settings.clip_norm,
                # Slices and a single rank need no bucket to reduce in, which ZeRO makes in every backward pass, nor its hooks
                # on every gradient, which ask whether the bucket is full.
                "zero_optimization": {"stage": stage, "contiguous_gradients": not (places or world.size == 1)},
                # The trainer looks at the norm before it asks for a step, which tells as much as a look at every tensor.
                "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": False},
                "steps_per_print": 10**12,
            },
        )
        self.slices = GradientSlices(list(module.parameters()), world, places, kind) if places else None
        self._share_norm_with_experts()
        self._time_communication()
        self._create_state()

    def _share_norm_with_experts(self) -> None:
        """ZeRO clips by `scaled_global_norm`; from here on that is what `step` is told, of dense and expert parameters."""
        self._norm = math.nan
        # Filled there, since a copy of the number would wait for all that the device has to do.
        self.zero.scaled_global_norm = lambda *_, **__: torch.full((), self._norm, device=self.world.device)

    def _time_communication(self) -> None:
        """What computation waits for: slices that are left when the backward pass is over, or else ZeRO's reductions, which
        stand between computations as its gathering of updated weights does."""
        from deepspeed.runtime.zero.stage_1_and_2 import OPTIMIZER_ALLGATHER_TIMER
        from deepspeed.utils.timer import NoopTimer

        exposed, reduce = self.world.exposed, self.zero.average_tensor

        class Timers(NoopTimer):
            def __call__(self, name: str) -> Any:
                return exposed if name == OPTIMIZER_ALLGATHER_TIMER else super().__call__(name)

        def timed(*arguments: Any) -> None:
            with exposed:
                reduce(*arguments)

        self.zero.timers, self.zero.average_tensor = Timers(), timed
        if self.slices is not None:
            self._hand_over(self.slices.finish)
        elif self.world.size == 1:
            self._hand_over(lambda: None)

    def _hand_over(self, finish: Callable[[], None]) -> None:
        """ZeRO's own reduction has two ends: it is told of a gradient that is complete, and behind the backward pass to reduce
        what is left. At the second it now finds all gradients averaged, and goes on with those of its partition. On one rank
        they always are, and ZeRO would copy each into a bucket to find that out."""
        self.zero.reduce_ready_partitions_and_remove_grads = lambda parameter, group: None
        self.zero.reduce_ipg_grads = finish

    def _create_state(self) -> None:
        """ZeRO fills AdamW's state at the first step; a checkpoint may come before it."""
        optimizer = self.zero.optimizer
        for group in optimizer.param_groups:
            for flat in group["params"]:
                optimizer.state[flat].update(zero_state(flat))
        self.zero._lazy_init_hp_params_optimizer_state()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Backward of one micro-batch; gradients are reduced over the ranks in the `last` one of a step, or under stage 2 in
        each."""
        self.engine.set_gradient_accumulation_boundary(last)
        if self.slices is not None:
            self.slices.begin(reduces=last or self.zero.partition_gradients)
        self.engine.backward(loss, scale_wrt_gas=False)

    def squared_norm(self, experts: ExpertShards) -> Tensor:
        """Of dense and expert gradients together, float64, the same on all ranks. Collective; nobody waits for the device."""
        return self._squared_norm() + experts.squared_norm()

    def _squared_norm(self) -> Tensor:
        """Of the averaged dense gradients, float64: every rank adds up its partition, in a few kernels for all tensors."""
        parts = [part for group in self.zero.averaged_gradients.values() for part in group]
        nothing = torch.zeros((), dtype=torch.float64, device=self.world.device)  # where there are more ranks than numbers
        return self.world.sum(torch.stack([nothing, *torch._foreach_norm(parts, 2, torch.float64)]).square().sum())

    def step(self, lr: float, norm: float, experts: ExpertShards) -> None:
        """Clips dense and expert gradients by their joint `norm`, which is finite, and updates both.

        Experts first: that keeps a device busy while the host starts the many small kernels of ZeRO.
        """
        assert math.isfinite(norm), norm
        experts.step(lr, scale=min(1.0, self.clip_norm / (norm + 1e-6)))
        self._norm = norm
        set_lr(self.zero.optimizer, lr)
        self.engine.step()

    def drop(self, experts: ExpertShards) -> None:
        """Forgets all gradients; nothing is updated. Collective."""
        self._norm = -1.0  # invalid to ZeRO, which then clears what it has gathered, if it looks
        self.zero.check_grad_overflow = True
        self.engine.step()
        self.zero.check_grad_overflow = False
        assert self.zero.overflow, "this DeepSpeed has made an update where it was told of an invalid norm"
        experts.drop_gradients()

    # ------------------------------------------------------------ state, by parameter name

    def fragments(self, with_moments: bool) -> Iterator[tuple[str, int, Tensor]]:
        """(name, first element, float32 values) of what this rank's partition has of each flattened parameter; of its moments,
        (name.moment, ...). Views; all ranks together have every element once. Local."""
        for name, parameter in self.module.named_parameters():
            own = _fragment(parameter)
            if own is not None:
                start = own.lp_fragment_address.start
                yield f"dense.{name}", start, own.get_hp_fragment(None).detach()
                for key in MOMENTS if with_moments else ():
                    yield f"dense.{name}.{key}", start, own.get_hp_fragment(key).detach()

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], with_moments: bool, steps: int) -> None:
        """Sets masters, rounded weights and, if asked, moments and step count, from whole tensors named as above."""
        for name, parameter in self.module.named_parameters():
            value = tensors[f"dense.{name}"]
            parameter.copy_(value)
            own = _fragment(parameter)
            if own is None:
                continue
            start, length = own.lp_fragment_address.start, own.lp_fragment_address.numel
            own.get_hp_fragment(None).copy_(value.flatten()[start : start + length])
            if with_moments:
                for key in MOMENTS:
                    moment = tensors[f"dense.{name}.{key}"].flatten()[start : start + length]
                    own.get_hp_fragment(key).copy_(moment)
        if with_moments:
            for state in self.zero.optimizer.state.values():
                state["step"].fill_(steps)


def _fragment(parameter: Any) -> Any:
    """DeepSpeed's record of the part of a parameter that lies in this rank's partition; None if there is none."""
    return parameter._hp_mapping
