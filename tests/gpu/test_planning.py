"""On GPUs the next update is planned while they are still at the backward pass, and planning waits for nothing.

With -s it prints what planning took on the host and what the GPUs waited for it.
"""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from parallel.materialisation import MEASURED_AFTER, Ahead
from parallel.placement import Floats
from parallel.topology import World
from tests.distributed.ranks import run_ranks
from tests.gpu.needs import gpus, hopper
from tests.models import parallel, random_batch, spec, tiny_model
from trainer.batch import cross_entropy
from trainer.step import Trainer

pytestmark = [pytest.mark.gpu, gpus(2), hopper()]

MODEL = tiny_model(hidden_size=64, expert_hidden_size=32, num_layers=49, num_experts=64, top_k=4, max_positions=512)
CYCLES = 4 * 10**9  # of the GPU, about two seconds


def sleeping(gradient: Tensor) -> Tensor:
    """The last of a backward pass: behind a sleep that came first the host would wait for room among a thousand launches."""
    torch.cuda._sleep(CYCLES)
    return gradient


def learn(world: World, reshard_every: int) -> list[tuple[float, float, bool]]:
    """(seconds of planning on the host, seconds that GPUs waited for it, whether this one was at work behind it) of updates
    whose backward pass ends slowly."""
    settings = parallel(policy="cost", overlap=4, memory=4, reshard_every=reshard_every)
    trainer = Trainer(spec(MODEL, micro_rows=4, dtype="bfloat16", parallel=settings), world)
    plan, found = trainer.materialisation.ahead, list[tuple[float, bool]]()

    def watched(loads_LE: Floats, updates: int) -> Ahead:
        torch.cuda.set_sync_debug_mode("error")  # whoever waits for the GPU here fails
        started = time.perf_counter()
        ahead = plan(loads_LE, updates)
        torch.cuda.set_sync_debug_mode("default")
        found.append((time.perf_counter() - started, not torch.cuda.current_stream().query()))
        return ahead

    waited = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.materialisation, "ahead", watched)
        for update in range(MEASURED_AFTER + 3):
            if update == MEASURED_AFTER:
                dict(trainer.model.named_parameters())["embedding.weight"].register_hook(sleeping)
            told = trainer.learn(random_batch(update, rows=4, length=512), cross_entropy, 1e-3)
            waited.append(told["time/plans_exposed_s"])
    later = range(MEASURED_AFTER, len(found))
    return [(found[update][0], waited[update], found[update][1]) for update in later]


@pytest.mark.parametrize("reshard_every", [0, 1])
def test_gpus_are_at_work_while_the_host_plans(reshard_every: int) -> None:
    for rank, updates in enumerate(run_ranks(learn, 2, reshard_every, kind="cuda")):
        for planning_s, waited_s, at_work in updates:
            print(f"rank {rank}: planned for {1e3 * planning_s:.1f} ms, the GPUs waited {1e3 * waited_s:.3f} ms")
            assert at_work, f"the GPU had nothing to do after {planning_s:.3f} s of planning"
