"""How many copies experts get so that the largest load per replica is least, and on which devices they then lie. Pure.

Letters: E experts of a layer, D devices.
"""

from __future__ import annotations

from bisect import insort

import numpy as np

from parallel.placement import Bools, Floats, Ints, Topology, on_owners

HALVINGS = 20  # of the largest load per replica; more of them change no plan


def even_replicas(weights_E: Floats, seats: int, most: int) -> Ints:
    """How many copies beside the owner's each expert gets, at most `most`, so that the largest weight per replica is least.

    That is what adding one copy after the other to the largest weight per replica arrives at (EPLB; LAER-MoE; in apportionment
    the method of Adams): bisection of that weight until it tells any two experts apart, then one copy each for as many as are
    left.
    """
    extra_E = np.zeros(len(weights_E), dtype=np.int64)
    total, wanted = float(weights_E.sum()), seats + len(weights_E)
    if total == 0 or seats == 0:
        return extra_E

    def replicas(weight: float) -> Floats:
        return np.maximum(np.minimum(np.ceil(weights_E / weight), most + 1), 1)

    low, high = total / wanted, total / seats  # at `low` there are too many replicas, at `high` there are not
    if replicas(low).sum() <= wanted:
        low = 0.0  # some have as many as they may, so that others can get more
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        left = wanted - replicas(middle).sum()
        low, high = (low, middle) if left >= 0 else (middle, high)
        if left == 0:
            break
    extra_E = replicas(high).astype(np.int64) - 1
    if left := seats - int(extra_E.sum()):
        open_E = np.flatnonzero((extra_E < most) & (weights_E > 0))
        extra_E[open_E[np.argsort(-weights_E[open_E] / (extra_E[open_E] + 1), kind="stable")[:left]]] += 1
    return extra_E


def pack(extra_E: Ints, loads_E: Floats, owner_E: Ints, topology: Topology, memory: int) -> Bools:
    """Gives each expert its copies, those with most load per replica first; returns where experts then are, (E, D).

    Each goes to a node with fewest of its expert, to the one whose least loaded device has least, and there to that device.
    """
    devices = topology.devices
    copies_ED, per_replica_E = on_owners(owner_E, devices), loads_E / (extra_E + 1)
    order_E = np.argsort(-per_replica_E, kind="stable")
    full_E = extra_E[order_E] == devices - 1
    full_E &= full_E.cumsum() <= memory
    everywhere_E, order_E = order_E[full_E], order_E[~full_E & (extra_E[order_E] > 0)]
    copies_ED[everywhere_E] = True
    own_E = per_replica_E.copy()
    own_E[everywhere_E] = 0.0
    load_D = np.bincount(owner_E, weights=own_E, minlength=devices) + per_replica_E[everywhere_E].sum()
    room_D = memory - len(everywhere_E) + np.bincount(owner_E[everywhere_E], minlength=devices)
    room = _Room(load_D, room_D, topology)
    wanted = zip(extra_E[order_E].tolist(), owner_E[order_E].tolist(), per_replica_E[order_E].tolist(), strict=True)
    takers = [room.take(*one) for one in wanted]
    copies_ED[order_E.repeat([len(found) for found in takers]), [device for found in takers for device in found]] = True
    return copies_ED


class _Room:
    """The devices that have room for copies, as (load, device) in ascending order.

    Plain lists: arrays would be slower than the few thousand steps that a layer takes.
    """

    def __init__(self, load_D: Floats, room_D: Ints, topology: Topology) -> None:
        per_node, load, room = topology.devices_per_node, load_D.tolist(), room_D.tolist()
        self.per_node, self.left = per_node, room
        self.lines = [  # one a node
            sorted((load[device], device) for device in range(first, first + per_node) if room[device])
            for first in range(0, topology.devices, per_node)
        ]
        self.first = sorted(line[0] for line in self.lines if line)  # of each line

    def take(self, copies: int, owner: int, load: float) -> list[int]:
        """The devices that get copies of one expert, with so much load each; fewer where room runs out.

        One of each node but the owner's, then a second, and one of that node, and so on, the least loaded first.
        """
        lines, first, home = self.lines, self.first, owner // self.per_node
        if copies > len(first) - bool(lines[home]):
            return self._take_everywhere(copies, owner, load)
        taken = first[:copies]
        if lines[home] and lines[home][0] in taken:  # its turn comes with the next expert
            own = lines[home][0]
            taken = first[: copies + 1]
            taken.remove(own)
            first[: copies + 1] = [own]
        else:
            del first[:copies]
        for before, device in taken:
            line = lines[device // self.per_node]
            del line[0]
            self._charge(line, device, before + load)
            if line:
                insort(first, line[0])
        return [device for _, device in taken]

    def _charge(self, line: list[tuple[float, int]], device: int, load: float) -> None:
        """A copy lies on a device, which has so much load then; `line` is that of its node, without it."""
        self.left[device] -= 1
        if self.left[device]:
            insort(line, (load, device))

    def _take_everywhere(self, copies: int, owner: int, load: float) -> list[int]:
        """More copies than nodes beside the owner's."""
        lines, home = self.lines, owner // self.per_node
        taken = [line[0] for node, line in enumerate(lines) if line and node != home]
        others = [(0.0, owner), *(entry for entry in lines[home][: copies + 1] if entry[1] != owner)]
        seen = [*lines[:home], others, *lines[home + 1 :]]
        for place in range(1, self.per_node):
            taken += sorted(line[place] for line in seen if len(line) > place)[: copies - len(taken)]
            if len(taken) == copies:
                break
        for before, device in taken:
            line = lines[device // self.per_node]
            line.remove((before, device))
            self._charge(line, device, before + load)
        self.first = sorted(line[0] for line in lines if line)
        return [device for _, device in taken]
