"""`python -m launch.bench weights`: how long new weights take from a rank to an engine, and how small changes become.

shown: the engine is another process, on the rank's GPU or on one that NVLink joins to it, and copies the memory that the rank
shows it. broadcast: it is on another GPU, or on a CPU. Both are timed from the offer to the engine's answer
(trainer/weight_links.py), without Ray calls. packed: into one block on the host and out of it, as for the object store, within
one process. Then changes (trainer/weight_delta.py) at random places.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from pydantic import Field, PositiveInt
from rich.table import Table
from torch.distributed import TCPStore

from launch.benchmarks.models import ModelOptions, model_config, random_weights
from launch.benchmarks.options import Listed
from launch.benchmarks.timing import Ceilings
from parallel.peer_memory import gpu_name, nvlinks
from parallel.topology import serve_store
from trainer.config.model import ModelConfig
from trainer.model.transformer import LanguageModel
from trainer.weight_delta import apply, difference
from trainer.weight_links import Receiver, Sender, open_group, span_digests
from trainer.weight_pieces import Piece, Span, shared_pieces
from trainer.weights import PackedTensors, pack, unpack

HOST, TIMEOUT_S = "127.0.0.1", 120.0
ENGINE, GROUP = "engine/0", "weights"
REPEATS = 10


class WeightsOptions(ModelOptions):
    changed: Listed[float] = Field(description="shares of the weights that change; none: only whole weights")
    positions: PositiveInt = 128


DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "cuda": {
        "model": "moe_2b", "layers": 24, "heads": 16, "kv_heads": 8, "head_dim": 64, "changed": "0.001,0.01,0.1",
    },
    "cpu": {
        "model": "tiny", "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "changed": "0.01,0.1",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Transfer:
    """One way of the weights."""

    work: str
    way: str
    nbytes: int  # that travel
    ms: float
    of: float | None  # share of the rate of a copy on the device; or bytes over those of values and 4-byte places
    failures: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def measure(
    options: WeightsOptions, contenders: Mapping[str, Any], device: torch.device, ceilings: Ceilings
) -> Iterator[Transfer]:
    """A case for every model and way that this machine has."""
    dtype = torch.bfloat16
    for name in options.model:
        config = model_config(options, name, options.positions)
        model = random_weights(config, device, dtype, options.seed)
        work = f"weights of {name}"
        repeats = options.repeats or REPEATS
        for target, shown in ways(device):
            nbytes, ms = transfer(model, device, target, shown, repeats)
            here = shown and target.index == (device.index or 0)
            share = 2 * nbytes / ms / ceilings.copy_tbytes / 1e9 if here else None
            yield Transfer(work, f"{'shown' if shown else 'broadcast'} to {target}", nbytes, ms, share)
        packed, ms = through_host(model)
        yield Transfer(work, "packed and read", packed.nbytes, ms, None)
        yield from changes(packed, options, work)


def ways(device: torch.device) -> list[tuple[torch.device, bool]]:
    """(device of the engine, whether it copies what it is shown), of this machine."""
    if device.type == "cpu":
        return [(device, False)]
    found, others = [(torch.device("cuda", device.index or 0), True)], range(1, min(2, torch.cuda.device_count()))
    for other in (torch.device("cuda", index) for index in others):
        linked = nvlinks(gpu_name(device), [gpu_name(other)])[gpu_name(other)]
        found += [(other, True)] * linked + [(other, False)]
    return found


def through_host(model: LanguageModel) -> tuple[PackedTensors, float]:
    """(the block, median milliseconds of packing it and of reading it into a model)."""
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        packed = pack(model.state())
        model.load_state(unpack(packed))
        if model.bias_LE.is_cuda:
            torch.cuda.synchronize()
        taken.append((time.perf_counter() - started) * 1000)
    return packed, median(taken)


def transfer(model: LanguageModel, device: torch.device, target: torch.device, shown: bool, repeats: int) -> tuple[int, float]:
    """(bytes, median milliseconds) from this process to an engine's in another one, whose weights are then the same."""
    store = serve_store(HOST, TIMEOUT_S)
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=engine, args=(theirs, store.port, model.config, target, not shown), daemon=True)
    child.start()
    sender = Sender(0, device, [] if shown else [open_group(store, GROUP, 0, 2, device, TIMEOUT_S)])
    pieces, here = all_pieces(model), [ENGINE] if shown else []
    taken = []
    for version in range(repeats + 2):  # the first ones open the memory or the group
        check = version == repeats + 1
        started = time.perf_counter()
        offer = sender.offer(pieces, version, check, here, shareable=True)
        ours.send(offer)
        sender.send()
        answer = ours.recv()
        taken.append((time.perf_counter() - started) * 1000)
        assert answer == offer.digests, "the engine has other weights than the rank"
    ours.send(None)
    child.join()
    sender.close()
    return offer.nbytes, median(taken[1:-1])


