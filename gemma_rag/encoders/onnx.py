"""Vectors computed here, by onnxruntime on the CPU: no torch, a graph from `gemma-rag export` or from the hub."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_rag.encoders.exported import Exported
from gemma_rag.encoders.graph import GraphEngine
from gemma_rag.encoders.settings import EncoderSettings
from gemma_rag.errors import MissingExtra, ModelUnavailable
from gemma_rag.vectors import Floats

OUTPUT = "sentence_embedding"


class OnnxEngine(GraphEngine):
    """An `Engine` on onnxruntime.

    Raises:
        MissingExtra: onnxruntime is not installed.
        ModelUnavailable: The graph cannot be opened, or has no ``sentence_embedding``.
    """

    usual_batch_tokens = 512

    def _open(self, settings: EncoderSettings, folder: Exported) -> None:
        if folder.precision != "float32":
            self.batch_texts = 1  # one scale for all activations of a batch: a vector would depend on its neighbours
        try:
            import onnxruntime
        except ImportError:
            raise MissingExtra("the ONNX runtime", "onnx") from None
        if settings.device not in (None, "cpu"):
            raise ModelUnavailable(f"the runtime onnx computes on the CPU, and the device {settings.device} is asked for")
        if settings.precision != "float32":
            raise ModelUnavailable("the precision of an ONNX folder is its own: leave precision out")
        try:
            self._session: Any = onnxruntime.InferenceSession(str(folder.graph), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors share no base class of its own
            raise ModelUnavailable(f"onnxruntime cannot open {folder.graph}: {error}") from None
        outputs = [output.name for output in self._session.get_outputs()]
        if OUTPUT not in outputs:
            raise ModelUnavailable(
                f"{folder.graph} has no output {OUTPUT}, but {', '.join(outputs)}: pooling and dense layers are not in it"
            )
        self._inputs = {given.name for given in self._session.get_inputs()}

    def _compute(self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> Floats:
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        rows: Floats = self._session.run([OUTPUT], {name: feeds[name] for name in feeds if name in self._inputs})[0]
        return rows.astype(np.float32, copy=False)
