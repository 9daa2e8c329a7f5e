"""Ranges and pieces by themselves: who is told secrets, what is kept, what goes to make room."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import pytest

from quantkit.errors import OutputError, SourceError
from quantkit.formats.remote.connections import BadAnswer, _redirected
from quantkit.formats.remote.fetch import Fetcher
from quantkit.formats.remote.files import Address, RemoteFile
from quantkit.formats.remote.pieces import FilePiece, Pieces
from tests.remote.remote_jobs import IMPATIENT
from tests.remote.server import Moods, serving

DATA = bytes(Random(5).randbytes(300_000))


def remote_file(url: str, etag: str = "", **facts: str) -> RemoteFile:
    return RemoteFile("data", "shown/data", len(DATA), etag, lambda: Address(f"{url}data"), **facts)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "served"
    made.mkdir()
    (made / "data").write_bytes(DATA)
    return made


@pytest.mark.parametrize("mood", ["drops", "stalls", "truncates", "busy", "whole", "shorter", "garbles"])
def test_each_fault_is_survived(folder: Path, mood: str) -> None:
    moods = Moods((mood,), share=0.6, stall=0.7, draw=Random(mood))
    fetcher = Fetcher(IMPATIENT)
    with serving(folder, moods) as server:
        found = fetcher.fetch(remote_file(server.url), 1_000, 250_000)
        fetcher.close()
    assert found == DATA[1_000:250_000]


def test_what_came_before_a_break_is_not_asked_for_again(folder: Path) -> None:
    moods, fetcher = Moods(("truncates",), share=1.0), Fetcher(IMPATIENT)
    with serving(folder, moods) as server:
        assert fetcher.fetch(remote_file(server.url), 0, len(DATA)) == DATA
        asked = [headers["Range"] for _, headers in server.seen]
        fetcher.close()
    starts = [int(each.removeprefix("bytes=").partition("-")[0]) for each in asked]
    assert starts == sorted(set(starts)), "every answer brought half of the rest"


@pytest.mark.parametrize(
    ("mood", "said"),
    [
        ("busy", "shown/data: the server answers 503, 12 times in a row."),
        ("drops", "shown/data: no connection (RemoteDisconnected), 12 times in a row."),
        ("garbles", "shown/data: no sound answer (BadStatusLine), 12 times in a row."),
        ("whole", "shown/data: the server ignores the range, 12 times in a row."),
    ],
)
def test_what_does_not_pass_is_given_up_in_one_line(folder: Path, mood: str, said: str) -> None:
    fetcher = Fetcher(IMPATIENT)
    with serving(folder, Moods((mood,), share=1.0)) as server, pytest.raises(SourceError) as error:
        fetcher.fetch(remote_file(server.url), 5, 10)
    fetcher.close()
    assert error.value.message == said


def test_another_etag_or_size_is_another_file(folder: Path) -> None:
    fetcher = Fetcher(IMPATIENT)
    with serving(folder) as server:
        with pytest.raises(SourceError, match="its ETag is another"):
            fetcher.fetch(remote_file(server.url, "before"), 0, 10)
        (folder / "data").write_bytes(DATA + b"more")
        with pytest.raises(SourceError, match="has 300,004 bytes, had 300,000"):
            fetcher.fetch(remote_file(server.url), 0, 10)
        (folder / "data").unlink()
        with pytest.raises(SourceError, match="changed or went away"):
            fetcher.fetch(remote_file(server.url), 0, 10)
    fetcher.close()


def test_a_refused_address_is_renewed_once(folder: Path) -> None:
    """A signature that ran out is made anew; who is refused again has no permission."""
    made: list[str] = []

    def address() -> Address:
        made.append(f"{server.url}data?turn={len(made)}")
        return Address(made[-1])

    fetcher = Fetcher(IMPATIENT)
    with serving(folder, Moods()) as server:
        server.refuse = "turn=0"
        file = RemoteFile("data", "shown/data", len(DATA), "", address)
        assert fetcher.fetch(file, 0, 10) == DATA[:10]
        assert len(made) == 2
        server.refuse = "turn="
        with pytest.raises(SourceError, match="no permission to read it"):
            fetcher.fetch(file, 0, 10)
    fetcher.close()
    assert "turn" not in repr(file)


def test_redirects_do_not_carry_tokens_elsewhere() -> None:
    sent = {"Authorization": "Bearer hush", "Range": "bytes=0-1"}
    assert _redirected("https://hub/a", "/b", sent) == ("https://hub/b", sent)
    assert _redirected("https://hub/a", "https://store/b", sent) == ("https://store/b", {"Range": "bytes=0-1"})
    with pytest.raises(BadAnswer, match="away from https"):
        _redirected("https://hub/a", "http://hub/a", sent)


def test_content_is_held_against_its_digests(folder: Path) -> None:
    file = remote_file("http://nowhere/", sha256="0" * 64)
    with pytest.raises(SourceError, match="its sha256 is not the one"):
        file.check_content(DATA)
    with pytest.raises(SourceError, match="its git digest is not the one"):
        remote_file("http://nowhere/", git_sha1="0" * 40).check_content(DATA)


# -------------------------------------------------------------------------------------------------------------- pieces


def put(pieces: Pieces, piece: FilePiece, *, urgent: bool = True) -> bool:
    if not pieces.reserve(piece.nbytes, urgent=urgent):
        return False
    pieces.put(piece, bytearray(DATA[piece.start : piece.stop]))
    return True


def read(pieces: Pieces, piece: FilePiece) -> bytes | None:
    data = bytearray(piece.nbytes)
    return bytes(data) if pieces.read(piece, memoryview(data), 0) else None


def numbered(number: int) -> FilePiece:
    return FilePiece("a", 1000 * number, 1000 * number + 1000)


def test_pieces_that_were_read_go_first_and_none_that_waits(tmp_path: Path) -> None:
    pieces = Pieces(tmp_path, 3000)
    for number in range(3):
        assert put(pieces, numbered(number))
    assert not put(pieces, numbered(3), urgent=False), "nothing was read yet"
    assert read(pieces, numbered(1)) == DATA[1000:2000]
    assert put(pieces, numbered(3), urgent=False)
    assert [pieces.has(numbered(number)) for number in range(4)] == [True, False, True, True]
    assert pieces.nbytes == sum(path.stat().st_size for path in tmp_path.glob("pieces-0/*/*")) == 3000
    pieces.close()


def test_who_waits_gets_room_from_what_was_announced_last(tmp_path: Path) -> None:
    pieces = Pieces(tmp_path, 2000)
    assert put(pieces, numbered(0))
    assert put(pieces, numbered(1))
    assert put(pieces, numbered(2))
    assert [pieces.has(numbered(number)) for number in range(3)] == [True, False, True]
    pieces.close()


def test_what_was_announced_in_vain_goes_in_the_end(tmp_path: Path) -> None:
    pieces = Pieces(tmp_path, 3000)
    for number in range(3):
        put(pieces, numbered(number))
    for number in (1, 2):
        read(pieces, numbered(number))
    assert put(pieces, numbered(3), urgent=False)
    assert put(pieces, numbered(4), urgent=False)
    assert put(pieces, numbered(5), urgent=False), "3,000 bytes came since 0"
    assert not pieces.has(numbered(0))
    pieces.close()


def test_a_later_process_takes_over_what_is_sound(tmp_path: Path) -> None:
    pieces = Pieces(tmp_path, 10_000)
    for number in range(3):
        put(pieces, numbered(number))
    pieces.close()
    files = {path.name: path for path in tmp_path.glob("pieces-0/a/*")}
    first, second, _ = sorted(files.values(), key=lambda path: int(path.name.partition("-")[0], 16))
    first.write_bytes(bytes(1000))
    os.truncate(second, 10)
    (first.parent / "0-3e8-00000000.new").write_bytes(b"torn")
    pieces = Pieces(tmp_path, 10_000)
    assert [read(pieces, numbered(number)) for number in range(3)] == [None, None, DATA[2000:3000]]
    assert len(list(tmp_path.glob("pieces-0/a/*"))) == 1
    pieces.close()


def test_processes_have_folders_of_their_own_and_clear_up_after_others(tmp_path: Path) -> None:
    one, two = Pieces(tmp_path, 2000), Pieces(tmp_path, 2000)
    put(one, numbered(0))
    put(two, numbered(1))
    assert (one.folder.name, two.folder.name) == ("pieces-0", "pieces-1")
    two.close()
    three = Pieces(tmp_path, 500)
    assert three.folder.name == "pieces-1"
    assert not list(three.folder.glob("*/*")), "more than it may have"
    three.close()
    one.close()
    left = Pieces(tmp_path, 1000)
    assert left.has(numbered(0))
    left.close()


def test_a_cache_that_its_disk_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"the cache may grow by .* its disk has"):
        Pieces(tmp_path, 2**60)
