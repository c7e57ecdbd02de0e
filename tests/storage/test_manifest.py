"""The manifest, and a folder in which any file is not what its manifest says."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from contextlib import closing
from itertools import product
from pathlib import Path
from tokenize import TokenError

import numpy as np
import pytest

from gemma_rag.documents import Category, Chunk, Document
from gemma_rag.encoders import Space
from gemma_rag.errors import KnowledgeBaseError
from gemma_rag.storage import Entry, Manifest, Store, StoredCategory
from gemma_rag.storage.arrays import read_arrays, write_arrays
from gemma_rag.storage.manifest import read_manifest, write_manifest

SPACE = Space(
    model="m", weights="w", prompts="p", dimensions=4, max_tokens=64, overflow="truncate", runtime="test", precision="float32"
)
DOCUMENTS = [
    Document(id=name, text=f"the text of {name}", title=f"the title of {name}", category=kind, metadata={"key": f"of {name}"})
    for name, kind in [("alpha", "fruit"), ("beta", "fruit"), ("gamma", "traffic")]
]
VECTORS = np.eye(4, dtype=np.float32)
FILES = ["manifest.json", "documents.sqlite", "segment-1.bin"]


def commit(store: Store, documents: list[Document], described: str = "as described") -> None:
    entries = [Entry(item, [Chunk(start=0, end=len(item.text))], VECTORS[i : i + 1]) for i, item in enumerate(documents)]
    names = sorted({document.category for document in documents})
    store.commit(entries, (), [StoredCategory(Category(name=name, description=described), VECTORS[3]) for name in names])


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("original") / "kb"
    with closing(Store.create(SPACE, {"model": "m"}, {"max_tokens": 64})) as store:
        commit(store, DOCUMENTS)
        store.save(path).close()
    return path


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A folder of three documents, to be damaged."""
    return Path(shutil.copytree(original, tmp_path / "kb"))


def change(folder: Path, **fields: object) -> None:
    """Rewrite fields of the manifest as they stand in the file, its checksum left as it was."""
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def expect_error(folder: Path, *words: str, verify: bool = True) -> None:
    with pytest.raises(KnowledgeBaseError) as caught, closing(Store.open(folder, verify=verify)) as store:
        store.snapshot()
    assert [word for word in words if word not in str(caught.value)] == []


def flip(file: Path, place: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)


def opens_rightly_or_names(folder: Path, name: str, *, verify: bool = True) -> bool:
    """Whether the folder still opens with the right documents, or an error names the file."""
    try:
        with closing(Store.open(folder, verify=verify)) as store:
            found = [store.get(document.id) for document in DOCUMENTS]
            return [item and item.document for item in found] == list(store.all_documents()) == DOCUMENTS
    except KnowledgeBaseError as error:
        return name in str(error)
    except (SyntaxError, TokenError, TypeError, ValueError):  # what numpy, json and sqlite3 raise if nobody catches it
        return False


# -- the manifest ---------------------------------------------------------------------------------------------------


def test_a_manifest_comes_back_equal(tmp_path):
    manifest = Manifest(
        space=SPACE, fingerprint=SPACE.fingerprint, recipe={"model": "模型"}, chunking={"overlap": 0}, documents=3
    )
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest


def test_writing_a_manifest_leaves_one_file(tmp_path):
    write_manifest(tmp_path, Manifest(space=SPACE, fingerprint=SPACE.fingerprint, recipe={}, chunking={}))
    assert list(tmp_path.iterdir()) == [tmp_path / "manifest.json"]


def test_two_manifests_have_two_identities():
    one, other = (Manifest(space=SPACE, fingerprint=SPACE.fingerprint, recipe={}, chunking={}) for _ in range(2))
    assert one.identity != other.identity


def test_a_path_where_nothing_is_is_no_knowledge_base(tmp_path):
    expect_error(tmp_path / "nowhere", "there is no knowledge base at", "nowhere")


def test_a_folder_without_a_manifest_is_no_knowledge_base(tmp_path):
    expect_error(tmp_path, str(tmp_path), "manifest.json")


