"""``quantkit evaluate``: perplexity and KL divergence of checkpoints of any format against their reference."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from quantkit import api as commands
from quantkit.cli.exit_codes import interruptible, refusals
from quantkit.cli.options import AsJson, Cache, CacheDir, Device, DeviceOption, Force, LogFile, size
from quantkit.cli.render import show_json
from quantkit.text.evaluation import evaluation_text
from quantkit.text.progress import progress


class ProtocolName(str, Enum):
    """How text is cut and scored."""

    WINDOWS = "windows"
    LLAMA_CPP = "llama.cpp"


Reference = Annotated[
    str,
    typer.Argument(
        metavar="REFERENCE",
        help="Folder of the original: config.json, tokenizer and safetensors, or its address as for `convert`. Or a "
        "file that --save-reference wrote.",
    ),
]
Candidates = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CANDIDATE",
        help="Folders (BF16, F16, F32, FP8 blocks, compressed-tensors, GPTQ, AWQ, bitsandbytes NF4) and GGUF files "
        "or folders of the same model.",
    ),
]
Text = Annotated[
    list[str] | None,
    typer.Option("--text", help="`builtin:NAME`, file or glob of .txt, .jsonl, .parquet. Default: builtin:eval."),
]
Context = Annotated[
    int | None, typer.Option("--context", min=4, max=2**20, metavar="N", help="Tokens of a window. Default: 512.")
]
MaxWindows = Annotated[
    int | None,
    typer.Option(
        "--max-windows-per-file", min=1, metavar="N", help="At most N windows of each text file, evenly spread."
    ),
]
Protocol = Annotated[
    ProtocolName | None,
    typer.Option(
        "--protocol",
        help="windows (default): BOS and the next N-1 tokens, all scored. llama.cpp: as llama-perplexity, the "
        "second half of each window.",
    ),
]
NoiseFloor = Annotated[
    bool,
    typer.Option(
        "--noise-floor/--no-noise-floor",
        help="Also score the reference against itself, rounded to bfloat16 at the layers' borders.",
    ),
]
SaveReference = Annotated[
    Path | None,
    typer.Option(
        "--save-reference",
        metavar="FILE",
        help="Save the reference's scores: FILE can stand for REFERENCE in later evaluations, which then use the same "
        "text, context and protocol.",
    ),
]
MemoryBudget = Annotated[
    int | None,
    typer.Option(
        "--memory-budget",
        parser=size,
        metavar="SIZE",
        help="Memory that the work stays within, e.g. 20GiB; Python and its libraries take some 430 MB on top, and "
        "hidden states beyond it go to a temporary folder ($TMPDIR). Default: 60 % of the machine's memory.",
    ),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the JSON document here.")]
Times = Annotated[bool, typer.Option("--times", help="Put wall times into the document.")]


def evaluate(
    reference: Reference,
    candidates: Candidates = None,
    text: Text = None,
    context: Context = None,
    max_windows_per_file: MaxWindows = None,
    protocol: Protocol = None,
    noise_floor: NoiseFloor = True,
    save_reference: SaveReference = None,
    device: DeviceOption = Device.AUTO,
    memory_budget: MemoryBudget = None,
    out: Out = None,
    force: Force = False,
    times: Times = False,
    cache: Cache = None,
    cache_dir: CacheDir = None,
    log: LogFile = None,
    as_json: AsJson = False,
) -> None:
    """Score checkpoints of any format against their reference: perplexity, KL divergence, errors by layer.

    All models go through the same text together, weights of one layer of one model at a time.
    """
    if not candidates and save_reference is None:
        raise typer.BadParameter("give a candidate, or --save-reference", param_hint="CANDIDATE")
    with refusals(), interruptible(lambda: "Nothing was written."), progress(log) as on_event:
        found = commands.evaluate(
            reference,
            candidates or (),
            text=text or None,
            context=context,
            max_windows_per_file=max_windows_per_file,
            protocol=None if protocol is None else protocol.value,
            noise_floor=noise_floor,
            save_reference=save_reference,
            device=device.value,
            memory_budget=memory_budget,
            out=out,
            force=force,
            times=times,
            cache=cache,
            cache_dir=cache_dir,
            on_event=on_event,
        )
    if as_json:
        show_json(found.document())
    else:
        typer.echo(evaluation_text(found))
