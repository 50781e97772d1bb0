"""Triton kernels run for real where there is a GPU, and in Triton's interpreter where there is none."""

from __future__ import annotations

import os

import pytest
import torch

GPU = torch.cuda.is_available()

if not GPU:
    # Triton decides when a kernel is defined, so the kernels are imported here, before anything else imports Triton. The
    # variable goes again, for the processes that other tests start.
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.experimental.gluon  # noqa: F401  # Triton imports it at the first launch, and refuses if the variable is gone
    from triton.runtime import interpreter

    import kernels.hopper.vocabulary
    import kernels.triton_accumulate
    import kernels.triton_attention
    import kernels.triton_destinations
    import kernels.triton_expert_order
    import kernels.triton_linear
    import kernels.triton_norm
    import kernels.triton_peer_routing
    import kernels.triton_peer_rows
    import kernels.triton_race
    import kernels.triton_router
    import kernels.triton_rows
    import kernels.triton_squares  # noqa: F401

    del os.environ["TRITON_INTERPRET"]

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: type, scope: interpreter._LangPatchScope) -> None:
        patch_tensor(tensor, scope)
        # Bounds of loops; Triton 3.6 converts an array of one dimension, which NumPy 2.4 refuses.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_and_index


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(GPU, reason="the kernels run on the GPU")),
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]),
    ]
)
def kernel_device(request: pytest.FixtureRequest) -> str:
    """Where kernels can run; on "cpu" they are interpreted, in float32 only."""
    device: str = request.param
    return device
