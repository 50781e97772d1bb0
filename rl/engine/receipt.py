"""What engines report about new weights that they took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Receipt:
    """Of one engine and one update."""

    nbytes: int
    changed_share: float | None  # None where all weights were sent
    check_s: float | None  # of hashing, the trainer's part included; None where nothing was to be checked


def sync_metrics(receipts: Sequence[Receipt]) -> dict[str, float]:
    """Of the largest update and the slowest check, if there was one; no changed share where all weights were sent."""
    metrics = {"sync/mib": max(receipt.nbytes for receipt in receipts) / 2**20}
    shares = [receipt.changed_share for receipt in receipts if receipt.changed_share is not None]
    if len(shares) == len(receipts):
        metrics["sync/changed_share"] = shares[0]
    checks = [receipt.check_s for receipt in receipts if receipt.check_s is not None]
    if checks:
        metrics["sync/check_s"] = max(checks)
    return metrics
