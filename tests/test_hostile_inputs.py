"""Whatever a file or a reply holds, it is read, or it is an error in words: no other exception, no code, no harm."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from kernels.errors import UserError
from launch.benchmarks.traces import recorded as loads_of
from launch.cli import load
from launch.machines import profiled, read_machine
from launch.recorded import Run
from launch.report import write_report
from launch.watch import watch
from parallel.topology import World
from rl.engine.completions import BadReply, Completion
from rl.engine.sampler import Sampling
from rl.engine.settings import EngineSettings
from rl.rewards.dataset import Dataset
from rl.rewards.workers import understood
from rl.trajectory import RolloutBuffer, Sample
from tests import checkpoints
from tests.models import tiny_model
from trainer import checkpoint
from trainer.checkpoint import CheckpointMeta
from trainer.checkpoint_files import checksum, folder_name
from trainer.config.rl import RLConfig
from trainer.config.run import JsonlSource, ParquetSource, PretrainConfig, TextSource, TokenizerConfig
from trainer.data import open_corpus, prepare
from trainer.keeper import Kept
from trainer.kept_checkpoints import whole_ones
from trainer.metrics import LOAD
from trainer.model.hf import load_pretrained, save_pretrained
from trainer.model.transformer import LanguageModel
from trainer.run_dir import RunDir
from trainer.sources import documents
from trainer.tokenizer import Tokenizer, train_tokenizer
from trainer.tracing import REQUEST, TraceRequest, Traces
from trainer.worker import named_tensors, read_model

MODEL = tiny_model()
DEEP = b"[" * 200_000  # deeper than Python's stack
few = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

scalars = st.one_of(
    *(st.none(), st.booleans(), st.integers(-3, 70), st.integers(), st.floats(), st.text(max_size=12)),
    st.sampled_from(
        ["../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "", ".", "__import__('os')", "!!python/object:os.system"]
    ),
    st.sampled_from([1 << 20, 1 << 40, 1 << 62, 1 << 200]),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=8
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a tree of JSON."""
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(value, (*path, key))


@st.composite
def changed(draw: st.DrawFn, tree: Any) -> Any:
    """A tree of JSON in which something is another thing, or gone."""
    tree = deepcopy(tree)
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(list(places(tree))))
        if not path:
            return draw(values)
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        if draw(st.booleans()):
            parent[path[-1]] = draw(values)
        else:
            del parent[path[-1]]
    return tree


