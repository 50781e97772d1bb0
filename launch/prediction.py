"""What a pretraining would take on a cluster: step time, communication that is waited for, and memory, for each layout that
Tessera can run. Predicted from what a machine reaches; nothing is started.

The model of time is that of the placement policies (parallel/layer_cost.py) for the MoE layers, in which nothing but copies of
experts hides, as it is today; products at one rate; ZeRO's all-reduce behind the backward pass, as DeepSpeed runs it here; and
optimizers as fast as memory. LEFT_OUT says what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from statistics import mean

import numpy as np

from kernels.errors import UserError
from launch.benchmarks.placement import owners, replay
from launch.benchmarks.traces import draw
from launch.machines import BYTES, layer_costs, read_group, topology_of
from parallel.flows import Plan
from parallel.layer_cost import LayerCosts, Setting, copy_times, hidden_copies
from parallel.placement import Budget, Floats, Topology
from parallel.planning import predict
from parallel.policies import POLICIES
from parallel.profiling import SHARE_FOR_COPIES
from parallel.schedule.cost import sharded_chunk, sharded_workload
from parallel.schedule.pipeline import MOST_CHUNKS, Copies, backward_tasks, forward_tasks
from parallel.schedule.timeline import Timeline, simulate
from parallel.two_level_exchange import has_two_levels
from trainer.config.plan import PlanConfig
from trainer.config.run import ParallelConfig
from trainer.estimate import GIB, Memory, flops_per_token, memory_per_rank
from trainer.model.transformer import ParameterCounts, parameter_counts
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
class LayerPrediction:
    """One MoE layer and one micro-batch, forward and backward, on average over the steps of a trace."""

    products_s: float
    tokens_s: float
    copies_s: float  # waited for
    sums_s: float  # of gradients
    imbalance: float  # entries of the busiest rank over the mean
    setting: Setting


@dataclass(frozen=True)
class StepTime:
    """Seconds of one update."""

    products_s: float  # of all matrix products, on the busiest rank of each layer, with the sums of their gradients
    tokens_s: float  # their exchanges, on links and devices
    copies_s: float
    gradients_s: float  # dense ones, and ZeRO's new weights
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
    step: StepTime
    skewed: StepTime  # with loads that follow Zipf's law
    ideal_s: float  # of the products alone, if every rank had equally many
    tokens: int  # of a step

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step.total_s

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.room_gib * GIB


@dataclass(frozen=True)
class Pipeline:
    """The MoE layers of a layout in chunks, as parallel/schedule plans them from what is published."""

    forward_degree: int
    backward_degree: int
    saved_s: float  # of a step
    panels: tuple[tuple[str, Timeline], ...]  # of one layer, whole and in chunks, forward and backward


class Cluster:
    """A model on so many GPUs of a machine."""

    def __init__(self, config: PlanConfig) -> None:
        self.config, self.model, self.machine = config, config.model, config.machine
        self.topology: Topology = topology_of(config.machine, config.gpus)
        self.counts: ParameterCounts = parameter_counts(config.model)
        self.owner_E = owners(config.model.num_experts, config.gpus)
        self.owned = (self.counts.total - self.counts.dense) / config.gpus  # parameters of experts that a rank owns
        self.flops_per_s = config.machine.product_tflops * 1e12
        self.room_gib = config.machine.memory_gib - LIBRARIES_GIB
        self._layers = cache(self._predicted_layer)

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
        layer, skewed = (self._layer(layout.micro_rows, parallel, loads) for loads in (config.loads, SKEWED))
        tokens = config.batch_rows * config.sequence_length
        flops = tokens / config.gpus * flops_per_token(config.model, config.sequence_length)
        return Prediction(
            layout=layout,
            memory=self._memory(layout, parallel),
            room_gib=self.room_gib,
            layer=layer,
            step=self._step(layout, layer),
            skewed=self._step(layout, skewed),
            ideal_s=flops / self.flops_per_s,
            tokens=tokens,
        )

    def _step(self, layout: Layout, layer: LayerPrediction) -> StepTime:
        config, layers = self.config, self.model.num_moe_layers
        micro_batches = config.batch_rows // config.gpus // layout.micro_rows
        tokens = layout.micro_rows * config.sequence_length
        passes = 4 if layout.recompute else 3  # forward, backward twice as much; forward again
        products_s = passes / 3 * (tokens * self._dense_flops() / self.flops_per_s + layers * layer.products_s)
        products_s += layers * layer.sums_s
        exchanges_s = (3 if layout.recompute else 2) / 2 * layers * layer.tokens_s  # forward, backward; forward again
        reductions = micro_batches if layout.parallel.zero_stage == 2 else 1
        return StepTime(
            products_s=micro_batches * products_s,
            tokens_s=micro_batches * exchanges_s,
            copies_s=micro_batches * layers * layer.copies_s,
            gradients_s=(2 * reductions + 1) * self.ring_s(self.counts.dense * BYTES),
            offload_s=micro_batches * self._offload_s(layout.parallel, (passes - 1) / passes * products_s),
            optimizer_s=self._optimizer_s(layout.parallel),
        )

    def _dense_flops(self) -> float:
        """Of everything but the routed experts, for a token, forward and backward."""
        model = self.model
        routed = 6 * model.num_moe_layers * model.top_k * self.counts.per_expert
        return flops_per_token(model, self.config.sequence_length) - routed

    def ring_s(self, size: float) -> float:
        """One pass of a ring over all ranks, a reduce-scatter or an all-gather of so many bytes; all GPUs of a node share what
        crosses nodes."""
        nodes, near = self.topology.nodes, self.topology.devices_per_node
        within, across = self.machine.within, self.machine.across
        within_s = size * (near - 1) / near / (within.gbytes * 1e9)
        across_s = size * (nodes - 1) / nodes / near / (across.gbytes * 1e9)
        return (near - 1) * within.latency_s + (nodes - 1) * across.latency_s + max(within_s, across_s)

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
        model, length = self.model, self.config.sequence_length
        heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        attention = 2 * model.hidden_size * (2 * heads + 2 * kv_heads) + 2 * length * heads  # causal: over half the row
        return layer_costs(self.machine, model.hidden_size, model.expert_hidden_size, micro_rows * length * attention)

    def loads(self, micro_rows: int, name: str) -> Floats:
        """Of the experts of a layer, entries of a micro-batch of all ranks, step by step."""
        model, config = self.model, self.config
        entries = micro_rows * config.sequence_length * config.gpus * model.top_k
        if name == "even":
            return np.full((TRACE_STEPS, model.num_experts), entries / model.num_experts)
        return draw(name, TRACE_STEPS, model.num_experts, entries, model.top_k, np.random.default_rng(config.seed))

    def _layer(self, micro_rows: int, parallel: ParallelConfig, loads: str) -> LayerPrediction:
        assert parallel.memory != "auto", "the room for copies is known by now"
        return self._layers(micro_rows, parallel.policy, parallel.rematerialise, parallel.memory, loads)

    def _predicted_layer(self, micro_rows: int, policy: str, rematerialise: bool, memory: int, loads: str) -> LayerPrediction:
        costs = self.costs(micro_rows)
        budget = Budget(hidden_copies(costs, self.topology.nodes), memory)
        setting = Setting(self.topology, self.model.top_k, budget, rematerialise, costs, has_two_levels(self.topology))
        replayed = replay(policy, self.loads(micro_rows, loads)[:, None], setting)
        return LayerPrediction(
            products_s=mean(time.products_s for time in replayed.times),
            tokens_s=mean(time.tokens_s for time in replayed.times),
            copies_s=mean(time.weights_s for time in replayed.times),
            sums_s=mean(time.sums_s for time in replayed.times),
            imbalance=replayed.imbalance,
            setting=setting,
        )

    def last_step(self, prediction: Prediction) -> tuple[Plan, Floats]:
        """The plan of the trace's last step, made from those before it, and the loads that then came."""
        loads_SE = self.loads(prediction.layout.micro_rows, self.config.loads)
        policy = POLICIES[prediction.layout.parallel.policy]
        return policy(predict(loads_SE[:-1, None])[0], self.owner_E, prediction.layer.setting), loads_SE[-1]


