"""`python -m launch.bench rollout`: tokens that the engine generates per second, and how close that is to the memory bound.

Random weights, prompts of random tokens, all slots busy, no <eos>: every row decodes the same number of tokens, with the
competitors too, in the same run. The bound is the bytes that a decoding step must read (the dense weights, the weights of the
experts that any row chose, and the keys and values of every row so far) at the rate of a copy on this device. Then whole
rounds, in which responses differ in length (launch/benchmarks/april.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from pydantic import Field, PositiveInt
from rich.table import Table

from launch.benchmarks import april
from launch.benchmarks.april import NO_TOKEN, Rounds, SweepOptions
from launch.benchmarks.models import floor_bytes, model_config, random_weights
from launch.benchmarks.options import Listed
from launch.benchmarks.peers import Generation, generation_rates
from launch.benchmarks.record import one_row
from launch.benchmarks.timing import Ceilings, wait_for
from rl.engine.engine import PREFILL_TOKENS, Engine
from rl.engine.sampler import Sampling
from rl.engine.settings import EngineSettings
from rl.trajectory import Sample
from trainer.config.model import ModelConfig
from trainer.model.transformer import LanguageModel, parameter_counts

LOOK_EVERY = 32  # tokens between two looks at who has finished


class RolloutOptions(SweepOptions):
    batch: Listed[PositiveInt] = Field(description="sequences decoded at once; none: only rounds")
    response: PositiveInt = Field(128, description="tokens that each sequence gets where all get as many")
    peers: Listed[str] | None = Field(None, description="that generate as many; not given: those that are installed, on a GPU")


DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "cuda": {
        "model": "moe_2b", "layers": 24, "heads": 16, "kv_heads": 8, "head_dim": 64, "batch": "16,128",
        "over_provision": "1.25,1.5,2,3", "slots": "256", "median": 256, "longest": 4096,
    },
    "cpu": {
        "model": "tiny", "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "batch": "4", "prompt": 16, "response": 16,
        "over_provision": "2", "groups": 4, "samples": 4, "slots": "16", "median": 8, "longest": 128, "advance": 4,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Rollout:
    """One batch size."""

    work: str
    batch: int
    prompt: int
    response: int
    parameters: int
    step_ms: float  # median over pieces of LOOK_EVERY tokens, the host's work between them included
    prefill_ms: float  # until the first token of the last prompt
    floor_ms: float  # of a step in the middle of the response
    peers_tokens_per_s: Mapping[str, float] = field(default_factory=dict)  # prefill included
    failures: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def tokens_per_s(self) -> float:
        return self.batch / self.step_ms * 1000


def measure(
    options: RolloutOptions, contenders: Mapping[str, Any], device: torch.device, ceilings: Ceilings
) -> Iterator[Rollout | Rounds]:
    """One case for every model and batch size, and for every model, number of slots and over-provision factor."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name in options.model:
        config = model_config(options, name, options.prompt + max(options.response, options.longest) + 1)
        weights = random_weights(config, device, dtype, options.seed)
        for batch in options.batch:
            asked = Generation(batch, options.prompt, options.response, options.seed)
            rates, failures = generation_rates(contenders, config, asked, device)
            step_ms, prefill_ms = _generate(config, weights, batch, options, device, dtype)
            counts = parameter_counts(config)
            yield Rollout(
                work=f"generation by {name}, {counts.total / 1e6:,.1f} million parameters",
                batch=batch,
                prompt=options.prompt,
                response=options.response,
                parameters=counts.total,
                step_ms=step_ms,
                prefill_ms=prefill_ms,
                floor_ms=floor_bytes(config, batch, batch * (options.prompt + options.response // 2), dtype.itemsize)
                / ceilings.copy_tbytes
                / 1e9,
                peers_tokens_per_s=rates,
                failures=failures,
            )
        for slots in options.slots if options.over_provision else ():
            yield from april.sweep(options, name, weights, slots, device, dtype, ceilings.copy_tbytes)


def _generate(
    config: ModelConfig, weights: LanguageModel, batch: int, options: RolloutOptions, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """(median milliseconds of a decoding step, milliseconds of the prefill)."""
    length = options.prompt + options.response + 1
    sampling = Sampling(temperature=1.0, seed=options.seed)
    engine = Engine(config, EngineSettings(batch, length, options.response + 1, None, sampling, NO_TOKEN), device, dtype)
    engine.load_weights(weights.state(), 0)
    generator = torch.Generator().manual_seed(options.seed)
    prompts = torch.randint(config.vocab_size or 0, (batch, options.prompt), generator=generator).tolist()
    samples = [Sample(uid=index, group=index, prompt_ids=tuple(prompt)) for index, prompt in enumerate(prompts)]
    engine.submit(samples)
    engine.advance(3)  # compiles, and captures the graph
    engine.drain()
    engine.submit(samples)
    start = time.perf_counter()
    chunks = -(-batch * (options.prompt - 1) // PREFILL_TOKENS)  # the first rows decode while the last are filled
    engine.advance(chunks)
    wait_for(device)
    prefill_ms = (time.perf_counter() - start) * 1000
    times = []
    for first in range(chunks, options.response, LOOK_EVERY):
        tokens = min(LOOK_EVERY, options.response - first)
        start = time.perf_counter()
        engine.advance(tokens)  # returns when the tokens before the last are there, and the last of the time before
        times.append((time.perf_counter() - start) * 1000 / tokens)
    lengths = [item.length for item in engine.drain()]
    assert len(lengths) == batch and min(lengths) > options.response - chunks, "all rows decoded all the time"
    return median(times), prefill_ms


def table(case: Rollout | Rounds) -> Table:
    if isinstance(case, Rounds):
        return april.table(case)
    row = {
        "batch": f"{case.batch}",
        "prompt": f"{case.prompt}",
        "response": f"{case.response}",
        "prefill ms": f"{case.prefill_ms:.1f}",
        "step ms": f"{case.step_ms:.3f}",
        "tokens/s": f"{case.tokens_per_s:,.0f}",
        "floor ms": f"{case.floor_ms:.3f}",
        "of floor": f"{case.floor_ms / case.step_ms:.0%}",
        **{f"{peer} tokens/s": f"{rate:,.0f}" for peer, rate in case.peers_tokens_per_s.items()},
    }
    return one_row(case.work, row)
