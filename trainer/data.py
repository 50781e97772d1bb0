"""Turns text into token arrays on disk, once; every process maps them.

`prepare` makes a corpus: a folder that holds the tokenizer and, for each side of the split, all ids one after another
(`tokens.bin`) with the bounds of the documents (`offsets.bin`). Other processes map the same files with `open_corpus`.
Reading documents is in sources.py, cutting rows for training in stream.py.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import tokenizers
from pydantic import Field, TypeAdapter, ValidationError

from kernels.errors import UserError
from trainer.config.run import TokenizerConfig
from trainer.json_text import first_problem
from trainer.locks import locked
from trainer.sources import MIB, AnySource, SourceFile, documents, list_files, read_documents
from trainer.stream import TokenArray, TokenStream
from trainer.tokenizer import Tokenizer, read_tokenizer_file, train_tokenizer

__all__ = ["Corpus", "TokenArray", "TokenStream", "documents", "open_corpus", "prepare"]

FORMAT = 1  # of the prepared folder; another number makes old folders unused
CHUNK_BYTES = 2 * MIB  # of text that is encoded at once, which bounds the memory
PIECE_CHARACTERS = MIB // 2  # longer documents are encoded piece by piece
REPORT_SECONDS = 10.0
LOCK = ".lock"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Corpus:
    """A prepared text. `fingerprint` is a hash of the tokenizer and of all tokens; equal text gives an equal one anywhere."""

    tokenizer: Tokenizer
    train: TokenArray
    validation: TokenArray
    folder: Path
    fingerprint: str

    def require_same(self, fingerprint: str, checkpoint: object) -> None:
        """Raises UserError unless `fingerprint`, kept in `checkpoint`, is that of this corpus."""
        if fingerprint != self.fingerprint:
            raise UserError(
                f"{checkpoint} was trained on another text or tokenizer (fingerprint {fingerprint[:12]}, now "
                f"{self.fingerprint[:12]}); a resumed run must see the same rows. Restore the text, or start a new run"
            )


# ---------------------------------------------------------------- preparing


def prepare(source: AnySource, tokenizer_config: TokenizerConfig, say: Say) -> Corpus:
    """The corpus of a source: from `source.cache_dir` if its files are unchanged (path, size, time), else made now.

    A document belongs to the validation side by a hash of its text. The folder is built aside and renamed when it is complete,
    so that concurrent builders and interrupted ones do no harm; what killed ones have left is removed. Raises UserError for
    text that is missing or wrong, for a split with an empty side, and for a disk that is full or read-only.
    """
    files = list_files(source)
    cache_dir = source.cache_dir.resolve()
    folder = cache_dir / "corpora" / _key(source, files, tokenizer_config)
    _remove_left(folder.parent)
    if folder.exists():
        return open_corpus(folder)
    try:
        with _beside(folder) as aside:
            _build(aside, source, files, tokenizer_config, cache_dir, say)
            _publish(aside, folder)
    except OSError as error:  # of the cache: reading the source raises UserError
        raise UserError(_cannot_write(error, cache_dir, source, files)) from error
    return open_corpus(folder)


def open_corpus(folder: Path) -> Corpus:
    """Maps a folder that `prepare` made. Raises UserError if it is no such folder or a file in it has a wrong size."""
    try:
        about = _ABOUT.validate_json((folder / "corpus.json").read_bytes())
    except FileNotFoundError:
        raise UserError(f"{folder} is not a prepared corpus: it has no corpus.json; delete it and start again") from None
    except ValidationError as error:
        raise UserError(
            f"{folder / 'corpus.json'} is damaged: {first_problem(error)}; delete {folder} and start again"
        ) from None
    arrays = {name: _open_array(folder, name, one) for name, one in (("train", about.train), ("validation", about.validation))}
    return Corpus(Tokenizer.load(folder / "tokenizer.json"), **arrays, folder=folder, fingerprint=about.fingerprint)


@dataclass(frozen=True)
class _AboutArray:
    tokens: Annotated[int, Field(ge=0)]
    documents: Annotated[int, Field(ge=0)]
    dtype: Literal["<u2", "<u4"]


@dataclass(frozen=True)
class _About:
    """What corpus.json holds of what is read again."""

    train: _AboutArray
    validation: _AboutArray
    fingerprint: str


_ABOUT = TypeAdapter(_About)


def _open_array(folder: Path, name: str, about: _AboutArray) -> TokenArray:
    shapes = {"tokens": (about.tokens, np.dtype(about.dtype)), "offsets": (about.documents + 1, np.dtype("<i8"))}
    mapped: dict[str, np.memmap] = {}
    for kind, (count, dtype) in shapes.items():
        path = folder / f"{name}.{kind}.bin"
        size = path.stat().st_size if path.exists() else 0
        if size != count * dtype.itemsize:
            raise UserError(
                f"the prepared corpus is damaged: {path} has {size:,} bytes instead of {count * dtype.itemsize:,}; "
                f"delete {folder} and start again"
            )
        mapped[kind] = np.memmap(path, dtype=dtype, mode="r", shape=(count,))
    return TokenArray(mapped["tokens"], mapped["offsets"], name)


def _key(source: AnySource, files: list[SourceFile], config: TokenizerConfig) -> str:
    """Names what a corpus is made from, without reading the text."""
    made_from = {
        "format": FORMAT,
        "tokenizers": tokenizers.__version__,
        "source": source.model_dump(mode="json", exclude={"cache_dir", "paths"}),
        "files": [(file.label, file.size, file.mtime_ns, file.named) for file in files],
        "tokenizer": (
            [config.vocab_size, config.train_mib]
            if config.file is None
            else hashlib.sha256(read_tokenizer_file(config.file).encode()).hexdigest()
        ),
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:24]


def _build(aside: Path, source: AnySource, files: list[SourceFile], config: TokenizerConfig, cache_dir: Path, say: Say) -> None:
    """Writes all files of a corpus into the folder `aside`."""
    if config.file is None:
        texts = read_documents(source, files, left_out=[])
        train_texts = (text for text in texts if _draw(text) >= source.validation_share)
        tokenizer = train_tokenizer(train_texts, config, cache_dir, say)
    else:
        tokenizer = Tokenizer.load(config.file)
    tokenizer.save(aside / "tokenizer.json")
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    left_out: list[Path] = []
    say(f"encoding the documents of {len(files):,} file{'s' if len(files) > 1 else ''}")
    with ExitStack() as stack:
        train = stack.enter_context(_ArrayWriter(aside, "train", dtype))
        validation = stack.enter_context(_ArrayWriter(aside, "validation", dtype))
        texts = read_documents(source, files, left_out)
        lowest_draw = _encode(texts, tokenizer, train, validation, source.validation_share, say)
    if left_out:
        say(f"left out {len(left_out):,} files that are not UTF-8 text, such as {left_out[0]}")
    _require_both_sides(train.documents, validation.documents, lowest_draw, source, len(files))
    about = {
        writer.name: {"tokens": writer.tokens, "documents": writer.documents, "dtype": dtype.str}
        for writer in (train, validation)
    }
    digests = f"{train.digest.hexdigest()} {validation.digest.hexdigest()} {tokenizer.layout}"
    fingerprint = hashlib.sha256(digests.encode()).hexdigest()
    (aside / "corpus.json").write_text(json.dumps({**about, "fingerprint": fingerprint}, indent=2))
    say(
        f"encoded {train.documents:,} documents ({train.tokens:,} tokens) for training, "
        f"{validation.documents:,} ({validation.tokens:,} tokens) for validation"
    )


class _ArrayWriter:
    """Appends documents to the two files of a TokenArray, and hashes what it writes."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype) -> None:
        self.name = name
        self.documents = 0
        self.tokens = 0
        self.digest = hashlib.sha256()
        self._dtype = dtype
        self._paths = [folder / f"{name}.tokens.bin", folder / f"{name}.offsets.bin"]

    def __enter__(self) -> Self:
        self._tokens_file, self._offsets_file = (path.open("wb") for path in self._paths)
        self._offsets_file.write(np.array([0], dtype="<i8").tobytes())
        return self

    def __exit__(self, *_: object) -> None:
        with self._offsets_file, self._tokens_file:  # closes both, even if the last bytes of one find no place
            pass

    def add(self, ids: list[int]) -> None:
        if not ids:  # a normaliser may leave nothing of a text
            return
        self.documents += 1
        self.tokens += len(ids)
        content, end = np.array(ids, dtype=self._dtype).tobytes(), np.array([self.tokens], dtype="<i8").tobytes()
        self._tokens_file.write(content)
        self._offsets_file.write(end)
        self.digest.update(end)
        self.digest.update(content)


