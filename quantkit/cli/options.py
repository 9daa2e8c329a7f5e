"""Options that several commands share, and the parsers of their values. A bad value is a usage error (exit code 2)."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from quantkit.plan.budget import parse_budget
from quantkit.plan.hardware import Gpu, parse_gpu
from quantkit.runtimes.gpus import Gpus, parse_gpus


class Device(str, Enum):
    """Where the arithmetic runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def size(text: str) -> int:
    """Bytes of "20GiB"; for typer."""
    try:
        return parse_budget(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def gpus(text: str) -> Gpus:
    """`Gpus` of "5xA100-80GB"; for typer."""
    try:
        return parse_gpus(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def gpu(text: str) -> Gpu:
    """`Gpu` of "H200-141GB"; for typer."""
    try:
        return parse_gpu(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


Source = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE", help="Folder of the checkpoint: config.json and safetensors shards (BF16, F16, F32 or FP8)."
    ),
]
RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe", "-r", help="A recipe file (YAML), or the name of a shipped one (`quantkit recipes list`)."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where to compute; auto takes a GPU if there is one.")]
GpuOption = Annotated[
    Gpus | None,
    typer.Option(
        "--gpus",
        parser=gpus,
        metavar="NxNAME-SIZEGB",
        help="Check whether vLLM (GGUF: llama.cpp) can serve the result there, e.g. 5xA100-80GB.",
    ),
]
ConvertOn = Annotated[
    Gpu | None,
    typer.Option(
        "--convert-on",
        parser=gpu,
        metavar="NAME-SIZEGB",
        help="Show the memory of the conversion on this GPU, e.g. H200-141GB. Default: one of 80 GB.",
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        "--context",
        min=1,
        metavar="TOKENS",
        help="Length of the sequence that --gpus must fit. Default: 32,768, or what the model is made for if less.",
    ),
]
MemoryBudget = Annotated[
    int | None,
    typer.Option(
        "--memory-budget",
        parser=size,
        metavar="SIZE",
        help="Memory to stay within, e.g. 20GiB. Default: 60 % of the machine's memory, or of its container's.",
    ),
]
