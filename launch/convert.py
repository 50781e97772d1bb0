"""Writes a checkpoint in the Hugging Face layout: `python -m launch.convert RUN OUT`.

OUT holds config.json, safetensors and the tokenizer; `transformers.AutoModelForCausalLM.from_pretrained(OUT)` loads it. Import
needs no command: `checkpoint=FOLDER` of launch.pretrain and launch.rl reads such a folder directly.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError

from kernels.errors import UserError
from launch.cli import guarded
from trainer import checkpoint
from trainer.model.hf import save_pretrained
from trainer.tokenizer import Tokenizer
from trainer.worker import read_model


def convert(source: Path, out: Path) -> None:
    folder = checkpoint.resolve(source)
    model = read_model(folder)
    try:
        save_pretrained(model, out, Tokenizer.load(folder / "tokenizer.json"))
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{out} cannot be written: {reason}; make room, or name a folder elsewhere") from error
    print(f"{folder} is in {out} in the Hugging Face layout")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.convert", description=__doc__.partition(":")[0])
    parser.add_argument("run", type=Path, help="a run folder or one of its checkpoints")
    parser.add_argument("out", type=Path, help="the folder to write; it must not exist yet")
    arguments = parser.parse_args(argv)
    return guarded(lambda: convert(arguments.run, arguments.out))


if __name__ == "__main__":
    sys.exit(main())
