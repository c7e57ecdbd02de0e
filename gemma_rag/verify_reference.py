"""Right vectors to verify an encoder against, and the vectors that each fault would give.

Computed by the sentence-transformers library itself, in float32 on the CPU, from texts whose prompts are written out, so
that they owe nothing to the encoders that are verified with them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gemma_rag.encoders.base import Space, prompts_digest
from gemma_rag.encoders.settings import EncoderSettings
from gemma_rag.errors import InputError
from gemma_rag.prompts import PromptProfile
from gemma_rag.vectors import Floats, unit
from gemma_rag.verify_texts import Fault, misreadings, probes, probes_digest, right_text, suspects

CUTS = (32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
"""Tokens at which texts are cut too early, to see what that gives."""
_CUT_PROBES = 4
"""Most texts that are cut at each of them; the longest take the time."""
_MADE_WITH = ("sentence-transformers", "transformers", "torch")


class Alternative(BaseModel):
    """What one text's vector would be if something were wrong.

    Attributes:
        probe: The text's place in `gemma_rag.verify_texts.probes`.
        faults: What would be wrong.
        how: In words, after "are those of".
        cut: Tokens at which the text was cut; None for no cut.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    probe: int = Field(ge=0)
    faults: tuple[Fault, ...]
    how: str
    cut: int | None = None


