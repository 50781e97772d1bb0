"""A person's mistakes are all reported at once, each with its name, its value and the way out."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kernels.errors import UserError
from launch.cli import group_choices, load, main, option_names, print_plan, usage
from launch.demo import main as run_demo
from launch.generate import generate
from launch.pretrain import pretrain as pretrain_a_model
from launch.rl import reinforce
from rl.engine.sampler import Sampling
from tests.end_to_end.commands import untrained
from trainer.checkpoint import resolve
from trainer.config.model import CosineRouter
from trainer.config.rl import RLConfig
from trainer.config.run import PretrainConfig, StdlibSource, TextSource
from trainer.run_dir import RunDir
from trainer.starting_point import settled, starting_point

REPOSITORY = Path(__file__).parents[2]


def pretrain(*arguments: str) -> PretrainConfig:
    return load(PretrainConfig, "pretrain", arguments)


def problems(*arguments: str, rl: bool = False) -> list[str]:
    """The report's lines without its heading, with runs of blanks made one."""
    with pytest.raises(UserError) as caught:
        load(RLConfig, "rl", arguments) if rl else pretrain(*arguments)
    heading, *lines = str(caught.value).splitlines()
    count = len(lines)
    assert heading == f"config: {count} problem{'s' if count != 1 else ''}"
    assert all(line.startswith("  ") for line in lines)
    return [" ".join(line.split()) for line in lines]


# ---------------------------------------------------------------- what works


def test_no_argument_is_needed() -> None:
    config = pretrain()
    assert isinstance(config.data, StdlibSource)
    assert config.train.steps > 0 and config.model.vocab_size is None


def test_groups_values_lists_nulls_and_interpolations_are_understood() -> None:
    config = pretrain(
        "data=text", "data.paths=[a,b/*.md]", "data.max_mib=1.5", "run_name=null", "train.steps=30",
        "train.eval_every=${train.steps}", "+train.eval_rows=5", "++seed=7", "optimizer.betas=[0.8,0.9]",
    )  # fmt: skip
    assert isinstance(config.data, TextSource)
    assert config.data.paths == ("a", "b/*.md") and config.data.max_mib == 1.5
    assert (config.run_name, config.train.eval_every, config.train.eval_rows, config.seed) == (None, 30, 5, 7)
    assert config.optimizer.betas == (0.8, 0.9)


def test_the_last_of_two_values_wins_and_values_beat_experiments() -> None:
    assert pretrain("train.steps=3", "experiment=smoke", "train.steps=4", "optimizer.warmup_steps=1").train.steps == 4


def test_choices_win_over_experiments_where_they_say_something() -> None:
    """What is the same in the usual choice is left to the experiment."""

    def rl(*arguments: str) -> RLConfig:
        return load(RLConfig, "rl", ["checkpoint=x", *arguments])

    assert rl("experiment=smoke", "warmup=none").warmup == rl("warmup=none").warmup
    assert rl("experiment=smoke").warmup.steps == rl("experiment=smoke", "warmup=demonstrations").warmup.steps == 2
    both = rl("rollout=sync", "experiment=smoke").rollout
    assert both == rl("experiment=smoke").rollout.model_copy(update={"over_provision": 1.0})
    assert pretrain("experiment=smoke", "tokenizer=bpe_32k").tokenizer == pretrain("tokenizer=bpe_32k").tokenizer
    assert pretrain("experiment=smoke", "optimizer=adamw_cosine").optimizer.warmup_steps == 2
    assert pretrain("experiment=unbalanced", "balance=loss_free").balance == pretrain("balance=loss_free").balance
    for name in ("qwen3_30b_a3b", "glm4_5_air_like"):
        free = ["tokenizer=bpe", "data=stdlib", "cluster=local", f"experiment={name}"]
        assert pretrain(*free, "balance=frozen").balance.rate == 0, "an experiment's rate does not win"
        assert pretrain(*free, "parallel=ep").parallel.memory == 0


