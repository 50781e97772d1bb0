"""Clusters that you do not have: conf/machine says how fast a GPU and its links are, and a file of measured times replaces
that."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, ValidationError

from kernels.errors import UserError
from parallel.layer_cost import LayerCosts, Link
from parallel.placement import Topology
from parallel.schedule.cost import Fit, fit
from trainer.config.plan import LinkConfig, MachineConfig
from trainer.config.record import Record
from trainer.json_text import parsed_yaml

CONF = Path(__file__).parents[1] / "conf"
BYTES, FLOAT32 = 2, 4  # of a value in bfloat16 and in sums

Options = TypeVar("Options", bound=Record)
Samples = tuple[tuple[float, float], ...]  # amounts and seconds


class Profile(Record):
    """Times measured on the real machine; of a part without samples what is known beside them stays.

    Links: all GPUs of a node, or of all nodes, at once, each sends this many bytes and receives as many.
    """

    products: Samples | None = None  # floating point operations of grouped products in bfloat16
    memory: Samples | None = None  # bytes read
    within: Samples | None = None  # bytes that a GPU sends to others of its node
    across: Samples | None = None  # bytes that it sends to other nodes


def _known(name: str) -> str:
    names = sorted(file.stem for file in (CONF / "machine").glob("*.yaml"))
    if name not in names:
        raise ValueError(f"is not in conf/machine; there are {', '.join(names)}")
    return name


MachineName = Annotated[str, AfterValidator(_known)]


@cache
def read_machine(name: str) -> MachineConfig:
    return read_group("machine", name, MachineConfig)


def read_group(group: str, choice: str, record: type[Options], **changed: Any) -> Options:
    """A file of conf/, which builds on no other, without Hydra, which benchmarks do without; with these options changed."""
    options = yaml.safe_load((CONF / group / f"{choice}.yaml").read_text(encoding="utf-8"))
    return record.model_validate(options | changed)


def profiled(machine: MachineConfig, file: Path) -> tuple[MachineConfig, list[str]]:
    """The machine as the file's times say it is, and a line about each fit.

    Raises:
        UserError: the file cannot be read, or is no profile.
    """
    try:
        profile = Profile.model_validate(parsed_yaml(file.read_bytes()))
        fits = {name: fit([n for n, _ in samples], [s for _, s in samples]) for name, samples in profile if samples is not None}
    except OSError as error:
        raise UserError(f"profile = {file} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise UserError(
            f"profile = {file}: {where}: {first['msg']}; it holds lists of [amount, seconds] named "
            f"{', '.join(Profile.model_fields)}"
        ) from error
    except ValueError as error:  # neither YAML nor JSON, or times that no line fits
        raise UserError(f"profile = {file}: {error}") from error
    if free := [name for name, found in fits.items() if found.line.beta_s == 0]:
        raise UserError(f"profile = {file}: {free[0]}: larger amounts took no longer, so there is no rate; measure larger ones")
    told = {key: value for name, found in fits.items() for key, value in _told(name, found).items()}
    lines = [f"{name:<9} {_in_words(name, found)}, r² {found.r_squared:.4f}" for name, found in fits.items()]
    return machine.model_copy(update=told), lines


def _told(name: str, found: Fit) -> dict[str, Any]:
    rate = 1 / found.line.beta_s
    if name == "products":
        return {"product_tflops": rate / 1e12}
    if name == "memory":
        return {"memory_tbytes": rate / 1e12}
    return {name: LinkConfig(latency_s=found.line.alpha_s, gbytes=rate / 1e9)}


def _in_words(name: str, found: Fit) -> str:
    rate = 1 / found.line.beta_s
    if name == "products":
        return f"{rate / 1e12:.4g} TFLOP/s"
    return f"{found.line.alpha_s * 1e6:.3g} us + {rate / 1e9:.4g} GB/s"


def topology_of(machine: MachineConfig, devices: int) -> Topology:
    """Full nodes, or a part of one."""
    return Topology(devices, min(machine.gpus_per_node, devices))


def link(config: LinkConfig) -> Link:
    return Link(config.latency_s, 1 / (config.gbytes * 1e9))


def layer_costs(machine: MachineConfig, hidden: int, expert_hidden: int, attention_flops: float) -> LayerCosts:
    """What an MoE layer costs there.

    Args:
        attention_flops: of the attention before it, forward, for all tokens of a device. It is taken to reach the rate of the
            products.

    What a plan takes on the host is left at nothing: it depends on the policy, and is measured by who asks.
    """
    expert, products, memory = 3 * hidden * expert_hidden, machine.product_tflops * 1e12, machine.memory_tbytes * 1e12
    return LayerCosts(
        entry_s=2 * expert / products,
        expert_s=BYTES * expert / memory,
        row_bytes=BYTES * hidden,
        expert_bytes=BYTES * expert,
        sum_bytes=FLOAT32 * expert,
        within=link(machine.within),
        across=link(machine.across),
        attention_s=attention_flops / products,
        planning_s=0.0,
        row_s=2 * BYTES * hidden / memory,
        exchange_s=machine.exchange_s,
        order_s=machine.order_s,
        sum_s=(BYTES + 2 * FLOAT32) * expert / memory,
    )
