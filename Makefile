# Two commands do everything, set-up included: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venvs/trl
BIN := $(VENV)/bin
# verl and a recent TRL cannot live in one environment.
VERL_VENV := .venvs/verl
VERL_BIN := $(VERL_VENV)/bin
# Tests run in as many processes as there are cores, so each of them keeps to one thread. `nproc` would take that for the cores.
WORKERS ?= $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2)
ENVIRONMENT := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
TEST := $(ENVIRONMENT) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
TEST_VERL := $(ENVIRONMENT) $(VERL_BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder tests/integrations/verl tests/examples
INSTALL := python -m pip install --quiet --disable-pip-version-check
# The lowest that is supported, the one that many machines have, and the newest: torch:transformers.
TORCH_VERSIONS ?= 2.8.0:5.5.0 2.11.0:5.17.0 2.15.0:5.24.0
VERSION_TESTS := tests/attention $(addprefix tests/modeling/test_,attention.py carrier.py enable.py inputs.py) tests/test_scoring.py tests/test_scoring_published.py
TRL_VERSIONS ?= 0.29.1 1.9.2 1.14.2 1.16.0

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-verl test test-fast test-exhaustive test-matrix test-versions bench bench-gpu gpu-check gpu-speed gpu-update support-table trust audit docs dist lint format clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s%s\n", $$1, $$2}'

setup: ## the development environments, in .venvs
	@$(MAKE) --no-print-directory -j2 $(VENV)/ready $(VERL_VENV)/ready

$(VENV)/ready: setup.cfg pyproject.toml requirements/trl.txt
	@echo "Setting up $(VENV); this takes a minute or two the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) -c requirements/trl.txt -e '.[trl,dev]'
	@touch $@

$(VERL_VENV)/ready: setup.cfg pyproject.toml requirements/verl.txt
	@echo "Setting up $(VERL_VENV); this takes a minute or two the first time"
	$(PYTHON) -m venv $(VERL_VENV)
	$(VERL_BIN)/$(INSTALL) -c requirements/verl.txt -e '.[verl,test]'
	@touch $@

demo: $(VENV)/ready ## TRL: train a tiny model with and without sharing, compare, draw a picture (2 to 5 minutes)
	@$(BIN)/python examples/trl/demo.py

demo-verl: $(VERL_VENV)/ready ## verl: the same on Ray, with two data-parallel workers (2 to 5 minutes)
	@$(VERL_BIN)/python examples/verl/demo.py

test: setup ## all tests
	$(TEST)
	$(TEST_VERL)

test-fast: setup ## the tests that take less than ten seconds each
	$(TEST) -m 'not slow and not exhaustive'
	$(TEST_VERL) -m 'not slow and not exhaustive'

test-exhaustive: setup ## the full grid of settings against the stock trainer (half an hour)
	$(TEST) -m exhaustive
	$(TEST_VERL) -m exhaustive

MATRIX := .venvs/matrix

# Older releases read tool calls with jmespath.
$(MATRIX)/trl-%/ready: | $(VENV)/ready
	$(BIN)/$(INSTALL) --no-deps --upgrade --target $(@D) trl==$* jmespath
	@touch $@

# A release that fails does not keep the others from running; the last lines say how each of them went. The path is a full
# one: some tests start processes in other folders, which would import the TRL of the environment.
test-matrix: $(TRL_VERSIONS:%=$(MATRIX)/trl-%/ready) ## the TRL tests on every supported TRL release, and the result of each (long)
	@rm -f $(MATRIX)/failed; for version in $(TRL_VERSIONS); do \
	  echo "== trl $$version"; \
	  { PYTHONPATH="$(CURDIR)/$(MATRIX)/trl-$$version" EXPECTED_TRL=$$version $(TEST) -rs tests/integrations/trl || touch $(MATRIX)/failed; } \
	    2>&1 | tee $(MATRIX)/trl-$$version.log; \
	done
	@for version in $(TRL_VERSIONS); do echo "trl $$version: $$(tail -n 1 $(MATRIX)/trl-$$version.log)"; done; [ ! -e $(MATRIX)/failed ]

# As in `test-matrix`: what cannot be installed here is said, and keeps nothing else from running.
test-versions: ## the tests of attention and of the packed model on each torch and transformers of TORCH_VERSIONS (some GB for each)
	@mkdir -p .venvs; rm -f .venvs/torch-failed; for pair in $(TORCH_VERSIONS); do \
	  environment=.venvs/torch-$${pair%:*}; log=$$environment.log; \
	  echo "== torch $${pair%:*}, transformers $${pair#*:}"; \
	  { { [ -x $$environment/bin/python ] || $(PYTHON) -m venv $$environment; } \
	    && $$environment/bin/$(INSTALL) torch==$${pair%:*} transformers==$${pair#*:} peft -e '.[test]'; } >$$log 2>&1 \
	    || { touch .venvs/torch-failed; tail -n 3 $$log; echo "not tested: it could not be installed, see above and $$log" | tee -a $$log; continue; }; \
	  { $(ENVIRONMENT) $$environment/bin/python -m pytest -n $(WORKERS) $(VERSION_TESTS) || touch .venvs/torch-failed; } 2>&1 | tee $$log; \
	done
	@for pair in $(TORCH_VERSIONS); do echo "torch $${pair%:*}, transformers $${pair#*:}: $$(tail -n 1 .venvs/torch-$${pair%:*}.log)"; done; \
	  [ ! -e .venvs/torch-failed ]

bench: $(VENV)/ready ## the CPU benchmarks, then the pictures and tables of docs/benchmarks.md (about 20 minutes)
	@set -e; for script in attention growth flops actor_update training pairs prompt_reuse plan_check recipes plot; do $(ENVIRONMENT) $(BIN)/python benchmarks/$$script.py; done

bench-gpu: $(VENV)/ready ## the GPU benchmarks, then pictures and tables (about 20 minutes on a data-centre GPU)
	@set -e; for script in attention growth actor_update; do $(BIN)/python benchmarks/$$script.py --device cuda; done
	@$(BIN)/python benchmarks/plot.py

# On a bare machine: no environment is made, nothing is installed; say GPU_PYTHON=... for another interpreter, GPU_OPTIONS=... for options.
GPU_PYTHON ?= python3
GPU_OPTIONS ?=
gpu-check: ## is attention on this GPU right? every backend against torch's, in poisoned memory; then the GPU tests (below 10 minutes)
	@PYTHONPATH=. $(GPU_PYTHON) benchmarks/gpu_check.py $(GPU_OPTIONS)

gpu-speed: ## how fast is attention on this GPU, against rows and gathered keys? (below 10 minutes)
	@PYTHONPATH=. $(GPU_PYTHON) benchmarks/gpu_speed.py $(GPU_OPTIONS)

gpu-update: ## what does an actor update cost on this GPU, rows against ours? (below 10 minutes)
	@PYTHONPATH=. $(GPU_PYTHON) benchmarks/gpu_update.py $(GPU_OPTIONS)

support-table: $(VENV)/ready ## build every model type tiny, compare and time it, then the tables of docs/models.md (about 6 minutes)
	@$(ENVIRONMENT) $(BIN)/python -m tests.modeling.support_table

trust: setup ## random inputs, long runs, learning curves, faults, trainings that are killed and resumed, in one table (half an hour)
	@$(ENVIRONMENT) $(BIN)/python -m tests.trust.summary

# An environment of its own, so that the tool's dependencies meet none of ours.
audit: ## known vulnerabilities of the pinned packages, asked of PyPI; says so and passes where that cannot be asked
	@[ -x .venvs/audit/bin/pip-audit ] || { $(PYTHON) -m venv .venvs/audit && .venvs/audit/bin/$(INSTALL) pip-audit==2.10.1; } || true
	@python=.venvs/audit/bin/python; [ -x $$python ] || python=$(PYTHON); $$python requirements/audit.py requirements/trl.txt requirements/verl.txt

docs: $(VENV)/ready ## the documentation site, in site/; warnings are errors
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Where files of the release can be read, such as https://github.com/OWNER/NAME/blob/v0.1.0; the package's page links there.
RELEASE_URL ?=
dist: $(VENV)/ready ## the wheel and the source archive of the last commit, in dist/, checked by twine; RELEASE_URL=... for links
	rm -rf dist build
	mkdir -p build/tree && git archive HEAD | tar -x -C build/tree
	$(BIN)/python docs/package_page.py build/tree/README.md $(RELEASE_URL)
	$(BIN)/python -m build build/tree --outdir dist
	$(BIN)/python -m twine check --strict dist/*

lint: $(VENV)/ready ## style, formatting, types, and which way imports point
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports --no-cache

format: $(VENV)/ready ## put the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove environments, caches and the demo's results
	rm -rf .venvs demo build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
