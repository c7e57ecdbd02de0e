import importlib.metadata
from pathlib import Path

import llama_index_gemma_rag
import pytest
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index_gemma_rag import GemmaEmbedding, GroundedQueryEngine, ThresholdPostprocessor, TwoStageRetriever

HERE = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (GemmaEmbedding, BaseEmbedding),
        (TwoStageRetriever, BaseRetriever),
        (ThresholdPostprocessor, BaseNodePostprocessor),
        (GroundedQueryEngine, BaseQueryEngine),
    ],
)
def test_class(ours, theirs):
    names_of_base_classes = [b.__name__ for b in ours.__mro__]
    assert theirs.__name__ in names_of_base_classes


def test_the_front_door_has_four_names():
    assert llama_index_gemma_rag.__all__ == [
        "GemmaEmbedding",
        "GroundedQueryEngine",
        "ThresholdPostprocessor",
        "TwoStageRetriever",
    ]


@pytest.mark.parametrize("name", llama_index_gemma_rag.__all__)
def test_public_names_are_documented(name):
    ours = getattr(llama_index_gemma_rag, name)
    public = [getattr(ours, each) for each in vars(ours) if not each.startswith(("_", "model_", "custom_model_dump"))]
    assert ours.__doc__
    assert all(each.__doc__ for each in public if callable(each))


def test_llamahub_lists_the_public_classes():
    tomllib = pytest.importorskip("tomllib", reason="part of Python since 3.11")
    hub = tomllib.loads((HERE / "pyproject.toml").read_text())["tool"]["llamahub"]
    assert hub["import_path"] == "llama_index_gemma_rag"
    assert sorted(hub["class_authors"]) == llama_index_gemma_rag.__all__


def test_the_distribution_depends_on_the_core_and_on_llama_index_core_alone():
    required = importlib.metadata.requires("llama-index-gemma-rag")
    assert sorted(required) == ["gemma-rag", "llama-index-core>=0.12"]


def test_it_says_that_it_is_typed():
    assert (HERE / "llama_index_gemma_rag" / "py.typed").exists()
