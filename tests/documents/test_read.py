"""Which files are read, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from quantkit.documents import read
from quantkit.documents.conversion import ConversionDocument
from quantkit.documents.evaluation import Evaluation
from quantkit.documents.read import read_documents
from quantkit.errors import OutputError
from tests.report.jobs import conversion, evaluation, scores, written


def test_folders_subfolders_and_files_are_read_once_in_order(tmp_path: Path) -> None:
    one = written(tmp_path / "one", conversion())
    several = [written(tmp_path / "several" / name, conversion()) for name in ("b", "a")]
    scored = written(tmp_path / "several", evaluation({}), "evaluation.json")
    (tmp_path / "several" / "notes").mkdir()
    found = read_documents([one.parent, tmp_path / "several", one, scored])
    assert [file.path for file in found] == [one, several[1], several[0], scored]
    assert [type(file.document) for file in found] == [
        ConversionDocument,
        ConversionDocument,
        ConversionDocument,
        Evaluation,
    ]


def test_what_a_report_can_do_without_may_be_missing(tmp_path: Path) -> None:
    document = conversion()
    for key in ("source", "contents", "validation", "validated", "calibration", "expert_tokens", "sha256"):
        del document[key]
    (found,) = read_documents([written(tmp_path / "old", document)])
    assert isinstance(found.document, ConversionDocument)
    assert found.document.contents == ()


def test_null_is_not_a_number(tmp_path: Path) -> None:
    document = evaluation({"w4": (1, 0.1)})
    document["candidates"][0]["result"]["overall"]["perplexity"]["standard_error"] = None
    (found,) = read_documents([written(tmp_path, document, "e.json")])
    assert isinstance(found.document, Evaluation)
    assert math.isnan(found.document.candidates[0].result.overall.perplexity.standard_error)


def test_what_quantkit_evaluate_writes_is_read(tmp_path: Path) -> None:
    document = evaluation({"w4": (1, 0.1)})
    document["candidates"][0]["result"]["overall"]["kld"]["histogram"] = [0] * 38
    path = tmp_path / "e.json"
    path.write_text(Evaluation.model_validate(document).to_json(), encoding="utf-8")
    (found,) = read_documents([path])
    assert found.document == Evaluation.model_validate(document)


def test_unknown_keys_and_a_later_version_are_no_fault(tmp_path: Path) -> None:
    later = evaluation({"w4": (1, 0.1)})
    later["schema_version"] = 3
    later["candidates"][0]["result"]["news"] = [1]
    converted = {**conversion(), "news": {}}
    found = read_documents([written(tmp_path, later, "e.json"), written(tmp_path / "c", converted)])
    assert [type(file.document) for file in found] == [Evaluation, ConversionDocument]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "EOF while parsing"),
        ("[]", "Input should be an object"),
        ('{"a": 1}', "is neither a conversion's"),
        ("[" * 100_000, "recursion limit exceeded"),
        ('{"quantkit": "0.1.0"}', "job: Field required"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(OutputError) as caught:
        read_documents([path])
    assert caught.value.message.startswith(f"{path}: ")
    assert told in caught.value.message
    assert "\n" not in caught.value.message


def wrong_loss(document: dict[str, Any]) -> None:
    document["tensors"]["lm_head.weight"]["relative_loss"] = "much"


def negative_size(document: dict[str, Any]) -> None:
    document["tensor_bytes"] = -1


def short_count(document: dict[str, Any]) -> None:
    document["expert_tokens"]["1"]["experts"][0] = [1]


@pytest.mark.parametrize("damage", [wrong_loss, negative_size, short_count])
def test_a_damaged_conversion_is_refused_with_the_place(tmp_path: Path, damage: Any) -> None:
    document = conversion()
    damage(document)
    with pytest.raises(OutputError, match=r"(tensors\.lm_head|tensor_bytes|expert_tokens\.1)") as caught:
        read_documents([written(tmp_path, document)])
    assert "damaged" in caught.value.hint


def test_missing_paths_and_folders_without_documents_are_refused(tmp_path: Path) -> None:
    for path, told in ((tmp_path / "no", "not found"), (tmp_path, "holds no quantkit.json")):
        with pytest.raises(OutputError, match=told):
            read_documents([path])


def test_huge_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "MAX_BYTES", 100)
    with pytest.raises(OutputError, match="at most 100"):
        read_documents([written(tmp_path, scores(0.1))])
