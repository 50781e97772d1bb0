"""Every metric, declared once: the console line, the documentation, the report and W&B all read this table.

Keys are `group/name` with the unit as suffix where there is one. A key that is not here cannot be logged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

Stage = Literal["pretrain", "rl"]
Value = float | list[list[float]]  # the tables are LOAD, (L MoE layers, E experts), and LENGTHS, (2, bins)
Values = Mapping[str, Value]

LOAD = "moe/load"
LENGTHS = "rollout/lengths"
ETA_STEPS = 20  # the time left is estimated from this many last steps
COLUMNS = 141  # of a console line; the elapsed time before it takes the other 9 of 150
AXES: dict[Stage, str] = {"pretrain": "train/step", "rl": "rollout/round"}  # the x axes in W&B
STEP_WORDS: dict[Stage, str] = {"pretrain": "step", "rl": "round"}


@dataclass(frozen=True)
class Group:
    """The metrics whose keys begin with one word."""

    title: str
    stage: Stage | None = None  # the only stage that logs them; None: both do


GROUPS: dict[str, Group] = {  # first part of a key -> group, in the order in which pages show them
    "eval": Group("Held-out text", "pretrain"),
    "reward": Group("Reward", "rl"),
    "train": Group("Update"),
    "policy": Group("Policy", "rl"),
    "value": Group("Value head", "rl"),
    "rollout": Group("Rollout", "rl"),
    "moe": Group("Experts"),
    "perf": Group("Speed and cost"),
    "time": Group("Where the time goes"),
    "sync": Group("Weights to the engines", "rl"),
    "mem": Group("Memory"),
}


@dataclass(frozen=True)
class Metric:
    key: str
    unit: str
    label: str  # short, for lines, tables and axes
    format: str
    meaning: str
    stage: Stage | None = None  # the only stage that logs it; None: those of its group

    def text(self, value: float) -> str:
        """By `format`; shares below 1 % and prices below a cent by two significant digits, so that only 0 reads as 0."""
        if self.unit in ("share", "$") and 0 < abs(value) < 0.01:
            return f"{100 * value:.2g}%" if self.format.endswith("%") else f"{value:.2g}"
        return format(value, self.format)


_DECLARED = (
    Metric("train/loss", "nats", "loss", ".4f", "mean loss of the learned tokens; in RL the policy loss need not fall"),
    Metric("train/grad_norm", "", "grad norm", ".2f", "global gradient norm of dense and expert parameters, before clipping"),
    Metric("train/lr", "", "learning rate", ".2e", "learning rate of the update"),
    Metric("train/entropy", "nats", "entropy", ".3f", "mean entropy of the next-token distribution on the learned tokens"),
    Metric("train/tokens", "tokens", "tokens", ",.0f", "tokens that the update learned from, all ranks"),
    Metric("train/model_tflops", "TFLOP", "model TFLOPs", ",.1f", "FLOPs that the model needs for the update, all ranks"),
    Metric(
        "train/skipped",
        "updates",
        "skipped",
        ".0f",
        "updates that the guard skipped: gradient not finite, or a spike of the loss",
    ),
    Metric("eval/loss", "nats", "eval loss", ".4f", "mean cross entropy of held-out tokens"),
    Metric(
        "eval/bits_per_byte", "bits/byte", "bits/byte", ".3f", "cross entropy per byte of held-out text, whatever the tokenizer"
    ),
    Metric("eval/max_vio", "", "eval MaxVio", ".3f", "MaxVio of all held-out tokens together; mean over layers"),
    Metric(
        "moe/max_vio", "", "MaxVio", ".3f", "load of the fullest expert / mean load - 1; mean over layers; in RL over a round"
    ),
    Metric("moe/max_vio_worst_layer", "", "MaxVio, worst layer", ".3f", "MaxVio of the layer where it is largest"),
    Metric(
        "moe/dead_experts", "experts", "dead experts", ".0f", "experts that no token chose; sum over layers; in RL over a round"
    ),
    Metric("moe/bias_range", "", "bias range", ".3f", "largest minus smallest selection bias, of all experts and layers"),
    Metric(
        "moe/replay_changed",
        "share",
        "choices replayed",
        ".2%",
        "with replayed routing: experts of learned tokens that the trainer's gates would not have chosen",
        stage="rl",
    ),
    Metric(LOAD, "share", "expert load", ".3f", "share of a layer's tokens that each expert received; (layers, experts)"),
    Metric(
        "moe/rank_imbalance", "", "rank imbalance", ".3f", "load of the busiest rank / mean load, with copies; mean over layers"
    ),
    Metric(
        "moe/rank_imbalance_owners", "", "imbalance, no copies", ".3f", "rank imbalance if owners alone served their experts"
    ),
    Metric(
        "moe/copies_per_layer", "copies", "copies", ".1f", "copies of experts beside their owners, all ranks; mean over layers"
    ),
    Metric("moe/copies_room", "copies", "room for copies", ".0f", "copies that each rank has memory for in a layer"),
    Metric("moe/chunks_forward", "chunks", "chunks forward", ".1f", "chunks of an MoE layer's forward pass; mean over layers"),
    Metric(
        "moe/chunks_backward", "chunks", "chunks backward", ".1f", "chunks of an MoE layer's backward pass; mean over layers"
    ),
    Metric(
        "moe/layers_calibrated", "layers", "calibrated", ".0f", "layers whose copies were changed after their gate had decided"
    ),
    Metric("moe/copies_mib", "MiB", "memory of copies", ".1f", "memory of the copies on the rank that holds the most"),
    Metric("moe/moved_mib", "MiB", "moved", ".1f", "weights sent to copies and gradients sent back in the step, all ranks"),
    Metric("moe/owners_moved", "experts", "owners moved", ".0f", "experts that changed their owner after the step"),
    Metric("reward/mean", "reward", "reward", ".3f", "mean reward of the round's finished samples"),
    Metric("reward/eval_mean", "reward", "eval reward", ".3f", "mean reward of one sample for each held-out prompt"),
    Metric(
        "reward/eval_error",
        "reward",
        "eval error",
        ".3f",
        "standard error of the eval reward; draws of one prompt count together",
    ),
    Metric("reward/std", "reward", "reward std", ".3f", "standard deviation of the rewards of the round"),
    Metric("reward/zero_std_share", "share", "groups without signal", ".1%", "groups whose samples all have the same reward"),
    Metric("reward/missing", "samples", "unjudged", ".0f", "samples whose reward is None; they take no part in the update"),
    Metric("reward/timeouts", "samples", "scores too late", ".0f", "scores stopped at reward.timeout_s; evaluation included"),
    Metric("reward/errors", "samples", "scores failed", ".0f", "scores that raised an exception; evaluation included"),
    Metric("reward/deaths", "samples", "scorers died", ".0f", "scores whose process died twice; evaluation included"),
    Metric("rollout/length_mean", "tokens", "length", ".1f", "mean response length of the finished samples"),
    Metric("rollout/length_max", "tokens", "longest", ".0f", "longest response of the round"),
    Metric("rollout/finished_groups", "groups", "groups finished", ".0f", "groups that were complete when the round ended"),
    Metric(
        "rollout/recycled_samples", "samples", "recycled", ".0f", "samples interrupted at the end of the round, continued later"
    ),
    Metric("rollout/resumed_samples", "samples", "resumed", ".0f", "interrupted samples that this round continued"),
    Metric("rollout/resumed_tokens", "tokens", "prefilled again", ",.0f", "tokens of resumed samples that are prefilled again"),
    Metric("rollout/stale_token_share", "share", "stale", ".0%", "learned tokens that were generated by older weights"),
    Metric("rollout/staleness_mean", "rounds", "mean staleness", ".2f", "age of a learned token in rounds, on average"),
    Metric("rollout/staleness_max", "rounds", "staleness", ".0f", "age of the oldest learned token in rounds"),
    Metric("rollout/truncated_share", "share", "truncated", ".1%", "samples cut off at max_new_tokens"),
    Metric(
        "rollout/length_bias",
        "",
        "length bias",
        ".3f",
        "mean length of trained samples / of drawn samples, over the last 8 rounds; below 1 short ones were preferred",
    ),
    Metric(
        LENGTHS,
        "share",
        "lengths",
        ".3f",
        "histograms of the lengths of trained and of drawn samples over the last 8 rounds, in bins up to max_new_tokens",
    ),
    Metric("rollout/new_tokens", "tokens", "new tokens", ",.0f", "tokens generated in the round, finished or recycled"),
    Metric(
        "rollout/decode_steps",
        "steps",
        "decoding steps",
        ",.0f",
        "tokens that a sample gets if it runs from start to end of the round: its length, independent of the clock",
    ),
    Metric("rollout/stale_groups", "groups", "grew stale", ".0f", "groups that became too old, and start again or are dropped"),
    Metric(
        "rollout/replaced_groups", "groups", "replaced", ".0f", "finished groups of equal rewards that were replaced by others"
    ),
    Metric("rollout/engines", "engines", "engines", ".0f", "our engines that take part at the end of the round"),
    Metric("rollout/engines_lost", "engines", "engines lost", ".0f", "engines that died or hung"),
    Metric(
        "rollout/engines_returned", "engines", "engines returned", ".0f", "replacements of lost engines that took part again"
    ),
    Metric("rollout/tokens_per_s", "tokens/s", "rollout tok/s", ",.0f", "tokens generated per second in which the engines ran"),
    Metric("policy/ratio_mean", "", "ratio", ".4f", "mean probability ratio of the policy to the one that it is clipped to"),
    Metric("policy/clip_share", "share", "clipped", ".1%", "learned tokens whose ratio is clipped"),
    Metric("policy/masked_share", "share", "masked", ".1%", "learned tokens to which a mask gives weight 0"),
    Metric(
        "policy/importance_weight_mean",
        "",
        "importance",
        ".3f",
        "mean weight of a token's loss: importance of old tokens (decoupled) x probability kept by top_k, top_p and min_p",
    ),
    Metric(
        "policy/mismatch_abs",
        "nats",
        "mismatch",
        ".4f",
        "mean absolute difference of trainer's and engine's log-probability; of a server, top_k, top_p and min_p add to it",
    ),
    Metric(
        "policy/kl_reference", "nats", "KL to reference", ".4f", "mean KL per token from the policy at the start of RL (k3)"
    ),
    Metric("value/loss", "", "value loss", ".4f", "mean of half the squared error of the values, clipped"),
    Metric(
        "value/clip_share", "share", "values clipped", ".1%", "learned tokens whose value is clipped to that before the update"
    ),
    Metric(
        "value/explained_variance", "", "explained variance", ".3f", "variance of returns that earlier values explain; 1 is all"
    ),
    Metric("sync/weights_s", "s", "weight sync", ".2f", "wall time to bring new weights to all engines"),
    Metric("sync/mib", "MiB", "weights sent", ".1f", "size of the update that each engine received"),
    Metric("sync/changed_share", "share", "changed", ".2%", "with sync=delta: weights whose bits changed"),
    Metric("sync/check_s", "s", "weight check", ".2f", "part of the sync that hashes, in the trainer and the slowest engine"),
    Metric("sync/version", "", "weight version", ".0f", "rounds whose updates the engines have received"),
    Metric("perf/tokens_per_s", "tokens/s", "tok/s", ",.0f", "learned tokens per second of the update, all ranks"),
    Metric("perf/tokens_per_s_per_device", "tokens/s", "tok/s a device", ",.0f", "learned tokens per second and device"),
    Metric(
        "perf/mfu",
        "share",
        "MFU",
        ".1%",
        "model FLOPs of the update / published peak of its GPUs; attention counts only unmasked pairs of tokens",
    ),
    Metric("perf/gpu_idle_share", "share", "GPU idle", ".0%", "part of the step in which a GPU ran no kernel; mean over ranks"),
    Metric(
        "perf/dollars_per_million_tokens", "$", "$ a million tokens", ",.2f", "price of the GPUs for a million learned tokens"
    ),
    Metric(
        "perf/checkpoint_share",
        "share",
        "in checkpoints",
        ".2%",
        "part of the time since the attempt's first record in which training stood still for checkpoints, on disk or in memory",
    ),
    Metric("time/step_s", "s", "step", ".2f", "wall time from one record to the next"),
    Metric("time/rollout_s", "s", "rollout", ".2f", "wall time of the rollout", stage="rl"),
    Metric(
        "time/engines_idle_s", "s", "engines idle", ".2f", "part of rollout, update and sync without generating", stage="rl"
    ),
    Metric(
        "time/proximal_s", "s", "proximal", ".2f", "wall time of log-probabilities and values before the updates", stage="rl"
    ),
    Metric("time/staged_s", "s", "staging", ".2f", "wall time of the trainer's log-probabilities of new tokens", stage="rl"),
    Metric("time/train_s", "s", "update", ".2f", "wall time of the update"),
    Metric(
        "time/copies_exposed_s", "s", "copies waited for", ".3f", "part of the update that waits for copies; mean over ranks"
    ),
    Metric("time/plans_exposed_s", "s", "plans waited for", ".3f", "part of the update that waits for plans; mean over ranks"),
    Metric(
        "time/communication_exposed_s",
        "s",
        "communication exposed",
        ".3f",
        "part of the update that waits for communication, copies included; mean over ranks",
    ),
    Metric("time/gpu_idle_s", "s", "GPU idle time", ".3f", "time without a kernel since the last update, as sampled by NVML"),
    Metric("time/eval_s", "s", "evaluation", ".2f", "wall time of the evaluation"),
    Metric("time/checkpoint_s", "s", "checkpoint", ".2f", "time that training stands still for a checkpoint on the disk"),
    Metric(
        "time/memory_checkpoint_s",
        "s",
        "memory checkpoint",
        ".2f",
        "time that training stands still for a checkpoint in memory",
    ),
    Metric(
        "time/memory_checkpoint_whole_s",
        "s",
        "memory checkpoint whole",
        ".2f",
        "of the last checkpoint in memory: from its start until all its files were there, on two nodes if there are several",
    ),
    Metric("mem/peak_gib", "GiB", "peak memory", ".2f", "peak memory so far of the run's processes on the driver's machine"),
)
METRICS: dict[str, Metric] = {metric.key: metric for metric in _DECLARED}

USE = {  # how well a step used its devices: key -> word on the console line
    "perf/tokens_per_s_per_device": "tok/s/dev",
    "perf/mfu": "MFU",
    "time/communication_exposed_s": "exposed",
    "perf/gpu_idle_share": "idle",
    "perf/dollars_per_million_tokens": "$/M",
}
UNKNOWN = {  # why a step may lack them
    "perf/mfu": "no known peak of this device",
    "time/communication_exposed_s": "one rank",
    "perf/gpu_idle_share": "no GPU that tells",
    "perf/dollars_per_million_tokens": "set cluster.dollars_per_gpu_hour",
}
CONSOLE: dict[Stage, dict[str, str]] = {  # key -> word on the console line, most important first
    "pretrain": {
        "train/loss": "loss",
        "moe/max_vio": "MaxVio",
        "eval/bits_per_byte": "bits/byte",
        **USE,
        "train/grad_norm": "norm",
        "time/step_s": "step",
    },
    "rl": {
        "reward/mean": "reward",
        "reward/eval_mean": "eval",
        "rollout/stale_token_share": "stale",
        **USE,
        "rollout/length_mean": "length",
        "train/entropy": "entropy",
        "train/grad_norm": "norm",
        "time/step_s": "step",
    },
}


def metrics_of(stage: Stage) -> dict[str, list[Metric]]:
    """Word of a group -> its metrics that a run of this stage may log and that are numbers, all in the tables' order."""
    found: dict[str, list[Metric]] = {word: [] for word, group in GROUPS.items() if group.stage in (None, stage)}
    for metric in METRICS.values():
        word = metric.key.partition("/")[0]
        if word in found and metric.stage in (None, stage) and metric.key not in (LOAD, LENGTHS):
            found[word].append(metric)
    return found


