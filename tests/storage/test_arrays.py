"""Files of named arrays: what goes in comes back, mapped and not read; damage is named."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from gemma_rag.errors import KnowledgeBaseError
from gemma_rag.storage.arrays import Blocks, read_arrays, write_arrays

KINDS = st.sampled_from(["<f4", "<i8", "<u8", "<i4", "|i1"])
FINITE = {"allow_nan": False}
ARRAYS = st.dictionaries(
    st.text(min_size=1, max_size=5),
    KINDS.flatmap(
        lambda kind: arrays_of.arrays(
            kind, arrays_of.array_shapes(min_side=0, max_dims=2), elements=FINITE if "f" in kind else None
        )
    ),
    max_size=5,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(given_arrays=ARRAYS)
def test_what_goes_in_comes_back(tmp_path, given_arrays):
    file = tmp_path / "file"
    digest = write_arrays(file, given_arrays)
    found = read_arrays(file)
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()
    assert list(found) == list(given_arrays)
    for name, array in given_arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def test_an_array_in_blocks_is_the_array(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(6, 2)
    whole, blocks = tmp_path / "whole", tmp_path / "blocks"
    write_arrays(whole, {"a": array})
    write_arrays(blocks, {"a": Blocks("<f4", (6, 2), (array[i : i + 4] for i in range(0, 6, 4)))})
    assert whole.read_bytes() == blocks.read_bytes()


def test_blocks_of_another_size_are_an_error(tmp_path):
    with pytest.raises(KnowledgeBaseError, match="16 bytes came"):
        write_arrays(tmp_path / "file", {"a": Blocks("<f4", (6, 2), [np.zeros((2, 2), np.float32)])})


def test_a_mapped_array_cannot_be_written(tmp_path):
    write_arrays(tmp_path / "file", {"a": np.zeros(3)[:2].astype("<f4")})
    with pytest.raises(ValueError, match="read-only"):
        read_arrays(tmp_path / "file")["a"][0] = 1


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(KnowledgeBaseError, match="nothing is missing"):
        read_arrays(tmp_path / "nothing")


@pytest.mark.parametrize("extra", [b"", b"x" * 64])
def test_a_file_of_another_length_is_named(tmp_path, extra):
    file = tmp_path / "file"
    write_arrays(file, {"a": np.zeros(100, np.float32)})
    file.write_bytes((file.read_bytes() + extra)[: None if extra else -1])
    with pytest.raises(KnowledgeBaseError, match=r"file is damaged: it has \d+ bytes, too few or too many"):
        read_arrays(file)


def test_a_table_that_was_changed_is_noticed_without_reading_the_arrays(tmp_path):
    file = tmp_path / "file"
    write_arrays(file, {"a": np.zeros(100, np.float32)})
    file.write_bytes(file.read_bytes().replace(b"[100]", b"[010]"))
    with pytest.raises(KnowledgeBaseError, match="table of arrays"):
        read_arrays(file)
