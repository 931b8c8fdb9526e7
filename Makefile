# `make demo` and `make test` set up everything they need in .venv, a virtual environment of this
# checkout: for the demo lorashard alone, for the tests 3 GB. The other targets are for development:
# `make help`.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
VLLM   ?= 0.33.0 0.22.1 0.20.2 0.16.0
COMPAT ?= 0.16.0 0.17.1 0.18.1 0.19.1 0.20.2 0.21.0 0.22.1 0.23.0 0.24.0 0.25.1 0.26.0 0.27.1 0.28.0 0.29.0 0.30.0 0.31.0 0.32.0 0.33.0
COMPAT_TESTS := test_loading_conformance.py test_layers_conformance.py test_without_plugin_conformance.py \
	test_beside_conformance.py test_load_faults_conformance.py patches/test_unloading.py \
	patches/test_reading_ahead.py test_rebalancing_conformance.py test_data_parallel_conformance.py
# In as many processes as there are CPUs, but a test may need 2 GB of memory.
PARALLEL := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo test check compat resolve fuzz sbom gpu-test fmt lint type bench mutation golden docs site clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.core ## split a small real MoE adapter for EP 2, verify it, merge it back, and show what is where
	$(BIN)/python -m tests.demo

test: $(VENV)/.test $(VENV)/.bare $(VENV)/.lowest $(VENV)/.legacy $(VENV)/.vllm $(VENV)/.beside $(VENV)/.megatron $(VENV)/.ray $(VENV)/.browser $(VENV)/.site ## set up everything and run the tests (what CI runs)
	LORASHARD_REQUIRE_ALL=1 $(BIN)/python -m pytest -q $(PARALLEL)

check: lint type test ## the tests, lint and types: run this before a review

compat: $(VENV)/.test $(VENV)/.vllm $(VENV)/.beside ## run the plugin in one vLLM of every minor release, on the CPU; writes docs/compat
	$(BIN)/python tests/vllm_release.py $(COMPAT)
	LORASHARD_RECORD=docs/compat LORASHARD_RELEASES="$(COMPAT)" LORASHARD_REQUIRE_ALL=1 $(BIN)/python -m pytest -q $(PARALLEL) $(addprefix tests/vllm_plugin/,$(COMPAT_TESTS))

resolve: $(VENV)/.base ## show that installing lorashard changes no package next to any vLLM release
	$(PIP) --group resolve
	$(BIN)/python -m tests.resolve_releases

fuzz: $(VENV)/.fuzz ## fuzz every file that strangers write, one target after the other (SECONDS=60 TARGETS="header layout" CORPUS=dir)
	$(BIN)/python -m tests.fuzz $(TARGETS) --seconds $(or $(SECONDS),60) $(if $(CORPUS),--corpus $(CORPUS))

sbom: $(VENV)/.bare $(VENV)/.sbom ## list what an installation is made of, as CycloneDX, in sbom.json
	$(VENV)/sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type library --output-reproducible \
		--output-file sbom.json $(VENV)/bare/bin/python

gpu-test: ## run the acceptance tests on two GPUs, in vLLM's environment (WORK=dir PYTHON=python)
	$(PYTHON) -m tests.gpu --work $(or $(WORK),/tmp/lorashard-gpu) --http --load --out lorashard-gpu.json

fmt: $(VENV)/.lint ## format, and fix what ruff can
	$(BIN)/ruff format lorashard tests docs
	$(BIN)/ruff check --fix-only --quiet lorashard tests docs

lint: $(VENV)/.lint ## check formatting and lint
	$(BIN)/ruff format --check lorashard tests docs
	$(BIN)/ruff check lorashard tests docs

type: $(VENV)/.lint ## check types (mypy --strict)
	$(BIN)/mypy

bench: $(VENV)/.test ## measure the README's ratios and draw its chart (17 GB of disk; SCALE=0.3 for a first look)
	$(BIN)/python -m tests.bench --scale $(or $(SCALE),1.0) --chart docs/bench.svg --json docs/bench.json

mutation: $(VENV)/.mutation ## change the pure core and the load path, one place at a time; the tests must notice (an hour)
	$(BIN)/mutmut run
	$(BIN)/mutmut results

