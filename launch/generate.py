"""Continues prompts with a checkpoint: `python -m launch.generate RUN PROMPT ...`.

One process with the engine of RL, so the text is what RL would sample. `--top-k 1` takes the most likely token.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from kernels.errors import UserError
from launch.cli import guarded
from rl.april import complete
from rl.engine.engine import Engine
from rl.engine.pool import LocalPool
from rl.engine.sampler import Sampling
from rl.engine.settings import EngineSettings
from rl.trajectory import UIDS_PER_GROUP, Sample, fresh_group
from trainer.config.model import ModelConfig
from trainer.config.rl import LEAST_TEMPERATURE
from trainer.model.hf import load_pretrained
from trainer.starting_point import starting_point, tokenizer_of
from trainer.state import choose_dtype
from trainer.tokenizer import Tokenizer
from trainer.worker import read_model

ADVANCE_TOKENS = 16  # between two looks at what is done
MOST_AT_ONCE = 64  # samples; the others wait


def generate(
    checkpoint: Path, prompts: Sequence[str], samples: int, new_tokens: int, sampling: Sampling
) -> tuple[list[Sample], Tokenizer]:
    """`samples` completions of each prompt, in their order. UserError where a prompt leaves no room for them."""
    folder, config = starting_point(checkpoint)
    tokenizer = tokenizer_of(folder, config)
    prompts_ids = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in prompts]
    longest = max(map(len, prompts_ids)) + new_tokens
    if longest > config.max_positions:
        raise UserError(
            f"a prompt of {longest - new_tokens} tokens and --tokens {new_tokens} make {longest}, and the model has "
            f"{config.max_positions} positions; shorten the prompt or lower --tokens"
        )
    slots = min(MOST_AT_ONCE, samples * len(prompts))
    engine = _engine(folder, config, EngineSettings(slots, longest, new_tokens, None, sampling, tokenizer.eos))
    pending = [sample for group, ids in enumerate(prompts_ids) for sample in fresh_group(group, ids, samples).samples]
    return complete(LocalPool([engine]), pending, ADVANCE_TOKENS), tokenizer


def _engine(folder: Path, config: ModelConfig, settings: EngineSettings) -> Engine:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine = Engine(config, settings, device, getattr(torch, choose_dtype("auto")[0]))
    theirs = (folder / "config.json").is_file()
    model = load_pretrained(folder, torch.float32) if theirs else read_model(folder)
    engine.load_weights(model.state(), version=0)
    return engine


def show(checkpoint: Path, prompts: Sequence[str], samples: int, new_tokens: int, sampling: Sampling) -> None:
    """Prints every prompt, in bold on a terminal, with its continuations; then how many tokens these are, and how likely."""
    started = time.perf_counter()
    done, tokenizer = generate(checkpoint, prompts, samples, new_tokens, sampling)
    seconds, console = time.perf_counter() - started, Console(soft_wrap=True, highlight=False)
    for sample in done:
        ended = sample.status == "finished"
        text = tokenizer.decode(sample.response_ids[: -1 if ended else None])
        console.rule(f"prompt {sample.group + 1}: {sample.length} tokens{', ended' if ended else ''}", align="left")
        console.print(Text.assemble((prompts[sample.group], "bold"), text))
    tokens = sum(sample.length for sample in done)
    logprob = sum(sum(sample.logprobs) for sample in done) / tokens
    console.rule(f"{tokens:,} tokens, {logprob:.3f} nats each on average, in {seconds:.1f} s with loading", align="left")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.generate", description="Continues prompts with a checkpoint.")
    parser.add_argument("checkpoint", type=Path, help="a run folder, a checkpoint, or a folder in the Hugging Face layout")
    parser.add_argument("prompts", nargs="+", type=_text, metavar="PROMPT", help='text to continue; "" begins with nothing')
    parser.add_argument("--samples", type=_samples, default=1, help="completions of each prompt")
    parser.add_argument("--tokens", type=_count, default=64, help="of a completion, at most")
    parser.add_argument("--temperature", type=_temperature, default=1.0)
    parser.add_argument("--top-k", type=_count, help="only the k likeliest tokens")
    parser.add_argument("--top-p", type=_share, default=1.0, help="only the likeliest tokens that make up this share")
    parser.add_argument("--seed", type=_seed, default=0, help="of the draws")
    asked = parser.parse_args(argv)
    sampling = Sampling(asked.temperature, asked.seed, asked.top_k, asked.top_p)
    return guarded(lambda: show(asked.checkpoint, asked.prompts, asked.samples, asked.tokens, sampling))


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(
            f"character {error.start + 1} is not UTF-8; set the terminal's encoding to UTF-8"
        ) from None
    return text


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} should be at least 1")
    return number


def _samples(text: str) -> int:
    if (number := _count(text)) >= UIDS_PER_GROUP:
        raise argparse.ArgumentTypeError(f"{number} should be less than {UIDS_PER_GROUP}")
    return number


def _seed(text: str) -> int:
    if not 0 <= (number := int(text)) < 1 << 63:
        raise argparse.ArgumentTypeError(f"{number} should be at least 0 and less than 2^63")
    return number


def _temperature(text: str) -> float:
    if (number := _positive(text)) < LEAST_TEMPERATURE:
        raise argparse.ArgumentTypeError(
            f"{number} should be at least {LEAST_TEMPERATURE}; --top-k 1 takes the likeliest token"
        )
    return number


def _positive(text: str) -> float:
    if not 0 < (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{number} should be larger than 0")
    return number


def _share(text: str) -> float:
    if (number := _positive(text)) > 1:
        raise argparse.ArgumentTypeError(f"{number} should be at most 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
