# Every target sets up what it needs. `make PYTHON=python3.12 setup` chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready

.PHONY: setup demo test test-exhaustive lint bench clean

setup: $(STAMP)
	@$(BIN)/python -m dcl_lightning.distributed.install

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -U pip setuptools wheel packaging
	$(BIN)/python -m pip install -q -c constraints.txt torch torchvision
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[plot,loggers,rich,timm,dev]'
	touch $(STAMP)

demo: setup
	$(BIN)/python cli.py fit --config configs/icarl_digits.yaml --trainer.strategy horovod --trainer.devices 2 --data.init_args.batch_size 8

test: setup
	$(BIN)/python -m pytest

test-exhaustive: setup
	$(BIN)/python -m pytest -m "exhaustive or not exhaustive"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	@for file in $(filter-out benchmarks/common.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$file || exit 1; done

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
