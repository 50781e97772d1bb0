"""What a pretraining would take on a cluster: step time, exposed communication and memory, for each layout that Tessera can
run. Predicted from the speeds of a machine; nothing is started.

MoE layers and the dense gradients under their backward pass are planned and simulated as in a run (predicted_layer.py): chunks,
copies and slices on one timeline. All products run at one rate, optimizers at the speed of memory, and ZeRO's gathering of new
weights is not hidden. LEFT_OUT says what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import product

import numpy as np
import torch

from kernels.errors import UserError
from launch.benchmarks.placement import owners
from launch.benchmarks.traces import draw
from launch.machines import BYTES, layer_costs, read_group, topology_of
from launch.predicted_layer import (
    DenseBytes,
    LayerPrediction,
    PassTime,
    chosen_transport,
    gradient_slices,
    predicted_layer,
    typical_slices,
)
from parallel.layer_cost import LayerCosts, Setting, hidden_copies
from parallel.placement import Budget, Floats, Topology, TransportKind
from parallel.profiling import SHARE_FOR_COPIES
from parallel.schedule.cost import Line
from parallel.schedule.gradients import Partition
from parallel.schedule.pipeline import OFF, Degrees
from parallel.schedule.timeline import Timeline
from parallel.schedule.transports import Choice
from parallel.transport import alternatives, auto_kind
from trainer.config.model import ModelConfig
from trainer.config.plan import PlanConfig
from trainer.config.run import ParallelConfig
from trainer.estimate import GIB, Memory, flops_per_token, memory_per_rank
from trainer.model.transformer import ParameterCounts, Transformer, parameter_counts
from trainer.worker import check_division

LEFT_OUT = (
    "elementwise work, launches and idle gaps between kernels, ranks that are slower than others, congestion on the network, "
    "owners of experts that move, reading data, checkpoints and evaluation"
)
TRACE_STEPS = 8
SKEWED = "zipf"  # what loads are like without balancing
NEAR = 1.02  # of the least step time: a difference that a prediction cannot tell
LIBRARIES_GIB = 2.0  # of a GPU's memory: contexts, communication buffers, and what allocators cannot use
MICRO_ROWS = (1, 2, 4, 8)
EP, FSSDP = (read_group("parallel", name, ParallelConfig) for name in ("ep", "fssdp"))
KINDS = (EP, FSSDP, FSSDP.model_copy(update={"rematerialise": True}))
STATE_BYTES = 38  # that AdamW and the norm move for a parameter: float32 master, gradient and moments, weights in bfloat16
HOST_STATE_BYTES = 30  # and AdamW alone


@dataclass(frozen=True)
class Layout:
    """How a run would be laid out, in options of launch.pretrain."""

    parallel: ParallelConfig
    micro_rows: int
    recompute: bool

    @property
    def name(self) -> str:
        """What tells it from others, beside how much goes through the model at once."""
        parts = ["ep" if self.parallel.policy == "plain" else "fssdp"]
        parts += ["rematerialise"] * self.parallel.rematerialise + ["offload"] * (self.parallel.offload == "cpu")
        return " + ".join(parts)

    @property
    def options(self) -> list[str]:
        return [
            f"parallel={'ep' if self.parallel.policy == 'plain' else 'fssdp'}",
            *(["parallel.rematerialise=true"] if self.parallel.rematerialise else []),
            *(["parallel.offload=cpu"] if self.parallel.offload == "cpu" else []),
            f"parallel.zero_stage={self.parallel.zero_stage}",
            f"train.micro_rows={self.micro_rows}",
            f"train.recompute={str(self.recompute).lower()}",
        ]


@dataclass(frozen=True)
class StepTime:
    """Seconds of one update."""

    products_s: float  # of all matrix products, on the busiest rank of each layer, with the sums of their gradients
    tokens_s: float  # that their exchanges and chunks add, beyond what products hide
    copies_s: float  # that copies of experts add, beyond what hides them
    gradients_s: float  # that dense gradients add, beyond what hides them; and ZeRO's new weights
    offload_s: float  # gradients of experts on their way to the host, as far as nothing hides it
    optimizer_s: float

    @property
    def exposed_s(self) -> float:
        """Communication that is waited for."""
        return self.tokens_s + self.copies_s + self.gradients_s + self.offload_s

    @property
    def total_s(self) -> float:
        return self.products_s + self.exposed_s + self.optimizer_s


@dataclass(frozen=True)
class Prediction:
    layout: Layout
    memory: Memory
    room_gib: float  # of a GPU, libraries aside
    layer: LayerPrediction
    slices: Partition  # of the dense gradients, in one backward pass
    step: StepTime
    ideal_s: float  # of the products alone, if every rank had equally many
    tokens: int  # of a step
    under_skewed: Callable[[], StepTime]

    @cached_property
    def skewed(self) -> StepTime:
        """With loads that follow Zipf's law; who compares many layouts asks for it of few."""
        return self.under_skewed()

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step.total_s

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.room_gib * GIB


