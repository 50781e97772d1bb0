"""Which rank brings its weights to which engine, and how: the driver's part of trainer/weight_links.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from trainer.cluster import Processes, gather
from trainer.weight_links import Offer


class Links:
    """Ranks and the engines that are linked to them now."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._engines: dict[str, Any] = {}  # name -> actor
        self._here: list[list[str]] = []  # of each rank, the engines on its GPU
        self._times = 0

    def connect(self, ranks: Processes, engines: Mapping[str, Any]) -> None:
        """Links these engines, unless they are already; a rank that has no engine elsewhere opens no group."""
        if self._engines == engines:
            return
        self._times += 1
        places = ranks.call("place")
        gpus = gather({name: actor.gpu.remote() for name, actor in engines.items()})
        self._here = [[name for name, found in gpus.items() if found is not None and found == gpu] for gpu, _ in places]
        groups: dict[str, dict[int, tuple[str, int, int]]] = {name: {} for name in engines}
        calls = {}
        for rank, ((rank_name, actor), here) in enumerate(zip(ranks.actors.items(), self._here, strict=True)):
            elsewhere = {name: gpu for name, gpu in gpus.items() if name not in here}
            members = {f"weights/{self._times}/{rank}/{number}": names for number, names in enumerate(apart(elsewhere))}
            for group, names in members.items():
                for member, name in enumerate(names, start=1):
                    groups[name][rank] = group, member, 1 + len(names)
            calls[rank_name] = actor.link.remote({group: len(names) for group, names in members.items()})
        (_, meeting), *_ = places
        for name, actor in engines.items():
            calls[name] = actor.link.remote(name, meeting, groups[name], self._timeout_s)
        gather(calls, ranks.logs)
        self._engines = dict(engines)

    def offers(self, ranks: Processes, version: int, check: bool) -> list[Offer]:
        """What all ranks have, and to whom they show it."""
        actors = zip(ranks.actors.items(), self._here, strict=True)
        return list(gather({name: a.offer.remote(version, check, here) for (name, a), here in actors}, ranks.logs).values())


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