@pytest.mark.parametrize("name", ["optimizer.lr", "model.routed_scale", "cluster.collective_timeout_s", "balance.rate"])
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_numbers_are_finite(name: str, value: str) -> None:
    with pytest.raises(UserError, match=name):
        pretrain(f"{name}={value}")


def test_a_bound_may_be_none() -> None:
    assert pretrain("optimizer.clip_norm=inf").optimizer.clip_norm == float("inf")
    with pytest.raises(UserError, match="clip_norm"):
        pretrain("optimizer.clip_norm=nan")


def test_an_experiment_may_be_written_with_a_plus() -> None:
    assert pretrain("+experiment=smoke") == pretrain("experiment=smoke")
    assert pretrain("experiment=smoke").train.steps < pretrain().train.steps


def test_a_deleted_option_falls_back_to_its_default() -> None:
    assert pretrain("~data.max_mib").data.max_mib is None


def test_no_options_at_all_are_written_as_an_empty_mapping() -> None:
    config = load(RLConfig, "rl", ["checkpoint=a", "task.name=module:Class", "task.options={}"])
    assert config.task.options == {} and config.task.name == "module:Class"


def test_a_task_takes_options_that_conf_does_not_list() -> None:
    config = load(RLConfig, "rl", ["checkpoint=a", "task.options.largest=12", "+task.options.note=x"])
    assert (config.task.options["largest"], config.task.options["note"]) == (12, "x")


@settings(max_examples=15, deadline=None)
@given(steps=st.integers(20, 10**6), lr=st.floats(1e-6, 1.0), seed=st.integers(0, 2**31))
def test_numbers_arrive_as_they_are_written(steps: int, lr: float, seed: int) -> None:
    config = pretrain(f"train.steps={steps}", f"optimizer.lr={lr!r}", f"seed={seed}")
    assert (config.train.steps, config.optimizer.lr, config.seed) == (steps, lr, seed)


# ---------------------------------------------------------------- what does not


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("model.top_kk=3", "model.top_kk = 3 unknown option; did you mean model.top_k?"),
        ("+model.top_kk=3", "model.top_kk = 3 unknown option; did you mean model.top_k?"),
        ("++lr=3", "lr = 3 unknown option; did you mean optimizer.lr?"),
        ("steps=3", "steps = 3 unknown option; did you mean train.steps?"),
        ("+unknown=1", "unknown = 1 unknown option, see --help"),
        ("modle=demo", "modle = demo unknown option; did you mean model?"),
        (
            "model=demoo",
            "model = demoo unknown choice; did you mean model=demo? choices: demo, glm4_5_air_like, olmoe_7b_a1b, "
            "qwen3_30b_a3b",
        ),
        ("model=3", "model = 3 unknown choice; choices: demo, glm4_5_air_like, olmoe_7b_a1b, qwen3_30b_a3b"),
        ("parallel=null", "parallel = null unknown choice; choices: ep, fssdp"),
        ("rollout=april", "rollout = april is a group of another command, see --help"),
        ("train.steps=abc", "train.steps = abc should be a whole number"),
        ("train.steps=1.5", "train.steps = 1.5 should be a whole number"),
        ("train.steps=null", "train.steps = null should be a whole number"),
        ("train.steps.x=1", 'train.steps = {"x": 1} should be a whole number'),
        ("train=3", "train = 3 is a group of options; they are written train.name=value"),
        ("optimizer.lr=fast", "optimizer.lr = fast should be a number"),
        ("optimizer.lr=-1", "optimizer.lr = -1 should be greater than 0"),
        ("dry_run=maybe", "dry_run = maybe should be true or false"),
        ("run_name=2024", "run_name = 2024 should be text; quote it: run_name='\"2024\"'"),
        ("runs_dir=7", "runs_dir = 7 should be a path"),
        ("optimizer.schedule=cosin", "optimizer.schedule = cosin should be cosine, wsd or constant; did you mean cosine?"),
        ("cluster.ranks=x", "cluster.ranks = x should be auto or a whole number"),
        ("cluster.ranks=0", "cluster.ranks = 0 should be auto or greater than 0"),
        ("optimizer.betas=[0.9]", "optimizer.betas = [0.9] has too few items (1)"),
        ("optimizer.betas=[0.9,1]", "optimizer.betas.1 = 1 should be less than 1"),
        (f"seed={2**63}", f"seed = {2**63} should be less than {2**63}"),
        (
            "model.vocab_size=5",
            "model.vocab_size (5) comes from the tokenizer when pretraining begins with random weights; "
            "set tokenizer.vocab_size, or tokenizer.file, instead",
        ),
        ("optimizer.betas=3", "optimizer.betas = 3 should be a list, written [a,b]"),
        ("optimizer.betas=[a,0.9]", "optimizer.betas.0 = a should be a number"),
        ("data.paths=[a]", 'data.paths = ["a"] is not an option of data=stdlib'),
        ("data.kind=txt", "data.kind = txt comes with the group, data=... of jsonl, parquet, stdlib, text"),
        ("~train.steps", "train.steps required; give train.steps=..."),
        ("~foo.bar", "foo.bar cannot be set: there is no such option to delete"),
        ("runs_dir=${nothing}", "runs_dir cannot be resolved: Interpolation key 'nothing' not found"),
        ("-m", "-m sweeps are not offered; start one command for each value"),
        ("--multirun", "--multirun sweeps are not offered; start one command for each value"),
        ("train.steps=1,2", "train.steps = 1,2 one value is expected; a list is written [1,2]"),
        ("--steps", "--steps unknown flag; options are written name=value, see --help"),
        ("train.steps", "train.steps should be written name=value, see --help"),
        ("data@x=text", "data@x=text should be written group=choice or group.name=value, see --help"),
        ("hydra/launcher=x", "hydra/launcher=x should be written group=choice or group.name=value, see --help"),
    ],
)
def test_a_mistake_is_explained(argument: str, line: str) -> None:
    assert problems(argument) == [line]


