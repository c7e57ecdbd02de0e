import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import langchain_gemma_rag
from langchain_core.documents import BaseDocumentCompressor
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever

import gemma_rag

HERE = Path(__file__).parents[2]


def test_the_front_door_has_six_names():
    assert langchain_gemma_rag.__all__ == [
        "GemmaEmbeddings",
        "Retrieved",
        "RoleSafeCache",
        "ThresholdFilter",
        "TwoStageRetriever",
        "create_grounded_chain",
    ]


def test_the_classes_are_langchains():
    assert issubclass(langchain_gemma_rag.TwoStageRetriever, BaseRetriever)
    assert issubclass(langchain_gemma_rag.ThresholdFilter, BaseDocumentCompressor)
    assert issubclass(langchain_gemma_rag.RoleSafeCache, Embeddings)
    assert langchain_gemma_rag.GemmaEmbeddings is gemma_rag.GemmaEmbeddings


def test_the_version_is_that_of_the_distribution():
    assert metadata.version("langchain-gemma-rag") == langchain_gemma_rag.__version__


def test_it_is_typed():
    assert (Path(langchain_gemma_rag.__file__).parent / "py.typed").exists()


def test_importing_it_loads_no_model_and_no_store():
    code = (
        "import sys, langchain_gemma_rag; "
        "print(sorted({'torch', 'transformers', 'chromadb', 'pymilvus', 'faiss', 'qdrant_client'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_example_of_the_readme_is_short_and_says_what_it_prints(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = example.splitlines()
    assert len(lines) <= 12
    exec(example, {"__name__": "example"})
    said = [line.rpartition("  # ")[2] for line in lines if line.startswith("print(")]
    assert capsys.readouterr().out.splitlines() == said