def emit(values: Values) -> dict[str, Value]:
    """The values, in the table's order. Raises KeyError for a key that is not declared, with the nearest one that is."""
    for key in values:
        if key not in METRICS:
            close = get_close_matches(key, METRICS, n=1)
            hint = f"; the nearest is {close[0]}" if close else ""
            raise KeyError(f"metric {key} is not declared in trainer/metrics.py{hint}")
    return {key: values[key] for key in METRICS if key in values}


def console_line(stage: Stage, step: int, total_steps: int, values: Values, eta_s: float | None) -> str:
    """One readable line of at most COLUMNS characters; if it gets too long, the last metrics are left out."""
    width = len(str(total_steps))
    line = f"{STEP_WORDS[stage]} {step:>{width}}/{total_steps}"
    end = "" if eta_s is None else f"  ETA {clock(eta_s)}"
    for key, word in CONSOLE[stage].items():
        metric, value = METRICS[key], values.get(key)
        if isinstance(value, int | float):
            part = f"  {word} {metric.text(value)}" + (" s" if metric.unit == "s" else "")
            if len(line) + len(part) + len(end) <= COLUMNS:
                line += part
    return line + end


def seconds_left(durations: Sequence[float], step: int, total_steps: int) -> float | None:
    """Seconds that the steps after `step` take, if like the last ETA_STEPS; None if no steps are left, or none are done."""
    recent = durations[-ETA_STEPS:]
    return (total_steps - step) * sum(recent) / len(recent) if recent and step < total_steps else None


def clock(seconds: float) -> str:
    """1:05, 12:00, 3:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def markdown_table() -> str:
    """All metrics, for the documentation."""
    rows = [f"| `{m.key}` | {m.unit or '-'} | {m.meaning} |" for m in METRICS.values()]
    return "\n".join(["| metric | unit | meaning |", "|---|---|---|", *rows])
