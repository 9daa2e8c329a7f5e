"""What several files ask for by ``pytest.mark.usefixtures``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("no clock", deadline=None)  # an example takes as long as other work on the machine lets it
settings.load_profile("no clock")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """A forked process must find no lock that a thread of its parent held; and small jobs are faster so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
