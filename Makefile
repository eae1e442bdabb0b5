# Two commands do everything: `make size` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: size launch-demo test test-kernels lint types contracts check schema accuracy bench clean

size: $(VENV)/.runtime
	@$(BIN)/glmplan size; status=$$?; if [ $$status -eq 0 ]; then \
	  echo; echo "The command of each node (glmplan launch --dry-run):"; echo; $(BIN)/glmplan launch --dry-run; \
	else exit $$status; fi

# Three nodes on this machine, a stand-in for the engine: start, answers checked, stop, nothing left.
launch-demo: $(VENV)/.runtime
	@$(BIN)/glmplan launch --rehearse --yes --name launch-demo --hosts local#0-7,local#8-15,local#16-23; status=$$?; \
	  $(BIN)/glmplan stop launch-demo --forget || status=$$?; exit $$status

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n auto --dist worksteal $(PYTEST_ARGS)

test-kernels: $(VENV)/.kernels
	$(BIN)/python -m pytest -q -n auto --dist worksteal tests/kernels $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

contracts: $(VENV)/.dev
	$(BIN)/lint-imports

check: lint types contracts test

schema: $(VENV)/.dev
	$(BIN)/python benchmarks/schema.py --write

accuracy: $(VENV)/.dev
	$(BIN)/python benchmarks/accuracy.py --write

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/startup.py

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and was not found."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11: set PYTHON=/path/to/python3.11."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml | $(VENV)/bin/python
	@echo "Installing glmplan into $(VENV) ..."
	@$(PIP) install -e .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	@echo "Installing glmplan and its test tools into $(VENV) ..."
	@$(PIP) install -e ".[dev]"
	@touch $@ $(VENV)/.runtime

# A CPU build of PyTorch is enough: the interpreter and the ahead-of-time compiler need no GPU.
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
$(VENV)/.kernels: $(VENV)/.dev
	@echo "Installing PyTorch and Triton into $(VENV) for the kernel tests ..."
	@$(PIP) install "$(TORCH)"
	@$(PIP) install "$(TRITON)" "numpy<2.4"
	@touch $@

clean:
	rm -rf $(VENV) dist build
