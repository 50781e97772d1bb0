"""Launches that cost the host little, and launches that overlap.

Overlap: a kernel begins while the last programs of the one before still run.
Starting a kernel costs a microsecond or two, as much as many of decoding take. With programmatic dependent launch (Hopper and
later) the next kernel's programs take their places as soon as all of this one's have, and wait there for its results. Every
kernel launched with `early` begins with `begin`: whatever ran before it is then done, and what it wrote can be read. Before
that it may read weights, which nothing changes that is itself launched so.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FEW_ROWS = 4096  # with many, what waits takes room from what runs: 3 % of the experts' forward pass of 32768 tokens
ALIGNED = 16  # bytes of an address, and the number that integers are multiples of: Triton compiles for that
_compiled: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}  # (the compiled kernel, its arguments behind the positional ones)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`: the runtime arguments first, then constants and options of the compiler by name.

    Triton binds arguments and looks for what it has compiled in Python at every launch, which takes as long as some of our
    kernels. Here a launch like one before, by all that Triton compiles for, goes to what was compiled then.
    """
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    key = id(kernel), device, *map(_kind, args), *options.items()
    found = _compiled.get(key)
    if found is not None:
        compiled, behind = found
        compiled[(*grid, 1, 1)[:3]](*args, *behind)
        return
    compiled = kernel[grid](*args, **options)
    if isinstance(compiled, triton.compiler.CompiledKernel):  # nothing is where kernels are interpreted
        _compiled[key] = compiled, tuple(options[name] for name in kernel.arg_names[len(args) :])


def _kind(arg: Any) -> Hashable:
    """What Triton compiles for of a runtime argument, or more."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % ALIGNED == 0
    if isinstance(arg, int):
        return type(arg), arg == 1, arg % ALIGNED == 0, arg.bit_length() // 32  # 32 bits, 64, or 64 without a sign
    if isinstance(arg, tuple):
        return tuple(map(_kind, arg))
    if isinstance(arg, TensorDescriptor):
        return arg.base.dtype, *arg.block_shape, arg.layout
    return type(arg).__name__  # a number with a point, or nothing


@triton.jit
def begin(EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


def early(device: torch.device, rows: int) -> dict[str, bool]:
    """The options of a launch for so many rows."""
    if rows <= FEW_ROWS and _overlaps(device):
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}


@cache
def _overlaps(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
