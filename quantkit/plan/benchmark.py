"""A benchmark of some seconds: how fast this machine does each thing that a conversion consists of -> `SpeedDocument`.

Random matrices of a few MB go through the code that a conversion runs. Codes of a matrix (rows, n) take a part for each
sweep, one for each weight, and one for each weight and column, so three sizes are timed; larger ones follow from them.
The least of some repetitions counts: what else a machine does meanwhile is not its speed. Kernels are compiled before.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from quantkit.arch.base import NormWeight
from quantkit.calibrate.inputs import InputImportance, InputStats
from quantkit.documents.speed import DiskSpeed, KernelSpeed, SpeedDocument
from quantkit.plan.plan import Plan
from quantkit.plan.speed import Treatment, disk_key, existing, is_complete, read_speed, save_speed, treatments
from quantkit.quantizers import Method
from quantkit.quantizers.batch import Quantizer
from quantkit.quantizers.ldlq.factor import factorize
from quantkit.quantizers.rescaling import ChannelReader, Channels, RescalingMethod
from quantkit.schemes import ChosenScheme

REPEATS = 3
PIECE = 32 * 2**20
"""Bytes that are read and written to time a disk."""
SMALL, WIDE, HIGH = (8, 256), (128, 1024), (512, 256)
"""(rows, n) of the matrices: of few rows, of long ones, of many. Eight times as many rows for a GPU."""
LEAST = 1e-12
"""Seconds: what is too fast to be seen."""


def compile_kernels(wanted: Mapping[str, Treatment], device: torch.device) -> None:
    """Run what a conversion will run on a small matrix each: compilers work now, not in the first layer."""
    for scheme, method in wanted.values():
        _quantizer(method, SMALL[1], device)(_weight(SMALL, device), scheme).decode()
    _wait(device)


def measured(plan: Plan, device: torch.device, machine: str, source: Path | None, out: Path) -> SpeedDocument:
    """All that a conversion needs to know of ``device``, and of the disks of ``source`` (None: no shards are there) and
    ``out``. What the cache has of ``machine`` is taken from there, the rest measured and kept."""
    wanted, disk = treatments(plan), disk_key(source, out)
    found = read_speed(machine)
    if found is not None and found.threads == torch.get_num_threads() and is_complete(found, wanted, disk):
        return found
    if found is None or found.threads != torch.get_num_threads():
        found = _base(device, machine)
    missing = {key: pair for key, pair in wanted.items() if key not in found.kernels}
    compile_kernels(missing, device)
    kernels = {key: _kernel(*pair, device) for key, pair in missing.items()}
    disks = {} if disk in found.disks else {disk: _disk_speed(source, out)}
    found = found.model_copy(update={"kernels": {**found.kernels, **kernels}, "disks": {**found.disks, **disks}})
    save_speed(found)
    return found


def _disk_speed(source: Path | None, out: Path) -> DiskSpeed:
    """Of reading shards and of writing, some MB each. A place that cannot be written counts as fast as it is read."""
    write = _written(out)
    read = None if source is None else _read(source)
    return DiskSpeed(read=read or write or 1e9, write=write or read or 1e9)


# ------------------------------------------------------------------------------------------------------------ computing


def _base(device: torch.device, machine: str) -> SpeedDocument:
    cuda = device.type == "cuda"
    short, long = torch.ones(2**21, device=device), torch.ones(2**24, device=device)
    one = torch.ones(8, 8, device=device)
    small, large = (_factor_seconds(n, device) for n in (512, 2048))
    # seconds = s n^2 + c n^3, at n and at 4 n
    cube = max(LEAST, (large - 16 * small) / (48 * 512**3))
    square = max(0.0, small / 512**2 - 512 * cube)
    return SpeedDocument(
        machine=machine,
        device=torch.cuda.get_device_name(device) if cuda else "cpu",
        threads=torch.get_num_threads(),
        flops=product_rate(device),
        memory=8 * short.numel() / _best(lambda: short * 1.0, device),
        new_memory=8 * long.numel() / _best(lambda: long * 1.0, device),
        hashed=2**22 / _best(partial(hashlib.sha256, bytes(2**22)), device),
        call=_best(lambda: one.add_(1.0), device),
        factor_square=square,
        factor_cube=cube,
        kernels={},
        disks={},
    )


def product_rate(device: torch.device) -> float:
    """Floating-point operations a second of matrix products, in the dtype that calibration computes with there."""
    cuda = device.type == "cuda"
    side = 4096 if cuda else 1024
    a = _weight((side, side), device)[0].to(torch.bfloat16 if cuda else torch.float32)
    return 2 * side**3 / _best(lambda: a @ a, device)


def _factor_seconds(n: int, device: torch.device) -> float:
    hessian = _stats(n, device).hessian
    return _best(lambda: factorize(hessian.clone(), 0.01, act_order=True), device)


def _kernel(scheme: ChosenScheme, method: Method, device: torch.device) -> KernelSpeed:
    times = 8 if device.type == "cuda" else 1
    small, wide, high = ((times * rows, n) for rows, n in (SMALL, WIDE, HIGH))
    of_small, of_wide, of_high = (_choice_seconds(scheme, method, shape, device) for shape in (small, wide, high))
    n = small[1]
    each = max(LEAST, (of_high - of_small) / ((high[0] - small[0]) * n))  # weight + n * column
    call = max(0.0, of_small / n - small[0] * each)
    wider = (of_wide / wide[1] - call) / wide[0]  # the same for more columns
    column = max(0.0, (wider - each) / (wide[1] - n))
    decode = _decode_seconds(scheme, method, high, device) / (high[0] * n)
    rescale = _rescaling_seconds(scheme, method, high, device) / (high[0] * n)
    return KernelSpeed(call=call, weight=max(LEAST, each - n * column), column=column, rescale=rescale, decode=decode)


def _choice_seconds(scheme: ChosenScheme, method: Method, shape: tuple[int, int], device: torch.device) -> float:
    """Of choosing codes for one matrix; its Hessian is factored before."""
    quantize, weight = _quantizer(method, shape[1], device), _weight(shape, device)
    return _best(lambda: quantize(weight, scheme), device)


def _rescaling_seconds(scheme: ChosenScheme, method: Method, shape: tuple[int, int], device: torch.device) -> float:
    """Of searching the factors of one matrix's input channels; 0 for a method that takes them as they are."""
    if not isinstance(method, RescalingMethod):
        return 0.0
    reader = ChannelReader(scheme, _weight(shape, device), InputImportance(_stats(shape[1], device).importance, (1,)))
    producer = NormWeight("norm", ())
    channels = Channels((producer,), reader.inputs, lambda: iter((reader,)))
    return _best(lambda: method.rescale(channels), device)


