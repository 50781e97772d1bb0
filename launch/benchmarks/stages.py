"""The options of `python -m launch.bench rl`, and what it reports of each part of an iteration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveInt

from launch.benchmarks.april import RoundOptions
from launch.benchmarks.options import Listed


class IterationOptions(RoundOptions):
    ranks: PositiveInt = Field(1, description="that learn, one on each GPU, or processes on a CPU")
    engines: NonNegativeInt = Field(0, description="with GPUs of their own; 0: one on the GPU of each rank")
    overlap: bool = Field(False, description="engines generate on while the ranks learn, as with rollout=async")
    over_provision: float = Field(2.0, ge=1, description="of APRIL; 1 waits for the longest")
    slots: PositiveInt = Field(description="sequences that an engine decodes at once")
    cache: PositiveInt | None = Field(
        None, description="tokens that an engine's cache holds; not given: the longest in every slot"
    )
    micro_rows: PositiveInt = Field(description="rows of prompt + longest tokens that a rank takes through the model at once")
    workers: PositiveInt = Field(2, description="processes that judge")
    profile: Path | None = Field(None, description="a JSON file: on what rank 0 spends the time of a logprob and an update")
    peer_response: PositiveInt = Field(64, description="tokens that transformers' generate gives each sequence")
    peers: Listed[str] | None = Field(None, description="that generate; not given: those that are installed, on a GPU")


@dataclass(frozen=True)
class Stage:
    """Of one iteration, the median over the rounds."""

    name: str
    seconds: float  # that the iteration waited for it
    busy_s: float  # in which its devices were at it; engines that go on while the ranks learn are so for longer
    devices: int
    tokens: int  # generated, judged, or passed through the trainer, prompts included
    work: float  # bytes that must be read or written, or FLOPs, of all devices
    ceiling: float | None  # of one device, in the same unit a second; None: the devices have no part in it

    @property
    def share(self) -> float | None:
        return None if self.ceiling is None else self.work / self.busy_s / self.devices / self.ceiling
