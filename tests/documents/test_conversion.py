"""quantkit.json: what is written, what is missing, what other versions may have; and the losses that a baseline
keeps of it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from pydantic import ValidationError

from quantkit.documents.baseline import ConversionLosses
from quantkit.documents.conversion import ConversionDocument, LinearRecord
from quantkit.documents.journal import JobHeader
from tests.report.jobs import conversion


def document(**changes: Any) -> ConversionDocument:
    return ConversionDocument.model_validate({**conversion(), **changes})


def test_what_applies_is_written_in_the_models_order() -> None:
    found = document()
    assert json.loads(found.to_json()) == conversion()
    fit = {"name": "lm_head.weight", "scheme": "Q4_0", "relative_loss": 1.0, "gaussian_loss": 0.0065}
    pruning = {"experts": 2, "kept": {"1": [1]}, "scores": {"1": [[0.5, 3], [0.75, 1]]}}
    tuning = {"0": {"loss_before": 0.5, "loss_after": 0.25, "epoch": 3, "codes": 100, "codes_changed": 7}}
    whole = document(poor_fits=[fit], pruning=pruning, tuning=tuning)
    assert json.loads(whole.to_json())["pruning"] == pruning
    assert json.loads(whole.to_json())["tuning"] == tuning
    assert list(json.loads(whole.to_json())) == list(ConversionDocument.model_fields)


def test_a_missing_loss_is_not_one_that_was_no_number() -> None:
    scheme = {"kind": "int", "bits": 4}
    tensors = {"kept": {"scheme": scheme}, "lost": {"scheme": scheme, "relative_loss": None, "n_tokens": 3}}
    found = document(tensors=tensors)
    lost = found.tensors["lost"].relative_loss
    assert found.tensors["kept"].relative_loss is None
    assert lost is not None
    assert math.isnan(lost)
    assert json.loads(found.to_json())["tensors"] == tensors
    assert LinearRecord(scheme=scheme, relative_loss=math.inf).model_dump(mode="json")["relative_loss"] is None


def test_the_job_of_another_version_is_shown_as_it_is() -> None:
    job = {"quantkit version": "9", "device": "cpu", "ranks": 8, "imatrix": None}
    found = document(job=job)
    assert found.job.facts() == job
    assert found.job.quantkit_version == "9"
    assert found.job.threads is None
    assert JobHeader(memory_budget=5).facts() == {"memory budget": 5}


@pytest.mark.parametrize(
    "changes",
    [
        {"tensor_bytes": 10**400},
        {"job": {"threads": -1}},
        {"job": []},
        {"recipe": "int4"},
        {"expert_tokens": {"-1": {}}},
        {"expert_tokens": {"1": {"experts": [[1, 0.5, 0, 0]]}}},
        {"tensors": {"a": {"scheme": None}}},
        {"validation": {"problems": []}},
    ],
)
def test_hostile_values_are_refused(changes: dict[str, Any]) -> None:
    text = json.dumps({**conversion(), **changes})
    with pytest.raises(ValidationError):
        ConversionDocument.model_validate_json(text)


def test_a_baseline_keeps_losses_and_how_they_were_calibrated() -> None:
    tensors = {
        "a": {"scheme": {}, "relative_loss": 0.0123456},
        "kept": {"scheme": {}},
        "lost": {"scheme": {}, "relative_loss": None},
    }
    found = ConversionLosses.of(document(recipe={"calibration": {"data": ["x"], "seed": 3}}, tensors=tensors))
    assert found.calibration == {"data": ["x"]}
    assert list(found.losses) == ["a", "lost"]
    assert found.losses["a"] == 0.01235
    assert math.isnan(found.losses["lost"])
    assert ConversionLosses.of(document(recipe={})).calibration is None