def _decode_seconds(scheme: ChosenScheme, method: Method, shape: tuple[int, int], device: torch.device) -> float:
    quantize = _quantizer(method, shape[1], device)
    return _best(quantize(_weight(shape, device), scheme).decode, device)


def _quantizer(method: Method, n: int, device: torch.device) -> Quantizer:
    return method.quantizer(_stats(n, device) if method.needs_inputs else None)


def _weight(shape: tuple[int, int], device: torch.device) -> Tensor:
    """(1, rows, n) float32, the same each time: torch's own random numbers are left alone."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, *shape, generator=generator).to(device)


def _stats(n: int, device: torch.device) -> InputStats:
    """Of 2 n random tokens."""
    x = _weight((2 * n, n), device)
    hessian = x.mT @ x / (2 * n)
    return InputStats(hessian, 0.01 * hessian, (2 * n,))


def _best(work: Callable[[], object], device: torch.device) -> float:
    """The least seconds of some runs; the first, which warms caches up, does not count."""
    work()
    found: list[float] = []
    for _ in range(REPEATS):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        found.append(time.perf_counter() - start)
    return max(LEAST, min(found))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------------------------------------------------- disk


def _written(folder: Path) -> float | None:
    """Bytes a second, synced; None where nothing can be written."""
    try:
        with tempfile.TemporaryFile(dir=existing(folder)) as file:
            start = time.perf_counter()
            file.write(bytes(PIECE))
            file.flush()
            os.fsync(file.fileno())
            return PIECE / max(LEAST, time.perf_counter() - start)
    except OSError:
        return None


def _read(source: Path) -> float | None:
    """Bytes a second of a shard's pages that are thrown out of the cache before; None if nothing can be read."""
    shards = sorted((*source.glob("*.safetensors"), *source.glob("*.gguf")), key=lambda path: path.stat().st_size)
    try:
        return _read_file(shards[-1]) if shards else None
    except OSError:
        return None


def _read_file(path: Path) -> float | None:
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, PIECE, os.POSIX_FADV_DONTNEED)
        start, nbytes = time.perf_counter(), 0
        while nbytes < PIECE and (piece := file.read(2**20)):
            nbytes += len(piece)
        return nbytes / max(LEAST, time.perf_counter() - start) if nbytes else None