def test_a_file_is_no_knowledge_base(tmp_path):
    (tmp_path / "file").write_text("{}")
    expect_error(tmp_path / "file", "file is no knowledge base")


def test_another_format_is_refused(folder):
    change(folder, format="another program's")
    expect_error(folder, "manifest.json was not written by gemma-rag")


@pytest.mark.parametrize("text", ["[]", "null", '"a string"', "1"])
def test_json_that_is_no_object_is_refused(folder, text):
    (folder / "manifest.json").write_text(text)
    expect_error(folder, "manifest.json was not written by gemma-rag")


@pytest.mark.parametrize("version", [2, 4], ids=["older", "newer"])
def test_another_version_is_refused_with_both_versions_and_the_cure(folder, version):
    change(folder, version=version)
    expect_error(folder, f"manifest.json is of format version {version}", "reads version 3", "index the documents anew")


@pytest.mark.parametrize(
    "fields",
    [
        {"documents": 4},
        {"documents": "many"},
        {"unknown": 1},
        {"checksum": None},
        {"recipe": {"model": "\ud800"}},
        {"segments": [{"file": "../elsewhere.bin"}]},
    ],
    ids=str,
)
def test_a_changed_field_is_damage(folder, fields):
    change(folder, **fields)
    expect_error(folder, "manifest.json is damaged")


def test_a_fingerprint_of_another_space_is_damage(tmp_path):
    write_manifest(tmp_path, Manifest(space=SPACE, fingerprint="0" * 64, recipe={}, chunking={}))
    expect_error(tmp_path, "manifest.json is damaged")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000], ids=["empty", "cut", "no text", "too deep"])
def test_a_manifest_that_is_no_json_is_damage(folder, content):
    (folder / "manifest.json").write_bytes(content)
    expect_error(folder, "manifest.json is damaged")


def test_whatever_bit_of_the_manifest_flips_it_is_noticed(folder):
    file = folder / "manifest.json"
    good = file.read_bytes()
    for place in range(0, len(good), 3):
        flip(file, place, place % 8)
        expect_error(folder, "manifest.json")
        file.write_bytes(good)


# -- the other files ------------------------------------------------------------------------------------------------


def test_an_undamaged_folder_opens(folder):
    with closing(Store.open(folder)) as store:
        assert list(store.all_documents()) == DOCUMENTS


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder, name, verify):
    (folder / name).unlink()
    expect_error(folder, name, verify=verify)


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_named(folder, name, share, verify):
    os.truncate(folder / name, int((folder / name).stat().st_size * share))
    expect_error(folder, name, verify=verify)


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "content", [b"not ours " * 2000, bytes(9000), b"PK\x03\x04 a broken zip"], ids=["text", "zeros", "broken zip"]
)
def test_a_file_of_other_bytes_is_named(folder, name, content, verify):
    (folder / name).write_bytes(content)
    expect_error(folder, name, verify=verify)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_knowledge_base_is_noticed(folder, tmp_path, name):
    with closing(Store.create(SPACE, {"model": "other"}, {})) as store:
        commit(store, [item.model_copy(update={"text": item.text.upper()}) for item in reversed(DOCUMENTS)])
        store.save(tmp_path / "other").close()
    shutil.copy(tmp_path / "other" / name, folder / name)
    # one of the files that it names is not as a foreign manifest says, whichever comes first
    expect_error(folder, str(folder) if name == "manifest.json" else name, "is damaged")


def test_an_older_copy_of_the_database_is_noticed(folder):
    shutil.copy(folder / "documents.sqlite", folder / "older")
    with closing(Store.open(folder)) as store:
        commit(store, [DOCUMENTS[0].model_copy(update={"text": "new"})])
    shutil.move(folder / "older", folder / "documents.sqlite")
    expect_error(folder, "documents.sqlite is damaged")


