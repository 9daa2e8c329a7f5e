"""Before the work: kernels are compiled, and the schedule is made of this machine's speed."""

from __future__ import annotations

from quantkit.convert.conversion import Conversion
from quantkit.convert.events import StageStarted
from quantkit.plan.benchmark import compile_kernels, measured
from quantkit.plan.costs import schedule
from quantkit.plan.memory import Needs
from quantkit.plan.schedule import COMPILING, Schedule
from quantkit.plan.speed import disk_key, machine_key, treatments


def schedule_of(conversion: Conversion, needs: Needs) -> Schedule:
    """Compile what the plan's methods run, and say how long each step should take: on the first rank, which shows it.
    What is not known of the machine yet is measured, for some seconds."""
    conversion.on_event(StageStarted(COMPILING))
    plan, device = conversion.plan, conversion.machine.device
    compile_kernels(treatments(plan), device)
    if not conversion.ranks.first:
        return ()
    # How fast a remote source comes is seen while it comes.
    source = None if conversion.source.origin else conversion.source.files[0].parent
    out = conversion.folder.partial
    speed = measured(plan, device, machine_key(device.type), source, out)
    at_once = conversion.share.experts_at_once if device.type == "cuda" else 1
    return schedule(plan, conversion.arch, needs.work, speed, speed.disks[disk_key(source, out)], at_once)
