"""The example of a Ray cluster is one that Ray's cluster launcher takes, and the commands around it are real."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.dashboard.modules.job.cli import job_cli_group, submit
from ray.scripts import scripts

from launch.cli import load
from trainer.config.run import PretrainConfig

REPOSITORY = Path(__file__).parents[2]
FILE = REPOSITORY / "launch" / "ray" / "cluster.yaml"
PAGE = (REPOSITORY / "docs" / "clusters.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line) for line in re.findall(r"^ {4}ray (.*)$", PAGE, re.MULTILINE)]


def test_ray_takes_the_example() -> None:
    config = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["max_workers"] == len(config["provider"]["worker_ips"])


def test_the_commands_that_start_ray_have_options_that_it_knows() -> None:
    config = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    started = [line for line in config["head_start_ray_commands"] + config["worker_start_ray_commands"] if " start " in line]
    head, worker = ([part for part in shlex.split(line.partition(" start ")[2])] for line in started)
    found = scripts.start.make_context("start", list(head)).params
    assert (
        found["head"] and found["node_ip_address"] == config["provider"]["head_ip"] and found["dashboard_host"] == "127.0.0.1"
    )
    joined = scripts.start.make_context("start", list(worker)).params["address"]
    assert joined == f"$RAY_HEAD_IP:{found['port']}"
    assert all("RAY_AUTH_MODE=token" in line for line in started)


def test_the_commands_of_the_page_are_rays() -> None:
    assert {command[0] for command in COMMANDS} == {"get-auth-token", "up", "dashboard", "job", "down"}
    assert {command[1] for command in COMMANDS if command[0] == "job"} == {"submit", "list", "logs", "stop"}
    for name, *arguments in COMMANDS:
        if name == "job":
            job_cli_group.commands[arguments[0]].make_context(name, list(arguments[1:]))
        else:
            scripts.cli.commands[name].make_context(name, list(arguments))
        assert all((REPOSITORY / word).is_file() for word in arguments if word.endswith(".yaml"))


def test_the_job_of_the_page_is_a_run_that_can_be_composed() -> None:
    (arguments,) = (command[2:] for command in COMMANDS if command[:2] == ["job", "submit"])
    entrypoint = submit.make_context("submit", list(arguments)).params["entrypoint"]
    python, module, *options = entrypoint[3:4] + entrypoint[5:]
    assert (python, module) == (".venv/bin/python", "launch.pretrain")
    config = load(PretrainConfig, "pretrain", options)
    assert config.cluster.address == "auto" and config.cluster.ranks == 8 and config.resume == "auto"
