"""Linears that lose far more than their scheme should: found, named at the end of a conversion and in the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.documents.conversion import ConversionDocument
from quantkit.documents.read import read_documents
from quantkit.report.build import report_of
from quantkit.report.markdown import markdown
from quantkit.report.scored import scored_checkpoints
from quantkit.schemes import ChosenScheme, GgmlScheme, IntScheme
from quantkit.schemes.gaussian import fits_poorly, gaussian_loss, gaussian_losses
from quantkit.text.converted import report_document, report_text
from tests.convert.gguf_jobs import gguf_output, gguf_recipe, wide_config
from tests.convert.jobs import recipe_of, run, write_text, write_tokenizer
from tests.tiny_models import random_weights, write_shards

TINY = "model.layers.1.mlp.experts.2.down_proj.weight"
CPU = torch.device("cpu")
Q4 = {"match": "role:expert", "scheme": "Q4_0", "method": {"kind": "rtn"}}
HALF = {"kind": "int", "bits": 4, "group_size": 64, "scale_dtype": "float16"}


def model(folder: Path, factor: float) -> Path:
    """A random checkpoint in which one expert's matrix is multiplied by ``factor``."""
    config = wide_config()
    tensors = random_weights(config)
    tensors[TINY] = tensors[TINY].float().mul(factor).to(torch.bfloat16)
    write_shards(folder, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    write_text(folder.parent / "calibration.txt")
    return folder


@pytest.mark.parametrize(
    ("recipe", "label"),
    [
        (gguf_recipe(gguf_output(Q4, {"match": "*", "keep": "source"})), "Q4_0"),
        (recipe_of({"match": "role:expert", "scheme": HALF, "method": {"kind": "rtn"}}, tokens=None), "int4 g64"),
        (recipe_of({"match": "role:expert", "scheme": HALF, "method": {"kind": "gptq"}}), "int4 g64"),
    ],
    ids=["gguf", "int", "gptq"],
)
def test_float16_scales_that_underflow(recipe: Any, label: str, tmp_path: Path) -> None:
    source = model(tmp_path / "model", 2.0**-24)
    report = run(source, recipe, tmp_path / "out")
    (fit,) = report.outputs[0].poor_fits
    assert (fit.name, fit.scheme) == (TINY, label)
    assert fit.relative_loss > 5 * fit.gaussian_loss > 0.01
    last = report_text(report).split("\n\n")[-1]
    assert last.startswith("warning: output main: 1 linear loses over five times what the scheme should:")
    assert TINY in last
    assert "keep: bf16" in last
    document = ConversionDocument.model_validate_json((tmp_path / "out" / "quantkit.json").read_text())
    assert document.poor_fits == (fit,)
    outputs: Any = report_document(report)["outputs"]
    assert outputs[0]["poor_fits"][0]["name"] == TINY
    page = markdown(report_of(scored_checkpoints(read_documents([tmp_path / "out"])), None))
    assert "1 linear lost more than five times what the same scheme loses on Gaussian weights" in page
    assert "Linears that do not fit their scheme" in page


@pytest.mark.parametrize("tokens", [None, 256])
def test_ordinary_linears_are_not_named(tokens: int | None, tmp_path: Path) -> None:
    kind = "rtn" if tokens is None else "gptq"
    rule = {"match": "role:expert", "scheme": HALF, "method": {"kind": kind}}
    report = run(model(tmp_path / "model", 1.0), recipe_of(rule, tokens=tokens), tmp_path / "out")
    assert report.outputs[0].poor_fits == ()
    assert "warning:" not in report_text(report)
    assert "poor_fits" not in json.loads((tmp_path / "out" / "quantkit.json").read_text())


def test_gaussian_loss() -> None:
    """More bits lose less; eight bits lose what uniform rounding of a normal range does."""
    losses = [gaussian_loss(IntScheme(bits=bits, group_size=32), CPU) for bits in (2, 3, 4, 8)]
    assert losses == sorted(losses, reverse=True)
    largest = 2.35  # mean of the largest of 32
    assert losses[-1] == pytest.approx((largest / 127.5) ** 2 / 12, rel=0.2)
    schemes: tuple[ChosenScheme, ...] = (IntScheme(bits=4, group_size=None), GgmlScheme(type="Q8_0"))
    measured = gaussian_losses(CPU)
    assert [measured(scheme) for scheme in schemes] == [gaussian_loss(scheme, CPU) for scheme in schemes]


def test_limits() -> None:
    assert fits_poorly(0.051, 0.01)
    assert not fits_poorly(0.049, 0.01)
    assert fits_poorly(1.0, 0.3)
    assert not fits_poorly(float("nan"), 0.01)
