# Every target sets up what it needs. `make PYTHON=python3.12 setup` chooses the interpreter.
PYTHON ?= python3
PYTHONS ?= $(PYTHON)
BIN := .venv/bin
STAMP := .venv/.ready

# What `make test-latest` runs: the parts that take minutes and need no Horovod.
FAST := $(addprefix tests/,functional metrics memory backbones report callbacks checkpoint agents data cli \
	conformance/test_lightning_support.py distributed/test_lightning_relied_on.py)
LATEST := .venv-latest/bin

.PHONY: setup demo test test-exhaustive test-latest lint bench docs wheel clean

setup: $(STAMP)
	@$(BIN)/python -m dcl_lightning.tools.install_horovod

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -U pip setuptools wheel packaging
	$(BIN)/python -m pip install -q -c constraints.txt torch torchvision
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[plot,loggers,rich,timm,mnist5k,sweep,docs,dev]'
	touch $(STAMP)

demo: setup
	$(BIN)/python cli.py fit --config configs/icarl_digits.yaml --trainer.strategy horovod --trainer.devices 2 --data.init_args.batch_size 8

test: setup
# Two processes on two cores: threads of their own would wait for each other.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-exhaustive: setup
	$(BIN)/python -m pytest -m "exhaustive or not exhaustive"

# The fast part of the suite against the newest releases in the registry, in an environment of its own.
test-latest:
	test -x $(LATEST)/python || $(PYTHON) -m venv .venv-latest
	$(LATEST)/python -m pip install -q -U pip setuptools wheel
	$(LATEST)/python -m pip install -q -U --upgrade-strategy eager -e '.[plot,loggers,rich,timm,mnist5k,sweep,dev]'
	$(LATEST)/python .ci/versions.py
# Horovod is not installed there: tests that need it may be skipped, also in CI.
	CI= OMP_NUM_THREADS=1 $(LATEST)/python -m pytest -n 2 --dist loadfile $(FAST) \
		|| { $(LATEST)/python .ci/versions.py; exit 1; }

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/all.py

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build -q --strict

# Built and checked, then used from environments that have nothing of this folder.
# `make wheel PYTHONS="python3.10 python3.13"` chooses their interpreters.
wheel:
	rm -rf dist .wheel
	$(PYTHON) -m venv .wheel
	.wheel/bin/python -m pip install -q build twine
	.wheel/bin/python -m build -q
	.wheel/bin/python -m twine check --strict dist/*
	for python in $(PYTHONS); do $(USED_FROM_WHEEL) || exit 1; done
	rm -rf .wheel
	du -h dist/*

define USED_FROM_WHEEL
$$python --version && $$python -m venv --clear .wheel && cd .wheel \
	&& bin/python -m pip install -q -c ../constraints.txt ../dist/*.whl \
	&& bin/dcl-lightning fit --data.dataset digits --model nil --trainer.accelerator cpu --trainer.fast_dev_run 2 \
	&& bin/dcl-lightning cite --model nil --data.dataset digits \
	&& bin/python -m pip install -q --no-deps --force-reinstall ../dist/*.tar.gz && bin/dcl-lightning --version && cd ..
endef

clean:
	rm -rf .venv .venv-latest .wheel dist runs site .pytest_cache .mypy_cache .ruff_cache .hypothesis