def _encode(
    texts: Iterable[str], tokenizer: Tokenizer, train: _ArrayWriter, validation: _ArrayWriter, share: float, say: Say
) -> float:
    """Writes every document to its side. Returns the lowest draw of all documents."""
    reported, lowest_draw = time.monotonic(), 1.0
    for chunk in _chunks(texts):
        pieces = [_pieces(text) for text in chunk]
        ids = iter(tokenizer.encode_many([piece for parts in pieces for piece in parts]))
        for text, parts in zip(chunk, pieces, strict=True):
            draw, found = _draw(text), [index for _ in parts for index in next(ids)]
            (validation if draw < share else train).add(found)
            if found:
                lowest_draw = min(lowest_draw, draw)
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            num_documents, num_tokens = train.documents + validation.documents, train.tokens + validation.tokens
            say(f"encoded {num_documents:,} documents so far, {num_tokens:,} tokens")
    return lowest_draw


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _pieces(text: str) -> list[str]:
    """Cuts a long text after the last line end of every piece, or anywhere if a line is longer than a piece."""
    pieces: list[str] = []
    first = 0
    while len(text) - first > PIECE_CHARACTERS:
        last = text.rfind("\n", first, first + PIECE_CHARACTERS) + 1 or first + PIECE_CHARACTERS
        pieces.append(text[first:last])
        first = last
    return [*pieces, text[first:]]


