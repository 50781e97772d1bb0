"""Rows from every rank of a group to every other at once.

NCCL has a collective for it. That of gloo is left alone: a rank there sends before it tells the other that it may send, in the
same stream. So what comes waits until what goes is through, and a link that carries both ways at once is half used: between two
hosts at 580 Mbit/s, 1.2 MB each way takes 32 ms, where the link needs 17. As messages, receives first, it takes 18.

Letters: W ranks of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch.distributed as dist
from torch import Tensor

TAG = 2**30  # of gloo's messages; experts that travel (sparse_collectives.py) have lower ones


class AllToAll:
    """Under way. All ranks of the group start theirs in the same order; several may be under way."""

    def __init__(
        self,
        received: Tensor,
        sent: Tensor,
        receive_W: Sequence[int],
        send_W: Sequence[int],
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """
        Args:
            received: contiguous; rows from rank 0 of the group, then from rank 1, and so on. Not to be read before `wait`.
            sent: contiguous; rows to them. Not to be changed before `wait`.
            group: None of all ranks.
        """
        if sent.device.type == "cuda":
            arguments = list(receive_W), list(send_W)
            self._works = [dist.all_to_all_single(received, sent, *arguments, group=group, async_op=True)]
        else:
            self._works = _messages(received, sent, receive_W, send_W, group)

    def wait(self) -> None:
        """On a GPU the host does not wait, only what it starts from here on."""
        for work in self._works:
            work.wait()
        self._works = []


def _messages(
    received: Tensor, sent: Tensor, receive_W: Sequence[int], send_W: Sequence[int], group: dist.ProcessGroup | None
) -> list[dist.Work]:
    here, size = dist.get_rank(group), dist.get_world_size(group)
    incoming, outgoing = (
        [rows[end - count : end] for count, end in zip(counts, accumulate(counts), strict=True)]
        for rows, counts in ((received, receive_W), (sent, send_W))
    )
    # Beginning behind itself, each rank asks, and is asked, by one after the other.
    others = [(here + step) % size for step in range(1, size)]
    works = [dist.irecv(incoming[peer], group=group, group_src=peer, tag=TAG) for peer in reversed(others) if receive_W[peer]]
    works += [dist.isend(outgoing[peer], group=group, group_dst=peer, tag=TAG) for peer in others if send_W[peer]]
    incoming[here].copy_(outgoing[here])
    return [work for work in works if work is not None]
