# Everything a developer or CI does, in one line each. Needs Python 3.11 or newer and make; the rest goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= .
PROTOS := $(wildcard protos/collab_service/v1/*.proto)
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Where Python keeps no bytecode, every process compiles everything again; the tests start hundreds.
export PYTHONDONTWRITEBYTECODE :=
.DEFAULT_GOAL := help
.PHONY: help install run test test-long torture check format bench bench-large generate lock

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/installed ## Make .venv with everything (does nothing when nothing changed)

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("collab-service needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; choose another with: make PYTHON=/path/to/python3")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

run: install ## Start the service with a PostgreSQL of its own (more: collab serve --help)
	$(BIN)/collab serve

test: install ## Run the tests, on several cores (under five minutes)
	$(BIN)/python -m pytest -m "not long" -n 4 --dist loadfile --no-loadscope-reorder

test-long: install ## Run what takes longer: whole traces, a million events, the built wheel
	$(BIN)/python -m pytest -m long

torture: install ## Make faults at random for MINUTES=5 and check every promise; SEED=n begins with a known one
	$(BIN)/python -m tests.torture --minutes $(or $(MINUTES),5) $(if $(SEED),--seed $(SEED)) $(if $(OUTPUT),--output $(OUTPUT))

check: install ## Check formatting, lint, types, layers, protos, generated code and migrations
	@bash .ci/check

format: install ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/buf format -w protos

bench: install ## Measure on this machine, as ratios to references beside it; fails below a floor
	$(BIN)/python -m tests.bench

bench-large: install ## Measure how the service grows, up to 10,000,000 events (some minutes, 10 GB of disk for a while)
	$(BIN)/python -m tests.bench --large growth

generate: install ## Generate collab_service/v1 from protos/
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=$(OUT) --grpc_python_out=$(OUT) --mypy_out=quiet:$(OUT) --mypy_grpc_out=quiet:$(OUT) $(PROTOS)

lock: install ## Resolve the dependencies of pyproject.toml anew into requirements.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --generate-hashes --no-emit-index-url --no-emit-find-links --no-annotate --no-header --upgrade -o requirements.lock pyproject.toml