class _About(BaseModel):
    """The description in a reference file."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    format: Literal["gemma-rag reference"] = "gemma-rag reference"
    version: Literal[1] = 1
    probes: str
    space: Space
    matryoshka: tuple[int, ...]
    lengths: tuple[int, ...]
    alternatives: tuple[Alternative, ...]
    pooled: tuple[Alternative, ...]
    made_with: dict[str, str]
    sha256: str


@dataclass(frozen=True, eq=False)
class Reference:
    """Right vectors for every text of `gemma_rag.verify_texts.probes`, and wrong ones for some.

    Attributes:
        space: What made them.
        matryoshka: Dimensions below the native one that the model was trained to be cut to.
        lengths: Tokens of each text as the model reads it, prompt included, nothing cut.
        right: float32 of shape ``(probes, native dimensions)``, rows of norm 1.
        alternatives: What the rows of `wrong` are.
        wrong: float16, one row of the native dimension for each of them.
        pooled: What the rows of `pooled_wrong` are: vectors of the model without its Dense layers.
        pooled_wrong: float16, rows of the model's hidden size; none where it has no Dense layers.
        made_with: Versions of the libraries.
    """

    space: Space
    matryoshka: tuple[int, ...]
    lengths: tuple[int, ...]
    right: Floats
    alternatives: tuple[Alternative, ...]
    wrong: npt.NDArray[np.float16]
    pooled: tuple[Alternative, ...]
    pooled_wrong: npt.NDArray[np.float16]
    made_with: dict[str, str]

    @classmethod
    def from_model(cls, model: str | EncoderSettings) -> Reference:
        """Compute the vectors of a model with sentence-transformers: seconds for a small one, minutes for EmbeddingGemma.

        Args:
            model: As in `EncoderSettings.model`; or settings, of which the model, its revision, the token, the prompts and
                the context count. Dimensions and precision are always the model's own and float32.

        Raises:
            MissingExtra: sentence-transformers is not installed.
            ModelUnavailable: The model cannot be had; the message says what to do.
        """
        from gemma_rag.encoders.checks import chosen_context, chosen_profile
        from gemma_rag.encoders.sentence_transformers import find_source, load_model, weights_digest

        given = model if isinstance(model, EncoderSettings) else EncoderSettings(model=model)
        settings = EncoderSettings(
            runtime="sentence-transformers",
            device="cpu",
            **{name: getattr(given, name) for name in ("model", "revision", "token", "prompts", "max_tokens")},
        )
        source = find_source(settings)
        loaded = load_model(settings, source)
        profile = chosen_profile(settings, source.name, dict(loaded.prompts))
        loaded.max_seq_length = chosen_context(settings, loaded.max_seq_length, profile, source.name)
        native = int(loaded.get_embedding_dimension())
        space = Space(
            model=source.name,
            weights=weights_digest(loaded),
            prompts=prompts_digest(profile),
            dimensions=native,
            max_tokens=loaded.max_seq_length,
            overflow="truncate",
            runtime="sentence-transformers",
            precision="float32",
        )
        return _computed(loaded, profile, space)

    def save(self, path: str | Path) -> None:
        """Write one file, to verify with where the model itself is not at hand.

        Raises:
            InputError: The file cannot be written there.
        """
        about = _About(
            probes=probes_digest(),
            space=self.space,
            matryoshka=self.matryoshka,
            lengths=self.lengths,
            alternatives=self.alternatives,
            pooled=self.pooled,
            made_with=self.made_with,
            sha256=_digest(self.right, self.wrong, self.pooled_wrong),
        )
        text = np.frombuffer(about.model_dump_json().encode(), dtype=np.uint8)
        try:
            with Path(path).open("wb") as stream:
                np.savez_compressed(stream, about=text, right=self.right, wrong=self.wrong, pooled_wrong=self.pooled_wrong)
        except OSError as error:
            raise InputError(f"the reference cannot be written to {path}: {error.strerror}") from None

    @classmethod
    def load(cls, path: str | Path) -> Reference:
        """Read a file that `save` wrote, after checking all of it.

        Raises:
            InputError: It is absent, damaged, no reference, or made for other texts than this version verifies with.
        """
        file = Path(path)
        try:
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as parts:
                about = json.loads(bytes(parts["about"]))
                right, wrong, pooled_wrong = (parts[name] for name in ("right", "wrong", "pooled_wrong"))
        except FileNotFoundError:
            raise InputError(f"there is no reference file {file}. Make one: {_MAKE_ONE}") from None
        except (OSError, ValueError, KeyError, TypeError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error):
            raise InputError(f"{file} is no reference file of gemma-rag, or is damaged. Make one: {_MAKE_ONE}") from None
        if isinstance(about, dict) and about.get("probes", "") != probes_digest():
            raise InputError(
                f"{file} was made for other texts than this version of gemma-rag verifies with. Make it anew: {_MAKE_ONE}"
            )
        try:
            known = _About.model_validate(about)
        except ValidationError:
            raise InputError(
                f"{file} is no reference file that this version of gemma-rag reads. Make one: {_MAKE_ONE}"
            ) from None
        if known.sha256 != _digest(right, wrong, pooled_wrong) or not _fit(known, right, wrong, pooled_wrong):
            raise InputError(f"{file} is damaged: its vectors are not those that were written. Make it anew: {_MAKE_ONE}")
        return cls(
            space=known.space,
            matryoshka=known.matryoshka,
            lengths=known.lengths,
            right=right,
            alternatives=known.alternatives,
            wrong=wrong,
            pooled=known.pooled,
            pooled_wrong=pooled_wrong,
            made_with=known.made_with,
        )


_MAKE_ONE = "gemma-rag verify MODEL --write FILE"


def _digest(*arrays: npt.NDArray[Any]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _fit(about: _About, right: npt.NDArray[Any], wrong: npt.NDArray[Any], pooled: npt.NDArray[Any]) -> bool:
    n, native = len(probes()), about.space.dimensions
    places = [alternative.probe for alternative in (*about.alternatives, *about.pooled)]
    return (
        right.dtype == np.float32
        and right.shape == (n, native)
        and wrong.dtype == pooled.dtype == np.float16
        and wrong.shape == (len(about.alternatives), native)
        and pooled.ndim == 2
        and len(pooled) == len(about.pooled)
        and len(about.lengths) == n
        and max(places, default=0) < n
    )


# -- computing ----------------------------------------------------------------------------------------------------------


def _computed(model: Any, profile: PromptProfile, space: Space) -> Reference:
    texts = [right_text(probe, profile) for probe in probes()]
    ids = model.tokenizer(texts, truncation=False, padding=False, verbose=False)["input_ids"]
    lengths = tuple(len(row) for row in ids)
    alternatives, misread = [], []
    for i in suspects():
        for reading in misreadings(probes()[i], profile):
            alternatives.append(Alternative(probe=i, faults=reading.faults, how=reading.how))
            misread.append(reading.text)
    right = _embed(model, [*texts, *misread], space.max_tokens)
    cuts, cut_rows = _cut(model, texts, lengths, space)
    pooled, pooled_rows = _without_dense(model, texts, alternatives, misread, space)
    return Reference(
        space=space,
        matryoshka=tuple(d for d in profile.matryoshka if d < space.dimensions),
        lengths=lengths,
        right=right[: len(texts)],
        alternatives=(*alternatives, *cuts),
        wrong=np.concatenate([right[len(texts) :], cut_rows]).astype(np.float16),
        pooled=tuple(pooled),
        pooled_wrong=pooled_rows.astype(np.float16),
        made_with={name: importlib.metadata.version(name) for name in _MADE_WITH},
    )


def _embed(model: Any, texts: Sequence[str], max_tokens: int) -> Floats:
    """The library's own vectors of texts that carry their prompts; long ones one by one, for the memory's sake."""
    context = model.max_seq_length
    long = [len(text) > 800 for text in texts]
    out: dict[int, Floats] = {}
    try:
        model.max_seq_length = max_tokens
        for which, batch_size in ((False, 16), (True, 1)):
            places = [i for i, is_long in enumerate(long) if is_long is which]
            chosen = [texts[i] for i in places]
            options = {"prompt": "", "batch_size": batch_size, "show_progress_bar": False, "convert_to_numpy": True}
            rows = model.encode(chosen, **options) if chosen else []
            out.update(zip(places, rows, strict=True))
    finally:
        model.max_seq_length = context
    return unit(np.stack([out[i] for i in range(len(texts))]))


def _cut(model: Any, texts: list[str], lengths: tuple[int, ...], space: Space) -> tuple[list[Alternative], Floats]:
    """Vectors of texts that are cut before the context ends; of each cut a few, the shortest and the longest among them."""
    cuts, rows = [], [np.zeros((0, space.dimensions), dtype=np.float32)]
    for cut in [cut for cut in CUTS if cut < space.max_tokens]:
        long = [i for i, probe in enumerate(probes()) if probe.kind == "long" and lengths[i] > cut]
        chosen = sorted({long[round(j * (len(long) - 1) / (_CUT_PROBES - 1))] for j in range(_CUT_PROBES)}) if long else []
        if chosen:
            rows.append(_embed(model, [texts[i] for i in chosen], cut))
            how = f"texts cut at {cut} tokens"
            cuts += [Alternative(probe=i, faults=(Fault.TRUNCATED_EARLY,), how=how, cut=cut) for i in chosen]
    return cuts, np.concatenate(rows)


def _without_dense(
    model: Any, texts: list[str], alternatives: list[Alternative], misread: list[str], space: Space
) -> tuple[list[Alternative], Floats]:
    """Vectors of the model without its Dense layers, of texts as they should be read and as they should not."""
    from sentence_transformers import SentenceTransformer

    kept = [module for module in model if type(module).__name__ != "Dense"]
    if len(kept) == len(list(model)):
        return [], np.zeros((0, space.dimensions), dtype=np.float32)
    how = "by the model without its Dense layers"
    found = [Alternative(probe=i, faults=(Fault.DENSE_MISSING,), how=f"texts read {how}") for i in suspects()]
    read = [texts[i] for i in suspects()]
    seen = set()
    for alternative, text in zip(alternatives, misread, strict=True):
        if (alternative.probe, alternative.faults) not in seen:  # the likeliest form of each fault is enough here
            seen.add((alternative.probe, alternative.faults))
            faults = (*alternative.faults, Fault.DENSE_MISSING)
            found.append(Alternative(probe=alternative.probe, faults=faults, how=f"{alternative.how}, read {how}"))
            read.append(text)
    return found, _embed(SentenceTransformer(modules=kept, device="cpu"), read, space.max_tokens)
