"""Where the tests of Triton kernels run: on a GPU, or anywhere in Triton's interpreter (TRITON_INTERPRET=1, with Triton
installed); they are skipped elsewhere."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="no GPU"),
    pytest.mark.filterwarnings("ignore"),  # numpy's, under the interpreter
]
