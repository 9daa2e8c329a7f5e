"""Which rank this process is, from what torchrun, Slurm or `quantkit convert --gpus` put into its environment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from quantkit.errors import PlanError

COUNTS = (1, 2, 4, 8)
"""Ranks that can share the eight slices of rows evenly."""
LAUNCHED = "QUANTKIT_LAUNCHED"
"""Set for ranks that `quantkit convert --gpus` started: it says the line when one of them dies."""


@dataclass(frozen=True, slots=True)
class RankPlace:
    """``number`` of ``count`` ranks; ``local`` of ``local_count`` on this host. ``address``, ``port``: where rank 0
    listens. ``launched``: by `quantkit convert --gpus`."""

    number: int
    count: int
    local: int
    local_count: int
    address: str
    port: int
    launched: bool = False


def place_of(environment: Mapping[str, str]) -> RankPlace | None:
    """None for a process that is alone. Raises `PlanError` for an environment that makes no sense."""
    found = _of_torchrun(environment) or _of_slurm(environment)
    return None if found is None or found.count == 1 else found


def check_count(count: int) -> None:
    """Raise `PlanError` unless so many ranks can share the slices."""
    if count not in COUNTS:
        raise PlanError(
            f"{count} ranks: 1, 2, 4 or 8 was needed.",
            hint="Sums over tokens have eight parts, which ranks share evenly: so the bytes do not depend on them.",
        )


def _of_torchrun(environment: Mapping[str, str]) -> RankPlace | None:
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    count = _number(environment, "WORLD_SIZE")
    return RankPlace(
        number=_number(environment, "RANK"),
        count=count,
        local=_number(environment, "LOCAL_RANK", environment["RANK"]),
        local_count=_number(environment, "LOCAL_WORLD_SIZE", environment["WORLD_SIZE"]),
        address=environment.get("MASTER_ADDR", "127.0.0.1"),
        port=_number(environment, "MASTER_PORT", "29500"),
        launched=LAUNCHED in environment,
    )


def _of_slurm(environment: Mapping[str, str]) -> RankPlace | None:
    """A task of a step that srun started; in the batch script itself there is no step (srun(1), output environment)."""
    if "SLURM_PROCID" not in environment or "SLURM_STEP_NUM_TASKS" not in environment:
        return None
    hosts = environment.get("SLURM_STEP_NODELIST", "127.0.0.1")
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", environment["SLURM_STEP_NUM_TASKS"])
    return RankPlace(
        number=_number(environment, "SLURM_PROCID"),
        count=_number(environment, "SLURM_STEP_NUM_TASKS"),
        local=_number(environment, "SLURM_LOCALID", "0"),
        local_count=int((re.match(r"\d+", tasks) or ["1"])[0]),
        address=environment.get("MASTER_ADDR") or first_host(hosts),
        port=_number(environment, "MASTER_PORT", str(20_000 + _number(environment, "SLURM_JOB_ID", "0") % 20_000)),
    )


def first_host(hosts: str) -> str:
    """ "gpu[07-09,12],login" -> "gpu07"."""
    found = re.match(r"([^\[,]+)(?:\[(\d+))?", hosts)
    return "127.0.0.1" if found is None else found[1] + (found[2] or "")


def _number(environment: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environment.get(name, default) or ""
    if not text.isdecimal():
        raise PlanError(f"{name}={text!r}: a number was needed, as torchrun or Slurm set it.")
    return int(text)
