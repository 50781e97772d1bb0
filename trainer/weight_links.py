"""Direct transfer of weights: an engine reads the memory of a rank within its reach, and the other ranks broadcast theirs.

A rank offers its pieces (weight_pieces.py). To engines on the same GPU it shows the memory itself (CUDA IPC), and they copy
from it into their own weights, once, at the speed of that GPU's memory. An engine whose GPU is joined to the rank's by NVLink
does the same. To other engines the rank broadcasts, in a process group with them, or in several groups if they share a GPU,
because NCCL does not allow two processes on one GPU in a group; on CPUs gloo does the same. Nothing is gathered or packed on a
host. Small pieces travel together as one block, packed while the large ones are on their way; buffers are reused for the next
version.

Shown memory must stay until nobody reads it. The rank keeps it, since these are its weights; if they have moved, it shows the
new address, and the old memory is freed when the engines have released it. Weights must not change until all engines have
confirmed that they have them.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from parallel.peer_memory import gpu_name
from trainer.weight_pieces import Piece, Span, copy, is_small
from trainer.weights import ALIGNMENT, digests

Block = Tensor  # of bytes


@dataclass(frozen=True)
class Shown:
    """Memory of a rank on a GPU, for one process: `handles` open its blocks; None: those of the last time are still right."""

    handles: bytes | None
    places: tuple[tuple[int, int], ...]  # of each span: its block, and the first byte there


@dataclass(frozen=True)
class Offer:
    """What one rank has of the weights of a version. `shown` by the name of the engine; other engines are broadcast to."""

    rank: int
    version: int
    spans: tuple[Span, ...]
    nbytes: int
    shown: Mapping[str, Shown]
    digests: Mapping[str, str] | None  # by span, where engines are to check theirs
    hashing_s: float


def open_group(store: dist.Store, name: str, rank: int, size: int, device: torch.device, timeout_s: float) -> Any:
    """A process group beside the default one; its members meet in `store` under `name`. Member 0 sends."""
    prefixed, timeout = dist.PrefixStore(name, store), timedelta(seconds=timeout_s)
    if device.type == "cpu":
        return dist.ProcessGroupGloo(prefixed, rank, size, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(prefixed, rank, size, options)


def close_group(group: Any, device: torch.device) -> None:
    """Without waiting for the other members, which may be gone; gloo lets go by itself."""
    if device.type == "cuda":
        group.abort()


def gpu_of(device: torch.device) -> str | None:
    """The name of a GPU, the same in all processes; None for a CPU."""
    return gpu_name(device) if device.type == "cuda" else None


def opened(handles: bytes, device: torch.device) -> list[Block]:
    """The blocks that a process shows, as memory of `device`, into which the driver maps those of another GPU. All that filled
    them is done: a rank waits for its device before it offers."""
    shown: list[tuple[Callable[..., Tensor], tuple[Any, ...]]] = pickle.loads(handles)
    blocks = []
    for rebuild, arguments in shown:
        call = signature(rebuild).bind(*arguments)
        # The other process counts GPUs as it sees them; and its event may be of a GPU that this one does not see.
        call.arguments |= {"storage_device": device.index or 0, "event_sync_required": False}
        blocks.append(rebuild(*call.args))
    return blocks


class Sender:
    """A rank's side; `groups`: with the engines elsewhere, each of which is in one."""

    def __init__(self, rank: int, device: torch.device, groups: Sequence[Any]) -> None:
        self._rank, self._device, self._groups = rank, device, groups
        self._shown: dict[str, tuple[tuple[int, int], ...]] = {}  # engine -> (address, bytes) of the blocks it was shown
        self._copy: list[Tensor] | None = None
        self._pieces: Sequence[Piece] = ()

    def close(self) -> None:
        for group in self._groups:
            close_group(group, self._device)

    def offer(self, pieces: Sequence[Piece], version: int, check: bool, here: Sequence[str], shareable: bool) -> Offer:
        """Offers `pieces`, to the engines `here`, within reach, by showing the memory, or a copy if it is not `shareable`."""
        self._pieces = pieces
        shown_pieces = pieces if shareable or not here else self._copied(pieces)
        shown = {name: self._show(name, shown_pieces) for name in here}
        started = time.perf_counter()
        found = span_digests([(piece.span, piece.values_N) for piece in pieces]) if check else None
        hashing_s = time.perf_counter() - started if check else 0.0
        _wait(self._device)  # an engine does not see this process's streams
        spans, nbytes = tuple(piece.span for piece in pieces), sum(piece.values_N.nbytes for piece in pieces)
        return Offer(self._rank, version, spans, nbytes, shown, found, hashing_s)

    def send(self) -> None:
        """Broadcasts what was offered to the engines elsewhere, if there are any."""
        if not self._groups:
            return
        small, large = _sorted([piece.values_N for piece in self._pieces])
        works = [work for group in self._groups for work in _broadcast(group, large)]
        block, views = _block_for(small, self._device)
        copy(small, views)
        for work in [*works, *(work for group in self._groups for work in _broadcast(group, [block]))]:
            work.wait()
        _wait(self._device)

    def _copied(self, pieces: Sequence[Piece]) -> list[Piece]:
        values = [piece.values_N for piece in pieces]
        if self._copy is None or [one.numel() for one in self._copy] != [value.numel() for value in values]:
            self._copy = _block_for(values, self._device)[1]
        copy(values, self._copy)
        return [Piece(piece.span, own) for piece, own in zip(pieces, self._copy, strict=True)]

    def _show(self, engine: str, pieces: Sequence[Piece]) -> Shown:
        """Handles count their readers, so each engine gets its own."""
        storages = {piece.values_N.untyped_storage().data_ptr(): piece.values_N.untyped_storage() for piece in pieces}
        numbers = {address: number for number, address in enumerate(storages)}
        places = list[tuple[int, int]]()
        for values_N in (piece.values_N for piece in pieces):
            first = int(values_N.storage_offset()) * values_N.element_size()
            places.append((numbers[values_N.untyped_storage().data_ptr()], first))
        known, handles = tuple((address, storage.nbytes()) for address, storage in storages.items()), None
        if self._shown.get(engine) != known:
            blocks = [torch.empty(0, dtype=torch.uint8, device=self._device).set_(one) for one in storages.values()]
            handles, self._shown[engine] = pickle.dumps([reduce_tensor(block) for block in blocks]), known
            torch.cuda.ipc_collect()  # frees what was shown before and nobody reads any more
        return Shown(handles, tuple(places))


