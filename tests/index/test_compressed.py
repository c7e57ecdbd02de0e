from __future__ import annotations

import numpy as np
import pytest

from gemma_rag.index.compressed import PRECISIONS, Precision, compress, decoded, products
from gemma_rag.vectors import Floats, unit


def rows(n: int) -> Floats:
    return unit(np.random.default_rng(3).normal(size=(n, 96)))


def test_every_finite_float16_is_decoded_to_the_bit() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)].reshape(-1, 64)
    assert decoded(halves).tobytes() == halves.astype(np.float32).tobytes()
    assert decoded(halves[:, 3:50:2]).tobytes() == halves[:, 3:50:2].astype(np.float32).tobytes()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("n", [0, 1, 5_000])
def test_products_are_those_of_the_decoded_rows(precision: Precision, n: int) -> None:
    tail, scales = compress(rows(n), precision)
    assert products(rows(3), tail, scales) == pytest.approx(rows(3) @ decoded(tail, scales).T, abs=1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_was_decoded_is_compressed_to_the_same(precision: Precision) -> None:
    tail, scales = compress(rows(500), precision)
    again, other = compress(decoded(tail, scales), precision)
    assert again.tobytes() == tail.tobytes()
    if scales is not None and other is not None:
        assert other == pytest.approx(scales, rel=1e-6)