def test_unreadable_syntax_is_reported_beside_the_rest() -> None:
    found = problems("data.paths=[1", "train.steps=abc")
    assert found[0].startswith("data.paths=[1 cannot be read: ") and found[0].endswith("; quote special characters")
    assert found[1] == "train.steps = abc should be a whole number"


def test_all_mistakes_are_reported_at_once() -> None:
    found = problems(
        "-m",
        "model=demoo",
        "model.top_kk=3",
        "train.steps=abc",
        "optimizer.schedule=cos",
        "+x=1",
        "optimizer.warmup_steps=9999",
    )
    assert len(found) == 6  # the last one is legal by itself, and train.steps has no value to compare it with
    assert {line.split()[0] for line in found} == {"-m", "model", "model.top_kk", "train.steps", "optimizer.schedule", "x"}


def test_options_that_disagree_are_reported_together_with_typos_and_with_each_other() -> None:
    found = problems("foo=1", "model.num_experts=8", "model.top_k=9", "train.steps=100", "optimizer.warmup_steps=500")
    assert sorted(line.split(" (")[0] for line in found) == [
        "foo = 1 unknown option, see --help",
        "model top_k",
        "optimizer.warmup_steps",
    ]


def test_a_router_is_chosen_by_its_kind_and_has_its_own_options() -> None:
    cosine = ["model.router.kind=cosine", "model.router.size=4", "model.router.temperature=0.3"]
    assert load(PretrainConfig, "pretrain", cosine).model.router == CosineRouter(kind="cosine", size=4, temperature=0.3)
    assert problems("model.router.kind=cosine", "model.router.size=4") == [
        "model.router.temperature required; give model.router.temperature=..."
    ]
    assert problems("model.router.size=4") == ["model.router.size = 4 is not an option of model.router.kind=top_k"]
    (line,) = problems("model.router.kind=cosin")
    assert line.startswith(
        "model.router.kind = cosin should be one of 'top_k', 'noisy_top_k', 'cosine', 'group_limited', 'expert_choice'"
    )