@dataclass(frozen=True)
class Laid:
    """What a rank offers and where it goes. Hundreds of views take a host as long as a GPU takes to copy what is in them, so
    they are made once."""

    spans: tuple[Span, ...]
    places: tuple[tuple[int, int], ...]  # of what is shown; else empty, as `sources`
    state: Mapping[str, Tensor]  # of whose tensors the targets are views
    targets: list[Tensor]
    sources: list[Tensor]


class Receiver:
    """An engine's side. `groups`: rank -> the group in which it broadcasts to this engine."""

    def __init__(self, name: str, device: torch.device, groups: Mapping[int, Any]) -> None:
        self._name, self._device, self._groups = name, device, groups
        self._blocks: dict[int, list[Block]] = {}  # of ranks that show theirs
        self._laid: dict[int, Laid] = {}

    def close(self) -> None:
        for group in self._groups.values():
            close_group(group, self._device)

    @torch.no_grad()
    def take(self, offers: Sequence[Offer], state: Mapping[str, Tensor]) -> None:
        """Fills the tensors of a model from the offers of all ranks, in the order of the ranks, as all engines do."""
        for offer in offers:
            if self._name in offer.shown:
                laid = self._opened(offer, offer.shown[self._name], state)
                copy(laid.sources, laid.targets)
            else:
                self._receive(offer, state)
        _wait(self._device)

    def _opened(self, offer: Offer, shown: Shown, state: Mapping[str, Tensor]) -> Laid:
        """What a rank shows, as it was laid out before unless it lies elsewhere now."""
        if shown.handles is not None:
            self._laid.pop(offer.rank, None)  # lets go of the old ones first
            self._blocks.pop(offer.rank, None)
            self._blocks[offer.rank] = opened(shown.handles, self._device)
        return self._lay_out(offer, shown.places, state)

    def _lay_out(self, offer: Offer, places: tuple[tuple[int, int], ...], state: Mapping[str, Tensor]) -> Laid:
        laid = self._laid.get(offer.rank)
        if laid is not None and laid.state is state and (laid.spans, laid.places) == (offer.spans, places):
            return laid
        targets, sources = [span.of(state) for span in offer.spans], list[Tensor]()
        for own, (number, first) in zip(targets, places, strict=False):  # no places where nothing is shown
            sources.append(self._blocks[offer.rank][number][first : first + own.nbytes].view(own.dtype))
        self._laid[offer.rank] = Laid(offer.spans, places, state, targets, sources)
        return self._laid[offer.rank]

    def _receive(self, offer: Offer, state: Mapping[str, Tensor]) -> None:
        small, large = _sorted(self._lay_out(offer, (), state).targets)
        works = _broadcast(self._groups[offer.rank], large)
        block, views = _block_for(small, self._device)
        for work in [*works, *_broadcast(self._groups[offer.rank], [block])]:
            work.wait()
        copy(views, small)


def span_digests(parts: Sequence[tuple[Span, Tensor]]) -> dict[str, str]:
    """A content hash of every span."""
    return digests({f"{span.name}[{span.first}:{span.first + span.elements}]": values_N for span, values_N in parts})


def _offsets(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where blocks of this many bytes begin one after the other, and where the last one ends."""
    found, end = [], 0
    for size in sizes:
        found.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return found, end


def _sorted(values: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The small ones, which travel in one block, and the others."""
    return [value for value in values if is_small(value)], [value for value in values if not is_small(value)]


def _block_for(values: Sequence[Tensor], device: torch.device) -> tuple[Block, list[Tensor]]:
    """A block with room for all of them, and a view of it for each."""
    offsets, size = _offsets([value.nbytes for value in values])
    block = torch.empty(size, dtype=torch.uint8, device=device)
    return block, [block[at : at + one.nbytes].view(one.dtype) for at, one in zip(offsets, values, strict=True)]


def _broadcast(group: Any, blocks: Sequence[Block]) -> list[Any]:
    """Under way from member 0; on a GPU, waiting for it keeps the stream and not the host."""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    return [group.broadcast([block.view(torch.uint8)], options) for block in blocks if block.numel()]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
