"""The sources of text and the prepared corpus."""

from __future__ import annotations

import errno
import itertools
import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trainer.data
from kernels.errors import UserError
from trainer.config.run import JsonlSource, ParquetSource, StdlibSource, TextSource, TokenizerConfig
from trainer.data import Corpus, TokenArray, documents, open_corpus, prepare
from trainer.sources import PARQUET_BATCH_ROWS, list_files
from trainer.tokenizer import Tokenizer

CONFIG = TokenizerConfig(vocab_size=270, train_mib=1)


def silent(_: str) -> None:
    return None


def text_source(folder: Path, *paths: object, share: float = 0.3, max_mib: float | None = None) -> TextSource:
    names = tuple(str(path) for path in paths) or (str(folder / "text"),)
    return TextSource(kind="text", paths=names, validation_share=share, max_mib=max_mib, cache_dir=folder / "cache")


def jsonl_source(path: Path, field: str = "text") -> JsonlSource:
    return JsonlSource(kind="jsonl", paths=(str(path),), field=field, validation_share=0.3, cache_dir=path.parent / "cache")


def parquet_source(path: Path, field: str = "text") -> ParquetSource:
    return ParquetSource(kind="parquet", paths=(str(path),), field=field, validation_share=0.3, cache_dir=path.parent / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty documents in tmp_path/text."""
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i:02}.txt").write_text(f"document {i}\n" + "some words again and again\n" * (i % 5))
    return tmp_path


# ---------------------------------------------------------------- sources


def test_stdlib_is_text_without_tests_and_packages(tmp_path: Path) -> None:
    source = StdlibSource(kind="stdlib", validation_share=0.1, max_mib=0.5, cache_dir=tmp_path)
    labels = [file.label for file in list_files(source)]
    assert labels == sorted(labels) and "argparse.py" in labels
    assert not [label for label in labels if {"test", "tests", "site-packages", "idlelib"} & set(label.split("/")[:-1])]
    texts = list(documents(source))
    assert sum(len(text.encode()) for text in texts) == 1 << 19
    assert texts == list(documents(source))


def test_text_paths_are_sorted_and_each_file_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "b" / ".git").mkdir()
    for name in ("b/2.txt", "b/deep/3.md", "a.txt", "b/.hidden", "b/.git/config", "c.txt"):
        (tmp_path / name).write_text(name)
    source = text_source(tmp_path, tmp_path / "b", tmp_path / "*.txt", tmp_path / "a.txt", tmp_path / "b" / "2.txt")
    assert list(documents(source)) == ["a.txt", "b/2.txt", "b/deep/3.md", "c.txt"]


def test_the_cache_inside_the_text_folder_is_not_text(folder: Path) -> None:
    source = TextSource(kind="text", paths=(str(folder),), validation_share=0.3, cache_dir=folder / "cache")
    first = prepare(source, CONFIG, silent)
    assert prepare(source, CONFIG, silent).folder == first.folder


def test_a_file_with_a_wildcard_in_its_name_is_read(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("hello")
    assert list(documents(text_source(tmp_path, tmp_path / "a[1].txt"))) == ["hello"]


def test_empty_documents_are_left_out_and_marks_of_byte_order_too(tmp_path: Path) -> None:
    for name, content in (("1", b""), ("2", b" \n\t"), ("3", b"\xef\xbb\xbfhi\r\n")):
        (tmp_path / name).write_bytes(content)
    assert list(documents(text_source(tmp_path, tmp_path))) == ["hi\r\n"]


@pytest.mark.parametrize(("content", "offset"), [(b"abc\xffdef", 3), (b"ab\0c", 2), ("é".encode() * 3 + b"\xc3", 6)])
def test_a_named_binary_file_is_an_error_with_its_offset(tmp_path: Path, content: bytes, offset: int) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"data.bin is not UTF-8 text: byte 0x\w\w at offset {offset}; convert it"):
        list(documents(text_source(tmp_path, path)))
    (tmp_path / "good.txt").write_text("good")
    assert list(documents(text_source(tmp_path, tmp_path))) == ["good"]  # in a folder, it is left out


def test_binary_files_of_a_folder_are_reported(folder: Path) -> None:
    (folder / "text" / "picture.png").write_bytes(b"\x89PNG\0")
    said: list[str] = []
    prepare(text_source(folder), CONFIG, said.append)
    assert [line for line in said if "left out 1 files" in line and "picture.png" in line]


@settings(max_examples=30, deadline=None)
@given(limit=st.integers(1, 60), letters=st.sampled_from(["a", "é", "漢", "\U0001f600"]))
def test_max_mib_cuts_between_characters(tmp_path_factory: pytest.TempPathFactory, limit: int, letters: str) -> None:
    tmp_path = tmp_path_factory.mktemp("limit")
    for name in "abc":
        (tmp_path / name).write_text(letters * (20 // len(letters.encode())))
    texts = list(documents(text_source(tmp_path, tmp_path, max_mib=limit / (1 << 20))))
    total = sum(len(text.encode()) for text in texts)
    whole = 3 * len(letters.encode()) * (20 // len(letters.encode()))
    assert min(limit, whole) - len(letters.encode()) < total <= limit
    assert set("".join(texts)) <= {letters}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text/00.tx", r"00.tx does not exist .*did you mean .*00.txt"),
        ("nowhere/x", r"nowhere/x does not exist \(looked from .*correct the path"),
        ("text/*.md", r"\*.md matches no file"),
        ("empty", r"the folder .*empty has no visible file below it"),
        ("~nobody-here/x", r"~nobody-here/x cannot be read: Could not determine home directory"),
    ],
)
def test_paths_that_bring_nothing_are_errors(folder: Path, name: str, message: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        list(documents(text_source(folder, name if name.startswith("~") else folder / name)))


def test_jsonl_reads_the_field_of_every_line(tmp_path: Path) -> None:
    lines = [{"text": "one\nline", "id": 1}, {"text": ""}, {"text": None}, {"text": "drei ü"}]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\n".join(json.dumps(line) for line in lines) + "\n")
    (tmp_path / "notes.txt").write_text("not JSON")
    assert list(documents(jsonl_source(tmp_path / "a.jsonl"))) == ["one\nline", "drei ü"]
    assert list(documents(jsonl_source(tmp_path))) == ["one\nline", "drei ü"]  # *.jsonl of a folder


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"a.jsonl, line 2 is not JSON: .*one JSON object"),
        (b'{"text": "\xff"}', r"a.jsonl, line 2 is not JSON: "),
        (b'["a"]', r'line 2 is a JSON array, not an object; data=jsonl wants lines such as \{"text"'),
        (
            b'{"txt": "a", "id": 1}',
            r"line 2 has no field 'text'; its fields are 'txt', 'id'. The nearest is 'txt': set data",
        ),
        (b"{}", r"line 2 has no field 'text'; it has no fields at all"),
        (b'{"text": ["a"]}', r"line 2: field 'text' is a JSON array, not a string; set data.field"),
        (b'{"text": 3}', r"line 2: field 'text' is a JSON number"),
        (b'{"text": "ab\\ud800"}', r"line 2: field 'text' has half of a surrogate pair at character 2"),
    ],
)
def test_wrong_lines_are_errors_with_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message):
        list(documents(jsonl_source(tmp_path / "a.jsonl")))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_reads_the_column_over_several_batches(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [f"row {i}" for i in range(2 * PARQUET_BATCH_ROWS + 3)]
    column = pa.array([*texts, None, ""], pa.string()).cast(kind)
    pq.write_table(pa.table({"id": range(len(texts) + 2), "text": column}), tmp_path / "a.parquet")
    assert list(documents(parquet_source(tmp_path / "a.parquet"))) == texts


def test_wrong_parquet_files_are_errors(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1, 2], "content": ["a", "b"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"has no field 'contents'; its fields are 'id', 'content'. The nearest is 'content'"):
        list(documents(parquet_source(tmp_path / "a.parquet", "contents")))
    with pytest.raises(UserError, match=r"a.parquet: column 'id' has type int64, not string"):
        list(documents(parquet_source(tmp_path / "a.parquet", "id")))
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"d.parquet has 2 columns 'text'; write it again with one"):
        list(documents(parquet_source(tmp_path / "d.parquet")))
    (tmp_path / "b.parquet").write_text("no parquet at all")
    with pytest.raises(UserError, match=r"b.parquet is not a Parquet file that can be read"):
        list(documents(parquet_source(tmp_path / "b.parquet")))
    broken = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"text": broken}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c.parquet, rows 0 to .*column 'text' is not UTF-8"):
        list(documents(parquet_source(tmp_path / "c.parquet")))


# ---------------------------------------------------------------- the prepared corpus


def decoded(array: TokenArray, tokenizer: Tokenizer) -> list[str]:
    bounds = array.offsets.tolist()
    return [tokenizer.decode(array.tokens[a:b].tolist()) for a, b in itertools.pairwise(bounds)]


def test_every_document_is_on_one_side_and_decodes_to_its_text(folder: Path) -> None:
    corpus = prepare(text_source(folder), CONFIG, silent)
    train, validation = (decoded(array, corpus.tokenizer) for array in (corpus.train, corpus.validation))
    assert sorted(train + validation) == sorted(documents(text_source(folder)))
    assert train and validation and corpus.train.tokens.dtype == np.uint16
    assert corpus.train.num_documents == len(train) and corpus.train.num_tokens == len(corpus.train.tokens)
    with pytest.raises(ValueError, match="read-only"):
        corpus.train.tokens[0] = 1


def test_the_side_of_a_document_depends_on_its_text_alone(folder: Path) -> None:
    lines = [json.dumps({"text": text}) for text in documents(text_source(folder))]
    random.Random(0).shuffle(lines)
    (folder / "shuffled.jsonl").write_text("\n".join(lines))
    sides = []
    for source in (text_source(folder), jsonl_source(folder / "shuffled.jsonl")):
        corpus = prepare(source, CONFIG, silent)
        sides.append(set(decoded(corpus.validation, corpus.tokenizer)))
    assert sides[0] == sides[1]


def test_a_second_call_reads_no_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(text_source(folder), CONFIG, silent)

    def read_nothing(*_: object, **__: object) -> Iterator[str]:
        raise AssertionError("the text was read again")

    monkeypatch.setattr(trainer.data, "read_documents", read_nothing)
    said: list[str] = []
    again = prepare(text_source(folder), CONFIG, said.append)
    assert not said
    assert again.folder == first.folder and again.fingerprint == first.fingerprint
    assert np.array_equal(again.train.tokens, first.train.tokens)
    opened = open_corpus(first.folder)
    assert opened.fingerprint == first.fingerprint and opened.tokenizer.layout == first.tokenizer.layout
    assert np.array_equal(opened.validation.offsets, first.validation.offsets)


def test_a_changed_file_or_option_makes_another_corpus(folder: Path) -> None:
    corpora: list[Corpus] = [prepare(text_source(folder), CONFIG, silent)]
    (folder / "text" / "07.txt").write_text("changed text, longer than before, of another size")
    corpora.append(prepare(text_source(folder), CONFIG, silent))
    corpora.append(prepare(text_source(folder, share=0.5), CONFIG, silent))
    corpora.append(prepare(text_source(folder), TokenizerConfig(vocab_size=265, train_mib=1), silent))
    corpora.append(prepare(text_source(folder, max_mib=0.0005), CONFIG, silent))
    assert len({corpus.folder for corpus in corpora}) == len({corpus.fingerprint for corpus in corpora}) == 5


def test_equal_text_elsewhere_has_an_equal_fingerprint(folder: Path) -> None:
    (folder / "text").rename(folder / "moved")
    moved = prepare(text_source(folder, folder / "moved"), CONFIG, silent)
    (folder / "moved").rename(folder / "text")
    here = prepare(text_source(folder), CONFIG, silent)
    assert moved.folder != here.folder and moved.fingerprint == here.fingerprint


def test_a_tokenizer_file_is_used_as_it_is(folder: Path) -> None:
    trained = prepare(text_source(folder), CONFIG, silent)
    config = TokenizerConfig(vocab_size=9999, train_mib=1, file=trained.folder / "tokenizer.json")
    said: list[str] = []
    corpus = prepare(text_source(folder), config, said.append)
    assert corpus.tokenizer.layout == trained.tokenizer.layout and corpus.fingerprint == trained.fingerprint
    assert not [line for line in said if "training the tokenizer" in line]
    with pytest.raises(UserError, match="does not exist"):
        prepare(text_source(folder), TokenizerConfig(vocab_size=300, train_mib=1, file=folder / "no.json"), silent)


def test_a_long_document_is_encoded_in_pieces_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.data, "PIECE_CHARACTERS", 50)
    monkeypatch.setattr(trainer.data, "CHUNK_BYTES", 300)
    texts = [f"{i} " + "word and line\n" * 30 + "x" * 170 + "\n\n" for i in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    corpus = prepare(jsonl_source(tmp_path / "a.jsonl"), CONFIG, silent)
    found = decoded(corpus.train, corpus.tokenizer) + decoded(corpus.validation, corpus.tokenizer)
    assert sorted(found) == sorted(texts)


def test_an_interrupted_build_leaves_nothing_and_the_next_one_works(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.data, "_require_both_sides", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(text_source(folder), CONFIG, silent)
    assert list((folder / "cache" / "corpora").iterdir()) == []
    assert prepare(text_source(folder), CONFIG, silent).train.num_documents > 0


def kill_a_build(folder: Path) -> None:
    """In a process of its own, when all but the last file is written."""
    code = (
        "import os, signal, sys, trainer.data as data; from pathlib import Path; from tests.trainer import test_data as test; "
        "data._require_both_sides = lambda *_: os.kill(os.getpid(), signal.SIGKILL); "
        "data.prepare(test.text_source(Path(sys.argv[1])), test.CONFIG, print)"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], cwd=Path(__file__).parents[2], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL


def test_the_rest_of_a_killed_build_is_removed_by_the_next_one(folder: Path) -> None:
    """Of the same text or another, and also where nothing is to be built."""
    kill_a_build(folder)
    corpora = folder / "cache" / "corpora"
    assert len(list(corpora.rglob("train.tokens.bin"))) == 1
    corpus = prepare(text_source(folder, max_mib=0.0005), CONFIG, silent)
    assert list(corpora.iterdir()) == [corpus.folder]
    kill_a_build(folder)
    assert len(list(corpora.iterdir())) == 2
    assert prepare(text_source(folder, max_mib=0.0005), CONFIG, silent).fingerprint == corpus.fingerprint
    assert list(corpora.iterdir()) == [corpus.folder]


def test_the_rest_of_a_killed_build_that_cannot_be_removed_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    corpus = prepare(text_source(folder), CONFIG, silent)
    (of_another_user := corpus.folder.with_name(".abc.def")).mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(trainer.data, "locked", refuse)
        assert prepare(text_source(folder), CONFIG, silent).folder == corpus.folder and of_another_user.exists()
    prepare(text_source(folder), CONFIG, silent)
    assert not of_another_user.exists()


def test_a_builder_that_comes_second_uses_the_folder_of_the_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = trainer.data._build
    said: list[str] = []

    def build_while_another_does(*args: object) -> None:
        """Neither of the same text nor of another does it remove what is built here."""
        monkeypatch.setattr(trainer.data, "_build", build)
        prepare(text_source(folder, max_mib=0.0005), CONFIG, silent)
        first = prepare(text_source(folder), CONFIG, said.append)
        (first.folder / "mark").touch()
        build(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer.data, "_build", build_while_another_does)
    corpus = prepare(text_source(folder), CONFIG, said.append)
    assert (corpus.folder / "mark").exists()
    assert len(list(corpus.folder.parent.iterdir())) == 2, "only what is complete"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_an_error_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = Path.open

    def open_on_full_disk(path: Path, mode: str = "r", **options: object) -> IO[bytes]:
        target = Path("/dev/full") if path.name == "train.tokens.bin" else path
        return ordinary(target, mode, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", open_on_full_disk)
    size = sum(path.stat().st_size for path in (folder / "text").iterdir())
    with pytest.raises(UserError, match=rf"cache is full: the tokens of {size:,} bytes of text .*lower data.max_mib") as caught:
        prepare(text_source(folder), CONFIG, silent)
    assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == errno.ENOSPC
    assert list((folder / "cache" / "corpora").iterdir()) == []


def test_a_cache_that_is_no_folder_is_an_error(folder: Path) -> None:
    (folder / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"data.cache_dir=.*cache cannot be written: .*set data.cache_dir"):
        prepare(text_source(folder), CONFIG, silent)


def test_a_damaged_corpus_is_an_error(folder: Path) -> None:
    corpus = prepare(text_source(folder), CONFIG, silent)
    with (corpus.folder / "train.tokens.bin").open("ab") as file:
        file.write(b"xx")
    with pytest.raises(UserError, match=r"damaged: .*train.tokens.bin has .* bytes instead of .*delete"):
        prepare(text_source(folder), CONFIG, silent)
    with pytest.raises(UserError, match=r"is not a prepared corpus"):
        open_corpus(folder)


def test_a_side_without_documents_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for name, content in (("a", ""), ("b", "   \n")):
        (tmp_path / "text" / name).write_text(content)
    with pytest.raises(UserError, match=r"holds no text: 2 file\(s\), all documents empty"):
        prepare(text_source(tmp_path), CONFIG, silent)
    (tmp_path / "text" / "a").write_text("one document")
    with pytest.raises(UserError, match=r"one document only.*add more files"):
        prepare(text_source(tmp_path), CONFIG, silent)
    (tmp_path / "text" / "b").write_text("another document")
    with pytest.raises(UserError, match=r"none of the 2 documents falls on the validation side .*=1e-06; raise") as caught:
        prepare(text_source(tmp_path, share=1e-6), CONFIG, silent)
    enough = float(str(caught.value).partition("raise it to ")[2].partition(",")[0])
    assert len(prepare(text_source(tmp_path, share=enough), CONFIG, silent).validation.offsets) == 2
    with pytest.raises(UserError, match=r"none of the 2 documents falls on the training side .*=0.999999; lower"):
        prepare(text_source(tmp_path, share=0.999999), CONFIG, silent)
