"""What the outputs of a job share and what the hidden states pass through, in whole jobs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.convert.jobs import (
    decoded,
    files_of,
    int4,
    recipe_of,
    run,
    shards_of,
    write_model,
    write_text,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    write_text(folder / "calibration.txt")
    write_model(folder / "model")
    return folder


def test_the_first_of_two_outputs_is_that_of_a_job_alone(place: Path, tmp_path: Path) -> None:
    rule = int4(polish=0)
    second = [{"match": "role:expert", "scheme": {"kind": "int", "bits": 8}, "method": {"kind": "gptq", "cross": 0}}]
    run(place / "model", recipe_of(rule), tmp_path / "alone")
    run(place / "model", recipe_of(rule, others={"second": second}), tmp_path / "both")
    assert shards_of(tmp_path / "alone") == shards_of(tmp_path / "both" / "main")
    assert {name.partition("/")[0] for name in files_of(tmp_path / "both")} == {"main", "second"}


@pytest.mark.parametrize("propagate", ["quantized", "original"])
def test_originals_carry_when_asked(propagate: str, place: Path, tmp_path: Path) -> None:
    """Layer 1's codes depend on layer 0's only if the quantised weights carry."""
    for bits in (2, 8):
        first = {**int4("*layers.0.*_proj*", polish=0), "scheme": {"kind": "int", "bits": bits}}
        recipe = recipe_of(first, int4("role:expert", polish=0), propagate=propagate)
        run(place / "model", recipe, tmp_path / f"{bits}")
    two, eight = (decoded(tmp_path / f"{bits}") for bits in (2, 8))
    changed = [not torch.equal(two[name], eight[name]) for name in two if "layers.1.mlp.experts" in name]
    assert any(changed) == (propagate == "quantized")
