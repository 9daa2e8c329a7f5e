"""What `quantkit check` refuses: evaluations that are no comparison, damaged files, too few windows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from quantkit.documents.baseline import Baseline
from quantkit.errors import EvaluationError
from quantkit.evaluate.check.baseline import (
    check_comparable,
    read_baseline,
    read_evaluation,
    read_losses,
)
from quantkit.evaluate.check.run import check
from quantkit.evaluate.check.verdict import Limits
from tests.evaluate.evaluations import DOMAINS, Made, evaluation, write
from tests.evaluate.test_check import CLEAN, REFERENCE_FILE, failed

CHANGES: dict[str, Callable[[Path], Path]] = {
    "another text": lambda path: write(path, CLEAN, tokens_sha256="bb" * 32),
    "another reference": lambda path: write(
        path, CLEAN, reference=evaluation(CLEAN).reference.model_copy(update={"fingerprint": "22"})
    ),
    "another context": lambda path: write(
        path, CLEAN, protocol=evaluation(CLEAN).protocol.model_copy(update={"context": 256})
    ),
    "another protocol": lambda path: write(
        path, CLEAN, protocol=evaluation(CLEAN).protocol.model_copy(update={"name": "llama.cpp"})
    ),
    "another share of the reference's logits: all in the baseline, 512 a token": lambda path: write(
        path, CLEAN, reference_file=REFERENCE_FILE
    ),
    "another domains of the windows": lambda path: write(path, CLEAN, window_domains=tuple(reversed(DOMAINS))),
}


@pytest.mark.parametrize("words", CHANGES)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, words: str) -> None:
    found = read_evaluation(CHANGES[words](tmp_path / "e.json"))
    with pytest.raises(EvaluationError, match=f"not comparable, {words}") as refused:
        check_comparable(found, Baseline(evaluation=evaluation(CLEAN)), tmp_path / "b.json")
    assert "\n" not in refused.value.message
    check_comparable(found, Baseline(evaluation=found), tmp_path / "b.json")


def test_no_candidate_passes_unseen() -> None:
    two = [CLEAN, replace(CLEAN, name="gguf")]
    both, one = evaluation(*two), evaluation(CLEAN)
    for found, old, side in ((one, both, "evaluation"), (both, one, "baseline")):
        with pytest.raises(EvaluationError, match=f"candidate gguf: is not in the {side}, which has int4"):
            check(found, Baseline(evaluation=old), Limits(), {})
        assert [v.candidate for v in check(found, Baseline(evaluation=old), Limits(), {}, ["int4"])] == ["int4"]
    with pytest.raises(EvaluationError, match="found 2 of this name"):
        check(evaluation(CLEAN, CLEAN), Baseline(evaluation=one), Limits(), {})


def damaged(change: Callable[[dict[str, object]], object]) -> str:
    document = json.loads(evaluation(CLEAN).to_json())
    change(document)
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not an evaluation of this version: Invalid JSON"),
        ("[1]", "is not an evaluation of this version"),
        (damaged(lambda d: d.update(schema_version=9)), "schema_version"),
        (damaged(lambda d: d.update(candidates=[])), "has no candidates"),
        (damaged(lambda d: d.update(window_domains=[])), "no scores by window"),
        (damaged(lambda d: d["candidates"][0]["result"].pop("windows")), "no scores by window"),  # type: ignore[index]
        (damaged(lambda d: d["candidates"][0]["result"]["windows"]["kld"].pop()), "contradict"),  # type: ignore[index]
        (damaged(lambda d: d["candidates"][0]["result"]["layers"][1]["expert_tokens"].pop()), "contradict"),  # type: ignore[index]
        (damaged(lambda d: d["candidates"][0]["model"].update(nbytes=10**400)), "model.nbytes"),  # type: ignore[index]
        (damaged(lambda d: d["candidates"][0]["result"]["layers"][1].update(expert_tokens=[-1] * 12)), "expert_tokens"),  # type: ignore[index]
    ],
)
def test_damaged_files(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "e.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(EvaluationError, match=words) as refused:
        read_evaluation(path)
    assert refused.value.message.startswith(f"{path}: ")
    assert "\n" not in refused.value.message


def test_evaluations_that_come_from_no_file_are_refused_too() -> None:
    with pytest.raises(EvaluationError, match="has no candidates"):
        read_losses(evaluation(), Path())
    baseline = Baseline(evaluation=evaluation(CLEAN))
    for made, words in (
        (evaluation(), "has no candidates"),
        (evaluation(CLEAN, window_domains=()), "has no scores by"),
    ):
        with pytest.raises(EvaluationError, match=f"^evaluation: {words}"):
            check_comparable(made, baseline, Path("b.json"))


def test_texts_of_files_keep_to_one_line(tmp_path: Path) -> None:
    name = "a\n\x1b[31mb"
    (found,) = check(evaluation(Made(name=name, kld=9)), Baseline(evaluation=evaluation(Made(name=name))), Limits(), {})
    assert found.candidate == "'a\\n\\x1b[31mb'"
    for only in ([], ["c"]):
        with pytest.raises(EvaluationError) as refused:
            check(evaluation(Made(name=name)), Baseline(evaluation=evaluation(CLEAN)), Limits(), {}, only)
        assert refused.value.message.isprintable()
    damaged_name = damaged(lambda d: d["reference"].update(fingerprint=name))  # type: ignore[attr-defined, index]
    (tmp_path / "e.json").write_text(damaged_name, encoding="utf-8")
    with pytest.raises(EvaluationError) as refused:
        check_comparable(read_evaluation(tmp_path / "e.json"), Baseline(evaluation=evaluation(CLEAN)), Path("b.json"))
    assert refused.value.message.isprintable()


def test_few_windows_are_refused(tmp_path: Path) -> None:
    """Seven allow a mean KLD to double."""

    def cut(document: dict[str, object]) -> None:
        windows = document["candidates"][0]["result"]["windows"]  # type: ignore[index]
        for values in (windows["loss"], windows["kld"], windows["same_top"], *windows["layers"]):
            del values[7:]
        document["window_domains"] = list(DOMAINS[:7])

    path = tmp_path / "e.json"
    path.write_text(damaged(cut), encoding="utf-8")
    with pytest.raises(EvaluationError, match="found 7 windows, needed 8 to tell a regression from noise"):
        read_evaluation(path)


def test_errors_beyond_all_measure_are_compared() -> None:
    fine = evaluation(CLEAN)
    layer = fine.candidates[0].result.layers[1]
    endless = layer.model_copy(update={"expert_errors": (math.inf, *layer.expert_errors[1:])})  # type: ignore[index]
    result = fine.candidates[0].result.model_copy(
        update={"layers": (*fine.candidates[0].result.layers[:1], endless, *fine.candidates[0].result.layers[2:])}
    )
    hurt = fine.model_copy(update={"candidates": (fine.candidates[0].model_copy(update={"result": result}),)})
    (worse,) = check(hurt, Baseline(evaluation=fine), Limits(), {})
    assert failed(worse) == ["error of an expert's tokens"]
    (better,) = check(fine, Baseline(evaluation=hurt), Limits(), {})
    assert better.passed


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no such file"):
        read_evaluation(tmp_path / "absent.json")
    with pytest.raises(EvaluationError, match="no such baseline"):
        read_baseline(tmp_path / "absent.json")
