"""Checkpoints on one rank: whole or not there, checked on the way in, and clear about what is wrong."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.errors import UserError
from parallel.topology import World
from tests.models import tiny_model
from trainer import checkpoint
from trainer.checkpoint import CheckpointMeta
from trainer.model.transformer import LanguageModel
from trainer.worker import named_tensors, read_model

ALONE = World(0, 1, torch.device("cpu"), ranks_per_node=1)
MODEL = tiny_model()


def meta(step: int) -> CheckpointMeta:
    return CheckpointMeta("pretrain", step, step, MODEL.model_dump(mode="json"), "unknown", {"rows": 8 * step})


def write(checkpoints: Path, step: int, seed: int = 0) -> Path:
    folder = checkpoints / checkpoint.folder_name(step)
    model = LanguageModel.initialize(MODEL, seed)
    checkpoint.write(folder, named_tensors(model), (), meta(step), {"tokenizer.json": "{}"}, ALONE)
    return folder


def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    folder = write(tmp_path, 3, seed=5)
    assert checkpoint.read_meta(folder, MODEL) == meta(3)
    expected = LanguageModel.initialize(MODEL, 5)
    for (name, found), (_, tensor) in zip(named_tensors(read_model(folder)), named_tensors(expected), strict=True):
        assert torch.equal(found, tensor), name
    assert (folder / "tokenizer.json").read_text() == "{}"


def test_a_ranks_own_tensors_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 1000)
    expected = {f"experts.{index}": torch.randn(10 + index, 7) for index in range(20)}

    def own() -> Iterator[tuple[str, torch.Tensor]]:
        room = torch.empty(30, 7)
        for name, tensor in expected.items():
            yield name, room[: len(tensor)].copy_(tensor)

    folder = tmp_path / checkpoint.folder_name(1)
    checkpoint.write(folder, [("bias", torch.ones(3))], own(), meta(1), {}, ALONE)
    assert len(list((folder / "state").glob("own-00000-*.safetensors"))) > 3
    assert checkpoint.read_meta(folder) == meta(1)
    found = checkpoint.read(folder)
    assert found.keys() == expected.keys() | {"bias"}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_disk_that_fails_while_a_checkpoint_is_written_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    def own() -> Iterator[tuple[str, torch.Tensor]]:
        yield "experts.0", torch.ones(3)
        raise UserError("the disk of parallel.nvme_dir lost something")

    with pytest.raises(UserError, match="lost something"):
        checkpoint.write(tmp_path / checkpoint.folder_name(1), [("bias", torch.ones(3))], own(), meta(1), {}, ALONE)
    with file_size_limit(20_000), pytest.raises(UserError, match=r"no space to write .*step_000001"):
        big = [("experts.0", torch.ones(10_000))]
        checkpoint.write(tmp_path / checkpoint.folder_name(1), [("bias", torch.ones(3))], big, meta(1), {}, ALONE)
    assert not list(tmp_path.iterdir())


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    files = [p for p in write(tmp_path, 1).rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".json", ".safetensors"}


def test_a_step_that_was_written_before_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, 1, seed=1)
    folder = write(tmp_path, 1, seed=2)
    assert torch.equal(read_model(folder).dense.head_VD, LanguageModel.initialize(MODEL, 2).dense.head_VD)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing more into one file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_older_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with (
        file_size_limit(20_000),
        pytest.raises(UserError, match=r"no space to write .*step_000002.* MiB are free.*resume=auto"),
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
    damage(folder, files={**sums, "../../secret": {"bytes": 1, "sha256": "0"}})
    with pytest.raises(UserError, match=r"names a file outside its folder: \.\./\.\./secret"):
        checkpoint.read_meta(folder)
    damage(folder, files=sums, format=9)
    with pytest.raises(UserError, match="has checkpoint format 9; this version reads format"):
        checkpoint.read_meta(folder)
    damage(folder, files=sums, format=checkpoint.FORMAT)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"is damaged: tokenizer\.json is missing; use an older"):
        checkpoint.read_meta(folder)
    (folder / "meta.json").write_text("{")
    with pytest.raises(UserError, match=r"meta\.json is damaged"):
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


def test_old_ones_and_leftovers_are_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / ".step_000009.partial").mkdir()
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000002", "step_000003"]
