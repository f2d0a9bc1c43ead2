# make quickstart and make test are the two commands to know; both install what they need first.

PYTHON ?= python3.11
VENV := .venv
EXTRAS := quickstart,img2dataset,video,scores,heic,t5,s3,dev
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install quickstart test proofs lint format clean

help:
	@echo "make quickstart   run the whole pipeline on real captioned pictures, into out/quickstart"
	@echo "make test         lint, check types and run every test"
	@echo "make install      create $(VENV) and install mdm into it; the others do it when needed"
	@echo "make proofs       what takes too long for every change: killed refreshes, elastic training, S3 that fails"
	@echo "make lint         ruff, mypy and the layers"
	@echo "make format       let ruff rewrite the code"
	@echo "make clean        remove $(VENV) and caches; out/ stays"

install: $(INSTALLED)

# Written last, so that an interrupted install is done again.
$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
		echo "make: $(PYTHON) is not installed; wanted Python 3.11 with venv" \
			"(apt install python3.11 python3.11-venv), or say which: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

quickstart: install
	$(BIN)/mdm quickstart --out out/quickstart

test: lint
	$(BIN)/pytest

proofs: install
	$(BIN)/python -m tests.pipelines.data.accounting --links 20000 --kills 5
	$(BIN)/python -m tests.pipelines.data.accounting --links 20000 --kills 5 --s3 --fail_percent 5
	$(BIN)/pytest tests/pipelines/train/object_storage.py
	$(BIN)/pytest tests/pipelines/train/elastic.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
