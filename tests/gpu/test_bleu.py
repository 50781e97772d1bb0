"""BLEU on a GPU is that of a CPU, for batches as large as a round's."""

from __future__ import annotations

import pytest
import torch

from rl.rewards.bleu import bleu
from tests.gpu.needs import gpus

pytestmark = [pytest.mark.gpu, gpus(1)]


def test_bleu_is_the_same_on_both_devices() -> None:
    generator = torch.Generator().manual_seed(0)
    candidates, references = (torch.randint(0, 50, (256, width), generator=generator) for width in (900, 1000))
    candidates[:, :300] = references[:, :300]  # long runs in common
    lengths = [torch.randint(0, width + 1, (256,), generator=generator) for width in (900, 1000)]
    expected = bleu(candidates, lengths[0], references, lengths[1])
    found = bleu(candidates.cuda(), lengths[0].cuda(), references.cuda(), lengths[1].cuda())
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-6)
    assert 0.1 < expected.max() < 1
