"""One rank's part of the training state, from its creation to its checkpoints: weights, optimizers, selection bias, plans."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kernels.errors import UserError
from parallel.adamw import MOMENTS, AdamWSettings
from parallel.dense import DenseZeRO
from parallel.expert_arena import ExpertShape
from parallel.expert_shards import PARTS, ExpertShards
from parallel.hooks import Hooks, message_hooks
from parallel.materialisation import UNKNOWN, Materialisation, MaterialisationSettings
from parallel.offload import expert_optimizer
from parallel.placement import TransportKind, even_owners
from parallel.policies import POLICIES
from parallel.schedule.pipeline import OFF, Degrees
from parallel.schedule.slices import PLACES_OF_LAYER
from parallel.scheduling import Scheduling
from parallel.topology import World
from parallel.transport import alternatives, transport_kind
from trainer import checkpoint
from trainer.checkpoint import CheckpointMeta
from trainer.config.model import ModelConfig, NoisyTopKRouter
from trainer.config.run import BalanceConfig, ParallelConfig
from trainer.guard import Guard
from trainer.model.gate import NoisyGate
from trainer.model.initial import initial_expert
from trainer.model.transformer import Transformer
from trainer.reference import Weights, read_reference
from trainer.value_head import ValueHead

OWNERS, LOADS, MACHINE = "placement.owners", "placement.loads", "placement.machine"  # names in a checkpoint


@dataclass(frozen=True)
class TrainerSpec:
    """What a rank needs to build its trainer; it travels from the driver to the ranks."""

    model: ModelConfig
    adamw: AdamWSettings
    balance: BalanceConfig
    parallel: ParallelConfig
    dtype: str  # "float32" or "bfloat16"
    recompute: bool
    micro_rows: int
    batch_invariant: bool  # forward passes give a token the bits that an engine gives it (kernels/linear.py)
    temperature: float  # divides the logits; 1 except in RL, where it is the sampling temperature
    freeze_router: bool  # the gates' weights keep their values; the selection bias follows `balance`
    value_decay: float | None  # what an update still counts in the next fit of the value head; None: there is no head
    seed: int
    guard: Guard


class TrainerState:
    """Dense module under ZeRO, this rank's experts, and the selection bias. Every method is collective: all ranks call it."""

    def __init__(self, spec: TrainerSpec, world: World, folder: Path | None) -> None:
        """`folder`: for what is measured."""
        config = spec.model
        dtype = getattr(torch, spec.dtype)
        self.spec, self.world = spec, world
        shape = ExpertShape(config.num_moe_layers, config.num_experts, config.hidden_size, config.expert_hidden_size)
        owner_LE = np.tile(even_owners(config.num_experts, world.size), (config.num_moe_layers, 1))
        initial, owned = partial(initial_expert, config, spec.seed), owner_LE.size // world.size
        offload, nvme_dir = spec.parallel.offload, spec.parallel.nvme_dir
        optimizer = expert_optimizer(offload, nvme_dir, owned, shape.parts, spec.adamw, world.device)
        kind = transport_kind(spec.parallel.transport, world)
        fixed = fixed_degrees(spec.parallel, kind)
        hooks = hooks_of(spec.parallel, kind, dtype)
        self.experts = ExpertShards(shape, initial, owner_LE, 0, world, dtype, optimizer, kind, hooks)
        self.materialisation = Materialisation(self.experts, materialisation_settings(spec.parallel, config.top_k))
        self.model = Transformer(config, batch_invariant=spec.batch_invariant)
        self.model.initialize(spec.seed)
        self.model.to(world.device)
        slices = spec.parallel.schedule != "off" and world.size > 1
        places = PLACES_OF_LAYER * config.num_moe_layers if slices else 0
        self.dense = DenseZeRO(self.model, world, dtype, spec.adamw, spec.parallel.zero_stage, self._frozen(), places, kind)
        kinds = alternatives(spec.parallel.transport, kind)
        self.scheduling = Scheduling(self.experts.arena, fixed, config.top_k, folder, kinds, self.dense.slices)
        self.bias_LE = torch.zeros(config.num_moe_layers, config.num_experts, device=world.device)
        decay = spec.value_decay
        self.value_head = None if decay is None else ValueHead(config.hidden_size, config.num_layers, world, decay)
        self.reference: Weights | None = None
        self.updates = 0

    @property
    def noisy(self) -> bool:
        """Whether learning draws noise for the router; passes that must equal a generation's have none."""
        return isinstance(self.spec.model.router, NoisyTopKRouter) and not self.spec.batch_invariant

    def _frozen(self) -> list[Tensor]:
        gates = self.model.gates()
        if self.spec.freeze_router:
            return [parameter for gate in gates for parameter in gate.parameters()]
        return [] if self.noisy else [gate.noise for gate in gates if isinstance(gate, NoisyGate)]

    @property
    def weights(self) -> Weights:
        """What the policy computes with at this moment."""
        return Weights(self.model, self.experts.arena, self.bias_LE)

    # ------------------------------------------------------------ into checkpoints, and out of them

    def shared_state(self, with_moments: bool) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of what is the same on every rank: neither dense parameters nor experts."""
        yield "bias", self.bias_LE
        if with_moments:
            yield OWNERS, torch.from_numpy(self.experts.owner_LE)
            yield LOADS, self.materialisation.state()
            yield MACHINE, self.materialisation.machine()
            if self.value_head is not None:
                yield from self.value_head.named_state()

    def state_to_save(self, with_moments: bool) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of what lies in memory; what all ranks hold comes from one of them only, in turn."""
        for index, (name, tensor) in enumerate(self.shared_state(with_moments)):
            if index % self.world.size == self.world.rank:
                yield name, tensor
        for name, start, values in self.dense.fragments(with_moments):
            yield checkpoint.fragment_name(name, start), values
        if self.spec.parallel.offload != "nvme":
            yield from self.experts.named_state(with_moments)

    def state_on_disk(self, with_moments: bool) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of this rank's experts if they lie on its disk; each is valid until the next is asked for."""
        if self.spec.parallel.offload == "nvme":
            yield from self.experts.named_state(with_moments)

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], with_moments: bool, updates: int) -> None:
        """Sets selection bias, dense parameters, experts and, with moments, the value head, bit for bit.

        The owners must be these already. `updates`: optimizer steps taken so far.
        """
        self.bias_LE = tensors["bias"].to(self.world.device)
        self.experts.load_state(tensors, with_moments)
        if with_moments and self.value_head is not None:
            for name, tensor in self.value_head.named_state():
                tensor.copy_(tensors[name])
        self.dense.load(tensors, with_moments, updates if with_moments else 0)
        self.experts.set_step_count(updates if with_moments else 0)
        self.updates = updates if with_moments else 0

    def load(self, folder: Path, with_moments: bool) -> CheckpointMeta:
        """Loads a checkpoint that any number of ranks wrote. Without moments the optimizer and the placement start again."""
        meta = checkpoint.read_meta(folder, self.spec.model)
        checkpoint.verify(folder, self.world)
        self.restore(checkpoint.read(folder, dict(self.shapes(with_moments))), with_moments, meta.updates)
        return meta

    def restore(self, tensors: Mapping[str, Tensor], with_moments: bool, updates: int) -> None:
        """`load` of a checkpoint's tensors, after this many updates.

        With moments, the same number of ranks gets the same owners and copies, so it goes on bit for bit.
        """
        same_ranks = True
        if with_moments:
            owner_LE = tensors[OWNERS].long()
            same_ranks = owner_LE.unique(return_counts=True)[1].unique().numel() == 1
            same_ranks &= owner_LE.unique().tolist() == list(range(self.world.size))
            if same_ranks:
                self.experts.reshard(owner_LE.numpy())
        self.load_state(tensors, with_moments, updates)
        if with_moments:
            machine = tensors[MACHINE]  # of other ranks: other links, other room, to be measured again
            self.materialisation.load_state(tensors[LOADS], machine if same_ranks else torch.full_like(machine, UNKNOWN))

    def shapes(self, with_moments: bool) -> Iterator[tuple[str, Sequence[int]]]:
        """(name, shape) of what `restore` takes out of a checkpoint."""
        shape = self.experts.arena.shape
        masters: dict[str, Sequence[int]] = {
            f"dense.{name}": parameter.shape for name, parameter in self.model.named_parameters()
        }
        for layer, expert in itertools.product(range(shape.layers), range(shape.experts)):
            masters |= {f"experts.{layer}.{expert}.{part}": size for part, size in zip(PARTS, shape.parts, strict=True)}
        yield "bias", self.bias_LE.shape
        yield from masters.items()
        if with_moments:
            yield from ((f"{name}.{moment}", size) for name, size in masters.items() for moment in MOMENTS)
            yield OWNERS, self.experts.owner_LE.shape
            yield LOADS, self.materialisation.state().shape
            yield MACHINE, self.materialisation.machine().shape
            if self.value_head is not None:
                yield from ((name, tensor.shape) for name, tensor in self.value_head.named_state())

    def keep_reference(self, folder: Path) -> None:
        """From here on `predict` also asks the policy of this checkpoint, which takes the room of another set of weights."""
        dtype = getattr(torch, self.spec.dtype)
        self.reference = read_reference(
            folder, self.spec.model, self.spec.batch_invariant, dtype, self.world, self.experts.arena.hooks
        )

    @torch.no_grad()
    def reset_optimizer(self) -> None:
        """Moments and step count become zero, as before the first update; weights stay."""
        self.experts.reset_optimizer()
        for state in self.dense.zero.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
        self.updates = 0