def test_a_disagreement_that_follows_from_a_reported_typo_is_not_reported() -> None:
    assert problems("model.max_positionss=8192", "train.sequence_length=4096") == [
        "model.max_positionss = 8192 unknown option; did you mean model.max_positions?"
    ]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train.sequence_length=99", "model.max_positions=64"], ["train.sequence_length (99)", "model.max_positions (64)"]),
        (["optimizer.warmup_steps=161", "train.steps=160"], ["optimizer.warmup_steps (161)", "train.steps (160)"]),
        (["model.selection_bias=false", "balance.rate=0.5"], ["balance.rate (0.5)", "selection_bias=true", "balance=frozen"]),
        (["model.num_heads=3", "model.num_kv_heads=2"], ["num_heads (3)", "num_kv_heads (2)"]),
        (["parallel.offload=nvme"], ["offload=nvme needs nvme_dir", "set parallel.nvme_dir=FOLDER"]),
        (["model.router={kind: expert_choice, most_experts: 1}"], ["most_experts (1)", "top_k (2)", "num_experts (8)"]),
        (["model.router={kind: expert_choice, most_experts: 8}"], ["model.selection_bias=false", "balance=frozen"]),
        (["model.router={kind: group_limited, groups: 3, top_groups: 1}"], ["router.groups (3)", "num_experts (8)"]),
        (["model.router={kind: group_limited, groups: 4, top_groups: 5}"], ["top_groups (5)", "router.groups (4)"]),
        (["parallel.nvme_dir=here"], ["nvme_dir (here)", "write the whole path"]),
    ],
)
def test_options_that_disagree_are_named_with_their_values(arguments: Sequence[str], parts: Sequence[str]) -> None:
    (line,) = problems(*arguments)
    assert all(part in line for part in parts)


def test_required_values_are_in_the_same_list() -> None:
    assert problems("rollout=aprl", "task.nam=x", rl=True) == [
        "rollout = aprl unknown choice; did you mean rollout=april? choices: april, async, dynamic, sync",
        "checkpoint required; give checkpoint=...",
        "task.nam = x unknown option; did you mean task.name?",
    ]
    assert sorted(problems("data=parquet", "cluster=ray")) == [
        "cluster.ranks required; give cluster.ranks=...",
        "data.paths required; give data.paths=...",
    ]


def test_a_response_must_fit_into_a_row() -> None:
    (line,) = problems("checkpoint=a", "rollout.max_new_tokens=256", "loop.sequence_length=256", rl=True)
    assert "rollout.max_new_tokens (256)" in line and "loop.sequence_length (256)" in line


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(option_names(PretrainConfig))), st.data())
def test_a_swapped_pair_of_letters_is_set_right(name: str, data: st.DataObject) -> None:
    group, dot, last = name.rpartition(".")
    place = data.draw(st.integers(0, len(last) - 2)) if len(last) > 3 else 0
    typo = f"{group}{dot}{last[:place]}{last[place + 1]}{last[place]}{last[place + 2 :]}"
    if typo in set(option_names(PretrainConfig)) or len(last) <= 3:
        return
    assert any("did you mean" in line for line in problems(f"{typo}=1")), typo


# ---------------------------------------------------------------- the command


def test_help_names_every_group_and_choice() -> None:
    text = usage(PretrainConfig, "pretrain")
    for group, choices in group_choices(PretrainConfig, "pretrain").items():
        line = next(line for line in text.splitlines() if line.strip().startswith(f"{group}="))
        assert set(choices) == set(line.split("=", 1)[1].split())
    assert f"train.steps={pretrain().train.steps}" in text and "seed=0" in text
    assert "checkpoint=(required)" in usage(RLConfig, "rl")
    assert max(map(len, text.splitlines())) <= 120


