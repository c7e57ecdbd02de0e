"""From a sentence-transformers model to a folder that opens without torch: `export_model`, behind `gemma-rag export`.

The whole model becomes one graph: encoder, pooling, dense layers and norm. A graph that left the dense layers out would
still give vectors of the right length, all wrong; so every export is compared with its source before it is handed out.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gemma_rag.encoders.base import BOUNDS, Input
from gemma_rag.encoders.exported import (
    DESCRIPTION,
    TOKENIZER,
    Agreement,
    Description,
    file_digest,
    profile_to_json,
)
from gemma_rag.encoders.sentence_transformers import SentenceTransformerEngine
from gemma_rag.encoders.settings import EncoderSettings
from gemma_rag.encoders.text_encoder import TextEncoder
from gemma_rag.errors import GemmaRagError, InputError, MissingExtra, ModelUnavailable
from gemma_rag.prompts import Task
from gemma_rag.vectors import Floats

logger = logging.getLogger(__name__)

_SAMPLES = (
    "How do I reset my password?",
    "Annual leave: every employee has 25 days a year, and may take five unused days into the next one.",
    "员工每年享有二十五天带薪年假，未休的五天可以结转到下一年。",
    "El plazo de entrega es de tres días laborables.",
    "def area(radius: float) -> float:\n    return 3.14159 * radius**2",
    "ok",
    "Die Rechnung ist innerhalb von 14 Tagen ohne Abzug zahlbar. " * 8,
    "A long text, as chunks of handbooks are: " + "the parcel left the warehouse on Monday and has not arrived yet; " * 20,
)
"""What an export is compared with its source on; each as a query, a document, and a titled document."""


def export_model(
    settings: EncoderSettings,
    out: str | Path,
    *,
    to: Literal["onnx", "openvino"],
    precision: Literal["float32", "int8"] = "float32",
) -> Description:
    """Write a model as a folder for an engine.

    Args:
        settings: The model, as for sentence-transformers. Its prompts and its context are written too.
        out: The folder, new or empty. It appears only when everything in it is right.
        to: The engine.
        precision: ``int8``: the weights as 8-bit integers, each row of a matrix with its own scale.

    Returns:
        What was written, with the measured agreement.

    Raises:
        InputError: The folder is not empty.
        MissingExtra: What the export needs is not installed.
        ModelUnavailable: The model cannot be had or exported, or the graph disagrees with it.
    """
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already and not empty: give a new folder")
    out = out.resolve()
    _need(["onnx", "onnxscript", "onnxruntime"] if to == "onnx" else ["openvino", "nncf"], to)
    plain = settings.changed(
        runtime="sentence-transformers",
        precision="float32",
        device="cpu",
        dimensions=None,
        on_overflow="truncate",
        cache=None,
        show_progress=False,
    )
    source = SentenceTransformerEngine(plain)
    _parts(source.model, source.space.model)  # refuses what cannot be exported
    inputs = _samples()
    with _silence():
        right = TextEncoder(plain, lambda: source).encode(inputs)  # before the graph is made, which changes the model
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.parent / f".{out.name}-{uuid.uuid4().hex[:8]}"
    scratch.mkdir()
    there = plain.changed(model=str(scratch), runtime="auto", device=None)
    try:
        with _silence(), _blaming(source.space.model):
            program = _program(source)
        for sparing in (False, True):  # all of it in int8, and if that costs too much, but for what suffers most
            with _silence(), _blaming(source.space.model):
                _to_onnx(program, scratch, precision, sparing) if to == "onnx" else _to_openvino(program, scratch, precision)
            source.model.tokenizer.backend_tokenizer.save(str(scratch / TOKENIZER))
            description = _described(source, scratch, to, precision)
            _write(scratch, description)
            description = description.model_copy(update={"agreement": _compare(there, inputs, right)})
            if _agrees(description) or (to, precision) != ("onnx", "int8") or sparing:
                break
            for file in scratch.iterdir():
                file.unlink()
        _judge(description)
        _write(scratch, description)
        for file in scratch.iterdir():
            file.chmod((scratch / DESCRIPTION).stat().st_mode)  # some exporters keep others from reading
        _hand_over(scratch, out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return description


def _hand_over(scratch: Path, out: Path) -> None:
    """Put the folder in its place; the description goes last where the place is there already, so that none is half filled."""
    if not out.exists():
        scratch.rename(out)
        return
    for file in sorted(scratch.iterdir(), key=lambda file: file.name == DESCRIPTION):
        file.replace(out / file.name)
    scratch.rmdir()


def _described(
    source: SentenceTransformerEngine, folder: Path, to: Literal["onnx", "openvino"], precision: Literal["float32", "int8"]
) -> Description:
    return Description(
        runtime=to,
        precision=precision,
        model=source.space.model,
        weights=source.space.weights,
        native=source.native,
        max_tokens=source.space.max_tokens,
        profile=profile_to_json(source.profile),
        agreement=Agreement(texts=0, smallest_cosine=1.0, mean_cosine=1.0),
        made_with={name: importlib.metadata.version(name) for name in ("torch", "transformers", "sentence-transformers", to)},
        files={file.name: (file.stat().st_size, file_digest(file)) for file in sorted(folder.iterdir())},
    )


def _need(packages: list[str], extra: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(f"exporting to {extra} ({package})", "export")


def _program(source: SentenceTransformerEngine) -> Any:
    """The model as an exported program from ``input_ids`` and ``attention_mask`` to vectors of norm 1."""
    import torch

    body, pooling, layers = _parts(source.model, source.space.model)

    class Graph(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.body = body
            self.layers = torch.nn.ModuleList(layers)

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            hidden = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            if pooling == "cls":
                pooled = hidden[:, 0]
            else:
                mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
                pooled = (hidden * mask).sum(1) / mask.sum(1)
            for layer in self.layers:
                pooled = layer(pooled)
            return torch.nn.functional.normalize(pooled, dim=-1)

    body.config.use_cache = False
    body.set_attn_implementation(_attention())
    ids = torch.tensor([[2, 5, 6, 7, 1], [2, 5, 1, 0, 0], [2, 1, 0, 0, 0]])
    batch = torch.export.Dim("batch", min=1, max=4096)
    tokens = torch.export.Dim("tokens", min=2, max=source.space.max_tokens)
    shapes = ({0: batch, 1: tokens}, {0: batch, 1: tokens})
    with torch.no_grad():
        return torch.export.export(Graph().train(False), (ids, (ids != 0).long()), dynamic_shapes=shapes, strict=False)


def _attention() -> str:
    """Attention in which padding looks at itself, which changes no vector.

    A padded position further than the sliding window from all of its text may look at nothing; a softmax over nothing is
    NaN in some engines, and spreads from there.
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def mask(*args: Any, **kwargs: Any) -> Any:
        allowed = sdpa_mask(*args, **kwargs)
        if allowed is None:
            return None
        rows, columns = (torch.arange(size, device=allowed.device) for size in allowed.shape[-2:])
        return allowed | (rows[:, None] == columns[None, :])

    name = "gemma_rag_export"
    AttentionInterface.register(name, sdpa_attention_forward)
    AttentionMaskInterface.register(name, mask)
    return name


