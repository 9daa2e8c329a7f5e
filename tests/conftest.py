"""What several files ask for by ``pytest.mark.usefixtures``."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from quantkit.documents.speed import DiskSpeed, KernelSpeed, SpeedDocument
from quantkit.plan import benchmark

# A job in the background of a script ignores Ctrl-C, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("no clock", deadline=None)  # an example takes as long as other work on the machine lets it
settings.load_profile("no clock")

SPEED = SpeedDocument(
    machine="",
    device="cpu",
    threads=1,
    flops=1e11,
    memory=3e10,
    new_memory=5e9,
    hashed=2e9,
    call=3e-6,
    factor_square=1e-8,
    factor_cube=1e-11,
    kernels={},
    disks={},
)
DISK = DiskSpeed(read=1e9, write=5e8)
KERNEL = KernelSpeed(call=5e-6, weight=1e-7, column=3e-10, rescale=0, decode=1e-9)


MEASURED = (benchmark._base, benchmark._kernel, benchmark._disk_speed)
"""What `a_machine_of_known_speed` replaces."""


@pytest.fixture(scope="session", autouse=True)
def a_machine_of_known_speed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests leave the user's cache alone, and measure no machine."""

    def base(device: torch.device, machine: str) -> SpeedDocument:
        return SPEED.model_copy(update={"machine": machine, "threads": torch.get_num_threads()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(benchmark, "_base", base)
        patch.setattr(benchmark, "_kernel", lambda scheme, method, device: KERNEL)
        patch.setattr(benchmark, "_disk_speed", lambda source, out: DISK)
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """A forked process must find no lock that a thread of its parent held; and small jobs are faster so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
