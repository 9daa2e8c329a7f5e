"""The pass as a GPU computes it, weights and files in bfloat16, run on the processor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit.documents.sensitivity import SensitivityDocument
from quantkit.plan.machine import Machine
from quantkit.sensitivity.moments import output_moments
from tests.convert.jobs import small_config, write_model
from tests.sensitivity.passes import fisher_pass, new_store, opened_pass


def scalars(found: SensitivityDocument) -> torch.Tensor:
    return torch.tensor([one.fisher for one in found.linears.values()])


def test_scalars_files_and_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the bytes; scalars differ by what some labels and choices of experts make."""
    source, tokens = tmp_path / "model", torch.randint(0, 1024, (4, 64), generator=torch.Generator().manual_seed(1))
    write_model(source, small_config())
    expected = fisher_pass(source, tmp_path / "F32", tokens)
    monkeypatch.setattr(Machine, "scratch_dtype", torch.bfloat16)
    found = fisher_pass(source, tmp_path / "BF16", tokens)
    assert (found.job.dtype, expected.job.dtype) == ("BF16", "F32")
    assert found.linears.keys() == expected.linears.keys()
    assert (scalars(found) - scalars(expected)).norm() <= 0.2 * scalars(expected).norm()
    sizes = [sum(path.stat().st_size for path in (tmp_path / name).glob("layer-*")) for name in ("BF16", "F32")]
    assert sizes[0] == pytest.approx(sizes[1] / 2, rel=0.01)
    with opened_pass(source, tmp_path / "BF16") as (opened, read):
        (attention,) = opened.arch.sublayers(1)[0]
        with opened.sublayer(1, 0, lambda name: read(name).bfloat16(), new_store, torch.device("cpu")) as gradients:
            for name, moments in output_moments(gradients.dense(attention)).items():
                # The same gradients, but for the rounding of the stored ones.
                trace = float(moments.sums[0].trace()) / moments.sums.shape[-1]
                assert trace == pytest.approx(found.linears[name].fisher, rel=0.02)


def test_a_source_in_float32_computes_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "model", small_config(), dtype=torch.float32)
    monkeypatch.setattr(Machine, "scratch_dtype", torch.bfloat16)
    tokens = torch.randint(0, 1024, (1, 20), generator=torch.Generator().manual_seed(1))
    assert fisher_pass(tmp_path / "model", tmp_path / "pass", tokens).job.dtype == "F32"
