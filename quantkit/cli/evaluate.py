"""``quantkit evaluate``: perplexity and KL divergence of checkpoints of any format against their reference."""

from __future__ import annotations

import math
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli.options import AsJson, Device, size
from quantkit.cli.outcome import interruptible, refusals
from quantkit.cli.render import show_json, table
from quantkit.errors import OutputError
from quantkit.evaluate.document import estimate

if TYPE_CHECKING:
    from quantkit.evaluate.document import Evaluation, Layer, Mean, Result, Scores
    from quantkit.pipeline.evaluation import OnEvaluation


class ProtocolName(str, Enum):
    """How text is cut and scored."""

    WINDOWS = "windows"
    LLAMA_CPP = "llama.cpp"


def evaluate(
    reference: Annotated[
        Path,
        typer.Argument(
            metavar="REFERENCE",
            help="Folder of the original: config.json, tokenizer and safetensors. Or a file that --save-reference "
            "wrote.",
        ),
    ],
    candidates: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="CANDIDATE",
            help="Folders (BF16, F16, F32, FP8 blocks, compressed-tensors, GPTQ, AWQ, bitsandbytes NF4) and GGUF files "
            "or folders of the same model.",
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", help="`builtin:NAME`, file or glob of .txt, .jsonl, .parquet. Default: builtin:eval."),
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", min=4, max=2**20, metavar="N", help="Tokens of a window. Default: 512.")
    ] = None,
    max_windows_per_file: Annotated[
        int | None,
        typer.Option("--max-windows-per-file", min=1, metavar="N", help="At most so many of each file, evenly spread."),
    ] = None,
    protocol: Annotated[
        ProtocolName | None,
        typer.Option(
            "--protocol",
            help="windows (default): BOS and the next N-1 tokens, all scored. llama.cpp: as llama-perplexity, the "
            "second half of each window.",
        ),
    ] = None,
    noise_floor: Annotated[
        bool,
        typer.Option(
            "--noise-floor/--no-noise-floor",
            help="Also score the reference against itself, rounded to bfloat16 at the layers' borders.",
        ),
    ] = True,
    save_reference: Annotated[
        Path | None,
        typer.Option(
            "--save-reference",
            metavar="FILE",
            help="Keep what later evaluations need of the reference: give FILE in its place. Text, context and "
            "protocol are then the file's.",
        ),
    ] = None,
    device: Annotated[
        Device, typer.Option("--device", help="Where to compute; auto takes a GPU if there is one.")
    ] = Device.AUTO,
    memory_budget: Annotated[
        int | None,
        typer.Option(
            "--memory-budget",
            parser=size,
            metavar="SIZE",
            help="Memory to stay within, e.g. 20GiB; hidden states beyond it go to a temporary folder ($TMPDIR). "
            "Default: 60 % of the machine's memory.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the JSON document here.")
    ] = None,
    times: Annotated[bool, typer.Option("--times", help="Put wall times into the document.")] = False,
    as_json: AsJson = False,
) -> None:
    """Score checkpoints of any format against their reference: perplexity, KL divergence, what each layer does.

    All models go through the same text together, weights of one layer of one model at a time.
    """
    if not candidates and save_reference is None:
        raise typer.BadParameter("give a candidate, or --save-reference", param_hint="CANDIDATE")
    with refusals():
        if out is not None and (out.is_dir() or not out.parent.is_dir()):
            raise OutputError(f"{out}: is no place for a file.", hint="Give -o a file name in a folder that exists.")
        with interruptible(lambda: "Nothing was written."):
            # torch is loaded here, and not when --help is asked for.
            from quantkit.formats.safetensors_writer import write_durably
            from quantkit.pipeline.evaluation import evaluate as run

            with _progress() as on_event:
                found = run(
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
                    times=times,
                    on_event=on_event,
                )
            if out is not None:
                write_durably(out, found.to_json().encode())
    if as_json:
        show_json(found.document())
    else:
        typer.echo(evaluation_text(found))


