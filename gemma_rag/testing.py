"""Models with the real architecture and random weights, for tests and measurements where no model hub is in reach.

Their vectors mean nothing, but they are computed by the same code, from the same prompts, at the same cost.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from gemma_rag.prompts import EMBEDDINGGEMMA, EMBEDDINGGEMMA_2, PromptProfile, Task

_WORDS = "the quick brown fox jumps over the lazy dog; how do I reset my password in the portal? 如何重置密码 请假流程"

_PROMPT_NAMES: Mapping[str, Task] = {  # the names in google/embeddinggemma-300m's own configuration
    "query": Task.QUERY,
    "document": Task.DOCUMENT,
    "BitextMining": Task.QUERY,
    "Clustering": Task.CLUSTERING,
    "Classification": Task.CLASSIFICATION,
    "InstructionRetrieval": Task.CODE_QUERY,
    "MultilabelClassification": Task.CLASSIFICATION,
    "PairClassification": Task.SIMILARITY,
    "Reranking": Task.QUERY,
    "Retrieval": Task.QUERY,
    "Retrieval-query": Task.QUERY,
    "Retrieval-document": Task.DOCUMENT,
    "STS": Task.SIMILARITY,
    "Summarization": Task.SUMMARIZATION,
}

_PROMPT_NAMES_2: Mapping[str, Task] = {  # those that google/embeddinggemma-2 is known to have besides
    "query": Task.QUERY,
    "document": Task.DOCUMENT,
    "SearchQuery": Task.QUERY,
    "Document": Task.DOCUMENT,
    "Classification": Task.CLASSIFICATION,
    "Clustering": Task.CLUSTERING,
    "SentenceSimilarity": Task.SIMILARITY,
    "Summarization": Task.SUMMARIZATION,
    "CodeRetrieval": Task.CODE_QUERY,
    "QuestionAnswering": Task.QUESTION_ANSWERING,
    "FactChecking": Task.FACT_CHECKING,
}

_TINY = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 3, "head_dim": 16}
_TINY_2 = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 16,
    "embedding_dim": 48,
    "max_position_embeddings": 16_384,
}
_FULL = {"hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 24, "num_attention_heads": 3, "head_dim": 256}


def _tokenizer(corpus: Iterable[str]) -> Any:
    """A byte-pair tokenizer of Gemma's form, trained on a few sentences."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    special += ["<start_of_turn>", "<end_of_turn>"]
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=2048, special_tokens=special, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    return GemmaTokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        add_bos_token=True,
        add_eos_token=True,
        padding_side="right",
        model_max_length=2048,
    )


def build_random_embeddinggemma(
    folder: str | Path, size: Literal["tiny", "full"] = "tiny", seed: int = 0, generation: Literal[1, 2] = 1
) -> Path:
    """Write an EmbeddingGemma with random weights, to be loaded like the true one.

    The first generation: Gemma 3 text encoder with bidirectional attention, mean pooling, two Dense layers without bias,
    Normalize. The second: the text half of EmbeddingGemma 2, whose projection is in the encoder, mean pooling, Normalize.
    Both with the prompts of the true model's configuration.

    Args:
        folder: Where to write it; made where it is missing. Its name should say the generation, as the true model's does.
        size: ``tiny``, about 160 (80) thousand parameters in seconds; ``full``, the true sizes, 307.6 million parameters in
            about 20 s (first generation), 271 million (second).
        seed: Seed of the weights.
        generation: Which EmbeddingGemma.

    Returns:
        The folder.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer

    torch.manual_seed(seed)
    prompts = (
        _named_prompts(EMBEDDINGGEMMA, _PROMPT_NAMES) if generation == 1 else _named_prompts(EMBEDDINGGEMMA_2, _PROMPT_NAMES_2)
    )
    tokenizer = _tokenizer([*prompts.values(), *[_WORDS] * 9])
    vocabulary = len(tokenizer) if size == "tiny" else 262_144
    body, width = _first_encoder(size, vocabulary) if generation == 1 else _second_encoder(size, vocabulary)
    dense = []
    if generation == 1:
        linear = {"bias": False, "activation_function": torch.nn.Identity()}
        dense = [Dense(width, 4 * width, **linear), Dense(4 * width, width, **linear)]
    with tempfile.TemporaryDirectory() as scratch:
        body.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        model = SentenceTransformer(
            device="cpu",
            prompts=prompts,
            similarity_fn_name="cosine",
            modules=[
                Transformer(scratch, max_seq_length=2048 if generation == 1 else 8192),
                Pooling(width, "mean"),
                *dense,
                Normalize(),
            ],
        )
    model.save_pretrained(str(folder), create_model_card=False)
    return Path(folder)


def _named_prompts(profile: PromptProfile, names: Mapping[str, Task]) -> dict[str, str]:
    return {name: profile.prompts[task] for name, task in names.items()}


def _first_encoder(size: str, vocabulary: int) -> tuple[Any, int]:
    from transformers import Gemma3TextConfig, Gemma3TextModel

    sizes = _TINY if size == "tiny" else _FULL
    config = Gemma3TextConfig(
        **sizes,
        num_key_value_heads=1,
        query_pre_attn_scalar=sizes["head_dim"],
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        sliding_window=512,
        use_bidirectional_attention=True,
    )
    return Gemma3TextModel(config), sizes["hidden_size"]


def _second_encoder(size: str, vocabulary: int) -> tuple[Any, int]:
    from transformers import EmbeddingGemma2TextConfig, EmbeddingGemma2TextModel

    special = {"vocab_size": vocabulary, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config = EmbeddingGemma2TextConfig(**special, **(_TINY_2 if size == "tiny" else {}))
    return EmbeddingGemma2TextModel(config), config.embedding_dim


def build_random_gemma(folder: str | Path, seed: int = 0) -> Path:
    """Write a tiny Gemma 3 language model with random weights and a chat template; what it writes means nothing.

    Args:
        folder: Where to write it; made where it is missing.
        seed: Seed of the weights.

    Returns:
        The folder.
    """
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(seed)
    tokenizer = _tokenizer([_WORDS] * 9)
    tokenizer.add_eos_token = False
    tokenizer.add_tokens(["<start_of_turn>", "<end_of_turn>"], special_tokens=True)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}<start_of_turn>"
        "{{ 'model' if message['role'] == 'assistant' else 'user' }}\n"
        "{{ message['content'] }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    )
    config = Gemma3TextConfig(
        **_TINY,
        num_key_value_heads=1,
        query_pre_attn_scalar=16,
        vocab_size=len(tokenizer),
        max_position_embeddings=8192,
        sliding_window=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Gemma3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)
