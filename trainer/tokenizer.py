"""Byte-level BPE over the `tokenizers` package: text to token ids and back, and how many bytes each id stands for.

A trained tokenizer splits digits, so that numbers of any length consist of the same ten tokens, and splits the rest by GPT-2's
word pattern. The special tokens come first: <|bos|> 0, <|eos|> 1, <|pad|> 2. Text never turns into a
special token, even if it spells one: only the program puts them into a sequence.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from kernels.errors import UserError
from trainer.config.run import TokenizerConfig
from trainer.json_text import parsed
from trainer.sources import MIB

MIN_PAIR_COUNT = 2  # a pair seen once is noise; a small corpus then gives a smaller vocabulary
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")

# What public tokenizers call them, the preferred name first. Many have one token for all three purposes.
# \uff5c is a full-width bar and \u2581 a low block, in the names of DeepSeek.
BOS_NAMES = (
    "<|bos|>",
    "<s>",
    "<bos>",
    "<|begin_of_text|>",
    "<|startoftext|>",
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    "<|endoftext|>",
)
EOS_NAMES = (
    "<|eos|>",
    "</s>",
    "<eos>",
    "<|end_of_text|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|endoftext|>",
    "<|im_end|>",
)
PAD_NAMES = (
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|padding|>",
    "<\uff5c\u2581pad\u2581\uff5c>",
    "<|finetune_right_pad_id|>",
    "<|endoftext|>",
)


class Tokenizer:
    """A byte-level tokenizer from the text of a tokenizer.json.

    `vocab_size` V is the highest id plus one; `bos`, `eos` and `pad` are ids. `origin` names the file in messages; `eos` the
    special token that ends a text, where it is not the usual one. Raises UserError if the text is no tokenizer, if it is not
    byte-level, or if it lacks one of the three special tokens.
    """

    def __init__(self, layout: str, origin: str, eos: str | None = None) -> None:
        self.layout = layout
        self.origin, self._eos = origin, eos
        self._core = _parse(layout, origin)
        self._core.no_padding()
        self._core.no_truncation()
        self._core.encode_special_tokens = True  # as plain text
        self.vocab_size = max(self._core.get_vocab(with_added_tokens=True).values()) + 1
        self.bos, self.eos, self.pad = self._find_special_tokens()

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[str, str, str | None]]:
        return Tokenizer, (self.layout, self.origin, self._eos)

    @staticmethod
    def load(path: Path, eos: str | None = None) -> Tokenizer:
        """Reads a tokenizer.json, also one of the Hugging Face hub. Raises UserError as the class does and if it is missing."""
        return Tokenizer(read_tokenizer_file(path), str(path), eos)

    def save(self, path: Path) -> None:
        """Writes a tokenizer.json that `load` and Hugging Face programs read; `path` is never half-written."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        aside = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self.layout)
            aside.chmod(0o644)  # mkstemp gives it to this user alone; a cache may be shared
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        return list(self._core.encode(text, add_special_tokens=False).ids)

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a text in which the names of special tokens stand for these tokens."""
        special = {token.content: index for index, token in self._core.get_added_tokens_decoder().items() if token.special}
        names = sorted(special, key=len, reverse=True)  # of two that begin alike the longer one is meant
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
        return [index for part in parts for index in ([special[part]] if part in special else self.encode(part))]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode`, on all processor cores."""
        return [encoding.ids for encoding in self._core.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens stand for no text, bytes that are not UTF-8 become U+FFFD."""
        return str(self._core.decode(list(ids), skip_special_tokens=True))

    def id_of(self, name: str) -> int:
        """The id of a token, special or not, by its name in the vocabulary. Raises UserError where there is none."""
        found: int | None = self._core.token_to_id(name)
        if found is None:
            there = ", ".join(token.content for token in self._core.get_added_tokens_decoder().values())
            raise UserError(f"tokenizer {self.origin} has no token {name!r}; its added tokens are: {there or 'none'}")
        return found

    def spelled(self) -> tuple[bytes, ...]:
        """The bytes that each id stands for, V of them; none for special tokens and for ids without a token."""
        letters, bytes_V = byte_letters(), [b""] * self.vocab_size
        for token, index in self._core.get_vocab(with_added_tokens=False).items():
            # One letter of the alphabet is one byte. A token with any other letter is taken literally by the decoder.
            known = letters.keys() >= set(token)
            bytes_V[index] = bytes(letters[letter] for letter in token) if known else token.encode()
        for index, added in self._core.get_added_tokens_decoder().items():
            bytes_V[index] = b"" if added.special else added.content.encode()
        return tuple(bytes_V)

    def token_bytes(self) -> Tensor:
        """How many bytes of UTF-8 each id stands for: (V,) int64; 0 for special tokens and for ids without a token."""
        return torch.tensor([len(spelled) for spelled in self.spelled()], dtype=torch.int64)

    def _find_special_tokens(self) -> tuple[int, int, int]:
        added = {token.content: index for index, token in self._core.get_added_tokens_decoder().items()}
        if self._eos is not None and self._eos not in added:
            there = ", ".join(list(added)[:12]) or "none"
            raise UserError(
                f"tokenizer {self.origin} has no token {self._eos}, which should end a text (chat.eos); its added tokens are: "
                f"{there}. Name one of them, or choose chat=none"
            )
        found: list[int] = []
        missing: list[str] = []
        eos_names = EOS_NAMES if self._eos is None else (self._eos,)
        for purpose, names in (("bos", BOS_NAMES), ("eos", eos_names), ("pad", PAD_NAMES)):
            name = next((name for name in names if name in added), None)
            if name is None:
                missing.append(f"{purpose} (one of {', '.join(names)})")
            else:
                found.append(added[name])
        if missing:
            there = ", ".join(list(added)[:12]) or "none"
            raise UserError(
                f"tokenizer {self.origin} lacks these special tokens: {'; '.join(missing)}. Its added tokens are: {there}. "
                "Add the missing ones to its added_tokens, or set tokenizer.file=null to train a tokenizer"
            )
        bos, eos, pad = found
        return bos, eos, pad


def byte_letters() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for (GPT-2): Latin-1 letters that print stand for themselves,
    the letters from code 256 on for the other bytes in their order."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printing)
    return {chr(byte): byte for byte in printing} | {chr(256 + place): byte for place, byte in enumerate(others)}


def read_tokenizer_file(path: Path) -> str:
    """The text of a tokenizer file. Raises UserError if there is none to read."""
    path = path.expanduser()
    if path.is_dir():
        raise UserError(f"tokenizer.file={path} is a folder; name the tokenizer.json itself, such as {path / 'tokenizer.json'}")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"tokenizer.file={path} does not exist (looked from {Path.cwd()}); correct the path, or set tokenizer.file=null to "
            "train a tokenizer"
        ) from None
    except OSError as error:
        raise UserError(f"tokenizer.file={path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not a tokenizer: byte {error.start} is not UTF-8; tokenizer.file wants a tokenizer.json"
        ) from error


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig, cache_dir: Path, say: Callable[[str], None]) -> Tokenizer:
    """A tokenizer of at most `config.vocab_size` tokens from the first `config.train_mib` MiB of `texts`.

    The same text gives the same tokenizer. It is kept under `cache_dir`, by a hash of the text, the size and the version of
    `tokenizers`, and read from there the next time. Too little text gives a smaller vocabulary, none
    gives the bytes and the special tokens.
    """
    sample = list(_first_bytes(texts, int(config.train_mib * MIB)))
    digest = hashlib.sha256(f"{tokenizers.__version__} {config.vocab_size} {MIN_PAIR_COUNT}\n".encode())
    num_bytes = 0
    for text in sample:
        encoded = text.encode()
        num_bytes += len(encoded)
        digest.update(f"{len(encoded)}\n".encode() + encoded)
    path = cache_dir / "tokenizers" / f"{digest.hexdigest()[:24]}.json"
    if path.exists():
        return Tokenizer.load(path)
    if sample:
        say(f"training the tokenizer on {num_bytes / MIB:.1f} MiB of text")
    tokenizer = Tokenizer(_train(sample, config.vocab_size), str(path))
    tokenizer.save(path)
    return tokenizer


def _train(sample: list[str], vocab_size: int) -> str:
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_PAIR_COUNT,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(sample, trainer)
    return str(core.to_str())


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """The texts up to `limit` bytes of UTF-8; the last one is cut between two characters."""
    for text in texts:
        encoded = text.encode()
        if len(encoded) >= limit:
            yield encoded[:limit].decode(errors="ignore")
            return
        limit -= len(encoded)
        yield text


def _parse(layout: str, origin: str) -> tokenizers.Tokenizer:
    wanted = "tokenizer.file wants the tokenizer.json of a byte-level BPE tokenizer"
    try:
        fields = parsed(layout)
    except ValueError as error:
        raise UserError(f"{origin} is not a tokenizer: it is not JSON ({error}); {wanted}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("model"), dict):
        raise UserError(f"{origin} is not a tokenizer: it is JSON, but has no 'model'; {wanted}")
    kinds = _component_kinds(fields.get("decoder"))
    if "ByteLevel" not in kinds:
        raise UserError(f"tokenizer {origin} is not byte-level: its decoder is {', '.join(kinds) or 'missing'}; {wanted}")
    with _LibraryErrorIsUserError(f"{origin} cannot be read by tokenizers {tokenizers.__version__}"):
        return tokenizers.Tokenizer.from_str(layout)
    raise AssertionError("unreachable: the block returns or raises")


def _component_kinds(component: object) -> list[str]:
    """Types in a decoder of a tokenizer.json, those inside a Sequence too."""
    if not isinstance(component, dict):
        return []
    inner = [kind for part in component.get("decoders", []) for kind in _component_kinds(part)]
    return [str(component.get("type")), *inner]


class _LibraryErrorIsUserError:
    """`tokenizers` raises Exception itself for a bad file, or the panic of its Rust, which is no Exception and has no name to
    import. These two, and no subclass of Exception, become a UserError."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is Exception or (kind is not None and kind.__module__ == "pyo3_runtime"):
            raise UserError(f"{self._what}: {error}; update tokenizers, or set tokenizer.file to another file") from error