@contextmanager
def _progress() -> Generator[OnEvaluation]:
    """One line that is redrawn in a terminal; in a log a line each fifth of the layers."""
    from quantkit.pipeline.evaluation import LayerPassed, Started

    def start_line(event: Started) -> str:
        return f"{event.candidates} candidates, {event.windows:,} windows, {event.tokens:,} tokens"

    if not sys.stderr.isatty():

        def plain(event: Started | LayerPassed) -> None:
            if isinstance(event, Started):
                typer.echo(start_line(event), err=True)
            elif event.layer == event.layers or event.layer % max(1, event.layers // 5) == 0:
                typer.echo(f"layer {event.layer}/{event.layers}", err=True)

        yield plain
        return

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("layer"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("layers", total=None)

        def live(event: Started | LayerPassed) -> None:
            if isinstance(event, Started):
                progress.console.print(start_line(event), highlight=False)
                progress.update(task, total=event.layers)
            else:
                progress.update(task, completed=event.layer)

        yield live


# ---------------------------------------------------------------------------------------------------------------- text


def evaluation_text(found: Evaluation) -> str:
    """Tables: overall, by domain, by layer; then what was measured on."""
    rows = _named_results(found)
    tables = [_overall(found, rows), _domains(found, rows), _layers(rows)] if rows else []
    return "\n\n".join([*tables, _footer(found)])


def _named_results(found: Evaluation) -> list[tuple[str, float | None, Result]]:
    """(name, bpw, result) of the noise floor and of each candidate; by path where names are the same."""
    models = [candidate.model for candidate in found.candidates]
    names = [model.name for model in models]
    shown = [model.path if names.count(model.name) > 1 else model.name for model in models]
    rows = [
        (name, candidate.model.bpw, candidate.result) for name, candidate in zip(shown, found.candidates, strict=True)
    ]
    floor = [] if found.noise_floor is None else [("bf16 noise floor", None, found.noise_floor.result)]
    return [*floor, *rows]


def _overall(found: Evaluation, rows: Sequence[tuple[str, float | None, Result]]) -> str:
    head = ("model", "bpw", "perplexity", "ln ratio", _kld(found), "median", "90 %", "99 %", "99.9 %", "max")
    head = (*head, "same top", "RMS Δp")
    reference = rows[0][2].overall.reference_perplexity.shown(4)
    first = (found.reference.name, f"{found.reference.bpw:.3f}", reference, *("" for _ in range(9)))
    return table(head, [first, *((name, _bpw(bpw), *_cells(result.overall)) for name, bpw, result in rows)])


def _kld(found: Evaluation) -> str:
    """Head of the column."""
    return "KLD mean" if found.reference_file is None else "KLD mean, at least"


def _bpw(bpw: float | None) -> str:
    return "" if bpw is None else f"{bpw:.3f}"


def _cells(scores: Scores) -> tuple[str, ...]:
    kld, top, change = scores.kld, scores.same_top, scores.rms_probability_change
    quantiles = (f"{value:.5f}" for value in (kld.median, kld.p90, kld.p99, kld.p999, kld.max))
    return (
        scores.perplexity.shown(4),
        scores.log_ratio.shown(5),
        estimate(kld.mean, kld.standard_error, 5),
        *quantiles,
        _percent(top),
        _percent(change),
    )


def _percent(value: Mean) -> str:
    error = "-" if math.isnan(value.standard_error) else f"{value.standard_error:.2%}"
    return f"{value.mean:.2%} ± {error}"


def _domains(found: Evaluation, rows: Sequence[tuple[str, float | None, Result]]) -> str:
    head = ("domain", "model", "windows", "reference", "perplexity", "ln ratio", _kld(found), "same top")
    cells = [
        (
            domain if number == 0 else "",
            name,
            f"{scores.windows:,}",
            scores.reference_perplexity.shown(3),
            scores.perplexity.shown(3),
            scores.log_ratio.shown(5),
            estimate(scores.kld.mean, scores.kld.standard_error, 5),
            f"{scores.same_top.mean:.2%}",
        )
        for domain in rows[0][2].domains
        for number, (name, _, result) in enumerate(rows)
        for scores in (result.domains[domain],)
    ]
    return table(head, cells, left=2)


def _layers(rows: Sequence[tuple[str, float | None, Result]]) -> str:
    """Of each model the relative error of the hidden state and the share of experts that are the same."""
    head = ("layer: error, same experts", *(name for name, _, _ in rows))
    by_layer = zip(*(result.layers for _, _, result in rows), strict=True)
    return table(head, [(str(own[0].layer), *map(_layer, own)) for own in by_layer])


def _layer(layer: Layer) -> str:
    agreement = "" if layer.router_agreement is None else f"{layer.router_agreement:.2%}"
    error = "-" if math.isnan(layer.hidden_error) else f"{layer.hidden_error:.5f}"
    return f"{error} {agreement:>8}"


def _footer(found: Evaluation) -> str:
    n_windows = sum(text.windows for text in found.text)
    lines = [
        f"{n_windows * found.protocol.scored_per_window:,} tokens scored in {n_windows:,} windows of "
        f"{found.protocol.context:,} ({found.protocol.name}), {len(found.text)} files, on {found.device}. KLD in nats "
        "per token; ± standard error over windows.",
    ]
    if found.reference_file is not None:
        lines += [f"note: the reference is {found.reference_file.path}. KLD: {found.reference_file.kld}"]
        missing = found.reference_file.not_available
        for why in dict.fromkeys(missing.values()):
            lines.append(f"note: no {', '.join(name for name, own in missing.items() if own == why)}: {why}")
    lines += [f"note: {c.model.name}: {note}" for c in found.candidates for note in c.model.notes]
    return "\n".join(lines)
