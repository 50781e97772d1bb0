"""Generation from a checkpoint: the likeliest tokens are those of transformers, draws repeat, mistakes are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from launch.generate import generate, main
from rl.engine.sampler import Sampling
from tests.models import tiny_model
from trainer.config.run import TokenizerConfig
from trainer.model.hf import save_pretrained
from trainer.model.transformer import LanguageModel
from trainer.tokenizer import train_tokenizer

SOFTMAX = {"router_scores": "softmax", "selection_bias": False, "num_shared_experts": 0, "routed_scale": 1.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "glm": {"rotary_share": 0.5},
    "olmoe": SOFTMAX | {"qk_norm": "all_heads", "num_dense_layers": 0},
}
PROMPTS = ("def f(x", "", "x + 1\nreturn")


def export(folder: Path, **changes: Any) -> Path:
    """Random weights in the Hugging Face layout."""
    tokenizer = train_tokenizer(["def f(x): return x + 12\n" * 20], TokenizerConfig(vocab_size=280, train_mib=1), folder, print)
    model = LanguageModel.initialize(tiny_model(vocab_size=tokenizer.vocab_size, **changes), seed=0)
    save_pretrained(model, folder / "export", tokenizer)
    return folder / "export"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU generates in bfloat16, where the likeliest token may be another")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_likeliest_tokens_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    folder = export(tmp_path, **FAMILIES[family])
    done, tokenizer = generate(folder, PROMPTS, 1, 20, Sampling(temperature=1.0, seed=0, top_k=1))
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    for prompt, sample in zip(PROMPTS, done, strict=True):
        ids = torch.tensor([[tokenizer.bos, *tokenizer.encode(prompt)]])
        mask = torch.ones_like(ids)
        expected = theirs.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20, pad_token_id=tokenizer.pad)
        assert list(sample.response_ids) == expected[0, ids.shape[1] :].tolist()


def test_what_is_printed_repeats_and_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(export(tmp_path))
    capsys.readouterr()
    printed = []
    for seed in ("0", "0", "1"):
        assert main([folder, "def", "--samples", "3", "--tokens", "9", "--seed", seed]) == 0
        printed.append(capsys.readouterr().out.splitlines()[:-1])
    assert printed[0] == printed[1] != printed[2]
    assert sum(line.startswith("prompt 1: ") for line in printed[0]) == 3
    assert main([folder, "def", "--tokens", "1000"]) == 2
    assert "and --tokens 1000 make 100" in capsys.readouterr().err
    wrong = [
        ("--temperature", "0", "0.0 should be larger than 0"),
        ("--temperature", "1e-38", "should be at least 0.001; --top-k 1 takes the likeliest token"),
        ("--top-p", "2", "2.0 should be at most 1"),
        ("--samples", "65536", "65536 should be less than 65536"),
        ("--seed", str(1 << 63), "should be at least 0 and less than 2^63"),
        ("--seed", "-1", "-1 should be at least 0"),
    ]
    for option, value, said in wrong:
        with pytest.raises(SystemExit):
            main([folder, "def", option, value])
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([folder, "caf\udce9"])  # as Python has what is not UTF-8 on a command line
    assert "character 4 is not UTF-8" in capsys.readouterr().err
