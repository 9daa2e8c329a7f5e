"""``quantkit sensitivity``: the Fisher pass over an original model."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from quantkit import fisher as commands
from quantkit.cli.converted import program
from quantkit.cli.exit_codes import interruptible, refusals
from quantkit.cli.options import AsJson, Cache, CacheDir, Device, DeviceOption, Jobs, LogFile, count, size
from quantkit.cli.render import show_json
from quantkit.formats.remote.addresses import without_secrets
from quantkit.sensitivity.folder import is_begun
from quantkit.text.progress import progress
from quantkit.text.sensitivity import sensitivity_text

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Folder of the checkpoint: config.json and safetensors shards (BF16, F16, F32 or FP8); or its address as "
        "for `convert`.",
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder to create for the result.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="FILE...",
        help="Text: .txt, .jsonl, .parquet, globs, or `builtin:NAME`. Default: builtin:mixed.",
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        "--tokens",
        parser=count,
        metavar="N",
        help="Tokens of text, e.g. 32768, 32Ki, 1e5, made up to whole rows. Default: 32768.",
    ),
]
Length = Annotated[
    int | None,
    typer.Option(
        "--sequence-length",
        min=2,
        metavar="N",
        help="Tokens of a row. Default: 2048, or what the model is made for if less.",
    ),
]
Seed = Annotated[
    int, typer.Option("--seed", min=0, metavar="N", help="Decides where rows begin, and which labels are drawn.")
]
MemoryBudget = Annotated[
    int | None,
    typer.Option(
        "--memory-budget",
        parser=size,
        metavar="SIZE",
        help="Memory that the work stays within, e.g. 20GiB; Python and its libraries take some 430 MB on top, and "
        "hidden states beyond it go to FOLDER. Default: 60 % of the machine's memory, or of its container's.",
    ),
]
Restart = Annotated[
    bool,
    typer.Option(
        "--restart/--resume", help="Start anew and replace FOLDER; the default resumes where a killed run stopped."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="With --restart: replace a pass of another checkpoint, too.")]


def sensitivity(
    source: Source,
    out: Out,
    data: Data = None,
    tokens: Tokens = None,
    sequence_length: Length = None,
    seed: Seed = 0,
    device: DeviceOption = Device.AUTO,
    memory_budget: MemoryBudget = None,
    jobs: Jobs = None,
    restart: Restart = False,
    force: Force = False,
    cache: Cache = None,
    cache_dir: CacheDir = None,
    log: LogFile = None,
    as_json: AsJson = False,
) -> None:
    """Measure how much the loss feels errors of each linear, by one backward pass over the original model.

    FOLDER keeps what later conversions of the same checkpoint need for the gradients of any linear's outputs. A killed
    run resumes with the same command.
    """
    with refusals(), interruptible(lambda: _advice(out)), progress(log) as on_event:
        found = commands.sensitivity(
            source,
            out,
            data=data or (),
            tokens=32768 if tokens is None else tokens,
            sequence_length=sequence_length,
            seed=seed,
            device=device.value,
            memory_budget=memory_budget,
            jobs=jobs,
            restart=restart,
            force=force,
            cache=cache,
            cache_dir=cache_dir,
            on_event=on_event,
        )
    if as_json:
        show_json(found.model_dump(mode="json"))
    else:
        typer.echo(sensitivity_text(found))


def _advice(out: Path) -> str:
    """What an interrupted user does next."""
    if not is_begun(out):
        return "Nothing was begun: nothing is to be resumed or removed."
    return (
        f"Resume with: {program()} {shlex.join(without_secrets(word) for word in sys.argv[1:] if word != '--restart')}"
    )
