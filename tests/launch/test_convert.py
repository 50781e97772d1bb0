"""An export of a checkpoint: it loads, and a folder that cannot be written is named and left as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch.convert import main
from parallel.topology import World
from tests import checkpoints
from tests.checkpoints import file_size_limit
from tests.models import tiny_model
from trainer.checkpoint import CheckpointMeta
from trainer.config.run import TokenizerConfig
from trainer.model.hf import load_pretrained
from trainer.model.transformer import LanguageModel
from trainer.tokenizer import train_tokenizer
from trainer.worker import named_tensors


def test_a_checkpoint_goes_out_or_the_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = train_tokenizer(["def f(x): return x"], TokenizerConfig(vocab_size=260, train_mib=1), tmp_path, print)
    model = LanguageModel.initialize(tiny_model(vocab_size=tokenizer.vocab_size), seed=0)
    meta = CheckpointMeta("pretrain", 1, 1, model.config.model_dump(mode="json"), "unknown", {})
    alone, folder = World(0, 1, torch.device("cpu"), ranks_per_node=1), tmp_path / "step_000001"
    checkpoints.write(folder, named_tensors(model), meta, {"tokenizer.json": tokenizer.layout}, alone)
    out = tmp_path / "exports" / "out"
    with file_size_limit(20_000):
        assert main([str(folder), str(out)]) == 2
    assert f"{out} cannot be written: " in capsys.readouterr().err and not list(out.parent.iterdir())
    assert main([str(folder), "/proc/out"]) == 2
    assert "/proc/out cannot be written: No such file or directory; make room, or" in capsys.readouterr().err
    assert main([str(folder), str(out)]) == 0
    torch.testing.assert_close(load_pretrained(out, torch.float32).state(), model.state(), rtol=0, atol=0)