class Cluster:
    """A model on this many GPUs of a machine."""

    def __init__(self, config: PlanConfig) -> None:
        self.config, self.model, self.machine = config, config.model, config.machine
        self.topology: Topology = topology_of(config.machine, config.gpus)
        self.counts: ParameterCounts = parameter_counts(config.model)
        self.dense = dense_bytes(config.model)
        self.owner_E = owners(config.model.num_experts, config.gpus)
        self.owned = (self.counts.total - self.counts.dense) / config.gpus  # parameters of experts that a rank owns
        self.flops_per_s = config.machine.product_tflops * 1e12
        self.room_gib = config.machine.memory_gib - LIBRARIES_GIB
        self.kind = auto_kind(self.topology, in_reach=self.topology.nodes == 1)
        self._layers = cache(self._predicted_layer)
        self._sliced = cache(self._gradient_slices)
        self.transport = cache(self._transport)

    def obstacle(self) -> str | None:
        """Why Tessera cannot run this, whatever the layout; None if it can."""
        try:
            check_division(self.model, self.config.batch_rows, self.config.gpus)
        except UserError as error:
            return str(error)
        return None

    def layouts(self) -> Iterator[Layout]:
        """Everything that Tessera offers and that matters here."""
        rows = self.config.batch_rows // self.config.gpus
        for kind, offload, stage, micro_rows, recompute in product(KINDS, ("none", "cpu"), (1, 2), MICRO_ROWS, (False, True)):
            if rows % micro_rows == 0:
                changes = {"offload": offload, "zero_stage": stage}
                yield Layout(kind.model_copy(update=changes), micro_rows, recompute)

    # ------------------------------------------------------------ one layout

    def predict(self, layout: Layout) -> Prediction:
        config = self.config
        parallel = layout.parallel.model_copy(update={"memory": self._copies(layout)})
        tokens = config.batch_rows * config.sequence_length
        flops = tokens / config.gpus * flops_per_token(config.model, config.sequence_length)
        told = self._told(layout.micro_rows, parallel)

        def step(loads: str) -> StepTime:
            return self._step(layout, self._layers(*told, loads), self._sliced(*told, loads)[1])

        return Prediction(
            layout=layout,
            memory=self._memory(layout, parallel),
            room_gib=self.room_gib,
            layer=self._layers(*told, config.loads),
            slices=self._sliced(*told, config.loads)[0],
            step=step(config.loads),
            ideal_s=flops / self.flops_per_s,
            tokens=tokens,
            under_skewed=partial(step, SKEWED),
        )

    def _step(self, layout: Layout, layer: LayerPrediction, slices_s: float) -> StepTime:
        """`slices_s`: that dense gradients add to a backward pass which averages them."""
        config, layers = self.config, self.model.num_moe_layers
        micro_batches = config.batch_rows // config.gpus // layout.micro_rows
        passes = [layer.forward, layer.backward] + [layer.again] * layout.recompute
        rest_s = layout.micro_rows * config.sequence_length * self._rest_flops() / self.flops_per_s
        rest_s *= (len(passes) + 1) / 3  # the backward pass has twice the products of the forward one
        products_s = rest_s + layers * sum(one.products_s for one in passes)
        reductions = micro_batches if layout.parallel.zero_stage == 2 else 1
        backward_s = products_s - rest_s / (len(passes) + 1) - layers * layer.forward.products_s
        return StepTime(
            products_s=micro_batches * products_s,
            tokens_s=micro_batches * layers * sum(one.tokens_s for one in passes),
            copies_s=micro_batches * layers * sum(one.copies_s for one in passes),
            gradients_s=reductions * slices_s + self.gathering.seconds(self.counts.dense * BYTES),
            offload_s=micro_batches * self._offload_s(layout.parallel, backward_s),
            optimizer_s=self._optimizer_s(layout.parallel),
        )

    def unscheduled(self, prediction: Prediction) -> StepTime:
        """With parallel.schedule=off: nothing overlaps but copies with the attention, and DeepSpeed reduces all dense gradients
        behind the backward pass."""
        layer, typical = prediction.layer, prediction.layer.typical

        def slower(planned: PassTime, timeline_of: Callable[[Degrees], Timeline]) -> PassTime:
            more_s = timeline_of(OFF).seconds - timeline_of(layer.degrees).seconds
            return replace(planned, tokens_s=planned.tokens_s + more_s)

        without = replace(
            layer,
            forward=slower(layer.forward, typical.forward),
            backward=slower(layer.backward, typical.backward),
            again=slower(layer.again, typical.again),
        )
        return self._step(prediction.layout, without, 2 * self.gathering.seconds(self.counts.dense * BYTES))

    def _rest_flops(self) -> float:
        """Of everything but routed experts and the attention of their layers, for a token, forward and backward."""
        model, layers = self.model, self.model.num_moe_layers
        routed = 6 * layers * model.top_k * self.counts.per_expert
        return flops_per_token(model, self.config.sequence_length) - routed - 3 * layers * self._attention_flops()

    def _attention_flops(self) -> float:
        """Of one layer, for a token, forward: causal, over half the row."""
        model, length = self.model, self.config.sequence_length
        heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        return 2 * model.hidden_size * (2 * heads + 2 * kv_heads) + 2 * length * heads

    @property
    def gathering(self) -> Line:
        """One pass of a ring over all ranks, a reduce-scatter or an all-gather of this many bytes; all GPUs of a node share
        what crosses nodes, and links of both kinds carry at the same time."""
        start_s, within_s, across_s = self._ring
        return Line(start_s, max(within_s, across_s))

    @property
    def slice_line(self) -> Line:
        """A slice of dense gradients by its bytes, there and back (parallel/ordered_mean.py): inside nodes, then across."""
        start_s, within_s, across_s = self._ring
        return Line(2 * start_s, 2 * (within_s + across_s))

    @property
    def _ring(self) -> tuple[float, float, float]:
        """(seconds of the messages' starts; of a byte inside nodes, and between them)."""
        nodes, near = self.topology.nodes, self.topology.devices_per_node
        within, across = self.machine.within, self.machine.across
        start_s = (near - 1) * within.latency_s + (nodes - 1) * across.latency_s
        within_s, across_s = (near - 1) / near / (within.gbytes * 1e9), (nodes - 1) / nodes / near / (across.gbytes * 1e9)
        return start_s, within_s, across_s

    def _offload_s(self, parallel: ParallelConfig, backward_s: float) -> float:
        """The last layer's gradients have nothing that hides them; the others have the backward pass of a micro-batch."""
        if parallel.offload == "none":
            return 0.0
        way_s = BYTES * self.owned / (self.machine.host_link_gbytes * 1e9)
        return max(way_s - backward_s, 0.0) + way_s / self.model.num_moe_layers

    def _optimizer_s(self, parallel: ParallelConfig) -> float:
        dense = self.counts.dense / self.config.gpus
        memory = self.machine.memory_tbytes * 1e12
        if parallel.offload == "none":
            return STATE_BYTES * (self.owned + dense) / memory
        return STATE_BYTES * dense / memory + HOST_STATE_BYTES * self.owned / (self.machine.host_gbytes * 1e9)

    # ------------------------------------------------------------ memory

    def _memory(self, layout: Layout, parallel: ParallelConfig) -> Memory:
        config = self.config
        return memory_per_rank(
            config.model, config.gpus, layout.micro_rows, config.sequence_length, "bfloat16", parallel, layout.recompute, True
        )

    def _copies(self, layout: Layout) -> int:
        """The room for copies that a run would find with parallel.memory=auto (parallel/materialisation.py)."""
        parallel = layout.parallel
        if parallel.memory == 0:
            return 0
        free = self.room_gib * GIB - self._memory(layout, parallel).total
        kept = 1 if parallel.rematerialise else self.model.num_moe_layers
        fitting = max(int(free * SHARE_FOR_COPIES), 0) // (self.counts.per_expert * BYTES * kept)
        hidden = hidden_copies(self.costs(layout.micro_rows), self.topology.nodes)
        return min(fitting, max(hidden, 1), self.model.num_experts)

    # ------------------------------------------------------------ one MoE layer

    def costs(self, micro_rows: int) -> LayerCosts:
        model, tokens = self.model, micro_rows * self.config.sequence_length
        return layer_costs(self.machine, model.hidden_size, model.expert_hidden_size, tokens * self._attention_flops())

    def loads(self, micro_rows: int, name: str) -> Floats:
        """Of the experts of a layer, entries of a micro-batch of all ranks, step by step."""
        model, config = self.model, self.config
        entries = micro_rows * config.sequence_length * config.gpus * model.top_k
        if name == "even":
            return np.full((TRACE_STEPS, model.num_experts), entries / model.num_experts)
        return draw(name, TRACE_STEPS, model.num_experts, entries, model.top_k, np.random.default_rng(config.seed))

    def _told(self, micro_rows: int, parallel: ParallelConfig) -> tuple[int, str, bool, int]:
        assert parallel.memory != "auto", "the room for copies is known by now"
        return micro_rows, parallel.policy, parallel.rematerialise, parallel.memory

    def _predicted_layer(self, micro_rows: int, policy: str, rematerialise: bool, memory: int, loads: str) -> LayerPrediction:
        costs = self.costs(micro_rows)
        budget = Budget(hidden_copies(costs, self.topology.nodes), memory)
        setting = Setting(self.topology, self.model.top_k, budget, rematerialise, costs, self.transport(micro_rows).kind)
        loads_SE, chunk_s = self.loads(micro_rows, loads), self.machine.chunk_s
        return predicted_layer(policy, loads_SE, self.owner_E, setting, chunk_s=chunk_s)

    def _gradient_slices(self, *told: int | str | bool) -> tuple[Partition, float]:
        return gradient_slices(self._layers(*told), self.model.num_moe_layers, self.dense, self.slice_line)

    def _transport(self, micro_rows: int) -> Choice[TransportKind]:
        costs, model = self.costs(micro_rows), self.model
        kinds = alternatives("auto", self.kind)
        settings = {kind: Setting(self.topology, model.top_k, Budget(0, 0), False, costs, kind) for kind in kinds}
        even_E = self.loads(micro_rows, "even")[0]
        return chosen_transport(settings, even_E, self.owner_E, self.machine.chunk_s)

    # ------------------------------------------------------------ what one looks at

    def timelines(self, prediction: Prediction) -> list[tuple[str, Timeline]]:
        """Of a layer in the middle under mean loads, by their titles: nothing overlapping, and as planned, with its slices of
        dense gradients."""
        layer, typical = prediction.layer, prediction.layer.typical
        places = typical_slices(prediction.slices, self.model.num_moe_layers)
        under_layer_s, under_dense_s = map(self.slice_line.seconds, places)
        found = []
        for name, off, planned, degree in (
            ("forward", typical.forward(OFF), typical.forward(layer.degrees), layer.degrees.forward),
            (
                "backward",
                typical.backward(OFF),
                typical.backward(layer.degrees, slices_s=(under_layer_s, under_dense_s)),
                layer.degrees.backward,
            ),
        ):
            how = "whole" if degree == 1 else f"in {degree} chunks"
            found.append((f"{name}, nothing overlapping: {1e3 * off.seconds:.2f} ms", off))
            found.append((f"{name}, as planned, {how}: {1e3 * planned.seconds:.2f} ms", planned))
        return found


