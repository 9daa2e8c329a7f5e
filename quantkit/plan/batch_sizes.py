"""What follows from a memory budget: experts at once, bytes for stores of hidden states and for kept weights; and the
peaks that are then to be expected in RAM and on the GPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from quantkit.calibrate.chunk_sizes import TOKEN_SLICES
from quantkit.plan.hardware import Gpu, Hardware
from quantkit.plan.memory import LEAST_CACHE, Needs, conversion_phases, interpreter, least_budget, total
from quantkit.plan.output_memory import aware
from quantkit.plan.phases import KEPT_CHUNK_BYTES, Phase, Place, Term, expert_phases
from quantkit.plan.shapes import Work

MOST_EXPERTS = 32
"""More experts at once gain nothing: a batch of this size fills the matrix products."""
MOST_AWARE_EXPERTS = 64
"""The same where rows hear of each other: few of each matrix are rounded at once, more matrices fill a GPU."""
STORES_SHARE, EXPERTS_SHARE, CACHE_SHARE = 0.5, 0.3, 0.15
"""Shares of what the budget leaves beside the least that the work needs: for hidden states, for experts beside the
first, and for weights of dense linears."""
DEVICE_ROOM = 0.92
"""The share of a GPU's memory that is planned with; the rest is the CUDA context, and gaps between what torch has
allocated."""
DEVICE_STORES_SHARE = 0.6
"""Hidden states take at most this share of a GPU's memory."""
DEVICE_EXPERTS_SHARE = 0.4
"""Experts quantised at once take at most this share of a GPU's memory, unless dense linears take more anyway."""
DEVICE_AWARE_SHARE = 0.75
"""The same where rows hear of each other."""
DEVICE_CACHE_SHARE = 0.05
"""Kept weights of dense linears take this share of a GPU's memory."""
EXPERTS_UNEVEN = 1.25
"""A batch of experts has so many times the mean of tokens."""
CUDA_BYTES = 10**9
"""RAM that the CUDA driver and its libraries take beside the interpreter."""


@dataclass(frozen=True, slots=True)
class Share:
    """How memory is divided. Bytes for hidden states in RAM (``stores``) and on the GPU (``device_stores``), and for
    weights kept between batches of tokens (``cache``, where the arithmetic runs). ``limited_by``: why no more experts
    are quantised at once."""

    stores: int
    device_stores: int
    cache: int
    experts_at_once: int
    limited_by: str


@dataclass(frozen=True, slots=True)
class Expected:
    """Peaks that `convert` is expected to reach on some hardware: terms that exist together, in RAM and on the GPU.
    ``hidden_states``: the places that hold some, of "GPU", "RAM" and "disk"."""

    hardware: Hardware
    share: Share
    ram: tuple[Term, ...]
    gpu: tuple[Term, ...]
    hidden_states: tuple[str, ...]

    @property
    def ram_bytes(self) -> int:
        """Peak of the process's resident memory."""
        return total(self.ram)

    @property
    def gpu_bytes(self) -> int:
        """Peak of what torch allocates on the GPU, 0 without one."""
        return total(self.gpu)


def share_of(needs: Needs, hardware: Hardware) -> Share:
    """Divide the memory of ``hardware``, whose budget holds the least that is needed."""
    if hardware.gpu is not None:
        return _device_share(needs.work, hardware.gpu, hardware.budget)
    least = least_budget(needs)
    spare = hardware.budget - least
    assert spare >= 0, f"a budget of {hardware.budget:,} bytes for {least:,}"
    place, room = Place.of(needs.work, None), least + int(spare * EXPERTS_SHARE)
    count, limit = experts_within(needs.work, place, room, "the memory budget")
    return Share(int(spare * STORES_SHARE), 0, LEAST_CACHE + int(spare * CACHE_SHARE), count, limit)


def share_on_ranks(needs: Needs, hardware: Hardware, ranks: int) -> Share:
    """`share_of` for one of several ranks, each with ``hardware`` of its own: hidden states leave room for what they
    exchange."""
    share = share_of(needs, hardware)
    if ranks == 1:
        return share
    nbytes = _exchanged_bytes(needs.work, share.experts_at_once, narrow=hardware.gpu is not None, ranks=ranks)
    if hardware.gpu is None:
        return replace(share, stores=max(0, share.stores - nbytes))
    return replace(share, device_stores=max(0, share.device_stores - nbytes))


