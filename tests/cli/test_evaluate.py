"""`quantkit evaluate` on the command line: tables, document, file, progress, exit codes."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from quantkit.documents.evaluation import Evaluation
from quantkit.evaluate import stream as evaluation_stream
from tests.cli.test_cli import quantkit
from tests.convert.jobs import write_model, write_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a candidate in FP8, another with other weights, and two texts."""
    root = tmp_path_factory.mktemp("models")
    write_model(root / "source")
    write_model(root / "fp8", fp8=True)
    write_model(root / "other", seed=1)
    write_text(root / "one.txt")
    write_text(root / "two.txt", 500)
    return root


def words(folder: Path, *candidates: str) -> tuple[object, ...]:
    texts = ("--text", folder / "one.txt", "--text", folder / "two.txt")
    options = ("--context", 32, "--max-windows-per-file", 3, "--device", "cpu", "--memory-budget", "1GiB")
    return ("evaluate", folder / "source", *(folder / name for name in candidates), *texts, *options)


def test_tables_and_file(folder: Path, tmp_path: Path) -> None:
    done = quantkit(*words(folder, "fp8", "other"), "-o", tmp_path / "evaluation.json")
    assert done.exit_code == 0, done.stderr
    overall, domains, layers, drafts, footer = done.stdout.strip().split("\n\n")
    assert [line.split("  ")[0] for line in overall.splitlines()[2:]] == ["source", "bf16 noise floor", "fp8", "other"]
    assert [line.split()[0] for line in domains.splitlines()[2::3]] == ["one", "two"]
    assert [line.split()[0] for line in layers.splitlines()[2:]] == ["0", "1"]
    assert [line.split("  ")[0] for line in drafts.splitlines()[2:]] == ["bf16 noise floor", "fp8", "other"]
    assert footer.startswith("186 tokens scored in 6 windows of 32 (windows), 2 files, on cpu.")
    assert [line.split("  ")[0] for line in done.stderr.splitlines()] == [
        "2 candidates, 6 windows, 192 tokens",
        "layer 1/2",
        "layer 2/2",
    ]
    found = Evaluation.model_validate_json((tmp_path / "evaluation.json").read_bytes())
    kld = found.candidates[0].result.overall.kld
    assert f"{kld.mean:.5f} ± {kld.standard_error:.5f}" in overall.splitlines()[4]
    assert found.seconds is None


def test_json_is_the_document_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    options = ("--protocol", "llama.cpp", "--no-noise-floor", "--times", "--json", "-o", tmp_path / "a.json")
    done = quantkit(*words(folder, "fp8"), *options)
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document == json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert (document["protocol"]["name"], document["protocol"]["scored_per_window"]) == ("llama.cpp", 15)
    assert (document["noise_floor"], list(document["seconds"])) == (None, ["open", "stream"])


def test_names_that_are_the_same_are_shown_as_paths(folder: Path) -> None:
    done = quantkit(*words(folder, "fp8", "fp8"), "--no-noise-floor")
    assert done.stdout.count(str(folder / "fp8")) > 2


def test_a_reference_that_is_kept_in_a_file(folder: Path, tmp_path: Path) -> None:
    saved = quantkit(*words(folder), "--save-reference", tmp_path / "file", "--no-noise-floor")
    assert saved.exit_code == 0, saved.stderr
    assert saved.stdout.startswith("186 tokens scored in 6 windows of 32 (windows)")
    assert saved.stderr.startswith("0 candidates, 6 windows, 192 tokens\n")
    done = quantkit("evaluate", tmp_path / "file", folder / "other", "--device", "cpu", "--memory-budget", "1GiB")
    assert done.exit_code == 0, done.stderr
    overall, domains, layers, drafts, footer = done.stdout.strip().split("\n\n")
    assert "KLD mean, at least" in overall
    assert "KLD mean, at least" in domains
    assert [line.split()[:2] for line in layers.splitlines()[2:]] == [["0", "-"], ["1", "-"]]
    assert drafts.splitlines()[2].count("%") == 2  # mean and error of the candidate: of the original nothing is known
    notes = footer.splitlines()[1:]
    assert notes[0].startswith(f"note: the reference is {tmp_path / 'file'}. KLD: A lower bound: exact on the ")
    assert notes[1].startswith("note: no hidden_error, expert_errors: The reference's hidden states are not kept")
    assert notes[2] == "note: no noise_floor: The file was written without it."
    refused = quantkit("evaluate", tmp_path / "file", folder / "other", "--context", 64)
    assert (refused.exit_code, "was made with --context 32, not --context 64" in refused.stderr) == (1, True)


def test_one_window_has_no_standard_error(folder: Path) -> None:
    done = quantkit(*words(folder, "other"), "--max-windows-per-file", 1, "--json")
    domain = json.loads(done.stdout)["candidates"][0]["result"]["domains"]["one"]
    assert (domain["kld"]["standard_error"], domain["log_ratio"]["standard_error"]) == (None, None)
    shown = quantkit(*words(folder, "other"), "--max-windows-per-file", 1).stdout
    assert "± -" in shown
    assert "nan" not in shown


def test_refusals(folder: Path, tmp_path: Path) -> None:
    refused = quantkit(*words(folder, "absent"))
    assert refused.exit_code == 1
    assert (
        refused.stderr
        == f"error: {folder / 'absent'}: does not exist.\nhint: Give checkpoints that exist after the reference.\n"
    )
    assert "is no place for a file" in quantkit(*words(folder, "fp8"), "-o", tmp_path).stderr
    assert "is no place for a file" in quantkit(*words(folder, "fp8"), "-o", tmp_path / "a" / "b.json").stderr
    short = quantkit(*words(folder, "fp8"), "--context", 4096)
    assert (short.exit_code, "the model is made for at most" in short.stderr) == (1, True)
    assert quantkit("evaluate", folder / "source").exit_code == 2
    assert quantkit(*words(folder, "fp8"), "--protocol", "other").exit_code == 2


def test_interrupted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left behind."""

    def interrupt(*words: object, **options: object) -> None:
        assert list(tmp_path.iterdir())  # the temporary folder
        raise KeyboardInterrupt

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(evaluation_stream, "compare_all", interrupt)
    done = quantkit(*words(folder, "fp8"))
    assert done.exit_code == 130
    assert done.stderr.splitlines()[-1] == "interrupted. Nothing was written."
    assert not list(tmp_path.iterdir())


def test_another_result_is_replaced_only_by_force(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    for _ in range(2):
        assert quantkit(*words(folder, "fp8"), "-o", out).exit_code == 0
    before = out.read_bytes()
    for other in (words(folder, "other"), (*words(folder, "fp8"), "--context", 16)):
        done = quantkit(*other, "-o", out)
        assert done.exit_code == 1
        assert f"error: {out}: exists already, and is no evaluation of the same models on the" in done.stderr
        assert out.read_bytes() == before
    assert quantkit(*words(folder, "other"), "-o", out, "--force").exit_code == 0
    assert out.read_bytes() != before