def materialisation_settings(config: ParallelConfig, top_k: int) -> MaterialisationSettings:
    return MaterialisationSettings(
        policy=POLICIES[config.policy],
        overlap=None if config.overlap == "auto" else config.overlap,
        memory=None if config.memory == "auto" else config.memory,
        rematerialise=config.rematerialise,
        reshard_every=config.reshard_every,
        calibrate=config.calibrate,
        top_k=top_k,
    )


def fixed_degrees(config: ParallelConfig, kind: TransportKind) -> Degrees | None:
    """In how many chunks layers run; None is to be planned. Raises UserError where chunks are asked for and tokens do not
    travel as messages."""
    if config.schedule == "auto":
        return None
    if config.schedule == "off":
        return OFF
    if kind == "peer_memory" and config.schedule > 1:
        raise UserError(
            f"parallel.schedule={config.schedule} cuts layers into chunks of messages, but the ranks read each other's memory, "
            "where a layer is whole; set parallel.transport=messages, or parallel.schedule=auto"
        )
    return Degrees(config.schedule, config.schedule)


def hooks_of(config: ParallelConfig, kind: TransportKind, dtype: torch.dtype) -> Hooks:
    """Raises UserError where messages are to be rounded and tokens do not travel as messages."""
    if kind == "peer_memory" and config.message_dtype != "auto":
        raise UserError(
            f"parallel.message_dtype={config.message_dtype} rounds rows on their way, but the ranks read each other's memory; "
            "set parallel.transport=messages, or parallel.message_dtype=auto"
        )
    return message_hooks(config.message_dtype, dtype)


def choose_dtype(asked: str) -> tuple[str, str]:
    """(dtype, why), for "auto", "float32" or "bfloat16"."""
    if asked != "auto":
        return asked, "as configured"
    if torch.cuda.is_available():
        return "bfloat16", "a GPU multiplies it at full speed; master weights stay float32"
    return "float32", "CPUs have no fast bfloat16"
