"""Any embeddings as a model of mteb, the package that runs the Massive Text Embedding Benchmark: prompts, titles and all.

    import mteb
    from gemma_rag import GemmaEmbeddings
    from gemma_rag.mteb_adapter import GemmaMteb

    results = mteb.evaluate(GemmaMteb(GemmaEmbeddings()), mteb.get_tasks(tasks=["NFCorpus", "STSBenchmark"]))

mteb downloads the data of its tasks and keeps results in a folder of its own; nothing here asks the network.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np

from gemma_rag.encoders.base import Encoder, Input, is_encoder
from gemma_rag.errors import InputError, MissingExtra
from gemma_rag.prompts import Task
from gemma_rag.vectors import Floats

logger = logging.getLogger(__name__)

TASK_BY_TYPE: Mapping[str, Task] = MappingProxyType(
    {
        "Retrieval": Task.QUERY,
        "Reranking": Task.QUERY,
        "InstructionRetrieval": Task.QUERY,
        "InstructionReranking": Task.QUERY,
        "Any2AnyRetrieval": Task.QUERY,
        "BitextMining": Task.QUERY,
        "Classification": Task.CLASSIFICATION,
        "MultilabelClassification": Task.CLASSIFICATION,
        "ZeroShotClassification": Task.CLASSIFICATION,
        "Regression": Task.CLASSIFICATION,
        "Clustering": Task.CLUSTERING,
        "PairClassification": Task.SIMILARITY,
        "STS": Task.SIMILARITY,
        "Summarization": Task.SUMMARIZATION,
    }
)
"""By mteb's task type, what its texts are embedded for; in the types of `_WITH_DOCUMENTS`, its queries.

As the configuration of google/embeddinggemma-300m has it, where that names the type, with one exception: its
``InstructionRetrieval`` has the prompt of code retrieval, and mteb's tasks of that type look for articles."""

_WITH_DOCUMENTS = frozenset({"Retrieval", "Reranking", "InstructionRetrieval", "InstructionReranking", "Any2AnyRetrieval"})

_ABOUT_THE_WEIGHTS = (
    "release_date",
    "languages",
    "n_parameters",
    "license",
    "open_weights",
    "public_training_code",
    "public_training_data",
    "training_datasets",
    "reference",
)
"""What mteb's own entry of a model says that is true however the model is run."""

_LANGUAGES = {"en": "eng-Latn", "zh": "zho-Hans"}
"""From the languages of a `PromptProfile` to mteb's."""


