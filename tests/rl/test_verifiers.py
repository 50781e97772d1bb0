"""Verifiers: right and wrong answers, answers that are none, and completions that were written to do harm."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.errors import UserError
from rl.rewards.task import Prompt
from rl.rewards.verifiers import VERIFIERS, Bleu, CodeIO, CodeTests, Exact, JsonSchema, Math, Regex, last_block, make_verifier
from rl.rewards.workers import Response, RewardWorkers
from tests.rl.test_sandbox import possible
from trainer.config.rl import RewardConfig, TaskConfig

isolated = pytest.mark.skipif(not possible("namespaces"), reason="no user namespaces for us")


@pytest.mark.parametrize(
    ("verifier", "completion", "answer", "reward"),
    [
        (Exact(), " Paris\n", "Paris", 1),
        (Exact(), "paris", "Paris", 0),
        (Exact(ignore_case=True), "paris", "Paris", 1),
        (Exact(pattern=r"<a>(.*?)</a>"), "<a>1</a> no, <a> 2 </a>", "2", 1),
        (Exact(pattern=r"\d+"), "first 1, then 12", "12", 1),
        (Exact(pattern=r"\d+"), "none", "12", 0),
        (Regex(), "  14:05 ", r"\d\d:\d\d", 1),
        (Regex(), "at 14:05", r"\d\d:\d\d", 0),
        (Regex(ignore_case=True), "YES\nof course", "yes.*", 1),
        (Math(), r"so it is \boxed{\frac{1}{2}}", "0.5", 1),
        (Math(), "The answer is 1,000.", "1000", 1),
        (Math(), r"$x^2 + 2x + 1$", "$(x+1)^2$", 1),
        (Math(), r"\boxed{[1, 2)}", "[1,2)", 1),
        (Math(), "41", "42", 0),
        (Math(), "\uff14\uff12", "42", 1),  # full-width
        (Math(), "\\boxed{\u0664\u0662}", "42", 1),  # Arabic
        (Math(), "The answer is \u0967,\u0966\u0966\u0966.", "1000", 1),  # Devanagari
        (Math(), "\\boxed{\U0001d7d2\U0001d7d0}", "42", 1),  # bold
        (Math(), "\uff14\uff11", "42", 0),
        (Math(), "4\u00b2", "42", 0),  # squared
        (Math(), "\uff3cboxed\uff5b\uff11\uff0f\uff12\uff5d", "0.5", 1),
        (Math(), "42", "\uff14\uff12", 1),
        (Math(), "I do not know", "42", 0),
        (Math(), "", "42", 0),
        (JsonSchema(), '{"a": [1, 2]}', '{"properties": {"a": {"items": {"type": "integer"}}}}', 1),
        (JsonSchema(), 'Here:\n```json\n{"a": 1}\n```\nDone.', '{"required": ["a"]}', 1),
        (JsonSchema(), '{"b": 1}', '{"required": ["a"]}', 0),
        (JsonSchema(), "not json", "{}", 0),
        (JsonSchema(), "NaN", "{}", 0),
        (JsonSchema(), "", "true", 0),
    ],
)
def test_a_verifier_tells_right_from_wrong(verifier: Any, completion: str, answer: str, reward: float) -> None:
    assert verifier(completion, answer) == reward


@pytest.mark.parametrize(
    ("verifier", "answer"),
    [
        (Math(), ""),
        (Regex(), "("),
        (JsonSchema(), "{"),
        (JsonSchema(), '{"type": 3}'),
        (CodeIO(isolation="none"), "[]"),
    ],
)
def test_an_answer_that_is_none_raises_and_gives_no_zero(verifier: Any, answer: str) -> None:
    with pytest.raises(Exception, match=r"."):
        verifier("1", answer)


latex = st.lists(
    st.sampled_from(["\\frac", "{", "}", "1", "x", "+", "\\boxed", "$", "\\sqrt", "(", "]", ",", "&", "\\\\", "_", "="])
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(latex.map("".join) | st.text(max_size=40))
def test_no_odd_mathematics_raises(completion: str) -> None:
    assert Math()(completion, "1/2") in (0, 1)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.text(st.characters(categories=["Nd", "Nl", "No"]), min_size=1, max_size=6),
    st.sampled_from(["{}", "${}$", "\\boxed{{{}}}"]),
)
def test_no_digits_of_another_script_raise(number: str, frame: str) -> None:
    assert Math()(frame.format(number), "1/2") in (0, 1)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(values)
def test_every_json_value_is_itself_and_no_other(value: Any) -> None:
    assert JsonSchema()(json.dumps(value), json.dumps({"const": value})) == 1
    assert JsonSchema()(json.dumps([value]), json.dumps({"const": value})) == 0


@pytest.mark.parametrize(
    "completion", ["[" * 10**6, "9" * 10**6, '{"a":' * 10**5, '"' + "\\" * 10**6, "```" * 10**6, "\x00" * 10**6]
)
def test_hostile_json_is_worth_nothing(completion: str) -> None:
    assert JsonSchema()(completion, '{"type": "object"}') == 0


@pytest.mark.parametrize("depth", [64, 65, 400, 950])
def test_json_that_is_nested_too_deeply_for_a_schema_is_worth_nothing(depth: int) -> None:
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        schema = {"items": {"$ref": "#"}, "additionalProperties": {"$ref": "#"}}
        assert JsonSchema()(opening * depth + "[]" + closing * depth, json.dumps(schema)) == (depth < 64)


@pytest.mark.parametrize("completion", ["1" + "0" * 400, "1e400", "-1e400", "[1e999]"])
def test_numbers_beyond_any_float_are_worth_nothing_and_raise_nothing(completion: str) -> None:
    assert JsonSchema()(completion, '{"multipleOf": 0.5, "items": {"multipleOf": 0.5}}') == 0


@pytest.mark.parametrize(
    "completion", ["(" * 10**6, "\\frac{" * 10**5, "\\boxed{" * 10**5 + "1", "1" * 10**6 + "!", "$" * 10**6]
)
def test_long_mathematics_is_worth_nothing(completion: str) -> None:
    assert Math()(completion, "7") == 0


@pytest.mark.parametrize(
    ("verifier", "completion", "answer"),
    [
        ("math", "\\boxed{9^{9^{9^{9}}}}", "1"),
        ("regex", "a" * 40 + "b", "(a+)+"),
        ("json_schema", '"' + "a" * 40 + 'b"', '{"pattern": "^(a+)+$"}'),
    ],
)
def test_what_takes_forever_is_ended_and_has_no_reward(tmp_path: Path, verifier: str, completion: str, answer: str) -> None:
    task = TaskConfig(name="dataset", options={"path": "never read.jsonl", "verifier": verifier}, eval_prompts=1)
    said: list[str] = []
    config = RewardConfig(workers=1, timeout_s=2.0, memory_gib=2.0)
    with RewardWorkers(task, 0, config, lambda name: tmp_path / name, said.append) as rewards:
        assert rewards.score([Response(Prompt("", answer), (completion,), True)]) == [None]
        assert sum(rewards.counts().values()) == 1
    assert said[0].startswith("task dataset: ")


PROGRAM = "Here you are:\n```python\nimport sys\nprint(sum(map(int, sys.stdin.read().split())))\n```"
CASES = json.dumps([{"input": "1 2", "output": "3"}, {"input": "4 5\n6", "output": " 15\n"}])


@isolated
def test_programs_are_judged_by_what_they_print() -> None:
    assert CodeIO()(PROGRAM, CASES) == 1
    assert CodeIO()("print(3)", CASES) == 0
    assert CodeIO()(PROGRAM + "\n```\nraise SystemExit(1)\n```", CASES) == 0
    assert CodeIO(timeout_s=0.8)("while True: pass", CASES) == 0


@isolated
@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("def double(x):\n    return 2 * x", 1),
        ("```\ndef double(x): return x + x\n```", 1),
        ("def double(x):\n    return x * x", 0),
        ("def double(x:", 0),
        ("import sys\nsys.exit(0)", 0),
        ("import os\ndef double(x): os._exit(0)", 0),
        ("def double(x): return 2 * x\nimport os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nos.kill(0, 9)", 0),
    ],
)
def test_code_has_to_pass_its_tests_and_leaving_early_does_not(completion: str, reward: float) -> None:
    assert CodeTests(timeout_s=8.0)(completion, "assert double(4) == 8\nassert double(0) == 0") == reward


@pytest.mark.parametrize(("kind", "module"), [(Math, "math_verify"), (Bleu, "rl.rewards.bleu")])
def test_what_is_slow_to_import_is_imported_before_the_first_score(
    monkeypatch: pytest.MonkeyPatch, kind: Callable[[], Any], module: str
) -> None:
    """On a busy machine sympy alone has taken longer than reward.timeout_s."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=module):
        kind()


