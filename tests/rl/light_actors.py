"""Actors of a process that imports next to nothing, for tests of where processes are and of what becomes of them."""

from __future__ import annotations


class Nobody:
    """Takes a place, and answers."""

    def __init__(self, index: int) -> None:
        """Of no consequence."""

    def pid(self) -> int:
        return 0


class BrokenEngine:
    def __init__(self) -> None:
        raise MemoryError("no memory for a cache of 7 GiB")

    def receive(self, *updates: object) -> None:
        """Never called."""
