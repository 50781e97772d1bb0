"""One rank of the training world: the methods that the driver calls through Ray, and tests without it.

Methods that the driver calls on all ranks at once are collective. Their results are the same on every rank unless noted.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from kernels.errors import UserError
from kernels.rows import LANE
from parallel.expert_shards import PARTS
from parallel.peer_memory import nvlinks
from parallel.topology import World, join, leave, serve_store, use_interface_to
from trainer import checkpoint
from trainer.batch import Objective, TrainBatch, cross_entropy
from trainer.checkpoint_files import folder_name
from trainer.checkpoint_writer import Shelf, Writer
from trainer.config.model import ModelConfig
from trainer.config.rl import SyncConfig
from trainer.data import Corpus, TokenStream, open_corpus
from trainer.hangs import JOINED, SHARE, StackWatch, watched
from trainer.kept_checkpoints import MemoryShelf, Whole, open_whole, send
from trainer.memory import keep_imports
from trainer.metrics import Value
from trainer.model.hf import load_pretrained, save_pretrained
from trainer.model.transformer import ExpertWeights, LanguageModel
from trainer.state import TrainerSpec
from trainer.step import Trainer
from trainer.tokenizer import Tokenizer
from trainer.tracing import Traceable
from trainer.usage import Usage
from trainer.weight_links import Offer, Sender, gpu_of, open_group
from trainer.weight_pieces import expert_pieces, shared_pieces
from trainer.weight_sync import WeightSource, WeightUpdate
from trainer.weights import pack

MEMORY_FULL = "Make it larger (a container: --shm-size), or keep none there: memory_checkpoint_every=0"
log = logging.getLogger("tessera")


@dataclass(frozen=True)
class SavedInMemory:
    """What became of a checkpoint in memory."""

    paused_s: float | None  # that training stood still for it; None: it was left out
    took_s: float | None  # until the one before was whole; None: there was none, or it is not
    failure: str | None  # why the one before is not


@watched
class TrainWorker(Traceable):
    """A rank. Life: `serve` on rank 0, `join`, `build`, then any of the others."""

    world: World
    meeting: tuple[str, int]  # host and port of the store
    timeout_s: float  # of collectives
    trainer: Trainer
    writer: Writer
    usage: Usage
    store: dist.TCPStore
    corpus: Corpus
    stream: TokenStream
    held_out: TokenStream

    def __init__(self, rank: int, log_file: Path | None = None) -> None:
        self.rank = rank
        self.source = WeightSource()
        self.sender: Sender | None = None
        self.log = log_to(log_file) if log_file is not None else None
        self.stack_watch: StackWatch | None = None
        self.memory: tuple[MemoryShelf, Writer] | None = None  # where checkpoints in memory go

    def pid(self) -> int:
        return os.getpid()

    def serve(self, host: str, timeout_s: float) -> tuple[str, int]:
        """Rank 0 only: opens the store where the ranks meet, on `host`, its node's address; returns (host, port)."""
        self.store = serve_store(host, timeout_s)
        return host, self.store.port

    def join(self, host: str, port: int, size: int, timeout_s: float) -> None:
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        use_interface_to(host)
        if self.rank > 0:
            self.store = dist.TCPStore(host, port, is_master=False)
        self.meeting, self.timeout_s = (host, port), timeout_s
        self.world = join(self.store, self.rank, size, device, timeout_s)
        if self.log is not None:
            self.stack_watch = StackWatch(self.log, SHARE * timeout_s)
        log.info("rank %d of %d %s %s", self.rank, size, JOINED, device)

    def build(self, spec: TrainerSpec, refused: Path | None = None) -> None:
        self.trainer = Trainer(spec, self.world, refused)
        self.writer = Writer(self.world)
        self.usage = Usage(spec.model, spec.dtype, self.world)
        keep_imports()  # here, because DeepSpeed is imported with the trainer

    def leave(self) -> None:
        leave(self.world)

    # ------------------------------------------------------------ learning

    def open_corpus(self, folder: Path, sequence_length: int, seed: int) -> None:
        """Where `learn_rows` and `evaluate` take their rows from. The folder is one that `trainer.data.prepare` filled."""
        self.corpus = open_corpus(folder)
        ends = self.corpus.tokenizer.bos, self.corpus.tokenizer.eos
        self.stream = TokenStream(self.corpus.train, sequence_length, seed, *ends)
        self.held_out = TokenStream(self.corpus.validation, sequence_length, 0, *ends)

    def learn_rows(self, first: int, count: int, lr: float) -> dict[str, Value]:
        """One update on rows first..first+count-1 of the training stream."""
        share = count // self.world.size
        started = time.perf_counter()
        batch = self.stream.rows(first + self.rank * share, share)
        return self._learn(batch, cross_entropy, lr, started)

    def learn(self, batch: TrainBatch, objective: Objective, lr: float) -> dict[str, Value]:
        """One update on a batch given whole to every rank; each takes its equal part of the rows."""
        return self._learn(self._own_rows(batch), objective, lr, time.perf_counter())

    def learn_values(self, batch: TrainBatch, objective: Objective) -> dict[str, Value]:
        """The same for the value head alone."""
        started = time.perf_counter()
        return {**self.trainer.learn_values(self._own_rows(batch), objective), "time/train_s": time.perf_counter() - started}

    def predict(self, batch: TrainBatch, policy: bool, reference: bool) -> dict[str, Tensor]:
        """`Trainer.predict` of a batch given whole to every rank; each returns that of its equal part."""
        return self.trainer.predict(self._own_rows(batch), policy, reference)

    def _own_rows(self, batch: TrainBatch) -> TrainBatch:
        share = batch.num_rows // self.world.size
        return batch.rows(self.rank * share, (self.rank + 1) * share)

    def _learn(self, batch: TrainBatch, objective: Objective, lr: float, started: float) -> dict[str, Value]:
        self.usage.begin()
        with record_function(f"update {self.trainer.updates + 1}"):  # a name in traces
            metrics = self.trainer.learn(batch, objective, lr)
        seconds = time.perf_counter() - started
        metrics |= {"time/train_s": seconds, **self.usage.end(batch, seconds)}
        log.info("update %d loss %.17g", self.trainer.updates, metrics.get("train/loss", math.nan))
        return metrics

    def evaluate(self, rows: int) -> dict[str, Value]:
        """Over the first `rows` rows of the held-out documents, or as many as there are: the same on any number of ranks."""
        count = min(rows, self.held_out.num_rows_per_epoch)
        share = -(-count // self.world.size)  # of every rank, because they exchange tokens; the last ones may have padding
        first = self.rank * share
        batch = self.held_out.rows(first, share).padded_from(max(0, count - first))
        return dict(self.trainer.evaluate(batch, self.corpus.tokenizer.token_bytes()))

    def new_optimizer(self) -> None:
        """Forgets moments and step count; weights stay."""
        self.trainer.reset_optimizer()

    def traced_as(self) -> tuple[str, torch.device]:
        return f"rank_{self.rank}", self.world.device

    # ------------------------------------------------------------ state

    def save(self, folder: Path, meta: checkpoint.CheckpointMeta, files: dict[str, str], keep: int) -> tuple[float, str | None]:
        """Begins a checkpoint, which is written while training goes on; all but the newest `keep` are then removed.

        Returns:
            (seconds that training stood still, why the checkpoint before this one could not be written).
        """
        started = time.perf_counter()
        failure = self.writer.settle()
        meta = replace(meta, updates=self.trainer.updates)
        self._start(folder, meta, files, keep, with_moments=True)
        return time.perf_counter() - started, failure

    def settle(self) -> str | None:
        """Waits until the last checkpoint is whole; why it could not be written, if so."""
        return self.writer.settle()

    def open_memory(self, shelves: Sequence[MemoryShelf]) -> None:
        """Where checkpoints in memory go from here on, of each rank."""
        mine = shelves[self.rank]
        share = None if mine.next is None else partial(send, mine.next)
        self.memory = mine, Writer(self.world, Shelf(mine.leads, MEMORY_FULL, share))

    def save_in_memory(self, meta: checkpoint.CheckpointMeta, files: dict[str, str]) -> SavedInMemory:
        """`save` into the memory of the nodes. It is left out if the one before is not whole yet."""
        assert self.memory is not None, "no keepers are there"
        shelf, writer = self.memory
        started = time.perf_counter()
        if self.world.sum(torch.tensor(float(writer.busy), device=self.world.device)) > 0:
            return SavedInMemory(None, None, None)
        failure = writer.settle()
        took_s = None if failure is not None or math.isnan(writer.took_s) else writer.took_s
        self._start_in_memory(shelf, writer, meta, files)
        return SavedInMemory(time.perf_counter() - started, took_s, failure)

    def keep_in_memory(self, meta: checkpoint.CheckpointMeta, files: dict[str, str]) -> str | None:
        """The same, in place of the one before and until it is whole; why it could not be kept, if so."""
        assert self.memory is not None, "no keepers are there"
        shelf, writer = self.memory
        writer.settle()
        self._start_in_memory(shelf, writer, meta, files)
        return writer.settle()

    def _start_in_memory(
        self, shelf: MemoryShelf, writer: Writer, meta: checkpoint.CheckpointMeta, files: dict[str, str]
    ) -> None:
        meta = replace(meta, updates=self.trainer.updates)
        folder = shelf.folder / folder_name(meta.step)
        writer.start(folder, self.trainer.state_to_save(with_moments=True), meta, files, keep=1)

    def load_from_memory(self, one: Whole, keepers: Mapping[str, Any]) -> checkpoint.CheckpointMeta:
        """Loads what `save_in_memory` of any number of ranks left with these keepers."""
        assert self.memory is not None, "no keepers are there"
        trainer = self.trainer
        expected = dict(trainer.shapes(with_moments=True))
        meta, tensors = open_whole(one, self.memory[0], keepers, expected, trainer.spec.model, self.world)
        trainer.restore(tensors, with_moments=True, updates=meta.updates)
        return meta

    def load(self, folder: Path, with_moments: bool) -> checkpoint.CheckpointMeta:
        """Loads what `save` wrote, on any number of ranks. Without moments the optimizer starts again."""
        return self.trainer.load(folder, with_moments)

    def write_reference(self, folder: Path, meta: checkpoint.CheckpointMeta, files: dict[str, str]) -> None:
        """Writes the weights as they are, without anything of the optimizer. Raises UserError if they cannot be written."""
        self._start(folder, meta, files, keep=1, with_moments=False)
        failure = self.writer.settle()
        if failure is not None:
            raise UserError(failure)

    def _start(
        self, folder: Path, meta: checkpoint.CheckpointMeta, files: dict[str, str], keep: int, with_moments: bool
    ) -> None:
        held, passing = self.trainer.state_to_save(with_moments), self.trainer.state_on_disk(with_moments)
        self.writer.start(folder, held, meta, files, keep, passing)

    def keep_reference(self, folder: Path) -> None:
        """The policy of this checkpoint is the reference from here on."""
        self.trainer.keep_reference(folder)

    def load_model(self, folder: Path) -> None:
        """Starts from a folder in the Hugging Face layout; the optimizer starts again."""
        model = load_pretrained(folder, torch.float32)
        self.trainer.load_state(dict(named_tensors(model)), with_moments=False, updates=0)

    def weights(self, version: int, config: SyncConfig) -> WeightUpdate | None:
        """`LanguageModel.state` in the dtype that the ranks compute with, or its changes: from rank 0; None elsewhere."""
        model = self._whole_model()
        return None if model is None else self.source.update(pack(model.state()), version, config)

    def link(self, groups: Mapping[str, int]) -> None:
        """Before the first `offer`, and when other engines are there: this many on other devices meet this rank in each
        group."""
        if self.sender is not None:
            self.sender.close()
        device = self.world.device
        opened = [open_group(self.store, name, 0, 1 + count, device, self.timeout_s) for name, count in groups.items()]
        self.sender = Sender(self.rank, device, opened)

    def place(self) -> tuple[str | None, tuple[str, int]]:
        """(this rank's GPU, where the store is in which ranks meet)."""
        return gpu_of(self.world.device), self.meeting

    def reached_by(self, gpus: Sequence[str]) -> list[str]:
        """Those of these GPUs, other than its own, that can copy from this rank's weights where they are. What ranks read in
        place among themselves no other process can open."""
        own = gpu_of(self.world.device)
        if own is None or self.trainer.experts.arena.peer_memory:
            return []
        return [gpu for gpu, found in nvlinks(own, gpus).items() if found]

    def offer(self, version: int, check: bool, here: Sequence[str]) -> Offer:
        """What this rank has of the weights, in the dtype that it computes with; `here`: the engines that it shows them to.

        They must not change before all engines have them. Rank 0 has the dense ones, and everybody the experts that it owns.
        """
        assert self.sender is not None, "no engines are linked"
        trainer = self.trainer
        pieces = expert_pieces(trainer.experts)
        if self.rank == 0:
            pieces += shared_pieces(trainer.model, trainer.bias_LE)
        return self.sender.offer(pieces, version, check, here, shareable=not trainer.experts.arena.peer_memory)

    def send(self) -> None:
        """Broadcasts what was offered to the engines on other devices."""
        assert self.sender is not None, "no engines are linked"
        self.sender.send()

    def export(self, folder: Path, tokenizer: Tokenizer) -> None:
        """Writes the same weights to `folder` in the Hugging Face layout."""
        model = self._whole_model()
        if model is not None:
            save_pretrained(model, folder, tokenizer)

    def _whole_model(self) -> LanguageModel | None:
        """On rank 0, None elsewhere."""
        layers = [self.trainer.experts.gathered(layer) for layer in range(self.trainer.spec.model.num_moe_layers)]
        whole = [parts for parts in layers if parts is not None]
        if not whole:
            return None
        experts = ExpertWeights(*(torch.stack(parts) for parts in zip(*whole, strict=True)))
        return LanguageModel(self.trainer.spec.model, self.trainer.model, experts, self.trainer.bias_LE)


def named_tensors(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """A whole model's tensors under the names that a checkpoint gives them."""
    yield "bias", model.bias_LE
    for name, parameter in model.dense.named_parameters():
        yield f"dense.{name}", parameter.detach()
    for layer in range(model.config.num_moe_layers):
        for expert in range(model.config.num_experts):
            for part, whole in zip(PARTS, (model.experts.gate_up_LECD, model.experts.down_LEDF), strict=True):
                yield f"experts.{layer}.{expert}.{part}", whole[layer, expert]


def read_model(folder: Path) -> LanguageModel:
    """The whole model of a checkpoint in one process, float32 on the CPU: for export and inspection."""
    checkpoint.verify(folder)
    meta = checkpoint.read_meta(folder)
    model = LanguageModel.initialize(checkpoint.model_of(folder, meta), seed=0)
    tensors = checkpoint.read(folder, {name: tensor.shape for name, tensor in named_tensors(model)})
    for name, tensor in named_tensors(model):
        tensor.copy_(tensors[name])
    return model


def check_division(model: ModelConfig, rows: int, ranks: int) -> None:
    """Raises UserError unless experts and rows divide evenly over the ranks, and tokens can travel."""
    if model.num_experts % ranks:
        raise UserError(
            f"model.num_experts ({model.num_experts}) is not divisible by the number of ranks ({ranks}); "
            f"set cluster.ranks to a divisor of {model.num_experts}"
        )
    if ranks > 1 and model.hidden_size % LANE:
        raise UserError(
            f"model.hidden_size ({model.hidden_size}) is not a multiple of {LANE}, which tokens need to travel between ranks; "
            "choose one that is, or set cluster.ranks=1"
        )
    if rows % ranks:
        raise UserError(f"train.batch_rows ({rows}) is not divisible by the number of ranks ({ranks}); change either")


def log_to(file: Path) -> IO[str]:
    """This process's log, prints and the errors of its libraries included, goes to `file`; every line of ours says when."""
    file.parent.mkdir(parents=True, exist_ok=True)
    stream = open(file, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - it lives as long as the process
    sys.stdout = sys.stderr = stream
    for descriptor in (1, 2):  # GPUs print to the one; NCCL's watchdog and fatal signals write to the other
        os.dup2(stream.fileno(), descriptor)
    faulthandler.enable(stream)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    return stream
