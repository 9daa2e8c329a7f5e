"""Files around the weights: which go along, and that what cannot is refused before the work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from quantkit.errors import SourceError
from quantkit.formats import side_files
from quantkit.formats.side_files import check_side_files, copy_side_files, folder_notes


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_side_files_go_along_and_weights_do_not(source: Path, out: Path) -> None:
    wanted = [
        "LICENSE-MODEL",
        "chat_template.jinja",
        "configuration_deepseek.py",
        "generation_config.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    unwanted = [
        "README.md",
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.bin",
        "x.gguf",
        "a.exe",
    ]
    for name in wanted + unwanted:
        (source / name).write_text(name)
    (source / "tokenizer_folder").mkdir()
    assert copy_side_files(source, out) == wanted
    assert {path.name: path.read_text() for path in out.iterdir()} == {name: name for name in wanted}


def test_links_out_of_the_folder_are_followed(source: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("{}")
    (source / "tokenizer.json").symlink_to(tmp_path / "elsewhere")
    check_side_files(source)
    assert copy_side_files(source, out) == ["tokenizer.json"]
    assert (out / "tokenizer.json").read_text() == "{}"
    assert not (out / "tokenizer.json").is_symlink()


def test_links_of_a_hub_cache_are_followed(tmp_path: Path, out: Path) -> None:
    snapshot = tmp_path / "models--x--y" / "snapshots" / "abc"
    blobs = tmp_path / "models--x--y" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to(Path("../../blobs/123"))
    assert copy_side_files(snapshot, out) == ["tokenizer.json"]
    assert not (out / "tokenizer.json").is_symlink()


def test_pipes_dangling_links_and_huge_files_are_refused(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(source / "tokenizer.json")
    with pytest.raises(SourceError, match=r"tokenizer\.json: is not a regular file"):
        copy_side_files(source, out)
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to(source / "gone")
    with pytest.raises(SourceError, match=r"tokenizer\.json: is a link that leads nowhere"):
        copy_side_files(source, out)
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").write_text("12345")
    monkeypatch.setattr(side_files, "MAX_SIDE_FILE_BYTES", 4)
    with pytest.raises(SourceError, match=r"has 5 bytes, at most 4 are copied"):
        copy_side_files(source, out)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        ("tokenizer.model", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        ("generation_config.json", "{not json", "not sound JSON"),
        ("generation_config.json", "[" * 100_000, "not sound JSON"),
        ("tokenizer_config.json", "<!DOCTYPE html><html>", "begins with '<!DOCTYPE'"),
    ],
)
def test_what_no_runtime_could_read_is_refused(source: Path, name: str, content: str, words: str) -> None:
    (source / name).write_text(content)
    with pytest.raises(SourceError) as caught:
        check_side_files(source)
    assert words in caught.value.message
    assert str(source / name) in caught.value.message


def test_notes_name_what_outputs_will_lack(source: Path) -> None:
    assert "no tokenizer files" in folder_notes(source)[0]
    (source / "tokenizer.json").write_text("{}")
    for folder in ("encoding", "assets", ".cache"):
        (source / folder).mkdir()
    template, folders = folder_notes(source)
    assert "no chat template" in template
    assert "not copied: assets/, encoding/." in folders
    (source / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert folder_notes(source) == (folders,)
