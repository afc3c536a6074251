# make search | test | lint | format: each sets the machine up first (make setup), so a fresh clone needs nothing else.
PYTHON ?= python3
BIN := .venv/bin
RUN ?= quickstart
# Threads that spin while they wait make runs beside each other many times slower.
export OMP_WAIT_POLICY ?= passive

.PHONY: setup search test extras lint format lock clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: .venv/.ready  ## a .venv with everything pinned, and MNIST in the data cache
	@$(BIN)/python launch.py data fetch mnist digits

# torch comes first, with its dependencies and the lock as constraints, so that a GPU build gets its CUDA packages;
# the rest is pinned in full and takes no dependencies of its own (torchattacks' are false, docs/decisions.md).
.venv/.ready: requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint requirements.lock torch==$$(sed -n 's/^torch==//p' requirements.lock)
	$(BIN)/pip install --quiet --no-deps --requirement requirements.lock
	@touch $@

# The tests' own environment: the product's packages, and beside them what the extras name.
extras: .venv-extras/.ready  ## an environment with s3fs, an S3 server and Kubernetes' schemas, for the tests that need them

.venv-extras/.ready: .venv/.ready pyproject.toml requirements.lock
	$(BIN)/python -m venv --clear .venv-extras
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$(.venv-extras/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/product.pth
	mkdir .venv-extras/extras && cp pyproject.toml .venv-extras/extras  # pip builds in the folder that it installs
	.venv-extras/bin/pip install --quiet --constraint requirements.lock '.venv-extras/extras[s3,s3-server,kubernetes]'
	@touch $@

search: setup  ## the default search on real MNIST, embedded: local Ray, a journal file, W&B offline
	$(BIN)/python launch.py $(if $(wildcard runs/$(RUN)/study.yaml),resume $(RUN),search --name $(RUN) --config search/quickstart.yaml)
	$(BIN)/python launch.py export $(RUN) --top 1

# A file stays with one worker, since its tests share what they train; one thread each, or two would fight for a core.
test: setup  ## the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: .venv/.ready  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.ready  ## rewrite in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:  ## pin requirements.in anew (needs the package registry)
	rm -rf .venv && $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.in
	$(BIN)/pip install --quiet --no-deps torchattacks==3.5.1
	$(BIN)/pip freeze --all --exclude pip | sed -E 's/^(torch==[0-9.]+)\+.*/\1/; /^(nvidia|cuda|triton)/d' > requirements.lock

clean:  ## remove the environment; searches and data stay
	rm -rf .venv .venv-extras .pytest_cache .mypy_cache .ruff_cache
