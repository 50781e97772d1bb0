"""What the server of ranks imports before it forks them: what each of them would spend a second on.

It forks on CPUs only, so DeepSpeed, which picks its device when it is imported, cannot be wrong about it.
"""

from __future__ import annotations

import gc
import os
from importlib import import_module

os.environ["DS_ACCELERATOR"] = "cpu"

for module in (
    *("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "torch._dynamo.trace_rules", "torch._inductor.compile_fx"),
    *("rl.engine.engine", "trainer.worker"),
    *("hypothesis", "pytest"),  # of the files whose functions the ranks run
):
    import_module(module)

import_module("deepspeed.ops").__compatible_ops__  # noqa: B018 - which operators can be built here, it looks once

gc.freeze()  # ranks look for garbage among what is theirs, and share these pages
