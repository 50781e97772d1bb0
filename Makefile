# make demo    sets everything up and runs the main job: pretraining, then RL
# make test    sets everything up and passes the tests
# make setup   prepares .venv only

PYTHON  ?= python3
TORCH   := $(shell sed -n 's/^torch==//p' constraints.txt)
BIN     := .venv/bin
# Not compiled: most of these thousands of modules are never imported, and those that are get compiled then.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

# Images of containers often set it. Each process would then compile all that it imports: 20 s instead of 5. So
# make unsets it, and setup imports once what most processes do.
unexport PYTHONDONTWRITEBYTECODE
IMPORTED := deepspeed, launch.demo, launch.rl, matplotlib.pyplot, trainer.worker, wandb

.PHONY: demo test check setup clean

demo: setup
	@$(BIN)/python -m launch.demo

test: check
	@$(BIN)/python -m pytest --numprocesses=2

check: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

setup: .venv/ready

# torch first and alone: the installer then takes the build that suits this machine, and nothing else asks for another.
.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tessera needs Python 3.11 or newer, this is " + sys.version)'
	@echo "setting up .venv: about two minutes and 2.5 GB, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(INSTALL) torch==$(TORCH)
	@$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	@DS_ACCELERATOR=cpu $(BIN)/python -c 'import $(IMPORTED)'
	@touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
