"""An MoE layer as chunked_experts.py runs it, with lines from published speeds instead of measured ones. Pure.

The lines are those of execution.py, so a predicted cluster is planned like a run.
"""

from __future__ import annotations

from parallel.layer_cost import LayerCosts, Link
from parallel.schedule.cost import Line, ShardedWorkload
from parallel.schedule.execution import NOTHING, ExecutionCosts, LayerWork

ALL = 1.0  # the entries of a layer, of which its lines are


def published(costs: LayerCosts, work: ShardedWorkload, sums_s: float, chunk_s: float) -> tuple[ExecutionCosts, LayerWork]:
    """What the parts of a layer take, and how much of each there is.

    Every chunk reads the weights of all experts again and fills as many last tiles. Rows are laid out, put in place and summed
    where their message is sent and arrives. Straight to the ranks, both kinds of links carry at the same time, and the layer
    waits for the one that takes longer; a message without rows takes its start all the same, but where nothing is exchanged.

    Args:
        sums_s: of gradients of weights.
        chunk_s: of each chunk of a pass after the first, beside its parts.
    """
    across, within = _line(costs.across), _line(costs.within)
    if work.two_level:
        first, first_bytes, inside, inside_bytes = across, work.across_bytes, within, work.within_bytes
    else:
        legs = [(across, work.across_bytes), (within, work.within_bytes)]
        first, first_bytes = max(legs, key=lambda leg: leg[0].seconds(leg[1]))
        inside, inside_bytes = NOTHING, 0.0
    first_bytes = first_bytes or work.exchanged
    rows = Line(work.weights_s, work.product_s)
    lines = ExecutionCosts(
        exchange=Line(work.exchanged * first.alpha_s, first.beta_s),
        copy=Line(0.0, work.rows_s / (first_bytes or 1.0)),
        forward=rows,
        backward=rows,
        weights=Line(work.weights_s + sums_s, work.product_s),
        attention=NOTHING,
        announce_s=(1 + work.two_level * work.exchanged) * work.beside_rows_s,  # each level tells its sizes
        inside=inside,
        chunk_s=chunk_s,
    )
    return lines, LayerWork(first_bytes, ALL, inside_bytes, ALL * work.staying)


def _line(link: Link) -> Line:
    return Line(link.latency_s, link.byte_s)
