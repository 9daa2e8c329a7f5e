"""Repositories of a hub: the commit is found and kept, the token goes to the hub alone, refusals are one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantkit.errors import OutputError, QuantkitError, SourceError
from quantkit.formats.remote.hub import repository
from tests.convert.jobs import data_free, small_config, write_model
from tests.remote.hub import NAME, TOKEN, Hub, hub_of
from tests.remote.remote_jobs import contents, convert_from

pytest.importorskip("huggingface_hub")

RTN = data_free()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``nano`` and ``local``, what its conversion gives."""
    folder = tmp_path_factory.mktemp("hub")
    write_model(folder / "nano", small_config(), fp8=True)
    convert_from(str(folder / "nano"), RTN, folder / "local", folder / "none")
    return folder


@pytest.fixture
def hub(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    shutil.copytree(place / "nano", tmp_path / "nano")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with hub_of(tmp_path / "nano") as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        yield made


def origin_of(out: Path) -> str:
    return json.loads((out / "quantkit.json").read_text())["job"]["origin"]


def card_of(out: Path) -> str:
    return (out / "README.md").read_text()


def test_the_files_are_those_of_a_local_conversion(hub: Hub, place: Path, tmp_path: Path) -> None:
    hub.private = True
    convert_from(f"hf://{NAME}", RTN, tmp_path / "out", tmp_path / "cache")
    found, wanted = contents(tmp_path / "out"), contents(place / "local")
    # The card links to the repository, which a folder does not know.
    assert f'base_model: "{NAME}"' in card_of(tmp_path / "out")
    assert {**found, "README.md": b""} == {**wanted, "README.md": b""}
    assert origin_of(tmp_path / "out") == f"hf://{NAME}@{'a' * 40}"


def test_a_revision_becomes_its_commit(hub: Hub, tmp_path: Path) -> None:
    convert_from(f"hf://{NAME}@v2", RTN, tmp_path / "out", tmp_path / "cache")
    assert origin_of(tmp_path / "out") == f"hf://{NAME}@{'b' * 40}"
    assert all("b" * 40 in path for path, _ in hub.seen if "resolve" in path)


def test_the_token_goes_to_the_hub_alone_and_into_no_file(hub: Hub, tmp_path: Path) -> None:
    convert_from(f"hf://{NAME}", RTN, tmp_path / "out", tmp_path / "cache")
    assert {token for _, token in hub.seen} == {f"Bearer {TOKEN}"}
    assert len(hub.storage.seen) > 10
    assert not any("Authorization" in headers for _, headers in hub.storage.seen)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or (TOKEN.encode() not in (data := path.read_bytes()) and b"s3cr3t" not in data)


def test_a_branch_that_moved_is_refused_when_resumed(hub: Hub, tmp_path: Path) -> None:
    hub.storage.refuse_after = 40
    with pytest.raises(SourceError, match="no permission to read it"):
        convert_from(f"hf://{NAME}", RTN, tmp_path / "out", tmp_path / "cache")
    hub.storage.refuse_after = None
    hub.commits["main"] = "c" * 40
    with pytest.raises(OutputError, match=rf"hf://{NAME}@a{{40}} then, hf://{NAME}@c{{40}} now") as error:
        convert_from(f"hf://{NAME}", RTN, tmp_path / "out", tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_content_that_is_not_what_was_listed_is_refused(hub: Hub, tmp_path: Path) -> None:
    listed = hub.siblings()
    hub.siblings = lambda: listed  # type: ignore[method-assign]
    path = hub.folder / "tokenizer_config.json"
    path.write_bytes(path.read_bytes().replace(b"true", b"null"))
    with pytest.raises(SourceError, match=r"tokenizer_config\.json: its git digest is not"):
        convert_from(f"hf://{NAME}", RTN, tmp_path / "out", tmp_path / "cache")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("address", "state", "said"),
    [
        ("hf://someone/other", "", "no such repository, or no permission to see it"),
        (f"hf://{NAME}@gone", "", "has no revision gone"),
        (f"hf://{NAME}", "gated", "its owner must grant access"),
        ("hf://onlyname", "", "names no repository"),
        ("hf://a/b/c", "", "names no repository"),
    ],
)
def test_refusals_are_one_line(hub: Hub, address: str, state: str, said: str, tmp_path: Path) -> None:
    hub.gated = state == "gated"
    with pytest.raises(QuantkitError, match=said) as error:
        convert_from(address, RTN, tmp_path / "out", tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert TOKEN not in str(error.value)


def test_the_hub_is_asked_once_where_a_file_lies(hub: Hub, tmp_path: Path) -> None:
    convert_from(f"hf://{NAME}", RTN, tmp_path / "out", tmp_path / "cache")
    shards = [path for path, _ in hub.seen if path.endswith(".safetensors")]
    assert len(shards) < len(hub.storage.seen) / 2
    assert len(set(shards)) == len(list(hub.folder.glob("*.safetensors")))


def test_an_address_that_ran_out_is_asked_for_again(hub: Hub, tmp_path: Path) -> None:
    hub.storage.expires = ("Signature=s3cr3t-0", 40)
    hub.expire_after = 40
    convert_from(f"hf://{NAME}", RTN, tmp_path / "out", tmp_path / "cache")
    assert any("s3cr3t-1" in path for path, _ in hub.storage.seen)
    assert (tmp_path / "out" / "quantkit.json").is_file()


def test_a_hub_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceError, match=rf"hf://{NAME}: cannot be asked for \(ConnectError\)"):
        convert_from(f"hf://{NAME}", RTN, tmp_path / "out", tmp_path / "cache")


def test_names_of_repositories() -> None:
    assert repository("hf://org/name") == ("org/name", None)
    assert repository("hf://org/name@refs/pr/1") == ("org/name", "refs/pr/1")
