"""Joins the ranks: one GPU each and NCCL, or gloo where the processor computes."""

from __future__ import annotations

import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed as dist

from quantkit.errors import PlanError, RankLostError
from quantkit.ranks.places import RankPlace, check_count
from quantkit.ranks.ranks import CPU, Ranks

TIMEOUT = timedelta(minutes=30)
"""A rank that is silent for so long is taken for hung: longer than the slowest batch of experts on a processor."""


@contextmanager
def connected(place: RankPlace, device: str, timeout: timedelta = TIMEOUT) -> Generator[Ranks]:
    """The ranks, joined until the end of the ``with``. ``device``: "auto", "cpu" or "cuda".

    Raises `PlanError` if two ranks would share a GPU, torch sees none, or so many cannot share the work;
    `RankLostError` if not all ranks come.
    """
    # What ranks exchange does not use NCCL's multicast over NVLink, which not every container allows.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    chosen = _device_of(place, device)
    control = _joined(place, timeout)
    try:
        ranks = Ranks(place.number, place.count, CPU, control)
        ranks.agreed(lambda: check_count(place.count))
        _refuse_shared_gpus(ranks, chosen)
        data = _nccl(timeout) if chosen.type == "cuda" else control
        yield Ranks(place.number, place.count, chosen, control, data, place.local_count)
    finally:
        dist.destroy_process_group()


def _device_of(place: RankPlace, device: str) -> torch.device:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available() and not place.launched):
        return CPU
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen == 0:
        raise PlanError(
            f"{place.count} ranks on GPUs: torch sees no GPU.",
            hint="Use --device cpu, or install a CUDA build of torch.",
        )
    chosen = torch.device("cuda", place.local % seen)  # Slurm may show each task its own GPU only
    torch.cuda.set_device(chosen)
    return chosen


def _joined(place: RankPlace, timeout: timedelta) -> dist.ProcessGroup:
    """Raises `RankLostError` if the others do not come."""
    os.environ.setdefault("MASTER_ADDR", place.address)
    os.environ.setdefault("MASTER_PORT", str(place.port))
    try:
        dist.init_process_group(
            "gloo", init_method="env://", rank=place.number, world_size=place.count, timeout=timeout
        )
    except (RuntimeError, ValueError) as error:  # torch's DistNetworkError and DistStoreError are RuntimeErrors
        said = str(error).partition("\n")[0][:120]
        raise RankLostError(
            f"rank {place.number} of {place.count} cannot reach the others at {place.address}:{place.port} ({said}).",
            hint="Start all ranks at once, and let them reach each other.",
        ) from error
    assert dist.group.WORLD is not None, "just made"
    return dist.group.WORLD


def _nccl(timeout: timedelta) -> dist.ProcessGroup:
    group = dist.new_group(backend="nccl", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup), "all ranks are in it"
    return group


def _refuse_shared_gpus(ranks: Ranks, device: torch.device) -> None:
    """Raise `PlanError` if two ranks compute on one GPU."""

    def own() -> tuple[str, str]:
        if device.type != "cuda":
            return "", str(ranks.number)
        return socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid)

    found = ranks.gathered(own())
    kinds = {bool(host) for host, _ in found}

    def check() -> None:
        if len(kinds) > 1:
            raise PlanError("some ranks see a GPU and others none.", hint="Give --device cuda or --device cpu.")
        host, uuid = found[ranks.number]
        if found.index((host, uuid)) != ranks.number:
            raise PlanError(
                f"{ranks.count} ranks: more than GPUs on {host}, where torch sees {torch.cuda.device_count()}.",
                hint="Start one rank for each GPU.",
            )

    ranks.agreed(check)
