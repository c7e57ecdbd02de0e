"""The frameworks' own wrappers, on the work that engines.py sends as JSON to standard input; prints JSON.

Runs in an environment of its own, because langchain-huggingface and our dependencies do not always agree:
langchain-huggingface, llama-index-embeddings-huggingface, fastembed, torch.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "sentence-transformers", "langchain-huggingface", "llama-index-embeddings-huggingface", "fastembed")
Pair = tuple[Callable[[list[str]], Any], Callable[[str], Any]]


def langchain(work: dict[str, Any]) -> Pair:
    from langchain_huggingface import HuggingFaceEmbeddings

    model = HuggingFaceEmbeddings(model_name=work["model"], model_kwargs={"device": "cpu"})
    return model.embed_documents, model.embed_query


def llama_index(work: dict[str, Any]) -> Pair:
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    model = HuggingFaceEmbedding(model_name=work["model"], device="cpu")
    return model.get_text_embedding_batch, model.get_query_embedding


def fastembed(work: dict[str, Any]) -> Pair:
    """fastembed wants a folder as the hub has them: the graph with its weights, and the tokenizer's files."""
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    folder = Path(tempfile.mkdtemp())
    for source in (*Path(work["onnx"]).glob("model.onnx*"), *Path(work["model"]).glob("*.json")):
        if not (folder / source.name).exists():
            (folder / source.name).symlink_to(source.resolve())
    TextEmbedding.add_custom_model(
        model="local/model",
        pooling=PoolingType.DISABLED,
        normalization=False,
        sources=ModelSource(url="file:///nowhere"),
        dim=768,
        model_file="model.onnx",
    )
    model = TextEmbedding("local/model", specific_model_path=str(folder), local_files_only=True)
    return lambda texts: list(model.embed(texts)), lambda text: list(model.query_embed(text))


def main() -> None:
    work = json.load(sys.stdin)
    seconds = {}
    wrappers = {
        "LangChain HuggingFaceEmbeddings": langchain,
        "LlamaIndex HuggingFaceEmbedding": llama_index,
        "fastembed, our onnx float32": fastembed,
    }
    for name, make in wrappers.items():
        texts, question = make(work)
        question(work["question"])
        best = {"bulk": float("inf"), "question": float("inf")}
        for _ in range(work["rounds"]):
            started = time.perf_counter()
            texts(work["texts"])
            best["bulk"] = min(best["bulk"], time.perf_counter() - started)
            started = time.perf_counter()
            question(work["question"])
            question(work["question"])
            best["question"] = min(best["question"], time.perf_counter() - started)
        seconds[name] = best
    print(json.dumps({"seconds": seconds, "versions": {package: version(package) for package in PACKAGES}}))


if __name__ == "__main__":
    main()
