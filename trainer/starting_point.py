"""The weights that a run begins with, if not random: a checkpoint of ours, or a folder in the Hugging Face layout.

A run that goes on needs what it began with no more as soon as it has a checkpoint of its own.
"""

from __future__ import annotations

from pathlib import Path
from types import NoneType

from kernels.errors import UserError
from trainer import checkpoint
from trainer.cluster import Processes
from trainer.config.model import ModelConfig
from trainer.config.run import RunConfig
from trainer.estimate import vocab_size
from trainer.model.hf import read_config, tensor_files
from trainer.run_dir import option, resumable, shown
from trainer.run_dir import read_config as read_run_config
from trainer.tokenizer import Tokenizer


def begun_with(path: Path, config: RunConfig, kind: str) -> tuple[Path, Path, ModelConfig]:
    """For `path`, the checkpoint of this configuration: (the folder that it leads to, `settled`; the folder of the weights and
    the tokenizer that this command takes, and their model). Those are of the run's own newest checkpoint, if it has one."""
    path = settled(path, config, kind)
    return path, *(own_checkpoint(config, kind) or starting_point(path))


def settled(path: Path, config: RunConfig, kind: str) -> Path:
    """The folder where `path`, the checkpoint of this configuration, leads through a link such as runs/latest-pretrain, which
    means another run as soon as one starts: the folder of now, or of a run that goes on its own."""
    with checkpoint.readable(path):
        linked = any(part.is_symlink() for part in (path, *path.parents))
    if not linked:
        return path
    run = resumable(config, kind)
    began = None if run is None else option(read_run_config(run), "checkpoint", str, NoneType)
    return Path(shown(path.resolve()) if began is None else began)


def own_checkpoint(config: RunConfig, kind: str) -> tuple[Path, ModelConfig] | None:
    """The newest checkpoint of the run that this command goes on with, and its model; None where the run has none whose record
    and tokenizer are whole, and must begin with its `starting_point`."""
    run = resumable(config, kind)
    for folder in [] if run is None else reversed(checkpoint.available(run / "checkpoints")):
        try:
            checkpoint.verify_file(folder, "tokenizer.json")
            return folder, checkpoint.model_of(folder, checkpoint.read_meta(folder))
        except checkpoint.Damaged:  # which is said where its weights are loaded, as that of the others
            continue
    return None


def starting_point(path: Path) -> tuple[Path, ModelConfig]:
    """The folder that `checkpoint=path` means and its model; its tokenizer is there, too."""
    with checkpoint.readable(path):
        if (path / "config.json").is_file():
            if not (path / "tokenizer.json").is_file():
                raise UserError(f"{path} has no tokenizer.json; copy the tokenizer of the model there")
            tensor_files(path)  # of what was copied in part this is known before anything starts
            return path, read_config(path)
    found = checkpoint.resolve(path)
    return found, checkpoint.model_of(found, checkpoint.read_meta(found))


def tokenizer_of(folder: Path, model: ModelConfig, eos: str | None = None) -> Tokenizer:
    """The tokenizer of a starting point; `eos` as in Tokenizer. Raises UserError where the model has fewer embeddings."""
    file = folder / "tokenizer.json"
    tokenizer, size = Tokenizer.load(file, eos), vocab_size(model)
    if tokenizer.vocab_size > size:
        raise UserError(
            f"{file} has {tokenizer.vocab_size} tokens, but the model beside it only {size}; put the model's own there"
        )
    return tokenizer


def load_weights(ranks: Processes, folder: Path) -> None:
    """The ranks go on with the weights of a starting point, and with an optimizer that has seen nothing."""
    if (folder / "meta.json").is_file():
        ranks.call("load", folder, False)
    else:
        ranks.call("load_model", folder)
