# `make demo` and `make test` set everything up on first use; nothing else has to be installed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export OMP_NUM_THREADS ?= 2

.PHONY: demo test slow deepspeed lint types install clean

demo: install
	$(BIN)/llada-trm demo --output_dir outputs/demo
	@echo "To type llada-trm yourself: source $(BIN)/activate"

test: install
	$(BIN)/python -m pytest tests -n 2

slow: install
	$(BIN)/python -m pytest tests -m slow

# It is built from source, against the torch that is installed; nothing of it is compiled for the CPU.
deepspeed: install
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt deepspeed
	PATH=$(BIN):$$PATH DS_ACCELERATOR=cpu $(BIN)/python -m pytest tests/e2e/test_two_processes.py -k deepspeed

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

install: $(VENV)/.installed

# torch first, at the tested version: any other build would be downloaded again, gigabytes of it.
$(VENV)/.installed: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
	@echo "Installed. To type llada-trm yourself: source $(BIN)/activate"

clean:
	rm -rf $(VENV) outputs build *.egg-info
