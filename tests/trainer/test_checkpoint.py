"""Checkpoints on one rank: whole or not there, checked on the way in, and clear about what is wrong."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from kernels.errors import UserError
from parallel.topology import World
from tests import checkpoints
from tests.checkpoints import file_size_limit
from tests.distributed.ranks import run_ranks
from tests.models import tiny_model
from trainer import checkpoint, checkpoint_writer
from trainer.checkpoint import CheckpointMeta, Damaged
from trainer.checkpoint_files import Checksum, folder_name
from trainer.checkpoint_writer import HostCopies, Shelf, Writer
from trainer.keeper import Keeper
from trainer.kept_checkpoints import whole_ones
from trainer.memory_checkpoints import InMemory, MemoryCheckpoints
from trainer.model.transformer import LanguageModel
from trainer.run_checkpoints import OnDisk, Progress, RunCheckpoints
from trainer.stopping import Move, StopRequest
from trainer.tensor_files import save_tensors
from trainer.worker import SavedInMemory, named_tensors, read_model

ALONE = World(0, 1, torch.device("cpu"), ranks_per_node=1)
MODEL = tiny_model()
NO_MEMORY = MemoryCheckpoints(0, print)
TOKENIZER: Any = SimpleNamespace(layout="{}")


def meta(step: int) -> CheckpointMeta:
    return CheckpointMeta("pretrain", step, step, MODEL.model_dump(mode="json"), "unknown", {"rows": 8 * step})


def write(parent: Path, step: int, seed: int = 0) -> Path:
    folder = parent / folder_name(step)
    model = LanguageModel.initialize(MODEL, seed)
    checkpoints.write(folder, named_tensors(model), meta(step), {"tokenizer.json": "{}"}, ALONE)
    return folder


def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    folder = write(tmp_path, 3, seed=5)
    assert checkpoint.read_meta(folder, MODEL) == meta(3)
    expected = LanguageModel.initialize(MODEL, 5)
    for (name, found), (_, tensor) in zip(named_tensors(read_model(folder)), named_tensors(expected), strict=True):
        assert torch.equal(found, tensor), name
    assert (folder / "tokenizer.json").read_text() == "{}"


def test_tensors_that_pass_through_memory_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "FILE_BYTES", 1000)
    expected = {f"experts.{index}": torch.randn(10 + index, 7) for index in range(20)}

    def own() -> Iterator[tuple[str, torch.Tensor]]:
        room = torch.empty(30, 7)
        for name, tensor in expected.items():
            yield name, room[: len(tensor)].copy_(tensor)

    folder = tmp_path / folder_name(1)
    checkpoints.write(folder, [("bias", torch.ones(3))], meta(1), {}, ALONE, own())
    files = {str(path.relative_to(folder)) for path in (folder / "state").glob("rank_00000_*.safetensors")}
    assert len(files) > 3 and files < json.loads((folder / "meta.json").read_text())["files"].keys()
    checkpoint.verify(folder)
    found = checkpoint.read(folder)
    assert found.keys() == expected.keys() | {"bias"}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_disk_that_fails_while_a_checkpoint_is_written_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    def own() -> Iterator[tuple[str, torch.Tensor]]:
        yield "experts.0", torch.ones(3)
        raise UserError("the disk of parallel.nvme_dir lost something")

    with pytest.raises(UserError, match="lost something"):
        checkpoints.write(tmp_path / folder_name(1), [("bias", torch.ones(3))], meta(1), {}, ALONE, own())
    with file_size_limit(20_000), pytest.raises(UserError, match=r"no space to write .*step_000001"):
        big = [("experts.0", torch.ones(10_000))]
        checkpoints.write(tmp_path / folder_name(1), [("bias", torch.ones(3))], meta(1), {}, ALONE, big)
    assert not list(tmp_path.iterdir())


@given(st.data())
def test_a_tensor_that_lies_in_fragments_is_read_whole_or_not_at_all(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=3)))
    wanted = torch.randn(shape)
    flat = wanted.flatten()
    cuts = sorted(data.draw(st.sets(st.integers(1, len(flat) - 1), max_size=4)) if len(flat) > 1 else ())
    starts = [0, *cuts]
    parts = {start: flat[start:end] for start, end in zip(starts, [*cuts, len(flat)], strict=True)}
    torn = data.draw(st.booleans())
    if torn:  # lost, or of another place or length
        start = data.draw(st.sampled_from(starts))
        part = parts.pop(start)
        parts |= data.draw(st.sampled_from([{}, {start + 1: part}, {start: torch.cat([part, part])}]))
    with tempfile.TemporaryDirectory() as place:
        files = dict[str, Callable[[], checkpoint.TensorFile]]()
        for start, part in data.draw(st.permutations(sorted(parts.items(), key=lambda item: item[0]))):
            file = Path(place) / f"{len(files)}.safetensors"
            save_file({checkpoint.fragment_name("a", start): part.clone(), f"of.{start}": part.clone()}, file)
            files[file.name] = partial(checkpoint.LocalFile, file)
        if torn:
            with pytest.raises(Damaged, match=r"no tensor a$|does not begin where|values of a, expected"):
                checkpoint.read_files(Path(place), files, {"a": shape})
        else:
            found = checkpoint.read_files(Path(place), files, {"a": shape})
            assert torch.equal(found["a"], wanted) and "a" in found


@given(st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=12), st.randoms())
def test_copies_of_tensors_are_their_own_and_use_the_same_memory_again(shapes: list[list[int]], random: Random) -> None:
    copies, kinds = HostCopies(pinned=False), [torch.float32, torch.float64, torch.int64, torch.uint8]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_writer, "SLAB_BYTES", 256)
        for _ in range(3):
            tensors = {str(i): (100 * torch.rand(shape)).to(random.choice(kinds)) for i, shape in enumerate(shapes)}
            taken = copies.take(iter(tensors.items()))
            expected = {name: tensor.clone() for name, tensor in tensors.items()}
            for tensor in tensors.values():
                tensor.zero_()
            assert taken.keys() == expected.keys()
            for name, tensor in expected.items():
                assert torch.equal(taken[name], tensor) and taken[name].dtype == tensor.dtype
            slabs = [slab.data_ptr() for slab in copies._slabs]
        tensors = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
        copies.take(tensors.items())
        assert [slab.data_ptr() for slab in copies._slabs] == slabs


@pytest.mark.parametrize("mode", [0o755, 0o700])
def test_who_may_use_a_folder_may_read_the_tensors_in_it(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    folder.chmod(mode)
    save_tensors({"a": torch.ones(2)}, folder / "a.safetensors")
    assert (folder / "a.safetensors").stat().st_mode & 0o777 == mode & 0o666


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    files = [p for p in write(tmp_path, 1).rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".json", ".safetensors"}


def test_all_of_it_is_on_the_disk_before_it_can_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    through = set[int]()
    monkeypatch.setattr(checkpoint_writer.os, "fsync", lambda descriptor: through.add(os.fstat(descriptor).st_ino))
    folder = write(tmp_path, 1)
    assert {path.stat().st_ino for path in folder.rglob("*") if path.is_file()} == through


def test_a_step_that_was_written_before_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, 1, seed=1)
    folder = write(tmp_path, 1, seed=2)
    assert torch.equal(read_model(folder).dense.head_VD, LanguageModel.initialize(MODEL, 2).dense.head_VD)


def test_a_full_disk_leaves_older_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with (
        file_size_limit(20_000),
        pytest.raises(UserError, match=r"no space to write .*step_000002.* MiB are free.*runs_dir"),
    ):
        write(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]
    assert checkpoint.read_meta(tmp_path / "step_000001").step == 1


def damage(folder: Path, **changes: Any) -> None:
    record = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**record, **changes}))


def test_damage_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    sums = json.loads((folder / "meta.json").read_text())["files"]
    damage(folder, files={**sums, "../secret": {"bytes": 1, "sha256": "0"}})
    with pytest.raises(Damaged, match=r"names a file outside its folder: \.\./secret"):
        checkpoint.verify(folder)
    damage(folder, files=sums, format=9)
    with pytest.raises(UserError, match="has checkpoint format 9; this version reads format"):
        checkpoint.read_meta(folder)
    damage(folder, files=sums, format=checkpoint.FORMAT)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(Damaged, match=r"is damaged: tokenizer\.json is missing; one beside it may be whole"):
        checkpoint.verify(folder)
    for content in ("{", "[]", "{}"):
        (folder / "meta.json").write_text(content)
        with pytest.raises(Damaged, match=r"meta\.json is damaged"):
            checkpoint.read_meta(folder)


def test_a_person_may_name_the_run_its_checkpoints_or_one_of_them(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"checkpoint=.*run holds no checkpoint. Give a run folder"):
        checkpoint.resolve(run)
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        checkpoint.resolve(tmp_path / "nowhere")
    first, last = write(run / "checkpoints", 2), write(run / "checkpoints", 10)
    assert [checkpoint.resolve(p) for p in (run, run / "checkpoints", first)] == [last, last, first]


def test_another_model_is_refused_and_a_younger_option_has_its_default(tmp_path: Path) -> None:
    older = replace(meta(1), model={name: value for name, value in meta(1).model.items() if name != "rotary_share"})
    checkpoint.require_model(tmp_path, older, MODEL)
    with pytest.raises(UserError, match=r"holds another model:\n  model.rotary_share: checkpoint 1.0, configuration 0.5\n"):
        checkpoint.require_model(tmp_path, older, MODEL.model_copy(update={"rotary_share": 0.5}))


def test_old_ones_and_leftovers_are_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / ".step_000009.partial").mkdir()
    checkpoint.prune(tmp_path / "step_000003", keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000002", "step_000003"]


def test_a_damaged_one_does_not_push_out_what_was_written_after_the_run_had_gone_back(tmp_path: Path) -> None:
    for step in (2, 4):
        write(tmp_path, step)
    (tmp_path / "step_000004" / "tokenizer.json").unlink()
    writer = Writer(ALONE)
    writer.start(tmp_path / "step_000003", [("bias", torch.ones(3))], meta(3), {}, keep=1)
    assert writer.settle() is None
    assert [folder.name for folder in checkpoint.available(tmp_path)] == ["step_000003", "step_000004"]
    checkpoint.verify(tmp_path / "step_000003")


def test_one_that_cannot_be_removed_is_out_of_sight_and_harms_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)

    def busy(folder: Path, ignore_errors: bool = False) -> None:
        """As on NFS, where somebody has a file open."""
        if folder.exists():
            (folder / "tokenizer.json").unlink()
            raise OSError(errno.EBUSY, "Device or resource busy")

    writer = Writer(ALONE)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        writer.start(tmp_path / "step_000002", [("bias", torch.ones(3))], meta(2), {}, keep=1)
        failure = writer.settle()
    assert failure is None, failure
    assert [folder.name for folder in checkpoint.available(tmp_path)] == ["step_000002"]
    checkpoint.prune(tmp_path / "step_000002", keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000002"]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    model, writer = LanguageModel.initialize(MODEL, 5), Writer(ALONE)
    for step in (1, 2):  # the second one reuses the memory of the first
        expected = {name: tensor.clone() for name, tensor in named_tensors(model)}
        writer.start(tmp_path / f"step_{step:06d}", named_tensors(model), meta(step), {"tokenizer.json": "{}"}, keep=1)
        for _, tensor in named_tensors(model):
            tensor.add_(1.0)
        assert writer.settle() is None
        found = dict(named_tensors(read_model(tmp_path / f"step_{step:06d}")))
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert [p.name for p in tmp_path.iterdir()] == [f"step_{step:06d}"], "the older one goes when this one is whole"


def test_a_run_survives_a_disk_that_was_full_for_a_while(tmp_path: Path) -> None:
    model, writer = LanguageModel.initialize(MODEL, 0), Writer(ALONE)
    arguments = (named_tensors, meta, {"tokenizer.json": "{}"})
    failures = []
    for step, size in ((1, resource.RLIM_INFINITY), (2, 20_000), (3, resource.RLIM_INFINITY)):
        with file_size_limit(size):
            writer.start(tmp_path / f"step_{step:06d}", arguments[0](model), arguments[1](step), arguments[2], keep=1)
            failures.append(writer.settle())
        assert [p.name for p in tmp_path.iterdir()] == [{1: "step_000001", 2: "step_000001", 3: "step_000003"}[step]]
    assert failures[0] is failures[2] is None
    assert failures[1] is not None and "Older checkpoints are intact" in failures[1]


def test_a_place_that_is_gone_is_told_and_not_made_again(tmp_path: Path) -> None:
    writer, folder = Writer(ALONE), tmp_path / "gone" / "step_000001"
    writer.start(folder, [("bias", torch.ones(3))], meta(1), {}, keep=1)
    failure = writer.settle()
    assert failure is not None and "step_000001 cannot be written: [Errno 2]" in failure
    assert not folder.parent.exists() and math.isnan(writer.took_s)


def test_older_ones_stay_until_a_new_one_is_shared(tmp_path: Path) -> None:
    shared: list[list[str]] = []

    def share(folder: Path, names: Sequence[str]) -> None:
        checkpoint.verify(folder)
        shared.append([path.name for path in checkpoint.available(tmp_path)])
        assert names == ["state/rank_00000.safetensors"]
        if len(shared) == 2:
            raise OSError(errno.ENOSPC, "No space left on device, on the node after this one")

    writer, failures = Writer(ALONE, Shelf(leads=True, way_out="Make it larger", share=share)), []
    for step in (1, 2, 3):
        writer.start(tmp_path / f"step_{step:06d}", [("bias", torch.ones(3))], meta(step), {}, keep=1)
        failures.append(writer.settle())
    assert shared == [["step_000001"], ["step_000001", "step_000002"], ["step_000001", "step_000003"]]
    assert failures[0] is failures[2] is None
    assert failures[1] is not None and "no space" in failures[1] and failures[1].endswith("Make it larger")
    assert [path.name for path in tmp_path.iterdir()] == ["step_000003"]


def full_on_one_rank(world: World, folder: str) -> list[str | None]:
    writer, failures = Writer(world), []
    tensors = [(f"part.{world.rank}", torch.full((50_000,), float(world.rank)))]
    for step in (1, 2):
        with file_size_limit(20_000 if (step, world.rank) == (1, 1) else resource.RLIM_INFINITY):
            writer.start(Path(folder) / f"step_{step:06d}", tensors, meta(step), {"tokenizer.json": "{}"}, keep=1)
            failures.append(writer.settle())
    assert torch.equal(checkpoint.read(Path(folder) / "step_000002")["part.0"], torch.zeros(50_000))
    return failures


def test_all_ranks_hear_of_the_disk_of_one(tmp_path: Path) -> None:
    first, second = run_ranks(full_on_one_rank, 2, str(tmp_path))
    assert first == second and first[1] is None and "no space to write" in first[0]
    assert [p.name for p in tmp_path.iterdir()] == ["step_000002"]
    checkpoint.verify(tmp_path / "step_000002")


class Ranks:
    """Load checkpoints as a rank does, without a model."""

    def call(self, method: str, folder: Path, with_moments: bool) -> list[CheckpointMeta]:
        assert method == "load" and with_moments
        checkpoint.verify(folder)
        return [checkpoint.read_meta(folder)]


class Run:
    def __init__(self, folder: Path) -> None:
        self.checkpoints, self.said = folder, []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(tmp_path: Path) -> None:
    run, ranks = Run(tmp_path), Ranks()
    parts: dict[str, Any] = {"run": run, "tracker": run, "stop": None}
    checkpoints = RunCheckpoints("pretrain", MODEL, TOKENIZER, every=1, keep=3, memory=NO_MEMORY, **parts)
    assert checkpoints.load_newest(ranks) is None  # type: ignore[arg-type]
    folders = [write(tmp_path, step) for step in (1, 2, 3)]
    file = folders[2] / "state" / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (folders[1] / "meta.json").write_text("{}")
    assert checkpoints.load_newest(ranks) == (OnDisk(folders[0]), meta(1))  # type: ignore[arg-type]
    assert len(run.said) == 2
    assert "step_000003 is damaged: state/rank_00000.safetensors has" in run.said[0] and "trying the one before" in run.said[0]
    (folders[0] / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"none of the 3 checkpoints .* is whole; resume=never"):
        checkpoints.load_newest(ranks)  # type: ignore[arg-type]


class DueRanks:
    """Note what they are asked for; memory is full in the end, if it `fills`."""

    def __init__(self, fills: bool) -> None:
        self.asked, self.fills = list[str](), fills

    def call(self, method: str, *arguments: Any) -> list[Any]:
        self.asked.append(method)
        if method == "save":
            folder, about, files, keep = arguments
            assert (folder.name, about.step, keep, set(files)) == (
                f"step_{about.step:06d}",
                about.position["rows"],
                2,
                {"config.yaml", "tokenizer.json", "state.json"},
            )
            return [(0.5, None)]
        if method == "save_in_memory":
            return [SavedInMemory(0.25, None, None)]
        return ["full" if self.fills and method == "keep_in_memory" else None]


@pytest.mark.parametrize(
    ("step", "last", "going", "fills", "asked"),
    [
        (4, False, None, False, ["save"]),
        (4, True, None, False, ["save"]),
        (3, True, None, False, ["save"]),
        (3, False, None, False, []),
        (2, False, None, False, ["save_in_memory"]),
        (4, False, "signal", False, ["save"]),
        (2, False, "signal", False, ["save"]),
        (2, False, {"a"}, False, ["keep_in_memory"]),
        (3, False, set(), False, ["keep_in_memory"]),
        (3, False, {"a", "b"}, False, ["save"]),
        (3, False, {"a"}, True, ["keep_in_memory", "save"]),
    ],
)
def test_what_is_due_after_a_step(
    tmp_path: Path, step: int, last: bool, going: set[str] | str | None, fills: bool, asked: list[str]
) -> None:
    """On the disk every 4, in memory every 2; a run that stops leaves its last step, in memory where it goes on at once."""
    ranks, stop, states = DueRanks(fills), StopRequest(), list[int]()
    memory = MemoryCheckpoints(2, print)
    memory._nodes = ["a", "b"]
    stop.move = Move("why", frozenset(going)) if isinstance(going, set) else None
    run: Any = SimpleNamespace(checkpoints=tmp_path, config_text="", git="unknown")
    tracker: Any = SimpleNamespace(say=print)
    parts = (TOKENIZER, 4, 2, run, tracker, stop, memory)
    progress = Progress(step, {"rows": step}, lambda: {"number": states.append(step)})
    metrics = RunCheckpoints("pretrain", MODEL, *parts).after(ranks, progress, last, going is not None)  # type: ignore[arg-type]
    assert ranks.asked == asked
    assert bool(metrics) == bool(states) == bool(asked), "the driver's state is asked for where it is written"
    assert ("time/checkpoint_s" in metrics) == ("save" in asked)


class OneNode(MemoryCheckpoints):
    """Whose keeper is in this process; it has a checkpoint of `step`."""

    def __init__(self, step: int, seed: int = 0) -> None:
        super().__init__(2, print)
        self.keeper, self.newest = keeper, _ = Keeper(), step
        self.inside = write(keeper.folder(), step, seed)

        class There(InMemory):
            def copy(self, folder: Path) -> dict[str, Checksum]:
                return {name: keeper.copy(self.step, name, folder / name) for name in self.whole.keepers}

        self.there = There

    def found(self) -> list[InMemory]:
        return [self.there(one, {}) for one in whole_ones({"here": self.keeper.kept()})]

    def settle(self, step: int | None) -> None:
        self.keeper.keep_only(step)


def with_memory(folder: Path, memory: MemoryCheckpoints) -> tuple[Run, RunCheckpoints]:
    run = Run(folder)
    run.config_text = "seed: 0"
    parts: dict[str, Any] = {"run": run, "tracker": run, "stop": None, "memory": memory}
    return run, RunCheckpoints("pretrain", MODEL, TOKENIZER, every=100, keep=2, **parts)


def tear(folder: Path) -> None:
    file = folder / "state" / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def test_one_in_memory_is_brought_to_the_disk_where_the_run_stops_without_its_ranks(tmp_path: Path) -> None:
    """Whole, beside those that were there before, or not at all."""
    memory = OneNode(3, seed=5)
    run, checkpoints = with_memory(tmp_path, memory)
    write(tmp_path, 2, seed=1)
    inside, found = memory.inside, memory.found()
    state = next((inside / "state").iterdir())
    content = state.read_bytes()
    state.write_bytes(content[:-1])
    memory.found, whole = (lambda: found), memory.found  # type: ignore[method-assign]
    checkpoints.bring_to_disk()
    assert "did not arrive as written" in run.said[-1] and [p.name for p in tmp_path.glob("*step_*")] == ["step_000002"]
    state.write_bytes(content)
    memory.found = whole  # type: ignore[method-assign]
    checkpoints.bring_to_disk()
    checkpoint.verify(tmp_path / "step_000003")
    assert checkpoint.read_meta(tmp_path / "step_000003", MODEL) == meta(3)
    assert (tmp_path / "step_000003" / "config.yaml").read_text() == "seed: 0"
    expected = named_tensors(LanguageModel.initialize(MODEL, 5))
    for (name, one), (_, tensor) in zip(named_tensors(read_model(tmp_path / "step_000003")), expected, strict=True):
        assert torch.equal(one, tensor), name
    assert [p.name for p in sorted(tmp_path.glob("*step_*"))] == ["step_000002", "step_000003"]
    said = len(run.said)
    checkpoints.bring_to_disk()
    assert len(run.said) == said, "the disk has it"


@pytest.mark.parametrize("newer", [3, 5])
def test_a_damaged_one_on_the_disk_does_not_keep_one_in_memory_from_being_brought_there(tmp_path: Path, newer: int) -> None:
    memory = OneNode(3, seed=5)
    run, checkpoints = with_memory(tmp_path, memory)
    write(tmp_path, 2)
    tear(write(tmp_path, newer))
    checkpoints.bring_to_disk()
    assert f"step_00000{newer} is damaged" in run.said[0] and "bringing the checkpoint of step 3" in run.said[1]
    checkpoint.verify(tmp_path / "step_000003")
    checkpoints.bring_to_disk()
    assert len(run.said) == (3 if newer == 5 else 2), "one that is whole and as new is there now"
    assert checkpoints.load_newest(Ranks()) == (OnDisk(tmp_path / "step_000003"), meta(3))  # type: ignore[arg-type]


def test_what_the_run_has_written_or_read_itself_is_not_read_again_when_it_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = OneNode(3)
    run, checkpoints = with_memory(tmp_path, memory)
    looked_at: list[Path] = []
    monkeypatch.setattr(checkpoint, "verify", looked_at.append)
    run.git = "unknown"

    class Saves(Ranks):
        def call(self, method: str, *arguments: Any) -> list[Any]:
            return [(0.5, None)] if method == "save" else [None] if method == "settle" else super().call(method, *arguments)

    ranks: Any = Saves()
    checkpoints.save(ranks, Progress(4, {}, dict))
    checkpoints.bring_to_disk()
    assert [folder.name for folder in checkpoint.available(tmp_path)] == ["step_000003"], "nobody knows that step 4 is whole"
    shutil.rmtree(tmp_path / "step_000003")
    checkpoints.settle(ranks)
    checkpoints.bring_to_disk()
    assert not looked_at and not checkpoint.available(tmp_path)
    write(tmp_path, 4)
    assert checkpoints.load_newest(ranks) is not None and looked_at == [tmp_path / "step_000004"]
    checkpoints.bring_to_disk()
    assert len(looked_at) == 1


def test_a_file_that_a_failing_disk_does_not_give_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path, 1)

    def fails(path: Path) -> Checksum:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint, "checksum", fails)
    with pytest.raises(Damaged, match=r"state/rank_00000\.safetensors cannot be read: Input/output error"):
        checkpoint.verify(folder)


def test_a_damaged_one_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    (folder / "tokenizer.json").unlink()
    write(tmp_path, 1)
    checkpoint.verify(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]
