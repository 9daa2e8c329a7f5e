"""A conversion of a small model to a folder and to GGUF in one pass, calibrated."""

from __future__ import annotations

from pathlib import Path

from quantkit.plan.recipe import Recipe
from tests.convert.gguf_jobs import RTN, compressed, gguf_output, gguf_recipe
from tests.convert.jobs import int4, small_config, write_model, write_text
from tests.faults.injected import FaultyJob

RECIPE: Recipe = gguf_recipe(
    compressed(int4("role:expert", grid=2, polish=0), name="folder"),
    gguf_output(name="gguf", preset="Q5_1", method=RTN, mtp="drop"),
    tokens=64,
    least=4,
)


def small_job(place: Path) -> FaultyJob:
    """Written into folder ``place`` and run once."""
    write_text(place / "calibration.txt")
    write_model(place / "model", small_config(num_nextn_predict_layers=0), fp8=True)
    return FaultyJob.of(place / "model", RECIPE, place / "out")