def test_the_last_complete_block_counts() -> None:
    assert last_block("a ```py\none\n``` b ```\ntwo\n``` c ```\nthree") == "two\n"
    assert last_block("a `b` ``` c") == "a `b` ``` c"
    assert last_block("```x = 1; y = 2\n```") == "x = 1; y = 2\n", "that is no language"


def test_a_wrong_verifier_is_an_error_that_says_what_there_is() -> None:
    with pytest.raises(
        UserError, match="verifier is 'maths'; known verifiers: bleu, code_io, code_tests, exact, json_schema, math"
    ):
        make_verifier("maths", {})
    with pytest.raises(UserError, match="unexpected keyword argument 'case'; it takes: pattern, ignore_case"):
        make_verifier("exact", {"case": True})
    assert make_verifier("bleu", {"max_order": 2})("a b, c", "a b, c") == pytest.approx(1)
    assert make_verifier("bleu", {})("", "a") == 0
    assert set(VERIFIERS) >= {"math", "exact", "regex", "json_schema", "code_tests", "code_io", "bleu"}


def test_a_function_of_ones_own_is_a_verifier_by_its_import_path(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}", "answer": "x" * (1 + n % 9)}) + "\n" for n in range(99)))
    own = {"path": str(path), "verifier": "tests.rl.scorers:as_long"}
    task = TaskConfig(name="dataset", options=own, eval_prompts=1)
    responses = [Response(Prompt("a", "xyz"), (text,), True) for text in ("abc", "ab", "")]
    with RewardWorkers(task, 0, RewardConfig(workers=1, timeout_s=60.0, memory_gib=4.0), tmp_path.joinpath, print) as workers:
        assert workers.score(responses) == [1.0, 0.0, None]
        assert sum(workers.counts().values()) == 0
    assert make_verifier(own["verifier"], {"credit": 0.5})("ab", "xyz") == 0.5
    with pytest.raises(UserError, match="has no function 'Scripted'"):
        make_verifier("tests.rl.scorers:Scripted", {})
    with pytest.raises(UserError, match=r"unexpected keyword argument 'credits'; it takes .*credit: "):
        make_verifier(own["verifier"], {"credits": 1})
    with pytest.raises(UserError, match=r"verifier is 'nowhere:as_long', and module 'nowhere' cannot be .* math, regex"):
        make_verifier("nowhere:as_long", {})