def engine(connection: Connection, port: int, config: ModelConfig, device: torch.device, broadcast: bool) -> None:
    """Takes every offer, and answers with the hashes of what it has then, if the offer brings some."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    state = random_weights(config, device, torch.bfloat16, seed=1).state()
    store = TCPStore(HOST, port, is_master=False)
    receiver = Receiver(ENGINE, device, {0: open_group(store, GROUP, 1, 2, device, TIMEOUT_S)} if broadcast else {})
    while (offer := connection.recv()) is not None:
        receiver.take([offer], state)
        own = span_digests([(span, span.of(state)) for span in offer.spans]) if offer.digests is not None else None
        connection.send(own)
    receiver.close()


def all_pieces(model: LanguageModel) -> list[Piece]:
    """As one rank has them that owns all experts."""
    experts = {"experts.gate_up": model.experts.gate_up_LECD, "experts.down": model.experts.down_LEDF}
    large = [Piece(Span(name, 0, tensor.numel()), tensor.view(-1)) for name, tensor in experts.items()]
    return [*large, *shared_pieces(model.dense, model.bias_LE)]


def changes(old: PackedTensors, options: WeightsOptions, work: str) -> Iterator[Transfer]:
    """Bits of random bfloat16 weights flip; what finds them, and what applies them to the weights of before."""
    for share in options.changed:
        words = old.data.view(np.int16).copy()
        places = np.random.default_rng(options.seed).random(words.size, dtype=np.float32) < share
        words[places] ^= 1
        new = PackedTensors(words.view(np.uint8), old.layout)
        started = time.perf_counter()
        delta = difference(old, new, base=0)
        found_ms = (time.perf_counter() - started) * 1000
        target = {name: tensor.clone() for name, tensor in unpack(old).items()}
        started = time.perf_counter()
        apply(delta, target)
        applied_ms = (time.perf_counter() - started) * 1000
        assert all(
            torch.equal(tensor.view(torch.uint8), target[name].view(torch.uint8)) for name, tensor in unpack(new).items()
        )
        plain = sum(part.values.nbytes + 4 * len(part.values) for part in delta.changes)
        yield Transfer(
            work,
            f"changes of {delta.changed_share:.2%}",
            delta.nbytes,
            found_ms + applied_ms,
            delta.nbytes / plain,
            notes=(f"found in {found_ms:.1f} ms, applied on a CPU in {applied_ms:.1f} ms",),
        )


def table(case: Transfer) -> Table:
    shown = Table(title=case.work, title_justify="left")
    changed = case.way.startswith("changes")
    of = "of values and places" if changed else "of a copy's rate"
    for name in ("way", "MB", "ms", "GB/s", of):
        shown.add_column(name, justify="left" if name == "way" else "right")
    rate = "" if changed else f"{case.nbytes / case.ms / 1e6:,.1f}"
    part = "" if case.of is None else f"{case.of:.2f}x" if changed else f"{case.of:.0%}"
    shown.add_row(case.way, f"{case.nbytes / 1e6:,.3f}", f"{case.ms:.2f}", rate, part)
    return shown
