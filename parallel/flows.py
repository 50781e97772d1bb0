"""Which copy serves whose tokens, and what every device then computes, sends and receives: pure functions of a plan.

Source: Hecate, arXiv 2502.02581, section 4.4. Unless a plan says otherwise, a device's tokens stay if it holds their expert,
or else go evenly to the holders on its node, or else evenly to all.

Letters: L layers, E experts of a layer, D devices, N nodes, G devices of a node, H pairs of an expert and a device that has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from parallel.placement import Bools, Floats, Placement, Placements, Topology

TINY = 1e-300  # divides nothing by something


@dataclass(frozen=True)
class Plan:
    """Where the experts of a layer are for a step, and who serves whose tokens."""

    placement: Placement
    weight_ED: Floats | None = None  # in which proportion holders share what comes to them; None: evenly
    nearest_first: bool = True  # own device, else own node, else all holders; or at once all holders

    def __post_init__(self) -> None:
        if self.weight_ED is not None:
            if ((self.weight_ED != 0) & ~self.placement.copies_ED).any():
                raise ValueError("tokens would go to a device without their expert")
            if not (self.weight_ED.sum(axis=1) > 0).all():
                raise ValueError("nobody would serve the tokens of an expert")

    @property
    def stays(self) -> bool:
        """Whether every device serves all of its own tokens."""
        return self.nearest_first and bool(self.placement.copies_ED.all())

    @property
    def weights_ED(self) -> Floats:
        return self.placement.copies_ED.astype(np.float64) if self.weight_ED is None else self.weight_ED


@dataclass(frozen=True)
class Flows:
    """What a device computes, and how many entries it takes from and gives to others on its node and elsewhere; (D,) each, or
    (L, D) of several layers."""

    entries_D: Floats
    experts_D: Floats  # that have entries there
    within_in_D: Floats
    within_out_D: Floats
    across_in_D: Floats
    across_out_D: Floats
    stays: Bools  # `Plan.stays`; () or (L,)

    @property
    def staying_D(self) -> Floats:
        """Entries of a device's own tokens that it computes."""
        return self.entries_D - self.within_in_D - self.across_in_D


def shares(plan: Plan, topology: Topology, device: int) -> Floats:
    """Which share of a device's entries of each expert goes to which device, (E, D); rows sum to one."""
    weights_ED = plan.weights_ED
    if plan.nearest_first:
        node_D = np.arange(topology.devices) // topology.devices_per_node
        near_ED = weights_ED * (node_D == topology.node_of(device))
        own_ED = np.zeros_like(weights_ED)
        own_ED[:, device] = plan.placement.copies_ED[:, device]
        weights_ED = np.where(near_ED.any(axis=1, keepdims=True), near_ED, weights_ED)
        weights_ED = np.where(own_ED.any(axis=1, keepdims=True), own_ED, weights_ED)
    return np.asarray(weights_ED / weights_ED.sum(axis=1, keepdims=True))


def flows(plan: Plan, topology: Topology, loads_E: Floats) -> Flows:
    """What `shares` amounts to if every device has an equal part of each expert's entries."""
    weight_LED = None if plan.weight_ED is None else plan.weight_ED[None]
    found = flows_of(Placements.of(plan.placement), topology, loads_E[None], weight_LED, nearest_first=plan.nearest_first)
    return Flows(*(part_LD[0] for part_LD in vars(found).values()))


def flows_of(
    placements: Placements,
    topology: Topology,
    loads_LE: Floats,
    weight_LED: Floats | None = None,
    *,
    nearest_first: bool = True,
) -> Flows:
    """`flows` of several layers whose plans have these weights and this order. The same bits as layer by layer."""
    layers, experts, devices = placements.copies_LED.shape
    nodes, per_node = topology.nodes, topology.devices_per_node
    expert_H, device_H = placements.holders
    stays_L: Bools = np.zeros(layers, dtype=np.bool_)
    if nearest_first and len(expert_H) >= experts * devices:  # else no layer has all experts everywhere
        stays_L = np.asarray(placements.copies_LED.reshape(layers, -1).all(axis=1))
    at_H = expert_H // experts * devices + device_H  # of (L, D)
    weight_H = np.ones(len(expert_H)) if weight_LED is None else weight_LED.reshape(-1, devices)[expert_H, device_H]
    part_E, weight_E = loads_LE.ravel() / devices, np.bincount(expert_H, weights=weight_H, minlength=layers * experts)
    part_H = part_E[expert_H]

    def on_devices(amount_H: Floats | Bools) -> Floats:
        found = np.bincount(at_H, weights=amount_H, minlength=layers * devices)
        return np.asarray(found.reshape(layers, devices), dtype=np.float64)

    def on_nodes(amount_LN: Floats) -> Floats:
        return amount_LN.repeat(per_node, axis=1)

    if not nearest_first:
        takes_LD = on_devices((part_E / weight_E)[expert_H] * weight_H)
        return _from_all(takes_LD, on_devices((weight_H > 0) & (part_H > 0)), stays_L, topology)
    cell_H = expert_H * nodes + device_H // per_node  # of (E, N), E those of all layers
    weight_EN = np.bincount(cell_H, weights=weight_H, minlength=layers * experts * nodes).reshape(-1, nodes)
    without_EN = per_node - np.bincount(cell_H, minlength=layers * experts * nodes).reshape(-1, nodes)
    # Devices without the expert give to the holders on their node, in proportion to their weights; on bare nodes, to all.
    bare_EN = weight_EN == 0
    near_H = without_EN.ravel()[cell_H] * weight_H / np.maximum(weight_EN.ravel()[cell_H], TINY)
    far_E = part_E * (without_EN * bare_EN).sum(axis=1) / weight_E
    own_LD = on_devices(part_H)
    near_LD = on_devices(part_H * near_H)
    far_LD = on_devices(far_E[expert_H] * weight_H)
    bare_LN = (part_E[:, None] * bare_EN).reshape(layers, experts, nodes).sum(axis=1)
    gives_far_LD = on_nodes(bare_LN) - on_devices(part_H * bare_EN.ravel()[cell_H])
    return Flows(
        entries_D=own_LD + near_LD + far_LD,
        experts_D=on_devices(part_H > 0),
        within_in_D=near_LD,
        within_out_D=part_E.reshape(layers, experts).sum(axis=1, keepdims=True) - own_LD - gives_far_LD,
        across_in_D=far_LD,
        across_out_D=gives_far_LD,
        stays=stays_L,
    )


def _from_all(takes_LD: Floats, experts_LD: Floats, stays_L: Bools, topology: Topology) -> Flows:
    """Of layers whose devices take this many entries from every device alike."""
    devices, per_node = topology.devices, topology.devices_per_node
    node_LD = takes_LD.reshape(len(takes_LD), topology.nodes, per_node).sum(axis=2).repeat(per_node, axis=1)
    return Flows(
        entries_D=takes_LD * devices,
        experts_D=experts_LD,
        within_in_D=takes_LD * (per_node - 1),
        within_out_D=node_LD - takes_LD,
        across_in_D=takes_LD * (devices - per_node),
        across_out_D=takes_LD.sum(axis=1, keepdims=True) - node_LD,
        stays=stays_L,
    )


def device_loads(plan: Plan, topology: Topology, loads_E: Floats) -> Floats:
    """Entries that each device computes, (D,)."""
    return flows(plan, topology, loads_E).entries_D


def imbalance(loads_D: Floats) -> float:
    """The busiest device's load over the mean; 1 is even, and what no load is."""
    return float(loads_D.max() / loads_D.mean()) if loads_D.sum() > 0 else 1.0