@cache
def dense_bytes(model: ModelConfig) -> DenseBytes:
    """In bfloat16. A tied embedding is complete where the backward pass ends."""
    with torch.device("meta"):
        whole = Transformer(model)

    def size(*modules: torch.nn.Module | None) -> int:
        return BYTES * sum(parameter.numel() for module in modules if module is not None for parameter in module.parameters())

    head, layer = size(whole.norm, whole.head), size(whole.blocks[-1])
    return DenseBytes(head, layer, size(whole) - head - model.num_moe_layers * layer)


def best_of_each(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Of each kind of layout the one to choose, or if none fits the one that needs least."""
    kinds: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        kinds.setdefault(prediction.layout.name, []).append(prediction)
    return [chosen(alike) or min(alike, key=lambda one: one.memory.total) for alike in kinds.values()]


def chosen(predictions: Sequence[Prediction]) -> Prediction | None:
    """Of those that fit and are as good as the fastest, the one that takes least under skewed loads; None if none fits."""
    fitting = [one for one in predictions if one.fits]
    if not fitting:
        return None
    least_s = min(one.step.total_s for one in fitting)
    near = [one for one in fitting if one.step.total_s <= NEAR * least_s]
    return min(near, key=lambda one: (one.skewed.total_s, one.step.total_s, one.memory.total))
