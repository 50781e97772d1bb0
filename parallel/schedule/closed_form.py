"""FSMoE's own choice of the pipeline degree, to compare with: four closed forms, each for what binds the layer.

Source: FSMoE, arXiv 2501.10714, section 4.2, for its layout of experts (`Chunk.within_s` is not in it). The paper solves each
case for a real degree by SLSQP; here the degrees are tried one by one, which cannot miss. The third case is not what an exact
simulation gives (tests/benchmarks/schedule.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from parallel.schedule.cost import Chunk

Case = Literal["across", "experts", "exchange", "within"]
CODED_DEGREES = (1, 2, 4, 8)  # that the paper's code rounds to
CODED_LEAST_EXCHANGE_S = 1e-3  # an exchange that takes less is left whole by the paper's code


def case_of(chunk: Chunk, degree: int, gradients_s: float) -> tuple[Case, float]:
    """(what binds the layer, the seconds that the paper expects)."""
    r, a, g, s, e = degree, chunk.across_s, chunk.gather_s, chunk.scatter_s, chunk.expert_s
    between = 2 * (r - 1) * a
    exchange_longer = a > g  # Q1
    if exchange_longer:
        experts_longer = r * e > between  # Q2
        covered = gradients_s > (r * e - between + g + s if experts_longer else g + s)  # Q5, Q4
    else:
        experts_longer = r * e > (r - 1) * (g + s)  # Q3
        covered = gradients_s > (g + s + r * e - between if experts_longer else r * g + r * s - between)  # Q7, Q6
    if covered:
        return "across", 2 * r * a + gradients_s
    if experts_longer:
        return "experts", 2 * a + g + s + r * e
    if exchange_longer:
        return "exchange", 2 * r * a + g + s
    return "within", 2 * a + r * g + r * s


def closed_form_degree(chunk_of: Callable[[int], Chunk], gradients_s: float, degrees: Sequence[int]) -> int:
    """Of these degrees the one with the least expected time; of equals the smallest."""
    return min(degrees, key=lambda degree: (case_of(chunk_of(degree), degree, gradients_s)[1], degree))


def coded_degree(chunk_of: Callable[[int], Chunk], gradients_s: float) -> int:
    """As the paper's code does it: few degrees, and none for short exchanges."""
    if chunk_of(1).across_s < CODED_LEAST_EXCHANGE_S:
        return 1
    return closed_form_degree(chunk_of, gradients_s, CODED_DEGREES)
