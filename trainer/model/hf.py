"""Models in the folder layout of Hugging Face: config.json, safetensors, tokenizer.

What `save_pretrained` writes loads with transformers' AutoModelForCausalLM and gives the same logits; what transformers saves
for one of the architectures of families.py loads here.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernels.errors import UserError
from trainer.config.model import ModelConfig
from trainer.json_text import parsed
from trainer.model.families import (
    OUR_KEY,
    config_json,
    family_of,
    our_features,
    parse_config,
    tensors_by_name,
    their_features,
    unused_layers,
)
from trainer.model.transformer import LanguageModel, require_plausible
from trainer.tensor_files import save_tensors
from trainer.tokenizer import Tokenizer

MAX_SHARD_BYTES = 4 << 30
ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PLAIN = re.compile(r"[ -.0-~]{1,255}")  # the name of a file in a folder: ASCII but for the slash


# ---------------------------------------------------------------- writing


def save_pretrained(
    model: LanguageModel, folder: Path, tokenizer: Tokenizer | None, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write `model` and, beside it, `tokenizer` to `folder`, complete or not at all.

    Replaces an earlier export of ours. Raises UserError if no architecture expresses the model, if the folder holds anything
    else, or if the tokenizer has more tokens than the model.
    """
    family = family_of(model.config)
    folder = folder.expanduser().resolve()
    _check_target(folder)
    tensors = tensors_by_name(family, model.config, model.state(), fused=False)
    special_ids: dict[str, int] = {}
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.writing-", dir=folder.parent))
    try:
        beside.chmod(0o755)  # mkdtemp gives it to this user alone
        if tokenizer is not None:
            special_ids = _write_tokenizer(tokenizer, beside, model.config)
        dtype = str(model.experts.gate_up_LECD.dtype).removeprefix("torch.")
        _write_json(beside / "config.json", config_json(model.config) | special_ids | {"dtype": dtype})
        if special_ids:
            _write_json(beside / "generation_config.json", special_ids)
        _write_tensors(tensors, model.config, beside, max_shard_bytes)
        _replace(folder, beside)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _check_target(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder to write the model to")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    config = folder / "config.json"
    if not config.is_file() or OUR_KEY not in _read_json(config):
        raise UserError(f"{folder} is not empty and holds no earlier export of Tessera; name another folder, or empty it")


def _replace(folder: Path, beside: Path) -> None:
    """Put the written folder in place. The earlier export is moved away first, because a rename replaces only empty folders."""
    earlier = beside.with_name(beside.name + "-earlier")
    if folder.exists():
        folder.rename(earlier)
    beside.rename(folder)
    shutil.rmtree(earlier, ignore_errors=True)


def _write_tokenizer(tokenizer: Tokenizer, folder: Path, config: ModelConfig) -> dict[str, int]:
    """Writes the tokenizer and describes it; returns the ids of its special tokens for the model's files."""
    assert config.vocab_size is not None, "a built model has a vocabulary size"
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{tokenizer.origin} has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}; "
            "name the model's own tokenizer"
        )
    tokenizer.save(folder / "tokenizer.json")
    names = {token["id"]: token["content"] for token in parsed(tokenizer.layout)["added_tokens"]}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[tokenizer.bos],
        "eos_token": names[tokenizer.eos],
        "pad_token": names[tokenizer.pad],
        "model_max_length": config.max_positions,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    # No pad id: transformers would freeze that row of the embedding.
    return {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}


def _write_tensors(tensors: Mapping[str, Tensor], config: ModelConfig, folder: Path, max_shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    files = [f"model-{place:05}-of-{len(shards):05}.safetensors" for place in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [ONE_FILE]
    else:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for file, shard in zip(files, shards, strict=True):
        # Cloned, because the format refuses views that share memory; one shard at a time.
        copies = {
            name: their_features(name, tensor.cpu(), config).clone(memory_format=torch.contiguous_format)
            for name, tensor in shard.items()
        }
        save_tensors(copies, folder / file, metadata={"format": "pt"})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- reading


def load_pretrained(folder: Path, dtype: torch.dtype) -> LanguageModel:
    """Read a model into `dtype` on the CPU; the selection bias stays float32.

    Raises UserError for files that are missing or damaged, architectures and settings that we do not have, and tensors that
    are missing, unknown or of another shape.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name a folder in the Hugging Face layout")
    path = folder / "config.json"
    content = _read_json(path)
    family, config = parse_config(content, path)
    unused = unused_layers(content, config)
    files = {name: file for name, file in tensor_files(folder).items() if not name.startswith(unused)}
    require_plausible(config, sum(file.stat().st_size for file in set(files.values())), str(path))
    model = LanguageModel.unset(config, torch.device("cpu"), dtype)
    fused = any(name.endswith("mlp.experts.gate_up_proj") for name in files)
    targets = tensors_by_name(family, config, model.state(), fused=fused)
    _check_names(targets, files, folder)
    for file in sorted(set(files.values())):
        held = {name: targets[name] for name, holder in files.items() if holder == file and name in targets}
        _read_tensors(file, held, config)
    return model


def read_config(folder: Path) -> ModelConfig:
    """The architecture of a folder in the Hugging Face layout, without its weights. Raises UserError as `load_pretrained`."""
    path = folder / "config.json"
    return parse_config(_read_json(path), path)[1]


def tensor_files(folder: Path) -> dict[str, Path]:
    """Which file holds a tensor, for all tensors. UserError where one of the files is missing, or the only one is damaged."""
    if (folder / INDEX).is_file():
        weight_map = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{folder / INDEX} has no weight_map")
        if strange := [file for file in weight_map.values() if not _is_plain(file)]:
            raise UserError(f"{folder / INDEX} names {strange[0]!r}, which is not the plain name of a file in its folder")
        files = {name: folder / file for name, file in weight_map.items()}
        if missing := sorted({file.name for file in files.values() if not file.is_file()}):
            raise UserError(f"{folder} lacks {_shortened(missing)}, which {INDEX} names")
        return files
    path = folder / ONE_FILE
    if not path.is_file():
        raise UserError(f"{folder} has neither {ONE_FILE} nor {INDEX}")
    try:
        with safe_open(path, "pt") as file:
            return dict.fromkeys(file.keys(), path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _is_plain(file: object) -> bool:
    """Links are followed all the same: caches of downloads are made of them."""
    return isinstance(file, str) and PLAIN.fullmatch(file) is not None


def _check_names(targets: Mapping[str, Tensor], files: Mapping[str, Path], folder: Path) -> None:
    missing = [name for name, target in targets.items() if target.numel() and name not in files]
    if missing:
        raise UserError(f"{folder} lacks {_shortened(missing)}")
    # Some programs write the head of a model with tied embeddings too.
    unknown = [name for name in files if name not in targets and name != "lm_head.weight"]
    if unknown:
        raise UserError(f"{folder} holds tensors that the model of its config.json does not have: {_shortened(unknown)}")


def _read_tensors(path: Path, targets: Mapping[str, Tensor], config: ModelConfig) -> None:
    try:
        with safe_open(path, "pt") as file:
            for name, target in targets.items():
                shape = tuple(file.get_slice(name).get_shape())
                if shape != tuple(target.shape):
                    raise UserError(f"{path}: {name} is {shape}, but config.json makes it {tuple(target.shape)}")
                value = file.get_tensor(name)
                if value.dtype not in FLOATS:
                    kind = str(value.dtype).removeprefix("torch.")
                    raise UserError(f"{path}: {name} is {kind}, as of a quantized model; take the weights before quantization")
                target.copy_(our_features(name, value, config))
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parsed(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return content


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
