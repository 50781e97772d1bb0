"""Planning for a cluster that you do not have."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from trainer.config.model import ModelConfig
from trainer.config.record import Record


class LinkConfig(Record):
    latency_s: float = Field(ge=0)  # of a message
    gbytes: float = Field(gt=0)  # GB/s that a GPU sends, and at the same time receives


class MachineConfig(Record):
    """What one GPU and its links reach: published, or better measured."""

    gpus_per_node: int = Field(gt=0)
    memory_gib: float = Field(gt=0)
    product_tflops: float = Field(gt=0)  # TFLOP/s of grouped products in bfloat16
    memory_tbytes: float = Field(gt=0)  # TB/s read
    within: LinkConfig  # to the other GPUs of the node
    across: LinkConfig  # to other nodes
    exchange_s: float = Field(ge=0)  # of an MoE layer's tokens, beside their transfer: sizes, order, plan, host
    order_s: float = Field(ge=0)  # to order a layer's choices if no tokens travel
    chunk_s: float = Field(ge=0)  # of each chunk of a pass except the first, beside its parts: until it is started
    host_gbytes: float = Field(gt=0)  # GB/s of the host's memory, for the optimizer of one rank
    host_link_gbytes: float = Field(gt=0)  # GB/s each way between a GPU and its host


class PlanConfig(Record):
    """A pretraining to predict, not to run."""

    model: ModelConfig
    machine: MachineConfig
    gpus: int = Field(gt=1)
    sequence_length: int = Field(gt=1)
    batch_rows: int = Field(gt=0)  # of all ranks together, in one update
    loads: Literal["even", "zipf", "drift", "burst", "settling"]  # of the experts; launch/benchmarks/traces.py
    profile: Path | None  # a file of measured times that replace published speeds
    picture: Path | None  # an .svg or .png of one layer's timeline
    seed: int = Field(ge=0)

    @model_validator(mode="after")
    def consistent(self) -> PlanConfig:
        if self.gpus > self.machine.gpus_per_node and self.gpus % self.machine.gpus_per_node:
            raise ValueError(
                f"gpus ({self.gpus}) do not fill nodes of {self.machine.gpus_per_node}; "
                "give a multiple, or machine.gpus_per_node"
            )
        if self.batch_rows % self.gpus:
            raise ValueError(f"batch_rows ({self.batch_rows}) does not divide over {self.gpus} gpus; change either")
        if self.sequence_length > self.model.max_positions:
            raise ValueError(
                f"sequence_length ({self.sequence_length}) is larger than model.max_positions ({self.model.max_positions})"
            )
        if self.picture is not None and self.picture.suffix not in (".svg", ".png"):
            raise ValueError(f"picture ({self.picture}) should end in .svg or .png")
        return self
