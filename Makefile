# Everything runs in .venv, which is made and filled from requirements.lock and requirements-torch.lock on first use.

BIN := .venv/bin
INSTALLED := .venv/.installed

# A thread that waits sleeps instead of spinning: on a machine with other work spinning costs several times the run.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help install demo gate test test-fast check format

help:
	@echo "make demo     quantise the small model of this repository and measure the result (a minute)"
	@echo "make gate     hold what this code makes of the small model against tests/baselines (a minute)"
	@echo "make test     run the tests (some minutes, offline)"
	@echo "make test-fast  the tests of all that is not a whole conversion (a minute)"
	@echo "make check    formatting, lint, types, import order, spelling"
	@echo "make format   reformat the code"
	@echo "make install  only make .venv; PYTHON=python3.12 picks the interpreter, PIP_ARGS=... goes to pip,"
	@echo "              TORCH_INDEX=... is where torch comes from"

install: $(INSTALLED)

$(INSTALLED): requirements.lock requirements-torch.lock pyproject.toml scripts/install
	@scripts/install
	@touch $@

demo: $(INSTALLED)
	$(BIN)/quantkit convert examples/nano-deepseek-v3 -r recipes/nano-demo.yaml -o demo-out --restart

# quantkit's own regression gate, see docs/regression-gate.md. After a change that is meant: make gate CHECK=--update-baseline
CHECK := --junit gate-out/junit.xml --markdown gate-out/summary.md

gate: $(INSTALLED)
	@mkdir -p gate-out
	$(BIN)/quantkit convert examples/nano-deepseek-v3 -r tests/baselines/nano.yaml -o gate-out/nano --restart
	$(BIN)/quantkit evaluate examples/nano-deepseek-v3 gate-out/nano/w4a16 gate-out/nano/Q4_K_M \
	  --context 256 --max-windows-per-file 16 --no-noise-floor -o gate-out/evaluation.json --force
	$(BIN)/quantkit check gate-out/evaluation.json --baseline tests/baselines/nano.json $(CHECK)

test: $(INSTALLED)
	$(BIN)/python -m pytest -q tests

# Rooms whose tests need no compiled kernels and no whole conversion.
FAST := arch documents inspect report runtimes schemes plan/test_recipe.py test_structure.py

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -q -m "not slow and not gpu" $(FAST:%=tests/%)

check: $(INSTALLED)
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/codespell

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
