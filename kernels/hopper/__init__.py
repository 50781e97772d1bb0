"""Matrix products for NVIDIA's Hopper GPUs, in Gluon, the part of Triton that exposes memories and pipelines.

Gluon changes from one version of Triton to the next, so these kernels require a certain version.
"""

import triton

from kernels.errors import UserError

TRITON = "3.6"

if not triton.__version__.startswith(f"{TRITON}."):
    raise UserError(
        f"the bfloat16 kernels for Hopper are written for Triton {TRITON}, which comes with torch 2.11; this is Triton "
        f"{triton.__version__}; install torch 2.11 on GPU machines, or use float32, which takes the reference"
    )
