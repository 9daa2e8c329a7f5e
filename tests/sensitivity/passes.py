"""Small Fisher passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantkit.calibrate.dataset import TokenRows
from quantkit.calibrate.hidden_states import MemoryRows, RowStore
from quantkit.documents.sensitivity import SensitivityDocument
from quantkit.formats import open_source
from quantkit.plan.headers import headers_of
from quantkit.plan.machine import Machine
from quantkit.sensitivity.events import FisherEvent
from quantkit.sensitivity.open import Sensitivity, open_sensitivity
from quantkit.sensitivity.prepare import FisherRequest
from quantkit.sensitivity.run import run

PROCESSOR = Machine(torch.device("cpu"), 2**30)
SEED = 5
"""With it no uniform number of these tests lies so near a border that rounding would move the label."""


def ignore(event: FisherEvent) -> None:
    """Listens to nothing."""


def fisher_pass(
    source: Path,
    folder: Path,
    tokens: Tensor,
    *,
    on_event: Callable[[FisherEvent], None] = ignore,
    restart: bool = False,
    seed: int = SEED,
    machine: Machine = PROCESSOR,
) -> SensitivityDocument:
    """The pass over tokens (rows, tokens) of the checkpoint in ``source``."""
    with open_source(source) as opened:
        arch = headers_of(opened).arch
        rows = TokenRows(tokens.numpy().astype(np.int32), ("text",) * len(tokens), ())
        request = FisherRequest(opened, arch, rows, seed, None, folder, restart)
        return run(request, machine, on_event)


@contextmanager
def opened_pass(source: Path, folder: Path) -> Iterator[tuple[Sensitivity, Callable[[str], Tensor]]]:
    """The finished pass, and the weights of its checkpoint in float32."""
    with open_source(source) as opened:
        found = open_sensitivity(folder, opened, headers_of(opened).arch)
        yield found, lambda name: opened.read(name).float()


def new_store(n_rows: int, length: int, width: int) -> RowStore:
    """In memory."""
    return MemoryRows(n_rows, length, width)