def test_main_returns_0_after_a_run_and_2_after_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[PretrainConfig] = []
    assert main(seen.append, PretrainConfig, "pretrain", ["seed=5"]) == 0
    assert [config.seed for config in seen] == [5]
    assert main(seen.append, PretrainConfig, "pretrain", ["sed=5"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("config: 1 problem\n  sed = 5") and "Traceback" not in captured.err
    assert len(seen) == 1


def test_main_prints_help_without_running(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(lambda config: pytest.fail("it ran"), PretrainConfig, "pretrain", ["seed=1", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: python -m launch.pretrain")


def test_ctrl_c_is_a_line_and_a_bug_keeps_its_trace(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(config: PretrainConfig) -> None:
        raise KeyboardInterrupt

    def broken(config: PretrainConfig) -> None:
        raise RuntimeError("ours")

    assert main(interrupted, PretrainConfig, "pretrain", []) == 130
    assert "Ctrl-C" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="ours"):
        main(broken, PretrainConfig, "pretrain", [])


def test_dry_run_prints_the_resolved_options_and_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    config = pretrain("dry_run=true", "train.batch_rows=16", "train.sequence_length=256")
    print_plan(config, config.model, 2)
    out = capsys.readouterr().out
    assert "top_k: 2" in out and "${" not in out
    assert "16 rows x 256 tokens = 4,096" in out and "nothing was started" in out


def test_the_command_exits_with_2_and_no_trace_from_any_folder(tmp_path: Path) -> None:
    code = "import sys; from launch.cli import main, PretrainConfig; sys.exit(main(print, PretrainConfig, 'pretrain'))"
    environment = {"PYTHONPATH": str(REPOSITORY), "HOME": str(tmp_path), "PATH": ""}
    command = [sys.executable, "-c", code, "model.top_kk=3"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["config: 1 problem", "  model.top_kk = 3   unknown option; did you mean model.top_k?"]


def test_a_trace_that_no_step_reaches_is_a_message() -> None:
    (line,) = problems("train.steps=20", "optimizer.warmup_steps=2", "trace.range=[21,22]")
    assert "trace.range [21, 22] begins after the last step (train.steps = 20)" in line
    (line,) = problems("checkpoint=x", "loop.rounds=4", "trace.range=[5,5]", rl=True)
    assert "trace.range [5, 5] begins after the last step (loop.rounds = 4)" in line
    assert pretrain("train.steps=20", "optimizer.warmup_steps=2", "trace.range=[20,22]").trace.range == (20, 22)


def test_an_empty_name_of_a_run_is_a_message_before_anything_is_read() -> None:
    (line,) = problems("run_name=")
    assert line.startswith("run_name ('') should be a plain folder name, not empty")
    with pytest.raises(ValidationError, match="plain folder name"):
        PretrainConfig(**{**pretrain().model_dump(), "run_name": "two\nlines"})


def test_changes_of_weights_go_through_the_store() -> None:
    (line,) = problems("checkpoint=x", "sync=delta", "sync.transport=direct", rl=True)
    assert "transport=direct sends all weights every time, but anchor_every = 32 asks for changes in between" in line
    config = load(RLConfig, "rl", ["checkpoint=x"]).sync
    assert config.is_direct(on_gpu=True) and not config.is_direct(on_gpu=False)


def test_what_a_checkpoint_brings_is_not_given_beside_it() -> None:
    found = problems("checkpoint=runs/a", "model.top_k=3", "tokenizer=bpe_32k", "train.batch_rows=8")
    assert [line.partition(" ")[0] for line in found] == ["tokenizer", "model.top_k"]
    assert all("checkpoint=runs/a brings its own" in line for line in found)
    pretrain("checkpoint=runs/a", "train.sequence_length=4096")  # longer than the model that it would be without
    pretrain("checkpoint=null", "model.top_k=3")


def test_a_checkpoint_named_by_a_link_is_the_folder_of_now_or_that_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    link = tmp_path / "runs" / "latest-pretrain"
    link.parent.mkdir()
    link.symlink_to("a")
    asked = ["checkpoint=runs/latest-pretrain", "run_name=tuned"]

    def of(*arguments: str) -> Path:
        config = load(RLConfig, "rl", arguments)
        return settled(config.checkpoint, config, "rl")

    assert of(*asked) == Path("runs/a")
    RunDir.open(load(RLConfig, "rl", ["checkpoint=runs/a", "run_name=tuned"]), "rl").close("stopped")
    link.unlink()
    link.symlink_to("b")  # another pretraining has begun
    assert of(*asked, "resume=auto") == Path("runs/a")
    assert of(*asked) == Path("runs/b")
    assert of("checkpoint=runs/latest-pretrain/checkpoints/step_000006") == Path("runs/b/checkpoints/step_000006")
    assert of("checkpoint=runs/a") == Path("runs/a")


def test_a_checkpoint_that_cannot_be_looked_at_is_a_message() -> None:
    wrong = r"checkpoint=a+ cannot be read: File name too long"
    for command in (starting_point, resolve):
        with pytest.raises(UserError, match=wrong):
            command(Path("a" * 300))
    with pytest.raises(UserError, match=wrong):
        pretrain_a_model(pretrain(f"checkpoint={'a' * 300}"))


def test_without_a_home_in_the_environment_the_cache_is_in_that_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TESSERA_CACHE", raising=False)
    monkeypatch.delenv("HOME")
    assert pretrain().data.cache_dir == Path("~/.cache/tessera").expanduser()


def test_a_folder_may_be_in_a_home() -> None:
    config = pretrain("runs_dir='~/runs'", "checkpoint='~/runs/a'")
    assert (config.runs_dir, config.checkpoint) == (Path.home() / "runs", Path.home() / "runs" / "a")
    with pytest.raises(UserError, match=r"runs_dir.*\(~nobody-here/x\) is in a home that this machine does not know"):
        pretrain("runs_dir='~nobody-here/x'")


def test_a_folder_that_was_copied_in_part_is_a_message_before_anything_starts(tmp_path: Path) -> None:
    folder = untrained(tmp_path)
    (folder / "model.safetensors").unlink()
    given = [f"checkpoint={folder}", f"runs_dir={tmp_path}/runs"]
    wrong = r"has neither model\.safetensors nor model\.safetensors\.index\.json"
    with pytest.raises(UserError, match=wrong):
        pretrain_a_model(load(PretrainConfig, "pretrain", given))
    with pytest.raises(UserError, match=wrong):
        reinforce(load(RLConfig, "rl", given))
    assert not (tmp_path / "runs").exists()


def test_a_port_for_prometheus_that_is_taken_is_a_message_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.cluster.GOING_S", 0.0)
    folder = untrained(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        given = [f"checkpoint={folder}", f"runs_dir={tmp_path}/runs", "rollout.engines=2", f"rollout.metrics_port={port - 1}"]
        with pytest.raises(UserError, match=rf"port {port} of rollout\.metrics_port on 127\.0\.0\.1 is not available"):
            reinforce(load(RLConfig, "rl", given))
    assert not (tmp_path / "runs").exists()


def test_a_tokenizer_with_more_entries_than_the_model_has_embeddings_is_a_message_before_anything_starts(
    tmp_path: Path,
) -> None:
    folder = untrained(tmp_path)
    layout = json.loads((folder / "tokenizer.json").read_text())
    layout["added_tokens"].append(dict(layout["added_tokens"][0], id=300, content="<more>"))
    (folder / "tokenizer.json").write_text(json.dumps(layout))
    given = [f"checkpoint={folder}", f"runs_dir={tmp_path}/runs", "dry_run=true"]
    wrong = r"tokenizer\.json has 301 tokens, but the model beside it only 300; put the model's own there"
    with pytest.raises(UserError, match=wrong):
        pretrain_a_model(load(PretrainConfig, "pretrain", given))
    with pytest.raises(UserError, match=wrong):
        reinforce(load(RLConfig, "rl", given))
    with pytest.raises(UserError, match=wrong):
        generate(folder, ["a"], 1, 4, Sampling(1.0, seed=0))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("train.steps=99", 'train = {"steps": 99}   is a group of another command'),
        ("run_name=mine", "run_name=mine names one"),
        ("runs_dri=a", "did you mean runs_dir?"),
    ],
)
def test_a_mistake_for_either_stage_of_the_demo_is_a_message_before_the_first(
    argument: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_demo([argument]) == 2
    out, err = capsys.readouterr()
    assert said in err and "pretraining" not in out
    assert run_demo(["--help"]) == 0 and "usage: python -m launch.demo" in capsys.readouterr().out
