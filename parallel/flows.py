"""Which copy serves whose tokens, and what that makes every device compute, send and receive: pure functions of a plan.

Source: Hecate, arXiv 2502.02581, section 4.4. Where a plan does not say otherwise a device's tokens go to itself if it holds
their expert, else evenly to the holders on its node, else evenly to all.

Letters: E experts of a layer, D devices, N nodes, G devices of a node, H pairs of an expert and a device that has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from parallel.placement import Bools, Floats, Placement, Topology


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
    def weights_ED(self) -> Floats:
        return self.placement.copies_ED.astype(np.float64) if self.weight_ED is None else self.weight_ED


@dataclass(frozen=True)
class Flows:
    """What a device computes, and how many entries it takes from and gives to others on its node and elsewhere; (D,) each."""

    entries_D: Floats
    experts_D: Floats  # that have entries there
    within_in_D: Floats
    within_out_D: Floats
    across_in_D: Floats
    across_out_D: Floats


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
    experts, devices = plan.placement.copies_ED.shape
    nodes, per_node = topology.nodes, topology.devices_per_node
    expert_H, device_H = plan.placement.holders
    weight_H = np.ones(len(expert_H)) if plan.weight_ED is None else plan.weight_ED[expert_H, device_H]
    part_E, weight_E = loads_E / devices, np.bincount(expert_H, weights=weight_H, minlength=experts)
    part_H = part_E[expert_H]

    def on_devices(amount_H: Floats | Bools) -> Floats:
        return np.asarray(np.bincount(device_H, weights=amount_H, minlength=devices), dtype=np.float64)

    if not plan.nearest_first:  # from every device alike
        takes_D = on_devices((part_E / weight_E)[expert_H] * weight_H)
        node_D = np.repeat(takes_D.reshape(nodes, per_node).sum(axis=1), per_node)
        return Flows(
            entries_D=takes_D * devices,
            experts_D=on_devices((weight_H > 0) & (part_H > 0)),
            within_in_D=takes_D * (per_node - 1),
            within_out_D=node_D - takes_D,
            across_in_D=takes_D * (devices - per_node),
            across_out_D=takes_D.sum() - node_D,
        )
    cell_H = expert_H * nodes + device_H // per_node  # of (E, N)
    weight_EN = np.bincount(cell_H, weights=weight_H, minlength=experts * nodes).reshape(experts, nodes)
    without_EN = per_node - np.bincount(cell_H, minlength=experts * nodes).reshape(experts, nodes)
    # Devices without the expert give to the holders on their node, in proportion to their weights; on bare nodes, to all.
    bare_EN = weight_EN == 0
    near_H = without_EN.ravel()[cell_H] * weight_H / np.where(weight_H > 0, weight_EN.ravel()[cell_H], 1.0)
    far_E = part_E * (without_EN * bare_EN).sum(axis=1) / weight_E
    own_D = on_devices(part_H)
    near_D = on_devices(part_H * near_H)
    far_D = on_devices(far_E[expert_H] * weight_H)
    gives_far_D = np.repeat(part_E @ bare_EN, per_node) - on_devices(part_H * bare_EN.ravel()[cell_H])
    return Flows(
        entries_D=own_D + near_D + far_D,
        experts_D=on_devices(part_H > 0),
        within_in_D=near_D,
        within_out_D=part_E.sum() - own_D - gives_far_D,
        across_in_D=far_D,
        across_out_D=gives_far_D,
    )


def device_loads(plan: Plan, topology: Topology, loads_E: Floats) -> Floats:
    """Entries that each device computes, (D,)."""
    return flows(plan, topology, loads_E).entries_D


def imbalance(loads_D: Floats) -> float:
    """The busiest device's load over the mean; 1 is even, and what no load is."""
    return float(loads_D.max() / loads_D.mean()) if loads_D.sum() > 0 else 1.0
