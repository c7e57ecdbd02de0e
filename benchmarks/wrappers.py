"""What do the frameworks' own wrappers make of EmbeddingGemma? Their vectors beside the right ones, for the same texts.

The right ones are those of `GemmaEmbeddings`: the query prompt before a question, the document prompt with its title before a
document. Without --model they are measured on a tiny EmbeddingGemma with random weights: the prompts, the tokens and the layers
are real, the meaning is not. So a cosine below 1 says that another text was read, and not how many answers that costs.

The wrappers run in an environment of their own, as those of peers.py do: torch, langchain-huggingface, langchain-ollama,
langchain-classic, llama-index-embeddings-huggingface. Nothing leaves the machine: Ollama is a listener in the same process.

usage: python benchmarks/wrappers.py --peers PYTHON [--model FOLDER] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from environment import environment

PACKAGES = (
    "torch",
    "transformers",
    "sentence-transformers",
    "langchain-huggingface",
    "langchain-ollama",
    "langchain-classic",
    "llama-index-core",
    "llama-index-embeddings-huggingface",
)
QUERY, DOCUMENT = "task: search result | query: ", "title: none | text: "
Work = dict[str, Any]
Vectors = dict[str, list[list[float]]]


# -- in the wrappers' environment ---------------------------------------------------------------------------------------


def langchain(work: Work) -> dict[str, Vectors]:
    from langchain_classic.embeddings import CacheBackedEmbeddings
    from langchain_core.stores import InMemoryByteStore
    from langchain_huggingface import HuggingFaceEmbeddings

    def vectors(model: Any) -> Vectors:
        queries = [model.embed_query(question) for question in work["questions"]]
        return {"queries": queries, "documents": model.embed_documents(work["texts"])}

    name, device = work["model"], {"device": "cpu"}
    query, document = {"prompt_name": "query"}, {"prompt_name": "document"}
    prompted = HuggingFaceEmbeddings(model_name=name, model_kwargs=device, encode_kwargs=document, query_encode_kwargs=query)
    cut = HuggingFaceEmbeddings(
        model_name=name,
        model_kwargs={**device, "truncate_dim": work["cut"]},
        encode_kwargs={**document, "normalize_embeddings": True},
        query_encode_kwargs=query,
    )
    cache = CacheBackedEmbeddings.from_bytes_store(
        prompted, InMemoryByteStore(), namespace=name, query_embedding_cache=True, key_encoder="sha256"
    )
    cache.embed_documents(work["questions"])
    return {
        "LangChain, as it comes": vectors(HuggingFaceEmbeddings(model_name=name, model_kwargs=device)),
        "LangChain, encode_kwargs with the document prompt": vectors(
            HuggingFaceEmbeddings(model_name=name, model_kwargs=device, encode_kwargs=document)
        ),
        "LangChain, both prompts named": vectors(prompted),
        "LangChain, both prompts named, cut": vectors(cut),
        "LangChain, both prompts named, cached": {"queries": [cache.embed_query(text) for text in work["questions"]]},
    }


def llama_index(work: Work) -> dict[str, Vectors]:
    from llama_index.core.schema import MetadataMode, TextNode
    from llama_index.core.storage.kvstore import SimpleKVStore
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    nodes = [TextNode(text=text, metadata={"title": title}) for text, title in zip(work["texts"], work["titles"], strict=True)]

    def vectors(model: Any) -> Vectors:
        queries = [model.get_query_embedding(question) for question in work["questions"]]
        contents = [node.get_content(metadata_mode=MetadataMode.EMBED) for node in nodes]
        return {"queries": queries, "documents": model.get_text_embedding_batch(contents)}

    name = work["model"]
    prompted = HuggingFaceEmbedding(model_name=name, device="cpu", query_instruction=QUERY, text_instruction=DOCUMENT)
    found = {
        "LlamaIndex, as it comes": vectors(HuggingFaceEmbedding(model_name=name, device="cpu")),
        "LlamaIndex, both prompts as instructions": vectors(prompted),
    }
    prompted.embeddings_cache = SimpleKVStore()
    prompted.get_text_embedding_batch(work["questions"])
    cached = [prompted.get_query_embedding(text) for text in work["questions"]]
    return {**found, "LlamaIndex, both prompts as instructions, cached": {"queries": cached}}


def ollama_requests(work: Work) -> list[dict[str, Any]]:
    """What LangChain's `OllamaEmbeddings` asks of a server, for one question and one document."""
    from langchain_ollama import OllamaEmbeddings

    asked: list[dict[str, Any]] = []

    class Listener(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            answer = json.dumps({"model": "embeddinggemma", "embeddings": [[1.0, 0.0]] * len(asked[-1]["input"])}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        model = OllamaEmbeddings(model="embeddinggemma", base_url=f"http://127.0.0.1:{server.server_port}")
        model.embed_query(work["questions"][0])
        model.embed_documents(work["texts"][:1])
        server.shutdown()
    return asked


def measure_here() -> None:
    work = json.load(sys.stdin)
    answer = {
        "vectors": langchain(work) | llama_index(work),
        "ollama": ollama_requests(work),
        "versions": {package: version(package) for package in PACKAGES},
    }
    print(json.dumps(answer))


# -- in ours ------------------------------------------------------------------------------------------------------------


def sample() -> Work:
    """The first two paragraphs of each English page of the sample handbook, and its English questions."""
    from gemma_rag import load_documents

    handbook = Path(str(files("gemma_rag"))) / "sample"
    documents = [page for page in load_documents(handbook / "handbook").documents if not page.id.endswith(".zh")]
    asked = [json.loads(line) for line in (handbook / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "questions": [row["question"] for row in asked if row["language"] == "en"],
        "texts": ["\n\n".join(page.text.split("\n\n")[1:3]) for page in documents],
        "titles": [page.title for page in documents],
    }


def ask_peers(python: Path, work: Work) -> dict[str, Any]:
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [str(python), __file__, "--inside"]
    done = subprocess.run(command, input=json.dumps(work), capture_output=True, text=True, check=False, env=quiet)
    if done.returncode:
        sys.exit(f"the wrappers failed: {done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def agreement(vectors: Any, right: np.ndarray) -> dict[str, float]:
    """Cosines of rows with the rows that they should be, and the norms that they came with."""
    rows = np.asarray(vectors, dtype=np.float64)
    norms = np.linalg.norm(rows, axis=1)
    cosines = (rows * right).sum(axis=1) / norms / np.linalg.norm(right, axis=1)
    return {
        "mean_cosine": round(float(cosines.mean()), 4),
        "smallest_cosine": round(float(cosines.min()), 4),
        "mean_norm": round(float(norms.mean()), 4),
    }


def compared(found: dict[str, Vectors], model: Path, work: Work) -> dict[str, Any]:
    from gemma_rag import GemmaEmbeddings

    ours = GemmaEmbeddings(model=str(model), device="cpu", show_progress=False)
    questions, texts, titles = work["questions"], work["texts"], work["titles"]
    queries, roles = ours.embed(questions, "query"), ours.embed(questions, "document")
    documents, untitled = ours.embed(texts, "document", titles), ours.embed(texts, "document")
    rows: dict[str, Any] = {}
    for name, vectors in found.items():
        width = work["cut"] if name.endswith("cut") else queries.shape[1]
        rows[name] = {"queries": agreement(vectors["queries"], queries[:, :width])}
        if "documents" in vectors:
            rows[name]["documents"] = agreement(vectors["documents"], documents[:, :width])
            rows[name]["documents_beside_untitled"] = agreement(vectors["documents"], untitled[:, :width])
        if name.endswith("cached"):
            rows[name]["queries_beside_document_vectors"] = agreement(vectors["queries"], roles)
    between = documents @ documents.T
    others = float(between[~np.eye(len(texts), dtype=bool)].mean())
    return {"rows": rows, "mean_cosine_of_two_right_documents": round(others, 4)}


def show(row: dict[str, float] | None) -> str:
    return f"{row['mean_cosine']:8.4f} {row['smallest_cosine']:9.4f} {row['mean_norm']:6.2f}" if row else " " * 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="a Python that has the wrappers' packages")
    parser.add_argument("--model", type=Path, help="a folder with EmbeddingGemma; default: a tiny one with random weights")
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        measure_here()
        return
    if options.peers is None:
        parser.error("--peers is missing: a Python that has the wrappers' packages")
    with contextlib.ExitStack() as stack:
        model = options.model
        if model is None:
            from gemma_rag.testing import build_random_embeddinggemma

            model = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "tiny-embeddinggemma"
            build_random_embeddinggemma(model)
        work = {**sample(), "model": str(model), "cut": 768 // 3 if options.model else 48 // 3}
        answer = ask_peers(options.peers, work)
        result = compared(answer["vectors"], model, work)
    print(f"{len(work['questions'])} questions, {len(work['texts'])} passages with titles")
    print(f"right vectors of two different passages: cosine {result['mean_cosine_of_two_right_documents']:.4f} on average")
    print(f"  {'':50s} {'queries: mean, smallest, norm':>32s} {'documents: mean, smallest, norm':>34s}")
    for name, row in result["rows"].items():
        print(f"  {name:50s}        {show(row['queries'])}          {show(row.get('documents'))}")
        if title := row.get("documents_beside_untitled"):
            print(f"  {'  beside the right vectors without titles':50s}        {show(None)}          {show(title)}")
        if same := row.get("queries_beside_document_vectors"):
            print(f"  {'  beside the document vectors of the same texts':50s}        {show(same)}")
    for body in answer["ollama"]:
        print(f"  OllamaEmbeddings sends {json.dumps(body, ensure_ascii=False)[:160]}")
    if options.out:
        result |= {"ollama_requests": answer["ollama"], "peer_versions": answer["versions"]}
        result = {**environment(), "model": "random weights" if options.model is None else model.name, **result}
        options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
