"""How long a conversion takes on this machine: its schedule, and what limits it.

An estimate from a benchmark of some seconds, for a machine that does nothing else meanwhile.
"""

from __future__ import annotations

from pathlib import Path

from quantkit.documents.speed import SpeedDocument
from quantkit.plan.costs import schedule
from quantkit.plan.forecast import Forecast
from quantkit.plan.plan import Plan
from quantkit.plan.schedule import Duration
from quantkit.plan.speed import disk_key, is_complete, likely_device, machine_key, read_speed, treatments


def duration_of(found: Forecast, out: Path = Path()) -> Duration:
    """How long the conversion of a forecast should take here, written into ``out``. What is not known of this machine
    yet is measured, for some seconds; only then torch is loaded."""
    source = found.source.files[0].parent if found.source.files and not found.source.origin else None
    speed = _speed(found.plan, source, out)
    disk = speed.disks[disk_key(source, out)]
    expected = found.on_gpu if speed.device != "cpu" else None
    at_once = 1 if expected is None else expected.share.experts_at_once
    steps = schedule(found.plan, found.source.arch, found.needs.work, speed, disk, at_once)
    return Duration(speed.device, speed.threads, steps)


def _speed(plan: Plan, source: Path | None, out: Path) -> SpeedDocument:
    key = machine_key(likely_device())
    known = read_speed(key)
    if known is not None and is_complete(known, treatments(plan), disk_key(source, out)):
        return known
    from quantkit.plan.benchmark import measured
    from quantkit.plan.machine import Machine

    return measured(plan, Machine.of("auto", None).device, key, source, out)
