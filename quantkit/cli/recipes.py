"""``quantkit recipes``: what recipes come with quantkit, and what a recipe may say."""

from __future__ import annotations

from typing import Annotated

import typer

from quantkit.cli.exit_codes import refusals
from quantkit.cli.options import AsJson
from quantkit.cli.render import show_json
from quantkit.plan.recipe import Recipe
from quantkit.plan.recipe_file import recipe_path, schema_of, shipped_recipes
from quantkit.text.tables import table

app = typer.Typer(
    invoke_without_command=True,
    rich_markup_mode=None,
)


@app.callback()
def start(context: typer.Context) -> None:
    """List and show the shipped recipes, or print the schema of recipe files. Without a command: list."""
    if context.invoked_subcommand is None:
        list_recipes()


@app.command("list")
def list_recipes(as_json: AsJson = False) -> None:
    """Name the shipped recipes; each can be given to -r by its name."""
    with refusals():
        named = [(path.stem, Recipe.from_yaml(path).description) for path in shipped_recipes()]
    if as_json:
        show_json([{"name": name, "description": description} for name, description in named])
    elif named:
        typer.echo(table(("name", "description"), named, left=2))


@app.command("show")
def show(name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a shipped recipe, or a file.")]) -> None:
    """Print a recipe as it stands, after checking it: a starting point for your own."""
    with refusals():
        Recipe.from_yaml(name)
        typer.echo(recipe_path(name).read_text(encoding="utf-8-sig"), nl=False)


@app.command("schema")
def schema() -> None:
    """Print the JSON schema of recipe files, for editors."""
    show_json(schema_of(Recipe))
