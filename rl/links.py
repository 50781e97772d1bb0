"""Which rank brings its weights to which engine, and how: the driver's part of trainer/weight_links.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.cluster import Processes, gather
from trainer.weight_links import Offer


class Links:
    """Ranks and the engines that are linked to them now."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._engines: dict[str, Any] = {}  # name -> actor
        self._here: list[list[str]] = []  # of each rank, the engines that it shows its memory to
        self._times = 0
        self.broadcasts = False  # whether some rank has an engine that it does not show its memory to

    def connect(self, ranks: Processes, engines: Mapping[str, Any]) -> None:
        """Links these engines, unless they are already; a rank that shows its memory to all of them opens no group."""
        if self._engines == engines:
            return
        self._times += 1
        places = ranks.call("place")
        gpus = gather({name: actor.gpu.remote() for name, actor in engines.items()})
        reached = ranks.call("reached_by", sorted({gpu for gpu in gpus.values() if gpu is not None}))
        self._here = [shown_to(gpu, found, gpus, len(ranks)) for (gpu, _), found in zip(places, reached, strict=True)]
        groups: dict[str, dict[int, tuple[str, int, int]]] = {name: {} for name in engines}
        calls, self.broadcasts = {}, False
        for rank, ((rank_name, actor), here) in enumerate(zip(ranks.actors.items(), self._here, strict=True)):
            elsewhere = {name: gpu for name, gpu in gpus.items() if name not in here}
            members = {f"weights/{self._times}/{rank}/{number}": names for number, names in enumerate(apart(elsewhere))}
            for group, names in members.items():
                for member, name in enumerate(names, start=1):
                    groups[name][rank] = group, member, 1 + len(names)
            calls[rank_name] = actor.link.remote({group: len(names) for group, names in members.items()})
            self.broadcasts |= bool(members)
        (_, meeting), *_ = places
        for name, actor in engines.items():
            calls[name] = actor.link.remote(name, meeting, groups[name], self._timeout_s)
        gather(calls, ranks.logs)
        self._engines = dict(engines)

    def offers(self, ranks: Processes, version: int, check: bool) -> list[Offer]:
        """What all ranks have, and to whom they show it."""
        actors = zip(ranks.actors.items(), self._here, strict=True)
        return list(gather({name: a.offer.remote(version, check, here) for (name, a), here in actors}, ranks.logs).values())


def shown_to(own: str | None, reached: Sequence[str], gpus: Mapping[str, str | None], ranks: int) -> list[str]:
    """The engines that copy from a rank on the GPU `own`: those on it, and those on GPUs that reach it, unless they are more
    than the ranks. Then they would divide a rank's links among them, and a broadcast gives all of them the whole rate."""
    here = [name for name, gpu in gpus.items() if gpu is not None and gpu == own]
    linked = [name for name, gpu in gpus.items() if gpu in reached and gpu != own]
    return here + linked if len(linked) <= ranks else here


def apart(gpus: Mapping[str, str | None]) -> list[list[str]]:
    """Engines in as few groups as can be, none with two on the same GPU; those without a GPU do not mind."""
    groups: list[list[str]] = []
    seen = Counter[str]()
    for name, gpu in gpus.items():
        number = 0 if gpu is None else seen[gpu]
        if gpu is not None:
            seen[gpu] += 1
        groups += [[]] if number == len(groups) else []
        groups[number].append(name)
    return groups
