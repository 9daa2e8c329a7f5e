"""``quantkit calibration build``: a calibration set of one's own text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit import api as commands
from quantkit.cli.exit_codes import interruptible, refusals
from quantkit.cli.options import AsJson, ManyFiles, count
from quantkit.cli.render import show_json
from quantkit.text.calibration_set import calibration_set_text
from quantkit.text.progress import reading

app = typer.Typer(
    help="Make calibration text.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def tokens_of(text: object) -> int:
    """524288 of "512Ki"; for typer, which hands defaults over as they are."""
    return count(str(text))


class ManyExcluded(ManyFiles):
    """--exclude takes all words up to the next option."""

    many = "--exclude"


Files = Annotated[
    list[str], typer.Argument(metavar="FILE...", help="Text: .txt, .jsonl, .parquet, globs, or `builtin:NAME`.")
]
Out = Annotated[
    Path,
    typer.Option("--out", "-o", metavar="FILE", help="The set to write, .jsonl; its manifest lies beside it."),
]
Tokens = Annotated[
    int,
    typer.Option("--tokens", parser=tokens_of, metavar="N", help="Tokens of the set, e.g. 524288, 512Ki, 1e6."),
]
Tokenizer = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer",
        metavar="MODEL",
        help="Folder of the checkpoint whose tokenizer counts. Default: estimated at 4 bytes a token.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Decides which documents are drawn.")]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        metavar="FILE...",
        help="Text that is evaluated with: what shares a run of 13 words with it is left out. builtin:eval always is.",
    ),
]
DomainBy = Annotated[
    str,
    typer.Option(
        "--domain-by",
        metavar="file|folder|KEY",
        help="What names the domains that are balanced: files, folders, or a key (column) of the rows.",
    ),
]
SequenceLength = Annotated[
    int,
    typer.Option(
        "--sequence-length", min=16, max=2**20, metavar="N", help="Of the recipe: longer texts are cut to about that."
    ),
]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace OUT if it exists.")]


@app.command("build", cls=ManyExcluded)
def build(
    files: Files,
    out: Out = Path("calibration.jsonl"),
    tokens: Tokens = 524288,
    tokenizer: Tokenizer = None,
    seed: Seed = 0,
    exclude: Exclude = None,
    domain_by: DomainBy = "file",
    sequence_length: SequenceLength = 2048,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Draw a calibration set from text of any size: without duplicates, balanced over domains and scripts.

    Files are read as a stream. Long texts are cut, chats are kept whole. Sources that hold fewer tokens give all they
    have, with a note.
    """
    with refusals(), interruptible(lambda: "Nothing was written."), reading() as on_read:
        made = commands.build_calibration(
            files,
            out,
            tokens=tokens,
            tokenizer=tokenizer,
            seed=seed,
            exclude=exclude or (),
            domain_by=domain_by,
            sequence_length=sequence_length,
            force=force,
            on_read=on_read,
        )
    if as_json:
        show_json(made.model_dump(mode="json"))
    else:
        typer.echo(calibration_set_text(made, out))
