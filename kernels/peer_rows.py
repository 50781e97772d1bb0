"""Rows that lie in the memory of several ranks: pulled to this one, and summed from there.

Shape letters: W ranks, V = W * C tokens, C of each rank, T of them on this rank, K top-k, R rows, D width. This file is the
reference in plain torch; CUDA takes kernels/triton_peer_rows.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.peers import PeerRows


def pull_rows(rows: PeerRows, row_V: Tensor, out_RD: Tensor) -> None:
    """Each row from where it lies: out[r] = row t of rank w where r = row[w * C + t] (int32).

    What is -1, or after the last of `out_RD`, which is contiguous, is not wanted.
    """
    if row_V.is_cuda:
        from kernels.triton_peer_rows import launch_pull  # here, because CPU machines may lack Triton

        launch_pull(rows, row_V, out_RD)
        return
    for rank, row_C in enumerate(row_V.view(len(rows.blocks), -1)):
        wanted_C = (row_C >= 0) & (row_C < out_RD.shape[0])
        out_RD[row_C[wanted_C]] = rows.of_rank[rank][: row_C.shape[0]][wanted_C]


def sum_rows(rows: PeerRows, rank_TK: Tensor, row_WT: Tensor) -> Tensor:
    """out[t] = the sum over the different ranks r of rank[t] (int32) of row row[r, t] of rank r, (T, D) in the rows' dtype.

    In float32 (float64 for float64), in the order in which a token first names them. A rank of -1 adds nothing.
    """
    if rank_TK.is_cuda:
        from kernels.triton_peer_rows import launch_sum

        return launch_sum(rows, rank_TK, row_WT)
    tokens, top_k = rank_TK.shape
    wide = torch.promote_types(rows.dtype, torch.float32)
    out_TD = torch.zeros(tokens, rows.width, dtype=wide, device=rank_TK.device)
    for k in range(top_k):
        first_T = (rank_TK[:, :k] != rank_TK[:, k : k + 1]).all(dim=1)
        for rank in range(len(rows.blocks)):
            here_T = first_T & (rank_TK[:, k] == rank)
            out_TD[here_T] += rows.of_rank[rank][row_WT[rank, here_T]].to(wide)
    return out_TD.to(rows.dtype)


def pick_numbers(rows: PeerRows, rank_TK: Tensor, row_WT: Tensor) -> Tensor:
    """out[t, k] = number k of row row[r, t] of rank r = rank[t, k], 0 for a rank of -1; the rows are K wide. (T, K)."""
    if rank_TK.is_cuda:
        from kernels.triton_peer_rows import launch_pick

        return launch_pick(rows, rank_TK, row_WT)
    out_TK = torch.zeros(rank_TK.shape, dtype=rows.dtype, device=rank_TK.device)
    for rank in range(len(rows.blocks)):
        t, k = (rank_TK == rank).nonzero(as_tuple=True)
        out_TK[t, k] = rows.of_rank[rank][row_WT[rank, t].long(), k]
    return out_TK
