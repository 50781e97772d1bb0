"""Checkpoints in memory: what is put together after losses is whole, and the newest that can be; nothing stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from kernels.errors import UserError
from trainer import keeper
from trainer.checkpoint import FORMAT, CheckpointMeta
from trainer.checkpoint_files import Checksum, checksum
from trainer.keeper import Keeper, Kept, OwnFolder
from trainer.kept_checkpoints import RemoteFile, following, outlives, whole_ones


def sum_of(content: object) -> Checksum:
    return {"bytes": 1, "sha256": str(content)}


def record(step: int, files: dict[str, Checksum]) -> str:
    meta = CheckpointMeta("pretrain", step, step, {}, "unknown", {})
    return json.dumps({"format": FORMAT, **asdict(meta), "files": files})


@st.composite
def kept_after_losses(draw: st.DrawFn) -> dict[str, dict[int, Kept]]:
    """Some steps, written once or twice on several ranks of several nodes; then nodes, files and records are lost or torn."""
    found: dict[str, dict[int, Kept]] = {}
    for step in draw(st.lists(st.integers(1, 4), max_size=4)):  # a step that comes again replaces what it meets
        nodes = draw(st.lists(st.sampled_from("abcd"), min_size=1, unique=True))
        ranks = draw(st.integers(1, 2)) * len(nodes)
        version = draw(st.integers())
        files = {f"state/rank_{rank:05d}.safetensors": sum_of((version, rank)) for rank in range(ranks)}
        sums = {**files, "state.json": sum_of(version)}
        for node in nodes:
            found.setdefault(node, {})[step] = Kept(record(step, sums), {"state.json": sums["state.json"]})
        for rank, file in enumerate(files):
            home = rank * len(nodes) // ranks
            for node in {nodes[home], nodes[(home + 1) % len(nodes)]}:
                found[node][step].files[file] = files[file]
    for node in draw(st.sets(st.sampled_from("abcd"), max_size=2)):
        found.pop(node, None)
    for steps in found.values():
        for step, kept in steps.items():
            for file in draw(st.sets(st.sampled_from(sorted(kept.files)), max_size=2)):
                if draw(st.booleans()):
                    del kept.files[file]
                else:
                    kept.files[file] = sum_of("torn")
            bad = draw(st.sampled_from([kept.record, kept.record, kept.record, None, "{", record(step + 1, kept.files)]))
            steps[step] = Kept(bad, kept.files)
    return found


@given(kept_after_losses())
def test_the_newest_of_which_everything_is_left_is_chosen_and_nothing_else(found: dict[str, dict[int, Kept]]) -> None:
    def everything_is_left(step: int, text: str) -> bool:
        try:
            told = json.loads(text)
        except ValueError:
            return False
        held = [kept[step].files for kept in found.values() if step in kept]
        return told["step"] == step and all(any(files.get(f) == s for files in held) for f, s in told["files"].items())

    records = {(step, kept.record) for steps in found.values() for step, kept in steps.items() if kept.record is not None}
    expected = {(step, text) for step, text in records if everything_is_left(step, text)}
    whole = whole_ones(found)
    assert {(one.step, one.record) for one in whole} == expected
    assert [one.step for one in whole] == sorted((one.step for one in whole), reverse=True)
    for one in whole:
        sums = json.loads(one.record)["files"]
        assert one.keepers.keys() == sums.keys()
        for file, names in one.keepers.items():
            assert names and all(found[name][one.step].files[file] == sums[file] for name in names)


@given(st.sets(st.sampled_from("abcde")), st.integers(1, 5), st.integers(1, 3))
def test_a_checkpoint_outlives_nodes_that_do_not_follow_each_other(lost: set[str], num_nodes: int, ranks_a_node: int) -> None:
    nodes = [node for node in "abcde"[:num_nodes] for _ in range(ranks_a_node)]
    files = {f"rank_{rank}": sum_of(rank) for rank in range(len(nodes))}
    found = {node: {7: Kept(record(7, files), {})} for node in nodes}
    for node, (file, one) in zip(nodes, files.items(), strict=True):
        for keeper_ in {node, following(nodes)[node]}:
            found[keeper_][7].files[file] = one
    left = {node: kept for node, kept in found.items() if node not in lost}
    assert [one.step for one in whole_ones(left)] == [7] * outlives(nodes, lost)
    assert outlives(nodes, lost) or len(lost & set(nodes)) > 1 or num_nodes == 1, "no single node takes it along"


def test_a_keeper_has_what_was_sent_whole_and_what_ranks_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "SHARED_MEMORY", tmp_path)
    mine = Keeper()
    folder = mine.folder()
    assert folder.stat().st_mode & 0o77 == 0, "others can read it"
    (folder / "step_000003" / "state").mkdir(parents=True)
    (folder / "step_000003" / "meta.json").write_text("{}")
    (folder / "step_000003" / "state" / "rank_00000.safetensors").write_bytes(b"of this node")
    for offset, chunk in ((5, b"other"), (0, b"from ")):  # of several callers, in any order
        mine.take(3, "state/rank_00001.safetensors", offset, chunk)
    assert mine.kept()[3].files.keys() == {"state/rank_00000.safetensors"}, "what is not all there does not count"
    mine.close(3, "state/rank_00001.safetensors")
    sent = folder / "step_000003" / "state" / "rank_00001.safetensors"
    assert sent.read_bytes() == b"from other"
    files = {
        name: checksum(folder / "step_000003" / name) for name in (f"state/rank_0000{rank}.safetensors" for rank in (0, 1))
    }
    assert mine.kept() == {3: Kept("{}", files)}
    with pytest.raises(AssertionError, match="leads out of a checkpoint"):
        mine.take(3, "../../../mark", 0, b"x")
    (folder / ".step_000004.partial").mkdir()
    (folder / "step_000002").mkdir()
    mine.keep_only(3)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"step_000003"}


def test_a_keeper_starts_without_torch() -> None:
    """One runs on every node, beside ranks and engines: importing torch takes seconds of a core and 200 MiB."""
    script = "import sys, trainer.keeper; print(*{'torch', 'pydantic', 'safetensors'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_what_a_keeper_elsewhere_has_is_read_tensor_by_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    there = Keeper()
    (there.folder() / "step_000003").mkdir()
    tensors = {
        "dense": torch.randn(5, 3),
        "moments": torch.randn(7).to(torch.bfloat16),
        "bias": torch.tensor(2.5, dtype=torch.float64),
        "counts": torch.arange(4),
        "none": torch.empty(0, 6),
    }
    save_file(tensors, there.folder() / "step_000003" / "rank.safetensors", {"who": "wrote it"})
    file = RemoteFile(SimpleNamespace(read=SimpleNamespace(remote=there.read)), 3, "rank.safetensors")
    assert {name: tuple(shape) for name, shape in file.shapes.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    for name, tensor in tensors.items():
        found = file.tensor(name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name


def test_what_a_killed_keeper_had_is_removed_at_once_or_by_the_next(tmp_path: Path) -> None:
    script = "import sys, time; from pathlib import Path; from trainer.keeper import OwnFolder\n"
    script += "own = OwnFolder(Path(sys.argv[1])); print(own.path, flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    theirs = Path(process.stdout.readline().strip())
    left = theirs.with_name("keeper-left")  # of one that was killed with its shell
    left.mkdir()
    theirs.with_name("keeper-gone").symlink_to("nowhere")  # as one is found that its shell has removed a moment later
    mine = OwnFolder(tmp_path)
    assert theirs.is_dir() and mine.path.is_dir() and not left.exists()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while theirs.exists():
        assert time.monotonic() < deadline, "it stays behind"
        time.sleep(0.02)
    tmp_path.joinpath("file").write_text("")
    with pytest.raises(UserError, match=r"need a folder in .*file: Not a directory; .* memory_checkpoint_every=0"):
        OwnFolder(tmp_path / "file")
