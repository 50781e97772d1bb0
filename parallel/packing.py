"""How many copies experts get so that the largest load per replica is smallest, and which devices hold them. Pure.

Letters: L layers, E experts of a layer, D devices.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from heapq import heappop, heapreplace
from typing import NamedTuple

import numpy as np

from parallel.placement import Bools, Floats, Ints, Topology, on_owners

HALVINGS = 20  # of the largest load per replica; more of them change no plan
MANY_LAYERS = 4  # from which on arrays are faster than lists, on one node


def even_replicas(weights_LE: Floats, seats: int, most: int) -> Ints:
    """How many copies beside the owner's each expert of a layer gets, at most `most`, so that the largest weight per replica is
    least, (L, E).

    That is what adding one copy after the other to the largest weight per replica arrives at (EPLB; LAER-MoE; in apportionment
    the method of Adams): bisection of that weight until it tells any two experts apart, then one copy each for as many as are
    left.
    """
    layers, experts = weights_LE.shape
    total_L, wanted = weights_LE.sum(axis=1), seats + experts
    if seats == 0 or not total_L.any():
        return np.zeros((layers, experts), dtype=np.int64)

    def replicas(weight_L: Floats) -> Floats:
        return np.maximum(np.minimum(np.ceil(weights_LE / weight_L[:, None]), most + 1), 1)

    total_L = np.where(total_L > 0, total_L, 1.0)  # who has no weights gets no copies
    low_L, high_L = total_L / wanted, total_L / seats  # at `low` there are too many replicas, at `high` there are not
    low_L[replicas(low_L).sum(axis=1) <= wanted] = 0.0  # some have as many as they may, so that others can get more
    heaviest_L = weights_LE.max(axis=1)
    for _ in range(HALVINGS):
        if (heaviest_L * (high_L - low_L) < low_L * high_L).all():
            break  # nobody gets two more between them
        middle_L = (low_L + high_L) / 2
        many_L = replicas(middle_L).sum(axis=1) > wanted
        np.copyto(low_L, middle_L, where=many_L)
        np.copyto(high_L, middle_L, where=~many_L)
    extra_LE = replicas(high_L).astype(np.int64) - 1
    left_L = seats - extra_LE.sum(axis=1)
    if left_L.any():
        open_LE = (extra_LE < most) & (weights_LE > 0)
        order_LE = np.argsort(-np.where(open_LE, weights_LE / (extra_LE + 1), -1.0), axis=1, kind="stable")
        more_LE = np.empty_like(open_LE)
        more_LE[np.arange(layers)[:, None], order_LE] = np.arange(experts) < left_L[:, None]
        extra_LE += more_LE & open_LE
    return extra_LE


def pack(extra_LE: Ints, loads_LE: Floats, owner_LE: Ints, topology: Topology, memory: int) -> Bools:
    """Gives the experts of each layer their copies, those with most load per replica first; returns where they then are,
    (L, E, D).

    Each goes to a node with fewest of its expert, to the one whose least loaded device has least, and there to that device.
    """
    devices, layers_L1 = topology.devices, np.arange(len(extra_LE))[:, None]
    copies_LED, per_replica_LE = on_owners(owner_LE, devices), loads_LE / (extra_LE + 1)
    order_LE = np.argsort(-per_replica_LE, axis=1, kind="stable")
    in_order_LE = extra_LE[layers_L1, order_LE]
    full_LE = in_order_LE == devices - 1
    full_LE &= full_LE.cumsum(axis=1) <= memory  # in that order
    everywhere_LE = np.empty_like(full_LE)
    everywhere_LE[layers_L1, order_LE] = full_LE
    copies_LED[everywhere_LE] = True
    on_LE = owner_LE + devices * layers_L1
    own_L = np.bincount(on_LE.ravel(), np.where(everywhere_LE, 0.0, per_replica_LE).ravel(), len(extra_LE) * devices)
    load_LD = own_L.reshape(-1, devices) + np.where(everywhere_LE, per_replica_LE, 0.0).sum(axis=1, keepdims=True)
    kept_L = np.bincount(on_LE.ravel(), everywhere_LE.ravel(), len(extra_LE) * devices).astype(np.int64)
    room_LD = memory - everywhere_LE.sum(axis=1, keepdims=True) + kept_L.reshape(-1, devices)
    wants_LE = ~full_LE & (in_order_LE > 0)
    spread = _spread_on_one_node if topology.nodes == 1 and len(extra_LE) >= MANY_LAYERS else _spread
    spread(copies_LED, _Wanted(order_LE, wants_LE, extra_LE, owner_LE, per_replica_LE), load_LD, room_LD, topology)
    return copies_LED


class _Wanted(NamedTuple):
    """By layers, experts in the order in which they get copies, and which of these have not got any yet."""

    order_LE: Ints
    wants_LE: Bools  # in that order
    extra_LE: Ints  # as the following ones by expert
    owner_LE: Ints
    per_replica_LE: Floats


def _spread(copies_LED: Bools, wanted: _Wanted, load_LD: Floats, room_LD: Ints, topology: Topology) -> None:
    """In place, layer by layer."""
    for layer, (order_E, wants_E) in enumerate(zip(wanted.order_LE, wanted.wants_LE, strict=True)):
        experts = order_E[wants_E]
        room = _Room(load_LD[layer], room_LD[layer], topology)
        columns = (part_LE[layer, experts].tolist() for part_LE in wanted[2:])
        takers = room.take(zip(*columns, strict=True))
        places = [device for found in takers for _, device, _ in found]
        copies_LED[layer, experts.repeat([len(found) for found in takers]), places] = True


def _spread_on_one_node(copies_LED: Bools, wanted: _Wanted, load_LD: Floats, room_LD: Ints, topology: Topology) -> None:
    """The same for all layers together, an expert of each at a time: to the devices with least load that have room."""
    layers, device_D, load_LD = np.arange(len(load_LD)), np.arange(topology.devices), load_LD.copy()
    places_LE = np.argsort(~wanted.wants_LE, axis=1, kind="stable")  # of those that want copies, the others after
    count_L = wanted.wants_LE.sum(axis=1)
    for turn in range(int(count_L.max())):
        expert_L = wanted.order_LE[layers, places_LE[:, turn]]
        copies_L = np.where(turn < count_L, wanted.extra_LE[layers, expert_L], 0)
        able_LD = (room_LD > 0) & (device_D != wanted.owner_LE[layers, expert_L][:, None])
        order_LD = np.where(able_LD, load_LD, np.inf).argsort(axis=1, kind="stable")
        taken_LD = np.empty_like(able_LD)
        taken_LD[layers[:, None], order_LD] = device_D < copies_L[:, None]
        taken_LD &= able_LD
        load_LD += taken_LD * wanted.per_replica_LE[layers, expert_L][:, None]
        room_LD -= taken_LD
        copies_LED[layers, expert_L] |= taken_LD


_Entry = tuple[float, int, int]  # a device's load, its number, and how many copies it has room for


class _Room:
    """The devices that have room for copies: those of each node as a heap, and the first one of each in order.

    Plain lists: arrays would be slower than the few thousand steps that a layer takes.
    """

    def __init__(self, load_D: Floats, room_D: Ints, topology: Topology) -> None:
        per_node, starts = topology.devices_per_node, range(0, topology.devices, topology.devices_per_node)
        entries: list[_Entry] = [*zip(load_D.tolist(), range(topology.devices), room_D.tolist(), strict=True)]
        self.lines = [sorted(one for one in entries[first : first + per_node] if one[2]) for first in starts]
        self.line_of = [line for line in self.lines for _ in range(per_node)]
        self.first = sorted(line[0] for line in self.lines if line)

    def take(self, wanted: Iterable[tuple[int, int, float]]) -> list[list[_Entry]]:
        """The devices that get copies, expert by expert, each (copies, owner, load of one); fewer where room runs out.

        One of each node but the owner's, then a second, and one of that node, and so on, the least loaded first.
        """
        line_of, first, takers = self.line_of, self.first, []
        for copies, owner, load in wanted:
            home = line_of[owner]
            if copies >= len(first) + (not home):
                takers.append(self._take_everywhere(copies, owner, load))
                continue
            taken = first[:copies]
            if home and home[0] in taken:  # its turn comes with the next expert
                taken = first[: copies + 1]
                taken.remove(home[0])
                first[: copies + 1] = [home[0]]
            else:
                del first[:copies]
            takers.append(taken)
            for before, device, room in taken:
                line = line_of[device]
                if room > 1:
                    heapreplace(line, (before + load, device, room - 1))
                else:
                    heappop(line)
                if line:
                    insort(first, line[0])
        return takers

    def _take_everywhere(self, copies: int, owner: int, load: float) -> list[_Entry]:
        """As many copies as nodes, or more."""
        lines, home = self.lines, self.line_of[owner]
        for line in lines:
            line.sort()
        if len(lines) == 1:
            return self._charge([entry for entry in home[: copies + 1] if entry[1] != owner][:copies], load)
        taken = [line[0] for line in lines if line and line is not home]
        others = [(0.0, owner, 0), *(entry for entry in home[: copies + 1] if entry[1] != owner)]
        seen = [others if line is home else line for line in lines]
        for place in range(1, len(self.line_of) // len(lines)):
            taken += sorted(line[place] for line in seen if len(line) > place)[: copies - len(taken)]
            if len(taken) == copies:
                break
        return self._charge(taken, load)

    def _charge(self, taken: list[_Entry], load: float) -> list[_Entry]:
        """These devices get a copy each, wherever in their lines they stand."""
        for before, device, room in taken:
            line = self.line_of[device]
            line.remove((before, device, room))
            if room > 1:
                insort(line, (before + load, device, room - 1))
        self.first[:] = sorted(line[0] for line in self.lines if line)
        return taken