@st.composite
def broken(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes of which some are others, or missing."""
    start = draw(st.integers(0, len(content)))
    end = draw(st.integers(start, min(len(content), start + 40)))
    return content[:start] + draw(st.binary(max_size=20)) + content[end:]


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def read_or_refused(read: Callable[[], object]) -> None:
    with suppress(UserError):
        read()


def files_below(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


# ---------------------------------------------------------------- options

OPTIONS = ["train.steps", "data.paths", "model", "run_name", "experiment", "trace.range", "task.options", "x.y", "runs_dir"]
arguments = st.one_of(
    st.text(max_size=30),
    st.builds("{}{}={}".format, st.sampled_from(["", "+", "++", "~"]), st.sampled_from(OPTIONS), st.text(max_size=20)),
    st.builds("{}={}".format, st.sampled_from(OPTIONS), values.map(repr)),
    st.sampled_from(
        [
            "runs_dir=${oc.env:HOME}",
            "seed=${seed}",
            "model=../../etc/passwd",
            "data=/etc",
            "seed=" + "[" * 3000,
            "--config-dir=/",
        ]
    ),
)


@few
@given(st.sampled_from([(PretrainConfig, "pretrain"), (RLConfig, "rl")]), st.lists(arguments, max_size=3))
def test_options(root: tuple[Any, str], argv: list[str]) -> None:
    read_or_refused(lambda: load(*root, argv))


# ---------------------------------------------------------------- text and tasks

lines = st.lists(
    st.one_of(
        st.binary(max_size=30),
        values.map(lambda value: json.dumps(value).encode()),
        st.fixed_dictionaries({"text": values, "answer": values}).map(lambda record: json.dumps(record).encode()),
        st.sampled_from([DEEP, b'{"text": ' + b"9" * 5000 + b"}", b'{"text": "\\ud800"}', b"\xff\xfe", b"\xef\xbb\xbf{}"]),
    ),
    max_size=4,
)


@few
@given(lines)
def test_json_lines(content: list[bytes]) -> None:
    with folder() as place:
        (place / "a.jsonl").write_bytes(b"\n".join(content))
        source = JsonlSource(
            kind="jsonl", paths=(str(place / "a.jsonl"),), field="text", validation_share=0.5, cache_dir=place / "cache"
        )
        read_or_refused(lambda: "".join(documents(source)).encode())
        assert set(files_below(place)) == {"a.jsonl"}


@few
@given(lines, st.sampled_from(["", "(a|b)+"]))
def test_rows_of_a_task(content: list[bytes], pattern: str) -> None:
    with folder() as place:
        (place / "a.jsonl").write_bytes(b"\n".join(content))
        options = {"prompt_field": "text", "answer_pattern": pattern, "demonstration_field": "answer"}

        def read() -> None:
            task = Dataset(0, str(place / "a.jsonl"), "exact", **options)  # type: ignore[arg-type]
            for prompt in (task.prompt(0), task.held_out(0), task.demonstration(0)[0]):
                prompt.text.encode()

        read_or_refused(read)


@few
@given(st.data())
def test_parquet(data: st.DataObject) -> None:
    import pyarrow
    from pyarrow import parquet

    with folder() as place:
        file = place / "a.parquet"
        parquet.write_table(pyarrow.table({"text": ["some text", None, "more"], "answer": ["1", "2", "3"]}), file)
        file.write_bytes(data.draw(broken(file.read_bytes())))
        source = ParquetSource(kind="parquet", paths=(str(file),), field="text", validation_share=0.5, cache_dir=place)
        read_or_refused(lambda: list(documents(source)))
        read_or_refused(lambda: Dataset(0, str(file), "exact", prompt_field="text").prompt(0))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    config = TokenizerConfig(vocab_size=300, train_mib=1)
    return train_tokenizer(["some text of a few words " * 9], config, tmp_path_factory.mktemp("cache"), lambda text: None)


@few
@given(st.data())
def test_tokenizers(tokenizer: Tokenizer, data: st.DataObject) -> None:
    whole = json.loads(tokenizer.layout)
    whole["model"]["merges"] = whole["model"]["merges"][:3]
    text = data.draw(st.one_of(changed(whole).map(json.dumps), st.text(max_size=20), st.just(DEEP.decode())))
    read_or_refused(lambda: Tokenizer(text, "tokenizer.json").encode("some text"))


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of ours."""
    place = tmp_path_factory.mktemp("checkpoints") / folder_name(3)
    meta = CheckpointMeta("pretrain", 3, 3, MODEL.model_dump(mode="json"), "unknown", {"rows": 24, "corpus": "a"})
    alone = World(0, 1, torch.device("cpu"), ranks_per_node=1)
    checkpoints.write(place, named_tensors(LanguageModel.initialize(MODEL, 0)), meta, {"tokenizer.json": "{}"}, alone)
    return place


def with_sums(place: Path) -> None:
    """Gives all files the checksums that they have now, as an author of bad files would."""
    record = json.loads((place / "meta.json").read_text())
    names = [p.relative_to(place) for p in place.rglob("*") if p.is_file() and p.name != "meta.json"]
    record["files"] = {str(name): checksum(place / name) for name in names}
    (place / "meta.json").write_text(json.dumps(record))


@few
@given(st.data())
def test_records_of_checkpoints(written: Path, data: st.DataObject) -> None:
    with folder() as place:
        own = place / "step_000003"
        shutil.copytree(written, own)
        whole = json.loads((own / "meta.json").read_text())
        (own / "meta.json").write_bytes(
            data.draw(
                st.one_of(changed(whole).map(lambda tree: json.dumps(tree).encode()), st.just(DEEP), st.binary(max_size=9))
            )
        )
        before = files_below(place)
        read_or_refused(lambda: read_model(own))
        assert files_below(place) == before


@few
@given(st.data())
def test_headers_of_tensors(written: Path, data: st.DataObject) -> None:
    with folder() as place:
        own = place / "step_000003"
        shutil.copytree(written, own)
        file = own / "state" / "rank_00000.safetensors"
        content = file.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        changed_header = data.draw(changed(header).map(lambda tree: json.dumps(tree).encode()))
        file.write_bytes(len(changed_header).to_bytes(8, "little") + changed_header + content[8 + size :])
        with_sums(own)
        read_or_refused(lambda: read_model(own))


class Bomb:
    """Unpickling it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_is_not_read_wherever_it_lies(written: Path, tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    for name in ("state/rank_00000.safetensors", "state/rank_00001.safetensors", "state/.metadata", "tokenizer.json"):
        own = tmp_path / "step_000003"
        shutil.copytree(written, own)
        (own / name).write_bytes(bomb)
        with_sums(own)
        read_or_refused(lambda place=own: read_model(place))
        shutil.rmtree(own)
    assert not (tmp_path / "exploded").exists()


def test_what_meta_json_does_not_name_is_not_read(written: Path, tmp_path: Path) -> None:
    own = tmp_path / "step_000003"
    shutil.copytree(written, own)
    save_file({"bias": torch.full((2, 8), 7.0)}, own / "state" / "rank_99999.safetensors")
    assert not torch.equal(read_model(own).bias_LE, torch.full((2, 8), 7.0))


def test_links_that_lead_outside_are_refused(written: Path, tmp_path: Path) -> None:
    own, outside = tmp_path / "step_000003", tmp_path / "outside.safetensors"
    shutil.copytree(written, own)
    state = own / "state" / "rank_00000.safetensors"
    shutil.move(state, outside)
    state.symlink_to(outside)
    with pytest.raises(checkpoint.Damaged, match="outside its folder"):
        read_model(own)


STRANGE_NAMES = ["x" * 300, "state/" + "a/" * 3000 + "b", "\ud800", "a\0b", "", "/etc/passwd", "../../secret", "a\nb"]


@pytest.mark.parametrize("name", STRANGE_NAMES)
def test_a_name_that_no_file_of_a_checkpoint_has_is_damage(written: Path, tmp_path: Path, name: str) -> None:
    """And so a run goes on from the checkpoint before."""
    own = tmp_path / "step_000003"
    shutil.copytree(written, own)
    record = json.loads((own / "meta.json").read_text())
    record["files"][f"{name}.safetensors" if name else ""] = record["files"].pop("state/rank_00000.safetensors")
    (own / "meta.json").write_text(json.dumps(record))
    for read in (read_model, checkpoint.verify, checkpoint.read):
        with pytest.raises(checkpoint.Damaged, match=r"is no name of a file in its folder") as refused:
            read(own)
        assert len(str(refused.value).encode()) < 1000 and "\n" not in str(refused.value)


def test_a_link_that_leads_to_itself_is_damage(written: Path, tmp_path: Path) -> None:
    own = tmp_path / "step_000003"
    shutil.copytree(written, own)
    state = own / "state" / "rank_00000.safetensors"
    state.unlink()
    state.symlink_to(state.name)
    with pytest.raises(checkpoint.Damaged, match=r"state/rank_00000\.safetensors"):
        read_model(own)


def test_a_tensor_of_another_shape_is_refused_and_not_stretched(written: Path, tmp_path: Path) -> None:
    own = tmp_path / "step_000003"
    shutil.copytree(written, own)
    tensors = {**dict(checkpoint.read(own)), "bias": torch.ones(1)}
    save_file(tensors, own / "state" / "rank_00000.safetensors")
    with_sums(own)
    with pytest.raises(checkpoint.Damaged, match=r"bias has shape \[1\], expected \[2, 8\]"):
        read_model(own)


def test_a_record_that_has_no_end_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "meta.json")
    with pytest.raises(UserError, match="is not a checkpoint"):
        checkpoint.read_meta(tmp_path)


@few
@given(st.data())
def test_states_of_rollouts(data: st.DataObject) -> None:
    sample = {"uid": 1, "prompt_ids": [1], "status": "partial", "reward": None}
    sample["segments"] = [{"token_ids": [2], "logprobs": [-0.5], "weight_version": 0, "sampled": True}]
    lengths = [{"first": 0, "trained": [[0, [2, 9]]], "replaced": []}]
    group = {"id": 0, "samples": [sample]}
    whole = {"next_group": 4, "lengths": lengths, "surplus": [], "recycled": [group]}
    assert RolloutBuffer.parse(json.dumps(whole), "step_000001").next_group == 4
    text = data.draw(st.one_of(changed(whole).map(json.dumps), st.just(DEEP.decode())))
    read_or_refused(lambda: RolloutBuffer.parse(text, "step_000001"))


@few
@given(st.data())
def test_what_keepers_say_that_they_have(written: Path, data: st.DataObject) -> None:
    record = json.loads((written / "meta.json").read_text())
    files = record["files"]
    assert [one.step for one in whole_ones({"a": {3: Kept(json.dumps(record), files)}})] == [3]
    strange = st.one_of(changed(record).map(json.dumps), st.just(DEEP.decode()), st.none())
    kept = st.builds(Kept, strange, changed(files).filter(lambda tree: isinstance(tree, dict)))
    found = data.draw(st.dictionaries(st.sampled_from(["a", "b"]), st.dictionaries(st.integers(0, 3), kept, max_size=2)))
    for one in whole_ones(found):
        for name, keepers in one.keepers.items():
            sums = [found[keeper][one.step].files[name] for keeper in keepers]
            assert sums and all(sum_ == json.loads(one.record)["files"][name] for sum_ in sums)


# ---------------------------------------------------------------- run folders, corpora and profiles


@pytest.fixture(scope="module")
def config() -> PretrainConfig:
    return load(PretrainConfig, "pretrain", ["run_name=run"])


@pytest.fixture(scope="module")
def recorded(config: PretrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has ended."""
    run = RunDir.open(config.model_copy(update={"runs_dir": tmp_path_factory.mktemp("runs")}), "pretrain")
    record = {"stage": "pretrain", "step": 1, "train/loss": 2.0, "time/step_s": 1.0, LOAD: [[0.5, 0.5]]}
    run.metrics_file.write_text("".join(json.dumps({**record, "step": step}) + "\n" for step in (1, 2)))
    run.close("finished")
    return run.path


@settings(few, max_examples=40)  # folders are written, and pages are drawn
@given(st.data(), st.sampled_from(["status.json", "config.yaml", "metrics.jsonl"]))
def test_run_folders(recorded: Path, config: PretrainConfig, data: st.DataObject, name: str) -> None:
    content = (recorded / name).read_bytes()
    lines = content.splitlines() if name == "metrics.jsonl" else [content]
    tree = yaml.safe_load(lines[-1])
    other = st.one_of(
        changed(tree).map(lambda tree: json.dumps(tree).encode()), st.just(DEEP), st.just(b"a: &a [*a]"), broken(lines[-1])
    )
    with folder() as place:
        own = place / "run"
        shutil.copytree(recorded, own)
        (own / name).write_bytes(b"\n".join([*lines[:-1], data.draw(other), b""]))
        read_or_refused(lambda: watch(own, once=True))
        read_or_refused(lambda: Run.read(own).facts())
        if name == "metrics.jsonl":
            read_or_refused(lambda: write_report([own], place / "report.html"))
            read_or_refused(lambda: loads_of(own, 16))

        def resume() -> None:
            run = RunDir.open(config.model_copy(update={"runs_dir": place, "resume": "auto"}), "pretrain")
            run.rewind(1)
            run.close("stopped")

        read_or_refused(resume)


@pytest.fixture(scope="module")
def prepared(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("corpus")
    (place / "texts").mkdir()
    for number in range(8):
        (place / "texts" / f"{number}.txt").write_text(f"some text of a few words {number} " * 9)
    source = TextSource(kind="text", paths=(str(place / "texts"),), validation_share=0.5, cache_dir=place / "cache")
    return prepare(source, TokenizerConfig(vocab_size=300, train_mib=1), lambda text: None).folder


@few
@given(st.data())
def test_requests_for_traces(config: PretrainConfig, data: st.DataObject) -> None:
    whole = {"steps": 2, "ranks": [0], "engines": "all", "tokens": 9, "memory": False}
    with folder() as place, open(os.devnull) as lock:
        run, asked = RunDir(place, "pretrain", 1, "", "", "", "", lock), list[TraceRequest]()
        content = data.draw(st.one_of(changed(whole).map(lambda tree: json.dumps(tree).encode()), st.just(DEEP)))
        (place / REQUEST).write_bytes(content)
        traces = Traces(config.trace, run, 1, lambda text: None)
        traces.before(lambda _, wanted: asked.append(wanted) or [], 1)
        assert not (place / REQUEST).exists() and all(one.ranks in ("all", (), (0,)) for one in asked)


@few
@given(st.data())
def test_corpora(prepared: Path, data: st.DataObject) -> None:
    whole = json.loads((prepared / "corpus.json").read_text())
    with folder() as place:
        own = place / "corpus"
        shutil.copytree(prepared, own)
        (own / "corpus.json").write_text(data.draw(st.one_of(changed(whole).map(json.dumps), st.just(DEEP.decode()))))
        read_or_refused(lambda: open_corpus(own))


@few
@given(st.data())
def test_profiles_of_machines(data: st.DataObject) -> None:
    whole = {"products": [[1e9, 1e-3], [2e9, 2e-3]], "across": [[1e6, 1e-3], [2e6, 2e-3]]}
    strange = st.sampled_from([DEEP, b"a: &a [*a]", b"!!python/object/apply:os.system [ls]", b"\xff"])
    with folder() as place:
        content = data.draw(st.one_of(changed(whole).map(lambda tree: json.dumps(tree).encode()), strange))
        (place / "profile").write_bytes(content)
        read_or_refused(lambda: profiled(read_machine("h100"), place / "profile"))


# ---------------------------------------------------------------- the Hugging Face layout


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("exported") / "model"
    save_pretrained(LanguageModel.initialize(MODEL, 0), place, None, max_shard_bytes=40_000)
    return place


@few
@given(st.data(), st.sampled_from(["config.json", "model.safetensors.index.json"]))
def test_folders_of_others(exported: Path, data: st.DataObject, name: str) -> None:
    with folder() as place:
        own = place / "model"
        shutil.copytree(exported, own)
        content = data.draw(st.one_of(changed(json.loads((own / name).read_text())).map(json.dumps), st.just(DEEP.decode())))
        (own / name).write_text(content)
        read_or_refused(lambda: load_pretrained(own, torch.float32))


@pytest.mark.parametrize(
    "file", ["../model/model.safetensors", "/etc/passwd", "a\0b", 3, None, ["a"], "..", "x" * 300, "\ud800", ""]
)
def test_an_index_names_files_of_its_folder_only(exported: Path, tmp_path: Path, file: object) -> None:
    own = tmp_path / "model"
    shutil.copytree(exported, own)
    index = json.loads((own / "model.safetensors.index.json").read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = file
    (own / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError):
        load_pretrained(own, torch.float32)


def test_a_config_of_a_huge_model_asks_for_no_memory(exported: Path, tmp_path: Path) -> None:
    own = tmp_path / "model"
    shutil.copytree(exported, own)
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "hidden_size": 1 << 24}))
    with pytest.raises(UserError, match=r"makes a model of [\d,]+ parameters"):
        load_pretrained(own, torch.float32)


