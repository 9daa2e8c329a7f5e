"""Sources in a bucket: moto's S3 on loopback, asked as any other is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import QuantkitError
from tests.convert.jobs import data_free, small_config, write_model
from tests.remote.remote_jobs import contents, convert_from

pytest.importorskip("s3fs")
server = pytest.importorskip("moto.server")

RTN = data_free()
KEY, SECRET = "AKIAHUSHHUSHHUSHHUSH", "s3cr3ts3cr3ts3cr3t"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``nano`` and ``local``, what its conversion gives."""
    folder = tmp_path_factory.mktemp("buckets")
    write_model(folder / "nano", small_config(), fp8=True)
    convert_from(str(folder / "nano"), RTN, folder / "local", folder / "none")
    return folder


@pytest.fixture
def client(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A bucket "models" that holds "nano" in the folder "released"."""
    from botocore.session import get_session

    running = server.ThreadedMotoServer(port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    made = get_session().create_client("s3")
    made.create_bucket(Bucket="models")
    for path in (place / "nano").iterdir():
        made.put_object(Bucket="models", Key=f"released/nano/{path.name}", Body=path.read_bytes())
    yield made
    running.stop()


def test_the_files_are_those_of_a_local_conversion(client: Any, place: Path, tmp_path: Path) -> None:
    convert_from("s3://models/released/nano", RTN, tmp_path / "out", tmp_path / "cache")
    assert contents(tmp_path / "out") == contents(place / "local")
    job = json.loads((tmp_path / "out" / "quantkit.json").read_text())["job"]
    assert job["origin"] == "s3://models/released/nano"
    for path in tmp_path.rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        assert not any(secret in data for secret in (KEY.encode(), SECRET.encode(), b"Signature"))


def test_an_object_that_was_replaced_is_another_version(client: Any, place: Path, tmp_path: Path) -> None:
    from quantkit.formats.remote import buckets
    from quantkit.formats.remote.fetch import Fetcher
    from tests.remote.remote_jobs import IMPATIENT

    found = buckets.listing("s3://models/released/nano")
    shard = next(file for file in found.files if file.name.endswith(".safetensors"))
    fetcher = Fetcher(IMPATIENT)
    data = (place / "nano" / shard.name).read_bytes()
    assert fetcher.fetch(shard, 8, 100) == data[8:100]
    client.put_object(Bucket="models", Key=f"released/nano/{shard.name}", Body=bytes(len(data)))
    with pytest.raises(QuantkitError, match=r"s3://models/released/nano/.*: changed while it was read"):
        fetcher.fetch(shard, 8, 100)
    client.delete_object(Bucket="models", Key=f"released/nano/{shard.name}")
    with pytest.raises(QuantkitError, match="changed or went away"):
        fetcher.fetch(shard, 8, 100)
    fetcher.close()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("s3://elsewhere/nano", r"s3://elsewhere/nano: no such bucket or folder"),
        ("s3://models/other", r"s3://models/other: no such bucket or folder"),
        ("s3://", "names no bucket"),
    ],
)
def test_refusals_are_one_line(client: Any, address: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(QuantkitError, match=said) as error:
        convert_from(address, RTN, tmp_path / "out", tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert SECRET not in str(error.value)


def test_a_service_that_is_not_there_is_one_line(client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(QuantkitError, match=r"s3://models/nano: cannot be asked for \(EndpointConnectionError\)"):
        convert_from("s3://models/nano", RTN, tmp_path / "out", tmp_path / "cache")


def test_a_bucket_that_refuses_is_one_line(client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantkit.formats.remote import buckets

    class Refusing:
        def ls(self, path: str, detail: bool, refresh: bool) -> list[Any]:
            raise PermissionError(f"Access Denied for {KEY}")

    monkeypatch.setattr(buckets, "opened", lambda scheme: (Refusing(), ()))
    with pytest.raises(QuantkitError, match="s3://models/released/nano: the bucket refuses") as error:
        convert_from("s3://models/released/nano", RTN, tmp_path / "out", tmp_path / "cache")
    assert KEY not in str(error.value)
