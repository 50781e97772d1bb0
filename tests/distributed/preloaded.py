"""What the server of ranks imports before it forks them: what each of them would spend a second on.

It forks on CPUs only, so DeepSpeed, which picks its device when it is imported, cannot be wrong about it.
"""

from __future__ import annotations

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed.ops
import deepspeed.runtime.zero.muon.muon_optimizer
import hypothesis
import pytest
import torch._dynamo.trace_rules
import torch._inductor.compile_fx

import rl.engine.engine
import trainer.worker  # noqa: F401

deepspeed.ops.__compatible_ops__  # noqa: B018  # looks for compilers and libraries, once