@pytest.mark.parametrize("place", [0, 20, 130, -1], ids=["magic", "header", "first number", "last byte"])
@pytest.mark.parametrize("name", FILES[2:])
def test_a_flipped_bit_of_an_array_is_noticed(folder, name, place):
    flip(folder / name, place)
    expect_error(folder, name)


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
@pytest.mark.parametrize("name", FILES[2:])
def test_whatever_bit_of_an_arrays_header_flips_it_is_named_or_harmless(folder, name, verify):
    file = folder / name
    good = file.read_bytes()
    wrong = []
    for place, bit in product(range(0, 700, 11), range(8)):
        flip(file, place, bit)
        if not opens_rightly_or_names(folder, name, verify=verify):
            wrong.append((place, bit))
        file.write_bytes(good)
    assert wrong == []


@pytest.mark.parametrize("change", ["fewer rows", "fewer components", "an array less"])
def test_arrays_of_another_shape_are_named_without_verifying(folder, change):
    file = folder / "segment-1.bin"
    arrays = {name: array.copy() for name, array in read_arrays(file).items()}
    if change == "fewer rows":
        arrays["chunks"] = arrays["chunks"][:2]
    elif change == "fewer components":
        arrays["head"] = arrays["head"][:, :3]
    else:
        del arrays["summarised"]
    file.unlink()
    write_arrays(file, arrays)
    expect_error(folder, "segment-1.bin is damaged", verify=False)


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self):
        return os.mkdir, (str(self.flag),)


@pytest.mark.parametrize("form", ["object array", "pickle", "zip of arrays"])
@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
@pytest.mark.parametrize("name", FILES[2:])
def test_a_pickled_array_is_refused_and_not_unpickled(folder, name, verify, form):
    trap = Trap(folder / "trapped")
    with (folder / name).open("wb") as file:
        if form == "object array":
            np.save(file, np.array([trap] * 3, dtype=object), allow_pickle=True)
        elif form == "pickle":
            pickle.dump(trap, file)
        else:
            np.savez(file, arr_0=np.array([trap], dtype=object))
    expect_error(folder, name, verify=verify)
    assert not trap.flag.exists()


# -- the database ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 15, 16, 18, 19, 20, 44, 45, 59], ids=str)
def test_a_flipped_bit_of_the_databases_header_is_named_or_harmless(folder, place):
    flip(folder / "documents.sqlite", place)
    assert opens_rightly_or_names(folder, "documents.sqlite")


@pytest.mark.parametrize(
    "text", [b"alpha", b"the text of beta", b"the title of gamma", b'"of alpha"', b"fruit", b"as described"], ids=bytes.decode
)
def test_a_flipped_bit_of_a_stored_text_is_noticed_wherever_it_stands(folder, text):
    file = folder / "documents.sqlite"
    good = file.read_bytes()
    places = [place for place in range(len(good)) if good.startswith(text, place)]
    assert places
    for place in places:  # an id stands in its row and in the index too
        flip(file, place + 2)
        expect_error(folder, "documents.sqlite")
        file.write_bytes(good)


def test_whatever_bit_of_the_database_flips_it_is_named_or_harmless(folder):
    file = folder / "documents.sqlite"
    good = file.read_bytes()
    used = [place for place, byte in enumerate(good) if byte]
    wrong = []
    for place, bit in product(random.Random(7).sample(used, 150), (0, 7)):
        flip(file, place, bit)
        if not opens_rightly_or_names(folder, "documents.sqlite"):
            wrong.append((place, bit))
        file.write_bytes(good)
    assert wrong == []


# -- opening without verifying --------------------------------------------------------------------------------------


def test_without_verifying_a_changed_number_goes_unnoticed(folder):
    file = folder / "segment-1.bin"
    flip(file, file.read_bytes().index(VECTORS[1].tobytes()) + 1)
    with closing(Store.open(folder, verify=False)) as store:
        assert store.get("beta").vectors.tobytes() != VECTORS[1].tobytes()


def test_without_verifying_a_changed_text_goes_unnoticed(folder):
    file = folder / "documents.sqlite"
    file.write_bytes(file.read_bytes().replace(b"the text of beta", b"the tent of beta"))
    with closing(Store.open(folder, verify=False)) as store:
        assert "the tent of beta" in [document.text for document in store.all_documents()]
