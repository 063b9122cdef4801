# `make demo` and `make test` set everything up on first use; nothing else has to be installed.
PYTHON ?= python3
VENV ?= .venv
LOWEST ?= .venv-lowest
# The lowest Python that setup.py claims, if there is one.
LOWEST_PYTHON ?= $(shell python3.10 -c 'import sys; print(sys.executable)' 2>/dev/null || echo $(PYTHON))
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export OMP_NUM_THREADS ?= 2

.PHONY: demo test slow deepspeed lowest portable wheel readme lint types install clean

demo: install
	$(BIN)/llada-trm demo --output_dir outputs/demo
	@echo "To type llada-trm yourself: source $(BIN)/activate"

# What a file's tests share is made once: a file goes to one worker. A worker that crashes ends the run, instead of its
# tests being tried again and again.
PARALLEL := -n 2 --dist loadscope --max-worker-restart 0

test: install
	$(BIN)/python -m pytest tests $(PARALLEL)

slow: install
	$(BIN)/python -m pytest tests -m slow

# It is built from source, against the torch that is installed; nothing of it is compiled for the CPU.
deepspeed: install
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt deepspeed
	PATH=$(BIN):$$PATH DS_ACCELERATOR=cpu $(BIN)/python -m pytest tests/e2e/test_two_processes.py -k deepspeed

# The whole suite on the lowest versions that setup.py claims, and models saved there and loaded with the newest, and the
# other way round.
lowest: install $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest tests $(PARALLEL)
	rm -rf outputs/across_versions && mkdir -p outputs/across_versions/lowest outputs/across_versions/newest
	$(LOWEST)/bin/python tests/load_across_versions.py save outputs/across_versions/lowest
	$(BIN)/python tests/load_across_versions.py load outputs/across_versions/lowest
	$(BIN)/python tests/load_across_versions.py save outputs/across_versions/newest
	$(LOWEST)/bin/python tests/load_across_versions.py load outputs/across_versions/newest

# The whole suite with the kernels of other CPUs (as far as this one has them), and with one thread and two. Every value
# of the three settings once, not all of their combinations.
portable: install
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m pytest tests $(PARALLEL)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX512_CORE LLADA_TEST_THREADS=2 $(BIN)/python -m pytest tests
	ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE_AMX $(BIN)/python -m pytest tests $(PARALLEL)

# The wheel alone in a clean environment, then with its extras: README's snippets and commands, outside the repository.
wheel:
	rm -rf build dist .venv-wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	.venv-wheel/bin/python -m pip install --quiet -c constraints.txt torch
	.venv-wheel/bin/python -m pip install --quiet -c constraints.txt dist/*.whl
	.venv-wheel/bin/python tests/run_readme.py --installed
	.venv-wheel/bin/python -m pip install --quiet -c constraints.txt "$$(echo dist/*.whl)[train,rl,eval,onnx,demo]"
	.venv-wheel/bin/python tests/run_readme.py --installed --extras

# The same with what is installed here.
readme: install
	$(BIN)/python tests/run_readme.py --extras

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

# PyPI's torch of that age is the CUDA build on Linux, 3 GB to download: PIP_EXTRA_INDEX_URL can name another index, with
# TORCH=torch==2.10.0+cpu.
TORCH ?= torch
$(LOWEST)/.installed: setup.py scripts/lowest_versions.py
	test -x $(LOWEST)/bin/python || $(LOWEST_PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check "setuptools>=77"
	$(LOWEST)/bin/python scripts/lowest_versions.py > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(LOWEST)/lowest.txt $(TORCH)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(LOWEST)/lowest.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) .venv-wheel outputs build dist *.egg-info
