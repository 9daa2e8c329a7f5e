"""The pass on a GPU is the processor's, but for rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit.documents.sensitivity import SensitivityDocument
from quantkit.plan.machine import Machine
from tests.convert.jobs import small_config, write_model
from tests.sensitivity.passes import fisher_pass

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def scalars(found: SensitivityDocument) -> torch.Tensor:
    return torch.tensor([one.fisher for one in found.linears.values()])


@pytest.mark.parametrize(
    ("dtype", "stored", "close"), [(torch.float32, "F32", 0.01), (torch.bfloat16, "BF16", 0.2)], ids=["F32", "BF16"]
)
def test_scalars(dtype: torch.dtype, stored: str, close: float, tmp_path: Path) -> None:
    """In bfloat16 some labels and some choices of experts are others."""
    write_model(tmp_path / "model", small_config(), dtype=dtype)
    tokens = torch.randint(0, 1024, (4, 128), generator=torch.Generator().manual_seed(1))
    expected = fisher_pass(tmp_path / "model", tmp_path / "cpu", tokens)
    machine = Machine(torch.device("cuda"), 2**30)
    found = fisher_pass(tmp_path / "model", tmp_path / "cuda", tokens, machine=machine)
    assert found.job.dtype == (stored if machine.scratch_dtype == torch.bfloat16 else "F32")
    assert found.linears.keys() == expected.linears.keys()
    assert (scalars(found) - scalars(expected)).norm() <= close * scalars(expected).norm()