# ---------------------------------------------------------------- answers of a completion server

GOOD = {
    "choices": [{"index": 0, "token_ids": [5, 6], "logprobs": {"token_logprobs": [-0.5, -1.0]}, "finish_reason": None}],
}
SETTINGS = EngineSettings(4, 40, 8, None, Sampling(1.0, 0), eos_id=1)


@few
@given(
    st.lists(st.one_of(changed(GOOD).map(lambda t: json.dumps(t).encode()), st.binary(max_size=20), st.just(DEEP)), max_size=4)
)
def test_answers_of_a_completion_server(events: list[bytes]) -> None:
    work = Completion(Sample(7, 0, (3, 4)), SETTINGS, vocab_size=20)
    work.request("model")
    for event in events:
        try:
            work.take(event)
        except BadReply:
            return
        assert len(work.logprobs) <= len(work.tokens) <= SETTINGS.max_new_tokens
        assert all(0 <= token < 20 for token in work.tokens)
    work.settle()
    assert len(work.tokens) == len(work.logprobs)


# ---------------------------------------------------------------- answers of reward workers

strange = st.sampled_from(
    [DEEP, b'{"found": NaN}', b'{"found": 1e999}', b'{"found": "\\ud800"}', b'{"found": 1}\n{"found": 2}']
)
answers = st.dictionaries(st.sampled_from(["found", "error", "ready", "x"]), values, max_size=2).map(json.dumps).map(str.encode)


@few
@given(st.sampled_from(["ready", "score", "reply"]), st.one_of(st.binary(max_size=20), strange, answers))
def test_answers_of_reward_workers(kind: str, line: bytes) -> None:
    answer = understood(kind, line)
    if isinstance(answer, dict) and "error" not in answer:
        found = answer.get("found")
        sound = {"ready": answer == {"ready": True}, "score": isinstance(found, float), "reply": isinstance(found, str)}
        assert sound[kind] or (kind != "ready" and found is None)
        assert not isinstance(found, float) or math.isfinite(found)