def _parts(model: Any, name: str) -> tuple[Any, str, list[Any]]:
    """The encoder, how its tokens are pooled, and the dense layers with their activations."""
    import torch

    first, *others = list(model)
    pooling: Any = others.pop(0) if others else None
    if type(first).__name__ != "Transformer":
        raise ModelUnavailable(f"{name} has a module {type(first).__name__}, which cannot be exported")
    modes = ["nothing" if pooling is None else type(pooling).__name__]
    if modes == ["Pooling"]:
        about = pooling.get_config_dict()
        mode = about.get("pooling_mode")
        modes = [str(mode)] if mode else [key for key, on in about.items() if key.startswith("pooling_mode_") and on]
    modes = modes or ["nothing"]
    kind = {"mean": "mean", "pooling_mode_mean_tokens": "mean", "cls": "cls", "pooling_mode_cls_token": "cls"}.get(modes[0])
    if kind is None or len(modes) != 1:
        raise ModelUnavailable(f"{name} pools its tokens by {' and '.join(modes)}: only mean and cls can be exported")
    layers: list[Any] = []
    for module in others:
        if type(module).__name__ == "Dense":
            layers += [torch.nn.Sequential(module.linear, module.activation_function)]
        elif type(module).__name__ != "Normalize":
            raise ModelUnavailable(f"{name} has a module {type(module).__name__}, which cannot be exported")
    return first.auto_model, kind, layers


