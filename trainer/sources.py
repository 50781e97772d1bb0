"""Reads documents from the four sources of text: the standard library, text files, JSON lines and Parquet.

A source is first listed (`list_files`: names, sizes and times only), then read (`read_documents`: one document at a time,
in the order of the list). Documents that are only white space are left out.
"""

from __future__ import annotations

import codecs
import difflib
import glob
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.errors import UserError
from trainer.config.run import JsonlSource, ParquetSource, StdlibSource, TextSource
from trainer.json_text import parsed

MIB = 1 << 20
PARQUET_BATCH_ROWS = 256
NAMES_SHOWN = 20  # of the fields that a record has, in a message
# Installed packages, and tests: many of them hold broken text on purpose.
STDLIB_FOLDERS_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"})

AnySource = StdlibSource | TextSource | JsonlSource | ParquetSource
PathSource = TextSource | JsonlSource | ParquetSource
SUFFIXES = {"text": "", "jsonl": ".jsonl", "parquet": ".parquet"}  # which files of a folder are taken


@dataclass(frozen=True)
class SourceFile:
    """A file to read. `label` identifies it: relative to the standard library, else the absolute path."""

    path: Path
    label: str
    size: int  # bytes
    mtime_ns: int
    named: bool  # the user named this very file; otherwise a folder or a glob brought it


def documents(source: AnySource) -> Iterator[str]:
    """Every document of a source, in a fixed order. Raises UserError for anything missing, unreadable or of a wrong type."""
    return read_documents(source, list_files(source), left_out=[])


def list_files(source: AnySource) -> list[SourceFile]:
    """The files of a source, sorted, each once. Raises UserError if a path does not exist or nothing matches."""
    if isinstance(source, StdlibSource):
        return _list_stdlib()
    suffix = SUFFIXES[source.kind]
    cache_dir = source.cache_dir.resolve()
    files: dict[Path, SourceFile] = {}
    for pattern in source.paths:
        try:
            found = [(path.resolve(), named) for path, named in _match(pattern, suffix)]
        except (OSError, RuntimeError) as error:  # RuntimeError: of ~somebody whom this machine does not know
            reason = error.strerror or error if isinstance(error, OSError) else error
            raise UserError(f"data.paths: {pattern} cannot be read: {reason}") from error
        found = [(path, named) for path, named in found if named or not path.is_relative_to(cache_dir)]
        if not found:
            raise UserError(_nothing_matches(pattern, suffix))
        for path, named in found:
            if named or path not in files:
                files[path] = _describe(path, str(path), named)
    return [files[path] for path in sorted(files)]


def read_documents(source: AnySource, files: Iterable[SourceFile], left_out: list[Path]) -> Iterator[str]:
    """The documents of `files`, up to `source.max_mib`; the last one is cut there. Files that are no text go to `left_out`."""
    limit = None if source.max_mib is None else max(1, int(source.max_mib * MIB))
    left = limit
    for text in _read_files(source, files, limit, left_out):
        if not text or text.isspace():
            continue
        if left is not None:
            encoded = text.encode()
            if len(encoded) >= left:
                cut = encoded[:left].decode(errors="ignore")
                if cut and not cut.isspace():
                    yield cut
                return
            left -= len(encoded)
        yield text


def _read_files(source: AnySource, files: Iterable[SourceFile], limit: int | None, left_out: list[Path]) -> Iterator[str]:
    for file in files:
        try:
            if isinstance(source, JsonlSource):
                yield from _read_jsonl(file.path, source.field)
            elif isinstance(source, ParquetSource):
                yield from _read_parquet(file.path, source.field)
            else:
                yield from _read_text(file, limit, left_out)
        except OSError as error:
            raise UserError(f"{file.path} cannot be read: {error.strerror or error}") from error


# ---------------------------------------------------------------- listing


def _list_stdlib() -> list[SourceFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in _walk(root, STDLIB_FOLDERS_LEFT_OUT) if path.suffix == ".py"]
    if not paths:
        raise UserError(f"this Python has no source text of its standard library under {root}; use data=text with data.paths")
    files = [_describe(path, path.relative_to(root).as_posix(), named=False) for path in paths]
    return sorted(files, key=lambda file: file.label)


def _match(pattern: str, suffix: str) -> Iterator[tuple[Path, bool]]:
    """(file, whether the user named it) for an entry of data.paths."""
    path = Path(pattern).expanduser()
    if path.is_file():
        yield path, True
    elif path.is_dir():
        yield from ((below, False) for below in _walk(path) if below.name.endswith(suffix))
    elif path.exists():
        raise UserError(f"data.paths: {pattern} is neither a file nor a folder")
    elif glob.has_magic(pattern):
        for match in map(Path, glob.iglob(str(path), recursive=True)):  # noqa: PTH207  Path.glob refuses absolute patterns
            if match.is_file():
                yield match, False
            elif match.is_dir():
                yield from ((below, False) for below in _walk(match) if below.name.endswith(suffix))
    else:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "correct the path or leave it out"
        raise UserError(f"data.paths: {pattern} does not exist (looked from {Path.cwd()}); {hint}")


