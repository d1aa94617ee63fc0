# Two commands do all the set-up: `make demo` and `make test`. What a target needs, it installs into .venv.
#   make demo [ONCE=1] [SPEED=60] [PORT=8000]   the whole way, from a simulated fleet to the first alert
#   make test                                   linters, types, import rules and every test
#   make campaign                               the long versions: an updater killed at every call, and 120 times at random
#   make bench                                  speed, as ratios against an alternative in the same run
#   make clean                                  forget .venv and everything the demo made

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SPEED  ?= 60
PORT   ?= 8000
# the commands are looked up in .venv first, by us and by what we start
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export ORT_DISABLE_TELEMETRY := 1
# the recipes that hold a server must get Ctrl-C themselves
SHELL  := /bin/bash

.PHONY: demo test lint campaign bench clean setup-demo setup-test system-test

demo: setup-demo
	@exec fleet-cloud demo --speed $(SPEED) --port $(PORT) $(if $(filter-out 0,$(ONCE)),--once)

test: setup-test lint
	@rm -f .coverage .coverage.*
	pytest -n 2 -m "not e2e" --cov --cov-report=term --cov-fail-under=85
	pytest -m e2e   # real processes at 60 times real time: not under a tracer

lint:
	ruff check .
	ruff format --check .
	mypy
	lint-imports --no-cache

campaign: setup-test
	VOLTWATCH_CAMPAIGN=1 pytest --timeout=1800 tests/faults/test_updater_kill.py

bench: setup-demo
	python tests/bench/run.py

clean:
	rm -rf $(VENV) var build *.egg-info

setup-demo: $(VENV)/.installed-training
	@.ci/sentence-model $(BIN)
setup-test: system-test $(VENV)/.installed-dev
	@.ci/sentence-model $(BIN)

# The stamp names the extra; a changed pyproject.toml installs again.
$(VENV)/.installed-%: pyproject.toml | $(VENV)/bin/pip
	@.ci/system-packages libgomp1=libgomp.so.1
	@echo "installing voltwatch[$*] into $(VENV) (a minute or two)"
	@$(BIN)/pip install --quiet --editable '.[$*]'
	@touch $@

$(VENV)/bin/pip:
	@.ci/make-venv $(PYTHON) $(VENV)

system-test:
	@.ci/system-packages --optional mosquitto strace procps:ps
