"""llama.cpp's own quantiser, llama_model_quantize: a float GGUF in, a GGUF of one of its mixes out.

    .venvs/llama/bin/python benchmarks/llama_cpp/quantize.py SOURCE.gguf OUT.gguf Q4_K_M [--imatrix FILE]
        [--output-tensor-type F32] [--token-embedding-type F32] [--tensor-type REGEX=TYPE]... [--log]
    ... quantize.py SOURCE.gguf --plan Q4_K_M [--assume-imatrix]

The same arguments as the program llama-quantize, which the wheel does not hold. Prints wall seconds and the CPU seconds
of the call. --plan writes nothing, but prints each tensor's name and type, as a dry run logs them.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import sys
import time
from pathlib import Path

import gguf
import llama_cpp.llama_cpp as llama
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.oracles.llama_imatrix import read_means  # noqa: E402

PLANNED = re.compile(r"\] +(\S+) +- \[.*\], type = *(\w+), size = .*?(?:\((\w+)\))?$", re.MULTILINE)
"""A line of the log: name, type in the source, type in the result if it is another."""


def ftype_of(name: str) -> int:
    """LLAMA_FTYPE_* of "Q4_K_M"; F32 is the one that is not MOSTLY."""
    constant = "LLAMA_FTYPE_ALL_F32" if name == "F32" else f"LLAMA_FTYPE_MOSTLY_{name}"
    value = getattr(llama, constant, None)
    if value is None:
        raise SystemExit(f"{name}: llama.cpp has no {constant}")
    return value


def imatrix_entries(means: dict[str, np.ndarray]) -> ctypes.Array[llama.llama_model_imatrix_data]:
    """The list that the call takes, ended by an entry without a name. It points into ``means``."""
    entries = (llama.llama_model_imatrix_data * (len(means) + 1))()
    for entry, (name, values) in zip(entries, means.items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    return entries


def override_entries(overrides: list[str]) -> ctypes.Array[llama.llama_model_tensor_override]:
    entries = (llama.llama_model_tensor_override * (len(overrides) + 1))()
    for entry, override in zip(entries, overrides, strict=False):
        pattern, kind = override.rsplit("=", 1)
        entry.pattern = pattern.encode()
        entry.type = gguf.GGMLQuantizationType[kind.upper()]
    return entries


def quantize(args: argparse.Namespace) -> None:
    params = llama.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.dry_run = args.threads, ftype_of(args.plan or args.ftype), bool(args.plan)
    for field, kind in (
        ("output_tensor_type", args.output_tensor_type),
        ("token_embedding_type", args.token_embedding_type),
    ):
        if kind:
            setattr(params, field, gguf.GGMLQuantizationType[kind.upper()])
    means = read_means(args.imatrix) if args.imatrix else {}
    if args.assume_imatrix:
        means["no weight of the model"] = np.ones(1, np.float32)
    if means:
        params.imatrix = imatrix_entries(means)
    if args.tensor_type:
        params.tt_overrides = override_entries(args.tensor_type)
    if llama.llama_model_quantize(str(args.source).encode(), str(args.out).encode(), ctypes.byref(params)):
        raise SystemExit(f"{args.source}: llama_model_quantize failed (see --log)")


def print_plan(log: str) -> None:
    for name, source, result in PLANNED.findall(log):
        print(f"{name}\t{(result or source).upper()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("ftype", help="Q4_K_M, IQ4_XS, ...", nargs="?")
    parser.add_argument("--imatrix", type=Path, help="imatrix.gguf")
    parser.add_argument("--output-tensor-type", metavar="TYPE")
    parser.add_argument("--token-embedding-type", metavar="TYPE")
    parser.add_argument("--tensor-type", metavar="REGEX=TYPE", action="append", default=[])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plan", metavar="FTYPE", help="only print the types of this mix")
    parser.add_argument("--assume-imatrix", action="store_true", help="with --plan: as if there were an imatrix")
    parser.add_argument("--log", action="store_true", help="show what llama.cpp says")
    args = parser.parse_args()
    if bool(args.plan) == bool(args.ftype):
        parser.error("SOURCE OUT FTYPE, or SOURCE --plan FTYPE")
    log: list[str] = []

    @llama.llama_log_callback
    def listen(_level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
        log.append(text.decode("utf-8", "replace"))
        if args.log:
            sys.stderr.write(log[-1])

    llama.llama_log_set(listen, ctypes.c_void_p())
    llama.llama_backend_init()
    wall, cpu = time.perf_counter(), time.process_time()
    quantize(args)
    if args.plan:
        print_plan("".join(log))
    else:
        print(f"{args.ftype}: {time.perf_counter() - wall:.2f} s, CPU {time.process_time() - cpu:.2f} s")
    llama.llama_log_set(llama.llama_log_callback(), ctypes.c_void_p())


if __name__ == "__main__":
    main()