golden: $(VENV)/.test ## rewrite the golden files of --json output; review the diff
	UPDATE_GOLDEN=1 $(BIN)/python -m pytest -q tests/cli

docs: $(VENV)/.test ## rewrite the generated pages of docs/
	$(BIN)/python -m tests.generate_docs

site: $(VENV)/.site ## build the documentation as a site, strictly, into .site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --config-file docs/site/mkdocs.yml

clean: ## remove the virtual environment and everything else that was made
	rm -rf $(VENV) .demo .site .pytest_cache .mypy_cache .ruff_cache mutants

# lorashard and what it cannot do without.
$(VENV)/.core: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

# torch goes before what needs it: once it is there, nothing pulls in another build of it.
$(VENV)/.base: $(VENV)/.core
	$(PIP) --upgrade "pip>=25.1"
	$(PIP) "$(TORCH)"
	touch $@

# What `pip install .` installs, in an environment of its own: the tests run it without torch.
$(VENV)/.bare: pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)/bare
	$(VENV)/bare/bin/python -m pip install --quiet --disable-pip-version-check .
	touch $@

# The same with the lowest versions that pyproject.toml allows and that have wheels for this Python.
$(VENV)/.lowest: $(VENV)/.test
	$(PIP) --group resolve
	$(PYTHON) -m venv --clear $(VENV)/lowest
	$(BIN)/python -m uv pip install --quiet --python $(VENV)/lowest/bin/python --resolution lowest-direct \
		--only-binary numpy --only-binary blake3 --only-binary google-re2 --only-binary safetensors .
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) --group test
	touch $@

# transformers 4 and its PEFT, for adapters with one tensor per expert: a directory, not an
# environment, because it shares torch with .venv.
$(VENV)/.legacy: $(VENV)/.test
	rm -rf $(VENV)/legacy
	$(PIP) --target $(VENV)/legacy --no-deps --group legacy
	touch $@

# The Python sources of vLLM releases, and what their modules import on the CPU.
$(VENV)/.vllm: $(VENV)/.test tests/vllm_release.py
	$(PIP) --group vllm
	$(PIP) --no-deps --group vllm-alone
	$(BIN)/python tests/vllm_release.py $(VLLM)
	touch $@

# Packages that patch vLLM's LoRA, for tests beside them: in a directory that only those import.
$(VENV)/.beside: $(VENV)/.vllm
	rm -rf $(VENV)/beside
	$(PIP) --target $(VENV)/beside --no-deps --group beside
	touch $@

# Megatron and its bridge: their Python files, which ask for Python 3.12 and run on others.
$(VENV)/.megatron: $(VENV)/.test
	rm -rf $(VENV)/megatron
	$(PIP) --target $(VENV)/megatron --no-deps --group megatron-needs
	$(PIP) --target $(VENV)/megatron --no-deps --only-binary :all: --python-version 3.12 --group megatron
	touch $@

$(VENV)/.site: $(VENV)/.test
	$(PIP) --group site
	touch $@

# A local Ray cluster, for the recipe of batches: in a directory that only its tests import.
$(VENV)/.ray: $(VENV)/.test
	rm -rf $(VENV)/ray
	$(PIP) --target $(VENV)/ray --group ray
	touch $@

# Its tests are skipped where there is no Chromium (`apt-get install chromium`).
$(VENV)/.browser: $(VENV)/.test
	$(PIP) --group browser
	touch $@

# In an environment of its own, as what it needs is not what lorashard is made of.
$(VENV)/.sbom: $(VENV)/.test
	$(PYTHON) -m venv --clear $(VENV)/sbom
	$(VENV)/sbom/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(VENV)/sbom/bin/python -m pip install --quiet --group sbom
	touch $@

$(VENV)/.fuzz: $(VENV)/.test
	$(PIP) --group fuzz
	touch $@

$(VENV)/.mutation: $(VENV)/.test
	$(PIP) --group mutation
	touch $@

$(VENV)/.lint: $(VENV)/.base
	$(PIP) --group lint --group test
	touch $@
