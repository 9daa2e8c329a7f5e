"""ggml's own C code reads our headers and writes the same bytes from what it read."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest

from quantkit.formats.gguf import values as v
from quantkit.formats.gguf.imatrix import ImatrixEntry, imatrix_layout
from quantkit.formats.gguf.layout import GgufTensor, layout_gguf
from quantkit.formats.preallocated import FilesLayout, PreallocatedFiles
from tests.formats.test_gguf_container import KEY_VALUES
from tests.formats.test_gguf_container import TENSORS as ALL_TENSORS

libggml = pytest.importorskip("libggml")


class InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    (library,) = Path(libggml.__file__).parent.glob("lib*/libggml-base.so")
    lib = ctypes.CDLL(str(library))
    signatures: list[tuple[str, type | None, list[type]]] = [
        ("gguf_init_from_file", ctypes.c_void_p, [ctypes.c_char_p, InitParams]),
        ("gguf_write_to_file", ctypes.c_bool, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_bool]),
        ("gguf_get_data_offset", ctypes.c_size_t, [ctypes.c_void_p]),
        ("gguf_get_n_tensors", ctypes.c_int64, [ctypes.c_void_p]),
        ("gguf_get_tensor_name", ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_int64]),
        ("gguf_get_tensor_offset", ctypes.c_size_t, [ctypes.c_void_p, ctypes.c_int64]),
        ("gguf_get_tensor_size", ctypes.c_size_t, [ctypes.c_void_p, ctypes.c_int64]),
        ("gguf_free", None, [ctypes.c_void_p]),
    ]
    for name, result, arguments in signatures:
        function: Callable[..., object] = getattr(lib, name)
        function.restype, function.argtypes = result, arguments  # type: ignore[attr-defined]
    return lib


# Of a shape like (1, 2, 3) ggml leaves the outermost dimension out when it writes; gguf-py and we write what was given.
TENSORS = [tensor for tensor in ALL_TENSORS if tensor.shape[0] > 1]
LAYOUTS: dict[str, Callable[[], FilesLayout]] = {
    "one file": lambda: layout_gguf("m", KEY_VALUES, TENSORS),
    "split": lambda: layout_gguf("m", KEY_VALUES, TENSORS, 1000),
    "alignment 64": lambda: layout_gguf("m", KEY_VALUES, TENSORS, 1000, 64),
    "no tensors": lambda: layout_gguf("m", KEY_VALUES, []),
    "imatrix": lambda: imatrix_layout(
        [ImatrixEntry("blk.0.attn_q.weight", 1, 8), ImatrixEntry("blk.0.up_exps.weight", 3, 4, experts=True)],
        ["x"],
        1,
        8,
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_ggml_reads_our_files_and_writes_the_same_header(name: str, ggml: ctypes.CDLL, tmp_path: Path) -> None:
    layout = LAYOUTS[name]()
    PreallocatedFiles.open(tmp_path, layout)
    for file in layout.files:
        context = ggml.gguf_init_from_file(str(tmp_path / file.file).encode(), InitParams(True, None))
        assert context
        start = ggml.gguf_get_data_offset(context)
        found = {
            ggml.gguf_get_tensor_name(context, n).decode(): (
                start + ggml.gguf_get_tensor_offset(context, n),
                ggml.gguf_get_tensor_size(context, n),
            )
            for n in range(ggml.gguf_get_n_tensors(context))
        }
        assert found == {name: (place.offset, place.nbytes) for name, place in file.places.items()}
        copy = tmp_path / "copy"
        assert ggml.gguf_write_to_file(context, str(copy).encode(), True)
        ggml.gguf_free(context)
        assert copy.read_bytes() == file.header


def test_ggml_refuses_what_our_layout_never_makes(ggml: ctypes.CDLL, tmp_path: Path) -> None:
    """The refusals of the C reader are real in this test: a flipped version byte is enough."""
    layout = layout_gguf("m", {"a": v.u8(1)}, [GgufTensor("t", (4,), "F32")])
    PreallocatedFiles.open(tmp_path, layout)
    path = tmp_path / "m.gguf"
    data = bytearray(path.read_bytes())
    data[4] = 9
    path.write_bytes(data)
    assert not ggml.gguf_init_from_file(str(path).encode(), InitParams(True, None))