def pipeline(cluster: Cluster, prediction: Prediction) -> Pipeline:
    """The best degrees for the last step of the trace, forward and backward apart, and a layer's timelines with and without."""
    plan, loads_E = cluster.last_step(prediction)
    layout, setting = prediction.layout, prediction.layer.setting
    costs, work = setting.costs, sharded_workload(plan, loads_E, setting)
    times, again = copy_times(plan.placement, setting.topology, costs), layout.parallel.rematerialise
    back_s = times.back_across_s + times.across_s if again else times.back_across_s
    back = Copies(back_s, (2 if again else 1) * times.within_s)
    saved, degrees, panels = [], [], []
    for name, backward, tasks_of, attention_s, copies in (
        ("forward", False, forward_tasks, costs.attention_s, Copies(times.across_s, times.within_s)),
        ("backward", True, backward_tasks, 2 * costs.attention_s, back),
    ):
        found = [
            simulate(tasks_of(sharded_chunk(costs, work, degree, backward=backward), degree, attention_s, copies))
            for degree in range(1, MOST_CHUNKS + 1)
        ]
        whole, cut = found[0], min(found, key=lambda timeline: timeline.seconds)
        degrees.append(found.index(cut) + 1)
        saved.append(whole.seconds - cut.seconds)
        panels.append((f"{name}, whole: {1e3 * whole.seconds:.2f} ms", whole))
        if cut is not whole:
            less = f"{saved[-1] / whole.seconds:.0%} less"
            panels.append((f"{name}, in {degrees[-1]} chunks: {1e3 * cut.seconds:.2f} ms, {less}", cut))
    micro_batches = cluster.config.batch_rows // cluster.config.gpus // layout.micro_rows
    saved_s = micro_batches * cluster.model.num_moe_layers * ((2 if layout.recompute else 1) * saved[0] + saved[1])
    return Pipeline(degrees[0], degrees[1], saved_s, tuple(panels))


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
