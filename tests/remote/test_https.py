"""Sources on a web server: the same bytes as from a folder, whatever the server does; or one line, and nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random

import pytest

from quantkit import convert, inspect, plan
from quantkit.errors import OutputError, PlanError, QuantkitError, SourceError
from quantkit.formats.remote.fetch import Patience
from tests.convert.jobs import data_free, int4, recipe_of, small_config, write_model, write_text
from tests.remote.remote_jobs import IMPATIENT, cached_bytes, contents, convert_from
from tests.remote.server import MOODS, Moods, serving

RTN = data_free()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model``, in FP8 and several shards, and ``local``, what its conversion gives."""
    folder = tmp_path_factory.mktemp("https")
    write_model(folder / "model", small_config(), fp8=True)
    convert_from(str(folder / "model"), RTN, folder / "local", folder / "none")
    return folder


def test_the_files_are_those_of_a_local_conversion(place: Path, tmp_path: Path) -> None:
    with serving(place / "model") as server:
        convert_from(server.url, RTN, tmp_path / "out", tmp_path / "cache")
    assert contents(tmp_path / "out") == contents(place / "local")
    job = json.loads((tmp_path / "out" / "quantkit.json").read_text())["job"]
    assert job["origin"] == server.url.rstrip("/")


def test_a_calibrated_conversion_takes_the_tokenizer_from_there(place: Path, tmp_path: Path) -> None:
    write_text(tmp_path / "calibration.txt")
    recipe = recipe_of(int4("role:expert", grid=2, polish=0), tokens=64)
    convert_from(str(place / "model"), recipe, tmp_path / "local", tmp_path / "none")
    with serving(place / "model") as server:
        convert_from(server.url, recipe, tmp_path / "out", tmp_path / "cache")
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


@pytest.mark.parametrize("seed", range(4))
def test_a_hostile_server_changes_no_byte(place: Path, tmp_path: Path, seed: int) -> None:
    moods = Moods(MOODS, share=0.3, stall=0.7, draw=Random(seed))
    with serving(place / "model", moods) as server:
        convert_from(server.url, RTN, tmp_path / "out", tmp_path / "cache")
    assert contents(tmp_path / "out") == contents(place / "local")
    assert sum(server.faults.values()) > 10


@pytest.mark.parametrize("after", [45, 50, 55])
def test_a_file_that_changes_midway_is_one_line_and_no_result(place: Path, tmp_path: Path, after: int) -> None:
    with serving(place / "model", Moods(change_after=after)) as server, pytest.raises(SourceError) as error:
        convert_from(server.url, RTN, tmp_path / "out", tmp_path / "cache")
    assert "changed while it was read (its ETag is another)" in error.value.message
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_resumed_job_refuses_another_version(place: Path, tmp_path: Path) -> None:
    with serving(place / "model", Moods(change_after=60)) as server:
        with pytest.raises(SourceError, match="changed while"):
            convert_from(server.url, RTN, tmp_path / "out", tmp_path / "cache")
        with pytest.raises(QuantkitError, match="changed since this job began"):
            convert_from(server.url, RTN, tmp_path / "out", tmp_path / "cache")
        server.moods.change_after = None
        convert_from(server.url, RTN, tmp_path / "out", tmp_path / "cache")
    assert contents(tmp_path / "out") == contents(place / "local")


def test_a_server_that_falls_silent_is_given_up_in_one_line(place: Path, tmp_path: Path) -> None:
    patience = Patience(timeout=0.1, tries=3, first_pause=0.001, longest_pause=0.01)
    with serving(place / "model") as server:
        inspect(server.url, cache_dir=tmp_path / "other")
        server.moods = Moods(("stalls",), share=1.0, stall=0.3)
        with pytest.raises(SourceError, match=r"config\.json: the server was silent for too long\."):
            convert_from(server.url, RTN, tmp_path / "out", tmp_path / "cache", patience=patience)


def test_what_is_fetched_stays_within_the_bound(place: Path, tmp_path: Path) -> None:
    layer = 2_000_000
    with serving(place / "model") as server:
        convert_from(server.url, RTN, tmp_path / "out", tmp_path / "cache", nbytes=layer)
        assert contents(tmp_path / "out") == contents(place / "local")
        assert 0 < cached_bytes(tmp_path / "cache") <= layer
        asked = len(server.seen)
        convert_from(server.url, RTN, tmp_path / "again", tmp_path / "whole")
        once = len(server.seen) - asked
        convert_from(server.url, RTN, tmp_path / "third", tmp_path / "whole")
    assert len(server.seen) - asked - once < once, "what a cache holds is not fetched again"


def test_a_cache_that_cannot_hold_a_layer_is_refused_before_any_work(place: Path, tmp_path: Path) -> None:
    with serving(place / "model") as server, pytest.raises(PlanError, match=r"--cache .*the largest layer of http://"):
        convert_from(server.url, RTN, tmp_path / "out", tmp_path / "cache", nbytes=100_000)
    assert not (tmp_path / "out.partial").exists()


def test_a_cache_of_no_stated_size_leaves_room_on_its_disk(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk._replace(free=100_000))
    with serving(place / "model") as server, pytest.raises(PlanError, match=r"--cache .*the largest layer"):
        convert_from(server.url, RTN, tmp_path / "out", tmp_path / "cache", nbytes=None)


def test_secrets_of_an_address_reach_the_server_and_nothing_else(place: Path, tmp_path: Path) -> None:
    with serving(place / "model") as server:
        address = server.url.replace("://", "://someone:hush@").rstrip("/") + "/?signature=abc123"
        convert_from(address, RTN, tmp_path / "out", tmp_path / "cache")
        assert all("signature=abc123" in path for path, _ in server.seen)
        assert all(headers["Authorization"] == "Basic c29tZW9uZTpodXNo" for _, headers in server.seen)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10
    for path in written:
        assert not any(secret in path.read_bytes() + str(path).encode() for secret in (b"hush", b"abc123", b"c29tZW9"))


def test_plans_and_inspections_read_headers_only(place: Path, tmp_path: Path) -> None:
    with serving(place / "model") as server:
        found = inspect(server.url, cache_dir=tmp_path / "cache")
        assert found.nbytes == inspect(place / "model").nbytes
        forecast = plan(server.url, RTN, cache_dir=tmp_path / "cache", cache="1MiB")
    assert forecast.source.origin == server.url.rstrip("/")
    shards = sum(path.stat().st_size for path in (place / "model").glob("*.safetensors"))
    assert cached_bytes(tmp_path / "cache") < shards


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ftp://host/model", "ftp://: is not read"),
        ("https:///model", "is no address of a folder"),
        ("http://127.0.0.1:9/model/", "no connection"),
    ],
)
def test_addresses_that_cannot_be_read_are_one_line(address: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=said) as error:
        convert_from(address, RTN, tmp_path / "out", tmp_path / "cache", patience=IMPATIENT)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("out", ["s3://bucket/out", "hf://org/name", "https://me:hush@host/out"])
def test_results_go_to_folders(place: Path, out: str) -> None:
    with pytest.raises(OutputError, match="results go to a folder of this machine") as error:
        convert(place / "model", RTN, out)
    assert "hush" not in str(error.value)
    assert not Path(out).parent.exists()


def test_a_folder_that_is_not_there_is_one_line(place: Path, tmp_path: Path) -> None:
    with serving(place / "model") as server, pytest.raises(SourceError, match=r"elsewhere: holds no config\.json"):
        convert_from(f"{server.url}elsewhere/", RTN, tmp_path / "out", tmp_path / "cache")
