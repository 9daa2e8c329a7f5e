"""What a plan says of output-aware methods: memory, time, and a pass that does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.documents.sensitivity import SENSITIVITY, FisherJob, SensitivityDocument
from quantkit.errors import OutputError, SourceError
from quantkit.plan.forecast import Forecast, forecast
from quantkit.plan.recipe import Recipe

V3 = Path(__file__).parents[2] / "examples" / "deepseek-v3-671b"
TOKENS = 32_768


def pass_of(folder: Path, *, layers: int = 61, hidden: int = 7168) -> Path:
    """The document of a finished pass of a model of this shape."""
    job = FisherJob(
        quantkit="0",
        torch="2",
        source="0" * 64,
        tokens_sha256="0" * 64,
        rows=TOKENS // 2048,
        length=2048,
        seed=0,
        device="cpu",
        threads=1,
        dtype="BF16",
        hidden=hidden,
        sublayers=(2,) * layers,
    )
    folder.mkdir()
    (folder / SENSITIVITY).write_text(SensitivityDocument(job=job, linears={}).to_json())
    return folder


def planned(sensitivity: Path, *, output_aware: bool, base_dir: Path = Path()) -> Forecast:
    rule = {
        "match": "role:attention|mlp|shared_expert|expert",
        "scheme": {"kind": "int", "bits": 4, "group_size": 128},
        "method": {"kind": "gptq", "output_aware": output_aware},
    }
    output = {"name": "a", "format": "compressed-tensors", "rules": [rule, {"match": "*", "keep": "source"}]}
    calibration = {"data": ["builtin:mixed"], "tokens": TOKENS, "sequence_length": 2048}
    values = {"version": 1, "calibration": calibration, "sensitivity": str(sensitivity), "outputs": [output]}
    return forecast(V3, Recipe.from_dict(values), base_dir=base_dir)


def test_the_pass_is_looked_for_where_the_recipe_s_files_lie(tmp_path: Path) -> None:
    pass_of(tmp_path / "felt")
    assert planned(Path("felt"), output_aware=True, base_dir=tmp_path).needs.work.fisher_tokens == TOKENS


def test_whole_buffers_output_hessians_and_gradients_are_counted(tmp_path: Path) -> None:
    folder = pass_of(tmp_path / "felt")
    plain, aware = (planned(folder, output_aware=asked) for asked in (False, True))
    assert plain.needs.work.fisher_tokens == 0
    assert aware.needs.work.fisher_tokens == TOKENS
    hidden, inter = 7168, 2048
    # One expert at a time: output Hessians of gate, up and all downs, and the factor of the largest beside them.
    least = 4 * (2 * inter**2 + hidden**2) + 4 * hidden**2
    assert aware.needs.working_bytes - plain.needs.working_bytes > least / 2
    terms = {term.what for term in aware.needs.working}
    assert terms >= {"output Hessians", "factors of output Hessians", "whole matrices"}


def test_a_gpu_holds_more(tmp_path: Path) -> None:
    folder = pass_of(tmp_path / "felt")
    plain, aware = (planned(folder, output_aware=asked) for asked in (False, True))
    assert plain.on_gpu is not None
    assert aware.on_gpu is not None
    assert aware.on_gpu.gpu_bytes > plain.on_gpu.gpu_bytes


def test_a_pass_that_is_not_there_or_of_another_model_is_refused_by_the_plan(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="nowhere: holds no sensitivity.json"):
        planned(tmp_path / "nowhere", output_aware=True)
    with pytest.raises(SourceError, match="61 layers of width 512; 61 layers of width 7,168 were needed"):
        planned(pass_of(tmp_path / "narrow", hidden=512), output_aware=True)
    planned(tmp_path / "nowhere", output_aware=False)