def _exchanged_bytes(work: Work, at_once: int, *, narrow: bool, ranks: int) -> int:
    """The most that exists at a time of: rows of a batch of experts (of each stream, as they came, as they went, and
    twice what is added), and sums of moments that wait for those of the rank before."""
    size = 2 if narrow and work.bf16 else 4
    slots = max((work.tokens * work.top_k // shape.count for shape in work.experts), default=0)
    rows = int(at_once * slots * EXPERTS_UNEVEN) * work.hidden * size * (2 * work.streams + 2)
    widest = max((block.context for block in work.blocks), default=0)
    return max(rows, (TOKEN_SLICES // ranks + 1) * work.streams * widest**2 * 4)


def _device_share(work: Work, gpu: Gpu, budget: int) -> Share:
    place, cache = Place.of(work, gpu), int(gpu.nbytes * DEVICE_CACHE_SHARE)

    def working(experts: int) -> int:
        return max(phase.nbytes for phase in conversion_phases(work, place, experts, cache))

    room = int(gpu.nbytes * DEVICE_ROOM)
    share = DEVICE_AWARE_SHARE if any(aware(shape.decisions) for shape in work.experts) else DEVICE_EXPERTS_SHARE
    count, limit = experts_within(work, place, max(working(1), int(room * share)), "GPU memory")
    on_gpu = max(0, min(int(gpu.nbytes * DEVICE_STORES_SHARE), room - working(count)))
    return Share(int(budget * STORES_SHARE), on_gpu, cache, count, limit)


def experts_within(work: Work, place: Place, nbytes: int, name: str) -> tuple[int, str]:
    """Experts quantised at once so that none of their phases takes more than ``nbytes``, and what limits them."""
    shapes = work.experts or work.untaught
    if not shapes:
        return 1, "no routed experts are quantised"
    shape = max(shapes, key=lambda one: one.inter * one.hidden)
    together = place.gpu is not None and bool(aware(shape.decisions))
    most = MOST_AWARE_EXPERTS if together else MOST_EXPERTS
    limits = [(most, "no gain from more"), (shape.count, f"all {shape.count} of a layer")]
    if place.gpu is not None and not together:
        one_slice = place.slice_bytes // (4 * 2 * shape.hidden * shape.inter)  # of gate and up together
        limits.append((max(1, one_slice), f"{place.slice_bytes / 2**30:g} GiB of rows at once"))
    most, why = min(limits, key=lambda limit: limit[0])
    for count in range(most, 1, -1):
        if all(phase.nbytes <= nbytes for phase in expert_phases(work, shape, place, count)):
            return count, why
        why = name
    return 1, why


# -------------------------------------------------------------------------------------------------------------- peaks


@dataclass(slots=True)
class _Placed:
    """Bytes of stores by place, as `machine.Stores` fills them: the GPU first, then RAM, then disk."""

    gpu_left: int
    ram_left: int
    nbytes: dict[str, int] = field(default_factory=lambda: {"GPU": 0, "RAM": 0, "disk": 0})

    def add(self, stores: Iterable[int]) -> _Placed:
        """Place stores in the order in which they are made."""
        for nbytes in stores:
            if nbytes <= self.gpu_left:
                self.gpu_left, place = self.gpu_left - nbytes, "GPU"
            elif nbytes <= self.ram_left:
                self.ram_left, place = self.ram_left - nbytes, "RAM"
            else:
                place = "disk"
            self.nbytes[place] += nbytes
        return self


def expected(needs: Needs, hardware: Hardware) -> Expected:
    """The peaks of `convert` on ``hardware``, whose budget holds the least that is needed."""
    work, share = needs.work, share_of(needs, hardware)
    place = Place.of(work, hardware.gpu)
    found = [
        (phase, _placed(work, share, phase).nbytes)
        for phase in conversion_phases(work, place, share.experts_at_once, share.cache)
    ]
    places = tuple(name for name in ("GPU", "RAM", "disk") if any(stores[name] for _, stores in found))
    if hardware.gpu is None:
        phase, stores = max(found, key=lambda one: one[0].nbytes + one[1]["RAM"])
        return Expected(hardware, share, (interpreter(), *_with_stores(phase, stores["RAM"])), (), places)
    phase, stores = max(found, key=lambda one: one[0].nbytes + one[1]["GPU"])
    in_ram = max(stores["RAM"] for _, stores in found)
    return Expected(hardware, share, _ram_beside_gpu(work, in_ram), _with_stores(phase, stores["GPU"]), places)


def _placed(work: Work, share: Share, phase: Phase) -> _Placed:
    streams = (work.tokens * work.hidden * 4,) * work.stores if phase.streams_open and work.tokens else ()
    return _Placed(share.device_stores, share.stores).add((*streams, *phase.scratch))


def _with_stores(phase: Phase, nbytes: int) -> tuple[Term, ...]:
    stores = (Term("hidden states", nbytes, f"stores for all tokens, while {phase.what}"),) if nbytes else ()
    return (*stores, *phase.terms)


def _ram_beside_gpu(work: Work, stores: int) -> tuple[Term, ...]:
    hidden = (Term("hidden states", stores, "what does not fit on the GPU"),) if stores else ()
    piece = min(KEPT_CHUNK_BYTES, work.largest_kept)
    return (
        interpreter(),
        Term("CUDA", CUDA_BYTES, "driver and libraries"),
        *hidden,
        Term("kept chunk", 2 * piece, f"2 x {piece:,} B"),
    )
