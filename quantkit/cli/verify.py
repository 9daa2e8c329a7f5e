"""``quantkit verify``: whether runtimes will load a finished checkpoint, and compute with it what was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit import api as commands
from quantkit.cli.exit_codes import REFUSED, refusals
from quantkit.cli.options import AsJson
from quantkit.cli.render import show_json
from quantkit.text.verification import verification_document, verification_text


def verify(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="Folder with safetensors or with a GGUF model, or a .gguf file."),
    ],
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            "--runtime",
            help="vllm, transformers, sglang or llama.cpp; may be repeated. Default: vllm for a folder of "
            "safetensors (what transformers cannot do is a note), llama.cpp for GGUF.",
        ),
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="GPUs that tensor parallelism cuts the model over.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="GPUs that pipeline parallelism cuts the model over.")] = 1,
    source: Annotated[
        Path | None,
        typer.Option(metavar="SRC", help="The original's folder: decoded linears are compared with it."),
    ] = None,
    sample: Annotated[int, typer.Option(min=0, help="Linears that are decoded.")] = 16,
    quick: Annotated[bool, typer.Option("--quick", help="Headers and config only: seconds for any model.")] = False,
    as_json: AsJson = False,
) -> None:
    """Hold a finished checkpoint against what runtimes need: names, shapes, dtypes, config, checksums, values.

    Runtimes load many broken checkpoints without a word. Exit code 1 if there is a fault.
    """
    with refusals():
        found = commands.verify(
            path,
            runtimes=runtime,
            tensor_parallel=tp,
            pipeline_parallel=pp,
            source=source,
            sample=0 if quick else sample,
            hashes=not quick,
        )
    if as_json:
        show_json(verification_document(found))
    else:
        typer.echo(verification_text(found))
    if not found.passed:
        raise typer.Exit(REFUSED)
