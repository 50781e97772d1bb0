"""Pieces of several ranks are the whole model, wherever its experts lie, and broadcasts bring them to engines bit for bit."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.topology import World
from rl.engine.engine import Engine
from rl.engine.sampler import Sampling
from rl.engine.settings import EngineSettings
from tests.distributed.ranks import run_ranks
from tests.models import spec, tiny_model
from trainer.model.transformer import LanguageModel
from trainer.state import TrainerSpec
from trainer.step import Trainer
from trainer.weight_links import Receiver, Sender, open_group
from trainer.weight_pieces import Piece, Span, expert_pieces, put, shared_pieces

CPU = torch.device("cpu")
CONFIG = tiny_model(max_positions=64)


def pieces_and_whole(world: World, told: TrainerSpec, owner_LE: np.ndarray) -> tuple[list[Piece], Any]:
    trainer = Trainer(told, world)
    trainer.experts.reshard(owner_LE)
    own = expert_pieces(trainer.experts) + (shared_pieces(trainer.model, trainer.bias_LE) if world.rank == 0 else [])
    return [Piece(piece.span, piece.values_N.clone()) for piece in own], trainer.experts.gathered(0)


@pytest.mark.parametrize("scattered", [False, True])
def test_the_pieces_of_all_ranks_are_the_model(scattered: bool) -> None:
    owner_LE = np.tile(np.repeat([0, 1], 4), (CONFIG.num_moe_layers, 1))
    if scattered:
        owner_LE = np.random.default_rng(0).permutation(owner_LE.flatten()).reshape(owner_LE.shape)
    (first, layer), (second, _) = run_ranks(pieces_and_whole, 2, spec(CONFIG), owner_LE)
    expected = LanguageModel.initialize(CONFIG, seed=3)
    found = LanguageModel.initialize(CONFIG, seed=4)
    assert sum(piece.span.elements for piece in first + second) == sum(t.numel() for t in found.state().values())
    put([*first, *second], found.state())
    for name, tensor in expected.state().items():
        torch.testing.assert_close(found.state()[name], tensor, rtol=0, atol=0, msg=name)
    assert torch.equal(layer[0], expected.experts.gate_up_LECD[0]) and torch.equal(layer[1], expected.experts.down_LEDF[0])
    assert len(first) + len(second) > 20 if scattered else True


def share(model: LanguageModel, rank: int, ranks: int) -> list[Piece]:
    """Of the experts every so manieth element run, of the rest all on rank 0."""
    found = shared_pieces(model.dense, model.bias_LE) if rank == 0 else []
    for name in ("experts.gate_up", "experts.down"):
        flat = model.state()[name].view(-1)
        size = flat.numel() // (2 * ranks)
        for part in range(rank, 2 * ranks, ranks):
            found.append(Piece(Span(name, part * size, size), flat[part * size : (part + 1) * size]))
    return found


class Exchange:
    """Two ranks and some engines, each in a thread; what they do together happens in step."""

    def __init__(self, engines: int, check: bool, spoil: bool) -> None:
        self.engines, self.check, self.spoil = engines, check, spoil
        self.store = dist.HashStore()
        self.offers: list[Any] = [None, None]
        self.step = threading.Barrier(2 + engines, timeout=60)

    def run(self) -> list[Any]:
        with ThreadPoolExecutor(2 + self.engines) as pool:
            ranks = [pool.submit(self.rank, rank) for rank in range(2)]
            engines = [pool.submit(self.engine, number) for number in range(self.engines)]
            for rank in ranks:
                rank.result()
            return [one.result() for one in engines]

    def rank(self, rank: int) -> None:
        model = LanguageModel.initialize(CONFIG, seed=0)
        sender = Sender(rank, CPU, [open_group(self.store, f"w/{rank}", 0, 1 + self.engines, CPU, 60)])
        for version in range(2):
            move(model)
            self.offers[rank] = sender.offer(share(model, rank, 2), version, self.check, (), shareable=True)
            if self.spoil and rank == 1:
                model.experts.down_LEDF.mul_(2.0)
            self.step.wait()
            sender.send()
            self.step.wait()

    def engine(self, number: int) -> dict[str, Tensor] | str:
        """What it holds in the end, or why not."""
        groups = {rank: open_group(self.store, f"w/{rank}", 1 + number, 1 + self.engines, CPU, 60) for rank in range(2)}
        receiver = Receiver(f"engine/{number}", CPU, groups)
        engine = Engine(CONFIG, EngineSettings(2, 40, 8, None, Sampling(1.0, 0), 1), CPU, torch.float32)
        said = ""
        for _ in range(2):
            self.step.wait()
            try:
                receipt = engine.take(self.offers, receiver)
                assert receipt.changed_share is None and (receipt.check_s is not None) == self.check
                assert receipt.nbytes == sum(tensor.nbytes for tensor in engine._model.state().values())
            except RuntimeError as error:
                said = said or str(error)
            self.step.wait()
        return said or engine._model.state()


def move(model: LanguageModel) -> None:
    for tensor in model.state().values():
        tensor += 0.25


@pytest.mark.parametrize(("small_bytes", "check"), [(1 << 24, True), (3000, False)])
def test_broadcasts_bring_every_bit_to_every_engine(small_bytes: int, check: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All in one block, and large pieces by themselves."""
    monkeypatch.setattr("trainer.weight_pieces.SMALL_BYTES", small_bytes)
    first, second = Exchange(2, check, spoil=False).run()
    expected = LanguageModel.initialize(CONFIG, seed=0)
    move(expected)
    move(expected)
    for name, tensor in expected.state().items():
        assert torch.equal(first[name], tensor) and torch.equal(second[name], tensor), name


def test_weights_that_change_on_the_way_are_an_error_that_names_them() -> None:
    (said,) = Exchange(1, check=True, spoil=True).run()
    assert "weights of version 0 arrived wrong: 2 of" in said and "experts.down[" in said