def _to_openvino(program: Any, folder: Path, precision: str) -> None:
    import openvino

    graph = openvino.convert_model(program)
    for given, name in zip(graph.inputs, ("input_ids", "attention_mask"), strict=True):
        given.get_tensor().set_names({name})
    graph.outputs[0].get_tensor().set_names({"sentence_embedding"})
    if precision == "int8":
        import nncf

        graph = nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_ASYM)
    openvino.save_model(graph, folder / "model.xml", compress_to_fp16=False)


def _to_onnx(program: Any, folder: Path, precision: str, sparing: bool) -> None:
    import onnx
    import torch

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        first = Path(scratch) / "model.onnx"
        torch.onnx.export(
            program,
            (),
            str(first),
            dynamo=True,
            external_data=True,
            input_names=["input_ids", "attention_mask"],
            output_names=["sentence_embedding"],
        )
        if precision == "float32":
            onnx.save(onnx.load(str(first)), str(folder / "model.onnx"), **_BESIDE)
            return
        from onnxruntime.quantization import QuantType, quantize_dynamic

        graph = onnx.load(str(first), load_external_data=False)
        del graph.graph.value_info[:]  # else the quantizer's shape inference stops at transposed weights
        onnx.save(graph, str(first))
        second = Path(scratch) / "int8.onnx"
        quantize_dynamic(
            str(first),
            str(second),
            weight_type=QuantType.QInt8,
            per_channel=True,
            use_external_data_format=True,
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            nodes_to_exclude=_narrowing(graph) if sparing else [],
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        onnx.save(onnx.load(str(second)), str(folder / "model.onnx"), **_BESIDE)


def _narrowing(graph: Any) -> list[str]:
    """The products that make rows narrower, the second half of each feed-forward layer among them.

    A few components of what goes into those are very large, and one scale for all of them leaves little of the others: left
    in float32 they take MiniLM's smallest cosine from 0.97 to 0.99.
    """
    shapes = {weight.name: list(weight.dims) for weight in graph.graph.initializer}
    found = []
    for node in graph.graph.node:
        shape = next((shapes[name] for name in node.input if len(shapes.get(name, ())) == 2), None)
        if shape is not None and node.op_type in ("MatMul", "Gemm"):
            turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
            rows, columns = reversed(shape) if turned else shape
            if rows > columns:
                found.append(node.name)
    return found


_BESIDE: dict[str, Any] = {"save_as_external_data": True, "all_tensors_to_one_file": True, "location": "model.onnx_data"}
"""Weights in a file beside the graph: one file cannot hold more than 2 GB, and a file of its own can be memory-mapped."""


def _samples() -> list[Input]:
    inputs = [Input(text, task) for text in _SAMPLES for task in (Task.QUERY, Task.DOCUMENT)]
    return inputs + [Input(text, Task.DOCUMENT, "Handbook") for text in _SAMPLES]


def _compare(there: EncoderSettings, inputs: list[Input], right: Floats) -> Agreement:
    from gemma_rag.encoders import load_encoder

    with _silence():  # what an export costs is said below, once; a text is cut on both sides alike
        cosines = (right * load_encoder(there).encode(inputs)).sum(axis=1)
    return Agreement(texts=len(inputs), smallest_cosine=float(np.min(cosines)), mean_cosine=float(np.mean(cosines)))


def _agrees(description: Description) -> bool:
    return description.agreement.smallest_cosine >= BOUNDS[description.precision]


def _judge(description: Description) -> None:
    if _agrees(description):
        return
    bound, found = BOUNDS[description.precision], description.agreement.smallest_cosine
    problem = f"the {description.precision} export of {description.model} agrees with it to a cosine of {found:.4f} only"
    if description.precision == "float32":
        raise ModelUnavailable(
            f"{problem}, where {bound} is right: nothing was written. Use sentence-transformers for this model"
        )
    logger.warning(
        "%s, and %.2f is expected: measure what that costs on your own questions, or export in float32", problem, bound
    )


def _write(folder: Path, description: Description) -> None:
    (folder / DESCRIPTION).write_text(description.model_dump_json(indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _blaming(model: str) -> Iterator[None]:
    """Whatever an exporter raises is about this model."""
    try:
        yield
    except GemmaRagError:
        raise
    except Exception as error:
        raise ModelUnavailable(f"{model} cannot be exported: {type(error).__name__}: {str(error)[:500]}") from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The exporters print pages of progress and advice that no user can act on."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
