"""Files of a layout, whatever their format: made whole, filled at offsets, taken up, and refused when others are
there. (What a crash, a full disk and links do is tested through safetensors in test_safetensors_writer.)"""

from __future__ import annotations

import errno
import hashlib
import zlib
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from quantkit.errors import OutputError
from quantkit.formats import preallocated
from quantkit.formats.checksums import WrittenRange
from quantkit.formats.preallocated import ByteRange, FileLayout, FilesLayout, PreallocatedFiles, combined

ONE = FileLayout("m-1.x", b"HEAD", {"a": ByteRange(8, 4), "b": ByteRange(12, 8)}, 24)
TWO = FileLayout("m-2.x", b"HEAD2", {"c": ByteRange(5, 3)}, 8)
LAYOUT = FilesLayout((ONE, TWO), ("*.x*",), ("index.x",))
OTHER = FilesLayout((FileLayout("beside.y", b"", {"d": ByteRange(0, 2)}, 2),), ("*.y", "*.x*"))


def test_what_is_not_written_is_zero(tmp_path: Path) -> None:
    writer = PreallocatedFiles.open(tmp_path, LAYOUT)
    assert (writer.fresh, LAYOUT.nbytes, LAYOUT.data_bytes) == (True, 32, 15)
    writer.write("b", 4, memoryview(array("I", [0x04030201])))  # a view of wider elements counts in bytes
    writer.write("c", 0, b"xyz")
    assert (writer.read("b"), writer.read("c")) == (b"\0\0\0\0\1\2\3\4", b"xyz")
    contents = {"m-1.x": b"HEAD" + bytes(12) + b"\1\2\3\4" + bytes(4), "m-2.x": b"HEAD2xyz"}
    assert writer.sha256() == {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == contents
    again = PreallocatedFiles.open(tmp_path, LAYOUT)
    assert (again.fresh, again.read("c")) == (False, b"xyz")


def test_what_was_written_is_told_once_and_checked_at_the_end(tmp_path: Path) -> None:
    writer = PreallocatedFiles.open(tmp_path, LAYOUT)
    writer.write("b", 4, b"5678")
    writer.write("a", 0, b"....")
    writer.write("a", 0, b"abcd")  # again: the last one counts
    writer.write("b", 0, b"1234")
    writer.write("b", 8, b"")
    first = writer.written()
    assert first == (WrittenRange(0, 8, 12, zlib.crc32(b"abcd12345678")),)
    assert writer.written() == ()
    writer.write("c", 1, b"yz")
    steps = {"layer 0": first, "layer 1": writer.written()}
    assert steps["layer 1"] == (WrittenRange(1, 6, 2, zlib.crc32(b"yz")),)
    assert writer.sha256(steps) == writer.sha256()
    for place, step in ((8, "layer 0"), (19, "layer 0")):
        with (tmp_path / "m-1.x").open("r+b") as file:
            file.seek(place)
            old = file.read(1)
            file.seek(place)
            file.write(bytes([old[0] ^ 4]))
        with pytest.raises(OutputError, match=rf"m-1\.x: {step} is not as it was written, .* bytes 8 to 20\."):
            writer.sha256(steps)
    with pytest.raises(OutputError, match=r"m-2\.x: layer 1 is not as it was written"):
        writer.sha256({"layer 1": (WrittenRange(1, 6, 9, zlib.crc32(b"yz")),)})  # behind the file's end


def test_writes_stay_in_their_place(tmp_path: Path) -> None:
    writer = PreallocatedFiles.open(tmp_path, LAYOUT)
    for start, data in ((0, b"12345"), (4, b"1"), (-1, b"1")):
        with pytest.raises(AssertionError, match=r"a: \d bytes at -?\d of 4"):
            writer.write("a", start, data)
    with pytest.raises(AssertionError, match="a is planned twice"):
        PreallocatedFiles(tmp_path, combined(LAYOUT, LAYOUT), fresh=True)


@pytest.mark.parametrize(("name", "refused"), [("m-3.x", True), ("old.x.new", True), ("index.x", False), ("z", False)])
def test_files_of_other_jobs_are_refused_by_the_formats_patterns(name: str, refused: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    if refused:
        with pytest.raises(OutputError, match=rf"{name}: is not one of the 2 shards of this job\. It is from another"):
            PreallocatedFiles.open(tmp_path, LAYOUT)
    else:
        assert PreallocatedFiles.open(tmp_path, LAYOUT).fresh


def test_layouts_go_together(tmp_path: Path) -> None:
    both = combined(LAYOUT, OTHER)
    assert (both.patterns, both.companions, both.nbytes) == (("*.x*", "*.y"), ("index.x",), 34)
    PreallocatedFiles.open(tmp_path, both).write("d", 0, b"ok")
    assert not PreallocatedFiles.open(tmp_path, both).fresh
    with pytest.raises(OutputError, match="is not one of the 1 shards"):
        PreallocatedFiles.open(tmp_path, OTHER)


def test_threads_write_into_more_files_than_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor that is closed for another file's sake is in no other thread's hands."""
    monkeypatch.setattr(preallocated, "_MAX_OPEN", 2)
    files = tuple(
        FileLayout(f"{i}.x", b"", {f"{i} {k}": ByteRange(8 * k, 8) for k in range(50)}, 400) for i in range(8)
    )
    writer = PreallocatedFiles.open(tmp_path, FilesLayout(files, ("*.x*",)))

    def fill(file: FileLayout) -> None:
        for name in file.places:
            writer.write(name, 0, name.encode().ljust(8))

    with ThreadPoolExecutor(len(files)) as pool:
        list(pool.map(fill, files))
    writer.sync()
    for file in files:
        assert (tmp_path / file.file).read_bytes() == b"".join(name.encode().ljust(8) for name in file.places)


def test_a_left_over_file_that_cannot_be_removed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unlink(path: Path, **options: bool) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(OutputError, match=r"cannot be read or written \(Input/output error\)\.$"):
        PreallocatedFiles.open(tmp_path, LAYOUT)