def _nothing_matches(pattern: str, suffix: str) -> str:
    if Path(pattern).expanduser().is_dir():
        return f"data.paths: the folder {pattern} has no {suffix or 'visible'} file below it; name another one"
    return f"data.paths: {pattern} matches no file (looked from {Path.cwd()}); correct the pattern or leave it out"


def _walk(root: Path, left_out: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Files below a folder; without hidden files and folders, and without folders of these names."""

    def refuse(error: OSError) -> None:
        raise UserError(f"the folder {error.filename} cannot be read: {error.strerror}") from error

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        yield from (path for path in paths if path.is_file())


def _describe(path: Path, label: str, named: bool) -> SourceFile:
    status = path.stat()
    return SourceFile(path, label, status.st_size, status.st_mtime_ns, named)


# ---------------------------------------------------------------- reading


def _read_text(file: SourceFile, limit: int | None, left_out: list[Path]) -> Iterator[str]:
    """The whole file as one document, at most `limit` bytes of it."""
    with file.path.open("rb") as stream:
        content = stream.read() if limit is None else stream.read(limit)
        at_end = not stream.read(1)
    try:
        # A read that stops early may stop inside a character: such a rest is dropped.
        text = codecs.getincrementaldecoder("utf-8")().decode(content, final=at_end)
        offset = content.find(b"\0")
    except UnicodeDecodeError as error:
        text, offset = "", error.start
    if offset < 0:
        yield text.removeprefix("\ufeff")
    elif file.named:
        raise UserError(
            f"{file.path} is not UTF-8 text: byte 0x{content[offset]:02x} at offset {offset}; convert it to UTF-8 or "
            "leave it out of data.paths"
        )
    else:
        left_out.append(file.path)


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    for where, record in json_records(path, wanted=f'data=jsonl wants lines such as {{{json.dumps(field)}: "some text"}}'):
        if field not in record:
            raise UserError(missing_field(where, field, list(record), "data.field"))
        yield _text_of(record[field], field, where)


def json_records(path: Path, wanted: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of each line that is not white space.

    Raises UserError for a line that is no object, with what is `wanted`, and OSError if the file cannot be read.
    """
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.isspace():
                continue
            where = f"{path}, line {number}"
            try:
                record = parsed(line)
            except ValueError as error:  # UnicodeDecodeError is one, too
                raise UserError(f"{where} is not JSON: {error}; every line is one JSON object") from error
            if not isinstance(record, dict):
                raise UserError(f"{where} is a JSON {_json_kind(record)}, not an object; {wanted}")
            yield where, record


def _text_of(value: object, field: str, where: str) -> str:
    if value is None:  # an empty document
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"{where}: field {field!r} is a JSON {_json_kind(value)}, not a string; set data.field to a field of text"
        )
    return encodable(value, field, where)


def encodable(text: str, field: str, where: str) -> str:
    """The text. Raises UserError where JSON has written what is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: field {field!r} has half of a surrogate pair at character {error.start}, which no UTF-8 text can hold; "
            "correct the line or leave it out"
        ) from error
    return text


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow  # here, because it is slow to import and only this source needs it
    from pyarrow import parquet

    row = 0
    try:
        with parquet.ParquetFile(path) as table:
            schema = table.schema_arrow
            if field not in schema.names:
                raise UserError(missing_field(str(path), field, schema.names, "data.field"))
            if (columns := schema.names.count(field)) > 1:
                raise UserError(
                    f"{path} has {columns} columns {field!r}; write it again with one, or set data.field to another"
                )
            _require_string_column(schema.field(field).type, field, path)
            for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=[field]):
                for text in batch.column(0).to_pylist():
                    yield text or ""  # null is an empty document
                row += batch.num_rows
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a Parquet file that can be read: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, rows {row} to {row + PARQUET_BATCH_ROWS - 1}: column {field!r} is not UTF-8 ({error})"
        ) from error


def _require_string_column(kind: object, field: str, path: Path) -> None:
    from pyarrow import types

    inner = kind.value_type if types.is_dictionary(kind) else kind  # type: ignore[attr-defined]
    checks: tuple[Callable[[object], bool], ...] = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    if not any(check(inner) for check in checks):
        raise UserError(f"{path}: column {field!r} has type {kind}, not string; set data.field to a column of text")


def missing_field(where: str, field: str, names: list[str], option: str) -> str:
    """What is wrong when a record without `field` has the fields `names`; `option` says which field to take."""
    if not names:
        return f"{where} has no field {field!r}; it has no fields at all"
    near = difflib.get_close_matches(field, names, n=1, cutoff=0.0)[0]
    shown = ", ".join(repr(name) for name in names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
    return f"{where} has no field {field!r}; its fields are {shown}. The nearest is {near!r}: set {option}={near}"


def _json_kind(value: object) -> str:
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return kinds[type(value)]
