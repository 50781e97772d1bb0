"""The house keeps its shape: imports run one way, and pure rooms stay pure."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
ROOMS = ["kernels", "parallel", "trainer", "rl", "launch"]  # each may import from itself and from those before it
SCHEDULE = [f"schedule/{name}" for name in ("timeline", "cost", "pipeline", "closed_form", "gradients", "plan")]
SCHEDULE += [f"schedule/{name}" for name in ("slices", "generalised", "execution")]
PURE = {  # mathematics that must be testable without any process group
    "parallel/balance.py": {"torch", "typing", "__future__"},
    **{
        f"parallel/{name}.py": {"numpy", "parallel", "__future__"}
        | {"bisect", "collections", "dataclasses", "functools", "heapq", "itertools", "math", "typing"}
        for name in ("placement", "flows", "routes", "layer_cost", "packing", "copy_numbers", "planning", "policies", *SCHEDULE)
    },
    "parallel/cuts.py": {"torch", "dataclasses", "__future__"},
    "rl/advantages.py": {"math", "numpy", "collections", "trainer", "__future__"},
    "rl/algorithms.py": {"torch", "dataclasses", "collections", "__future__", "rl", "trainer"},
    "rl/kl.py": {"torch", "rl", "__future__"},
    "rl/returns.py": {"torch", "dataclasses", "collections", "__future__", "rl", "trainer"},
    "rl/losses.py": {"torch", "rl", "__future__"},
    "rl/off_policy.py": {"torch", "dataclasses", "collections", "typing", "__future__"},
}


def imports(file: Path) -> list[tuple[str, int]]:
    """(module, line) of every import, wherever in the file it stands."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively; write the room's name"
            found.append((node.module or "", node.lineno))
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_no_import_runs_back_up_the_house(room: str) -> None:
    above = set(ROOMS[ROOMS.index(room) + 1 :]) | {"tests"}
    files = sorted((REPOSITORY / room).rglob("*.py"))
    assert files
    wrong = [
        f"{f.relative_to(REPOSITORY)}:{line} imports {m}" for f in files for m, line in imports(f) if m.split(".")[0] in above
    ]
    assert not wrong, wrong


def test_no_module_imports_itself_in_a_circle() -> None:
    modules = {
        ".".join(f.relative_to(REPOSITORY).with_suffix("").parts): f
        for room in ROOMS
        for f in (REPOSITORY / room).rglob("*.py")
    }
    edges = {name: {m for m, _ in imports(file) if m in modules} for name, file in modules.items()}
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for following in sorted(edges[name]):
                walk(following, [*path, name])
            done.add(name)

    for name in sorted(modules):
        walk(name, [])
    assert len(done) == len(modules) > 30


@pytest.mark.parametrize("file", sorted(PURE))
def test_mathematics_does_not_communicate(file: str) -> None:
    modules = imports(REPOSITORY / file)
    assert {m.split(".")[0] for m, _ in modules} <= PURE[file]
    assert not [m for m, _ in modules if m.startswith("torch.distributed")]
    assert {m for m, _ in modules if m.startswith("parallel")} <= {name[:-3].replace("/", ".") for name in PURE}


def test_the_top_level_is_what_the_house_has() -> None:
    allowed = {*ROOMS, "conf", "tests", "pyproject.toml", "constraints.txt", "README.md", "Makefile", "LICENSE", "runs", "docs"}
    found = {p.name for p in REPOSITORY.iterdir() if not p.name.startswith(".") and not p.name.endswith(".egg-info")}
    assert found - {"__pycache__"} <= allowed, found - allowed
