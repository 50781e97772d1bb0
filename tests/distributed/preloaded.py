"""What the server of ranks imports before it forks them: what each would spend a second on, ten where files are slow.

DeepSpeed picks its device when it is imported, so the server forks ranks for one kind only: GPUs, where the machine has any.
"""

from __future__ import annotations

import gc
import os
from importlib import import_module

import cpuinfo
import torch

from parallel.dense import import_deepspeed
from parallel.offload import remember_cpu

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # else a look at whether there are GPUs opens CUDA, and forks cannot use it
KIND = "cuda" if torch.cuda.is_available() else "cpu"
os.environ["DS_ACCELERATOR"] = KIND

import_deepspeed()
for module in (
    "deepspeed.runtime.zero.muon.muon_optimizer",  # with the first update
    "numpy.random",
    *("rl.engine.engine", "trainer.worker"),
    *("hypothesis", "pytest"),  # of the files whose functions the ranks run
):
    import_module(module)

if KIND == "cpu":  # some of these ask a GPU for its version, which opens CUDA
    import_module("deepspeed.ops").__compatible_ops__  # noqa: B018 - which operators can be built here, it looks once
    import_module("deepspeed.module_inject.auto_ep_layer")  # with the first trainer, and Triton with it
    import_module("torch._dynamo")  # with the first layer that is recomputed; two seconds of torch.utils.checkpoint

remember_cpu()
cpuinfo.get_cpu_info()  # for all ranks

gc.freeze()  # ranks look for garbage among what is theirs, and share these pages