class GemmaMteb:
    """A model for ``mteb.evaluate`` that embeds every text of a benchmark as `embeddings` would: an mteb ``EncoderProtocol``.

    Queries are embedded under `Task.QUERY` (`Task.CODE_QUERY` in tasks of code retrieval), documents under
    `Task.DOCUMENT` with their titles, the texts of other tasks as `TASK_BY_TYPE` says. mteb keeps results by the model's
    name and revision, and the revision is the fingerprint of the vectors' `Space`: other weights, prompts, dimensions or
    a shorter context are another revision.

    Scores are not quite those that mteb's own wrappers of EmbeddingGemma give: these embed the documents of reranking
    tasks as queries, and that of embeddinggemma-300m writes a document's title into its text.

    Batches and progress bars are as the embeddings' own settings say; mteb's ``batch_size`` and ``show_progress_bar`` change
    nothing.

    Args:
        embeddings: `GemmaEmbeddings`, or any other `Encoder`.

    Raises:
        MissingExtra: mteb is not installed.
        InputError: `embeddings` is no encoder.
    """

    def __init__(self, embeddings: Encoder) -> None:
        if importlib.util.find_spec("mteb") is None:
            raise MissingExtra("mteb", "mteb")
        if isinstance(embeddings, type) or not is_encoder(embeddings):
            raise InputError(f"GemmaMteb needs embeddings, such as GemmaEmbeddings(), and got {embeddings!r}")
        self.embeddings = embeddings

    @cached_property
    def mteb_model_meta(self) -> Any:
        """The model as mteb's ``ModelMeta``; loads the model, and asks no hub.

        What is known of the weights alone (languages, licence, training sets) comes from mteb's own entry of the model,
        where it has one.
        """
        from mteb import get_model_meta
        from mteb.models import ModelMeta

        space, profile = self.embeddings.space, self.embeddings.profile
        spoken = [_LANGUAGES[code] for code in profile.languages if code in _LANGUAGES]
        about: dict[str, Any] = dict.fromkeys(_ABOUT_THE_WEIGHTS) | {"languages": spoken or None}
        try:
            entry = get_model_meta(space.model, fetch_from_hf=False)
        except KeyError:
            pass
        else:
            about = {name: getattr(entry, name) for name in _ABOUT_THE_WEIGHTS}
        return ModelMeta(
            loader=None,
            name=space.model if "/" in space.model else f"local/{space.model}",  # mteb wants an owner
            revision=space.fingerprint,
            embed_dim=space.dimensions,
            max_tokens=space.max_tokens,
            memory_usage_mb=None,
            framework=["Sentence Transformers", "PyTorch"] if space.runtime == "sentence-transformers" else [],
            similarity_fn_name="cosine",
            use_instructions=any(profile.prompts.values()),
            **about,
        )

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: str | None = None,
        **kwargs: Any,
    ) -> Floats:
        """Embed the texts of a task, all batches in one pass.

        Args:
            inputs: mteb's batches: a ``DataLoader`` of dictionaries with ``text``, and ``title`` and ``body`` for documents.
            task_metadata: mteb's ``TaskMetadata`` of the task; its type and subtypes choose what the texts are embedded for.
            hf_split: The split; not needed here.
            hf_subset: The subset; not needed here.
            prompt_type: ``query`` or ``document`` in tasks that have both, else None.
            **kwargs: mteb's ``EncodeKwargs``, see the class.

        Returns:
            float32 of shape ``(texts, dimensions)``, rows of norm 1, in order. The row of an empty text, which benchmarks
            hold and encoders refuse, is all zeros, which is like nothing (one warning that counts them).

        Raises:
            InputError: A task type that is not known here, a batch without text, or a ``precision`` other than float32.
        """
        if kwargs.get("precision") not in (None, "float32"):
            raise InputError(
                f"mteb asks for vectors in {kwargs['precision']}, and gemma-rag gives float32: "
                "leave precision out of encode_kwargs"
            )
        task = task_for(task_metadata, prompt_type)
        items = [item for batch in inputs for item in _items(batch, task)]
        written = [i for i, item in enumerate(items) if item.text.strip()]
        rows = np.zeros((len(items), self.embeddings.space.dimensions), dtype=np.float32)
        if len(written) < len(items):
            logger.warning(
                "%d of the %d texts that %s gave are empty, and have zeros for a vector",
                len(items) - len(written),
                len(items),
                task_metadata.name,
            )
        if written:
            rows[written] = self.embeddings.encode([items[i] for i in written])
        return rows

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines of every row of one array with every row of the other: a tensor of shape ``(n, m)``."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosine of each row of one array with the same row of the other: a tensor of shape ``(n,)``."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)


def task_for(task_metadata: Any, prompt_type: str | None = None) -> Task:
    """What the texts of an mteb task are embedded for.

    Args:
        task_metadata: mteb's ``TaskMetadata``.
        prompt_type: ``query`` or ``document``. It matters in retrieval and reranking alone: where two texts are only
            compared, as in a few tasks of pair classification that give it, both are embedded alike.

    Raises:
        InputError: The type of the task is not in `TASK_BY_TYPE`.
    """
    kind = task_metadata.type
    if kind not in TASK_BY_TYPE:
        raise InputError(
            f"the mteb task {task_metadata.name} is of type {kind}, which gemma-rag has no prompt for. "
            f"It runs {', '.join(TASK_BY_TYPE)}"
        )
    if kind not in _WITH_DOCUMENTS:
        return TASK_BY_TYPE[kind]
    if prompt_type == "document":
        return Task.DOCUMENT
    return Task.CODE_QUERY if "Code retrieval" in (task_metadata.task_subtypes or ()) else TASK_BY_TYPE[kind]


def _items(batch: Mapping[str, Any], task: Task) -> list[Input]:
    if "text" not in batch:
        raise InputError(f"mteb gave a batch of {', '.join(batch)}, and only text can be embedded")
    texts = batch["text"]
    if task is not Task.DOCUMENT or "body" not in batch:
        return [Input(text, task) for text in texts]
    titles = batch.get("title") or [None] * len(texts)
    return [  # a document that has nothing but a title: `text`, where mteb joins the two, is that title
        Input(body, task, title or None) if body.strip() else Input(text, task)
        for text, body, title in zip(texts, batch["body"], titles, strict=True)
    ]


__all__: Sequence[str] = ["TASK_BY_TYPE", "GemmaMteb", "task_for"]
