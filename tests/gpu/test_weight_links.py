"""The direct way of the weights on GPUs: shown to another process on the same one, and broadcast to the next one."""

from __future__ import annotations

import gc
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from parallel.topology import World
from tests.distributed.ranks import run_ranks
from tests.distributed.test_weight_links import pieces_and_whole
from tests.gpu.needs import gpus, linked
from tests.models import spec, tiny_model
from trainer.model.transformer import LanguageModel
from trainer.weight_links import Receiver, Sender, gpu_of, open_group, span_digests
from trainer.weight_pieces import Piece, Span, put, shared_pieces

pytestmark = [pytest.mark.gpu, gpus(1)]
two = gpus(2)
CONFIG = tiny_model(hidden_size=128, expert_hidden_size=64)
ENGINE = "engine/0"


def model_of(seed: int, device: torch.device) -> LanguageModel:
    return LanguageModel.initialize(CONFIG, seed).to(device, torch.bfloat16)


def pieces_of(model: LanguageModel) -> list[Piece]:
    experts = {name: tensor for name, tensor in model.state().items() if name.startswith("experts.")}
    whole = [Piece(Span(name, 0, tensor.numel()), tensor.view(-1)) for name, tensor in experts.items()]
    return [*whole, *shared_pieces(model.dense, model.bias_LE)]


def take_all(connection: Connection, device: torch.device) -> None:
    """Answers every offer with the hashes of what the engine has then."""
    torch.cuda.set_device(device)
    state = model_of(1, device).state()
    receiver = Receiver(ENGINE, device, {})
    connection.send(gpu_of(device))
    while (offer := connection.recv()) is not None:
        receiver.take([offer], state)
        connection.send(span_digests([(span, span.of(state)) for span in offer.spans]))


def changed(model: LanguageModel) -> None:
    for tensor in model.state().values():
        tensor += 0.5


WAYS = [
    pytest.param(0, True, id="weights"),
    pytest.param(0, False, id="copy"),
    pytest.param(1, True, id="nvlink", marks=linked(2)),
]


@pytest.mark.parametrize("alone", [False, True], ids=["sees all GPUs", "sees its own"])
@pytest.mark.parametrize(("target", "shareable"), WAYS)
def test_an_engine_copies_what_it_is_shown(target: int, shareable: bool, alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same GPU and over NVLink; as under Ray, which shows a process its own GPU alone, and otherwise."""
    device, other = torch.device("cuda", 0), torch.device("cuda", target)
    name = gpu_of(other)
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    with monkeypatch.context() as patched:
        if alone:
            patched.setenv("CUDA_VISIBLE_DEVICES", str(name))
        seen = torch.device("cuda", 0) if alone else other
        child = context.Process(target=take_all, args=(theirs, seen), daemon=True)
        child.start()
    assert ours.recv() == name, "both call it alike"
    model, sender = model_of(0, device), Sender(0, device, [])
    handles, before = list[bool](), 0
    for version in range(5):
        if version == 3:  # the experts move, and what they leave is free again once the engine has let go
            before = torch.cuda.memory_allocated()
            model.experts = type(model.experts)(model.experts.gate_up_LECD.clone(), model.experts.down_LEDF.clone())
        changed(model)
        offer = sender.offer(pieces_of(model), version, True, [ENGINE], shareable)
        handles.append(offer.shown[ENGINE].handles is not None)
        ours.send(offer)
        assert ours.recv() == offer.digests, version
    assert handles == [True, False, False, shareable, False], "memory is opened once for every place"
    gc.collect()
    torch.cuda.ipc_collect()
    assert torch.cuda.memory_allocated() <= before
    ours.send(None)
    child.join(60)
    assert child.exitcode == 0


def broadcast(world: World) -> Any:
    device = world.device
    store = dist.distributed_c10d._get_default_store()
    group = open_group(store, "weights", world.rank, 2, device, 60)
    model = model_of(world.rank, device)
    sender, receiver = Sender(0, device, [group]), Receiver(ENGINE, device, {0: group})
    for version in range(3):
        offers: list[Any] = [None]
        if world.rank == 0:
            changed(model)
            offers = [sender.offer(pieces_of(model), version, False, [], shareable=True)]
        dist.broadcast_object_list(offers, src=0)
        if world.rank == 0:
            sender.send()
        else:
            receiver.take(offers, model.state())
    dist.barrier()
    sender.close()
    return {name: tensor.cpu() for name, tensor in model.state().items()}


@two
def test_an_engine_on_another_gpu_gets_every_bit() -> None:
    first, second = run_ranks(broadcast, 2, kind="cuda")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@two
def test_the_pieces_of_gpus_that_read_each_other_are_the_model() -> None:
    owner_LE = np.tile(np.repeat([0, 1], 4), (CONFIG.num_moe_layers, 1))
    (first, _), (second, _) = run_ranks(pieces_and_whole, 2, spec(CONFIG), owner_LE, kind="cuda")
    expected, found = LanguageModel.initialize(CONFIG, seed=3), LanguageModel.initialize(CONFIG, seed=4)
    moved = [Piece(piece.span, piece.values_N.cpu()) for piece in [*first, *second]]
    put(moved, found.state())
    state: dict[str, Tensor] = expected.state()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.state().items())