def _draw(text: str) -> float:
    """Of a document, from 0 to 1: below data.validation_share it is held out. By the text alone: the same under any order of
    the documents and on any machine. Equal texts never face each other."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2.0**64


def _require_both_sides(num_train: int, num_validation: int, lowest_draw: float, source: AnySource, num_files: int) -> None:
    if num_train and num_validation:
        return
    total = num_train + num_validation
    if not total:
        raise UserError(
            f"the source data={source.kind} holds no text: {num_files:,} file(s), all documents empty; set data.paths"
        )
    if total == 1:
        raise UserError(
            "the source has one document only, and a document is either for training or for validation; add more files to "
            "data.paths, or split the document into files, as `split -C 64k FILE PARTS/` does between lines"
        )
    side = "validation" if num_train else "training"
    change = f"raise it to {math.ceil(lowest_draw * 1000 + 1) / 1000:.3g}, which holds one out," if num_train else "lower it"
    raise UserError(
        f"none of the {total:,} documents falls on the {side} side with data.validation_share={source.validation_share}; "
        f"{change} or add documents"
    )


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A new folder on the same disk, which is removed if it is not moved. What holds it is locked while this process lives, and
    gets a name that `_remove_left` looks at when it is."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
        lock = locked(holder / LOCK)
        assert lock is not None, "nobody else knows of it"
        with lock:
            holder = holder.rename(holder.with_name(f".{folder.name}{holder.name}"))
            aside = holder / folder.name
            aside.mkdir()
            yield aside
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def _remove_left(corpora: Path) -> None:
    """Removes what processes built that were killed, whatever corpus it was to be."""
    for holder in corpora.glob(".*.*"):
        with suppress(OSError):  # another user's, on a disk that is read-only, or gone by now
            if (lock := locked(holder / LOCK)) is not None:
                with lock:
                    shutil.rmtree(holder)


def _publish(aside: Path, folder: Path) -> None:
    try:
        aside.replace(folder)
    except OSError as error:
        # Another process finished the same corpus first: its folder is as good as ours.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _cannot_write(error: OSError, cache_dir: Path, source: AnySource, files: list[SourceFile]) -> str:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"data.cache_dir={cache_dir} cannot be written: {error.strerror}; set data.cache_dir to a folder of yours"
    text_bytes = sum(file.size for file in files)
    if source.max_mib is not None:
        text_bytes = min(text_bytes, int(source.max_mib * MIB))
    # 2 or 4 bytes a token, and a token of 2 to 5 bytes of text
    return (
        f"the disk of data.cache_dir={cache_dir} is full: the tokens of {text_bytes:,} bytes of text want about as many bytes, "
        f"and {shutil.disk_usage(cache_dir).free:,} are free; free some space, set data.cache_dir to another disk or lower "
        "data.max_mib"
    )
