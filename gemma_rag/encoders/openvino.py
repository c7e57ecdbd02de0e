"""Vectors computed here, by OpenVINO on the CPU: no torch, a graph from `gemma-rag export`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_rag.encoders.exported import Exported
from gemma_rag.encoders.graph import GraphEngine
from gemma_rag.encoders.settings import EncoderSettings
from gemma_rag.errors import InputError, MissingExtra, ModelUnavailable
from gemma_rag.vectors import Floats

_HINTS = {"float32": "f32", "bfloat16": "bf16"}
_GROUP = {"float32": "0", "int8": "64"}
"""Activations that share a scale when int8 weights are multiplied in int8; 0 multiplies in the hinted format."""


class OpenVinoEngine(GraphEngine):
    """An `Engine` on OpenVINO.

    Raises:
        InputError: float16, which the CPU engine does not compute in.
        MissingExtra: openvino is not installed.
        ModelUnavailable: The graph cannot be opened.
    """

    step = 16  # OpenVINO keeps what it prepared for each shape: fewer shapes are less memory, and faster

    def _open(self, settings: EncoderSettings, folder: Exported) -> None:
        try:
            import openvino
        except ImportError:
            raise MissingExtra("the OpenVINO runtime", "openvino") from None
        if settings.precision not in _HINTS:
            raise InputError(f"OpenVINO computes in float32 or bfloat16 here, and {settings.precision} is asked for")
        if settings.device not in (None, "cpu"):
            raise ModelUnavailable(f"the runtime openvino computes on the CPU, and the device {settings.device} is asked for")
        options = {
            "INFERENCE_PRECISION_HINT": _HINTS[settings.precision],
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": _GROUP[folder.precision],
            "PERFORMANCE_HINT": "LATENCY",
        }
        core = openvino.Core()
        try:
            self._request: Any = core.compile_model(core.read_model(folder.graph), "CPU", options).create_infer_request()
        except RuntimeError as error:
            raise ModelUnavailable(f"OpenVINO cannot open {folder.graph}: {error}") from None

    def _compute(self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> Floats:
        rows: Floats = np.array(self._request.infer({"input_ids": ids, "attention_mask": mask})[0], dtype=np.float32)
        return rows
