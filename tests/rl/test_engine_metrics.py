"""What Prometheus scrapes is what the engine does, on loopback, and a scrape does not change what is generated."""

from __future__ import annotations

import socket
from urllib.request import urlopen

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from kernels.errors import UserError
from launch.cli import load
from rl.april import complete
from rl.engine.engine import Engine
from rl.engine.metrics import PREFIX, serve_state
from tests.rl.test_engine import CONFIG, MAX_NEW, LanguageModel, engine_for, requests, settings
from trainer.config.rl import RLConfig

LOOPBACK = "127.0.0.1"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.initialize(CONFIG, seed=0, batch_invariant=True)


def scrape(port: int) -> dict[str, float]:
    """Name without prefix -> value, of engine_0."""
    with urlopen(f"http://{LOOPBACK}:{port}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    assert {sample.labels["engine"] for sample in samples} == {"engine_0"}
    return {sample.name.removeprefix(PREFIX): sample.value for sample in samples}


def test_a_scrape_tells_what_the_engine_does(model: LanguageModel) -> None:
    engine = engine_for(model, slots=2, version=3)
    port = serve_state("engine_0", engine.state, LOOPBACK, 0)
    assert port is not None
    assert scrape(port) == {
        **{f"{name}_total": 0 for name in ("generated_tokens", "finished_samples", "interrupted_samples")},
        **{"running_samples": 0, "waiting_samples": 0, "cache_pages_used": 0, "weight_version": 3},
        "cache_pages": engine.state().pages,
    }
    engine.submit(requests(5))
    done = engine.advance(3)
    told = scrape(port)
    assert told["running_samples"] + told["waiting_samples"] + len(done) == 5 and told["running_samples"] == 2
    assert 0 < told["cache_pages_used"] <= told["cache_pages"]
    unfinished = engine.drain()
    told = scrape(port)
    assert told["generated_tokens_total"] == sum(sample.length for sample in (*done, *unfinished)) > 0
    assert (told["finished_samples_total"], told["interrupted_samples_total"]) == (len(done), len(unfinished))
    assert told["cache_pages_used"] == told["running_samples"] == told["waiting_samples"] == 0


def test_new_weights_interrupt_nobody_and_all_tokens_are_counted(model: LanguageModel) -> None:
    engine = engine_for(model, slots=4)
    engine.submit(requests(4))
    done = engine.advance(2)
    engine.load_weights(model.state(), version=1)
    assert engine.state().interrupted_samples == 0 and engine.state().weight_version == 1
    while len(done) < 4:
        done += engine.advance(MAX_NEW)
    assert engine.state().generated_tokens == sum(sample.length for sample in done)
    assert engine.state().finished_samples == 4


def test_being_watched_changes_nothing(model: LanguageModel) -> None:
    watched = engine_for(model)
    port = serve_state("engine_0", watched.state, LOOPBACK, 0)
    assert port is not None
    watched.submit(requests(6))
    found = []
    while watched.state().running_samples + watched.state().waiting_samples or not found:
        found += watched.advance(2)
        scrape(port)
    key = {sample.uid: sample for sample in found}
    assert key == {sample.uid: sample for sample in complete(engine_for(model), requests(6), advance_tokens=5)}


def test_before_weights_there_is_no_version(model: LanguageModel) -> None:
    engine = Engine(CONFIG, settings(), torch.device("cpu"), torch.float32)
    port = serve_state("engine_0", engine.state, LOOPBACK, 0)
    assert port is not None and "weight_version" not in scrape(port)


def test_a_port_that_is_taken_is_an_error_in_the_log_and_ends_nothing(
    model: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server((LOOPBACK, 0)) as other:
        assert serve_state("engine_0", engine_for(model).state, LOOPBACK, other.getsockname()[1]) is None
    assert "choose another rollout.metrics_port" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["rollout.metrics_port=65535", "rollout.engines=2"], "leaves no ports for 2 engines"),
        (["rollout.metrics_port=9400", "rollout.server=http://a/v1", "rollout=sync", "sync=full"], "is of our engines"),
    ],
)
def test_ports_that_cannot_be_are_a_message(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(RLConfig, "rl", ["checkpoint=a", "algorithm.off_policy=bypass", *options])


def test_it_is_off_and_on_loopback_unless_asked() -> None:
    config = load(RLConfig, "rl", ["checkpoint=a"])
    assert isinstance(config, RLConfig) and config.rollout.metrics_port == 0 and config.cluster.host == LOOPBACK
