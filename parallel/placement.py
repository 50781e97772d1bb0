"""Where experts live: one owner each, and copies for the step at hand. Records and legality; pure, on the CPU.

Source: Hecate, arXiv 2502.02581, section 3.1. An owner keeps an expert's master weights and optimizer state; a copy is a
replica of its weights on another device, for one step. Every rank makes the same plan from the same loads, so plans are never
sent.

Letters: E experts of one layer, D devices (a rank has one), L MoE layers, H pairs of an expert and a device that has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
# How tokens get from rank to rank (transport.py): straight, to a node once and on inside it, or read where they lie.
TransportKind = Literal["messages", "two_level", "peer_memory"]


@dataclass(frozen=True)
class Topology:
    """Devices 0..devices-1, `devices_per_node` consecutive ones on each node."""

    devices: int
    devices_per_node: int

    def __post_init__(self) -> None:
        if self.devices % self.devices_per_node:
            raise ValueError(f"{self.devices} devices do not fill nodes of {self.devices_per_node}")

    @property
    def nodes(self) -> int:
        return self.devices // self.devices_per_node

    def node_of(self, device: int) -> int:
        return device // self.devices_per_node


@dataclass(frozen=True)
class Budget:
    """What copies may cost (Hecate, section 4.2)."""

    overlap: int  # t: experts of a layer whose copies travel while attention computes
    memory: int  # m: copies that a device has room for in each layer


@dataclass(frozen=True)
class Placement:
    """Who owns and who holds the experts of one layer."""

    owner_E: Ints
    copies_ED: Bools  # where an expert's weights are: on its owner, and on every device with a copy

    def __post_init__(self) -> None:
        experts, devices = self.copies_ED.shape
        if self.owner_E.shape != (experts,):
            raise ValueError(f"{self.owner_E.shape} owners for {experts} experts")
        if not ((self.owner_E >= 0) & (self.owner_E < devices)).all():
            raise ValueError(f"owners {self.owner_E.tolist()} are not all devices 0..{devices - 1}")
        if not self.copies_ED[np.arange(experts), self.owner_E].all():
            raise ValueError("an expert is missing on its owner")

    @cached_property
    def beside_ED(self) -> Bools:
        """Where experts are, their owners excepted."""
        return self.copies_ED & ~on_owners(self.owner_E, self.copies_ED.shape[1])

    @property
    def extra_D(self) -> Ints:
        """Copies on each device beside what it owns."""
        return np.asarray(self.beside_ED.sum(axis=0), dtype=np.int64)


@dataclass(frozen=True)
class Placements:
    """Of several layers, as they are planned: with one call for all of them."""

    owner_LE: Ints
    copies_LED: Bools

    @staticmethod
    def of(*placements: Placement) -> Placements:
        if len(placements) == 1:  # nothing is copied
            return Placements(placements[0].owner_E[None], placements[0].copies_ED[None])
        return Placements(np.stack([one.owner_E for one in placements]), np.stack([one.copies_ED for one in placements]))

    def __getitem__(self, layers: Ints) -> Placements:
        """Of some of the layers, in ascending order."""
        return self if len(layers) == len(self.owner_LE) else Placements(self.owner_LE[layers], self.copies_LED[layers])

    @cached_property
    def holders(self) -> tuple[Ints, Ints]:
        """(experts, devices), (H,) each: who has which expert, by expert, then by device; experts are counted through all
        layers."""
        devices, found_H = self.copies_LED.shape[2], self.copies_LED.ravel().nonzero()[0]  # much faster than on three axes
        expert_H = found_H // devices
        return expert_H, found_H - devices * expert_H

    @property
    def extra_LE(self) -> Ints:
        """Copies of each expert beside its owner's."""
        return np.bincount(self.holders[0]).reshape(self.owner_LE.shape) - 1


def on_owners(owner_E: Ints, devices: int) -> Bools:
    """(E, D): every expert on its owner alone; (L, E, D) of (L, E) owners."""
    found = np.zeros((*owner_E.shape, devices), dtype=np.bool_)
    found.reshape(-1, devices)[np.arange(owner_E.size), owner_E.ravel()] = True
    return found


def without_copies(owner_E: Ints, devices: int) -> Placement:
    """Plain expert parallelism: every expert on its owner alone."""
    return Placement(owner_E, on_owners(owner_E, devices))


def even_owners(experts: int, devices: int) -> Ints:
    """Equal consecutive shares: device d owns d * E/D .. (d+1) * E/D - 1."""
    if experts % devices:
        raise ValueError(f"{experts} experts do not divide evenly over {devices} devices")
    return np.repeat(np.arange(devices), experts // devices)


def missing(wanted: Placement, present: Placement) -> Placement:
    """The owners, and those of the wanted copies that are not there."""
    copies_ED = wanted.copies_ED & ~present.copies_ED | on_owners(wanted.owner_E, wanted.copies_ED.shape[1])
    return Placement(wanted.owner_E, copies_ED)
