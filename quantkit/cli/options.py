"""Options that several commands share, and the parsers of their values. A bad value is a usage error (exit code 2)."""

from __future__ import annotations

from collections.abc import Container, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand

from quantkit.arguments import opened_places
from quantkit.calibrate.counts import parse_count
from quantkit.cli.exit_codes import missing_option
from quantkit.errors import RecipeError
from quantkit.plan.budget import MOST_JOBS, parse_budget
from quantkit.plan.gguf_model import config_folder
from quantkit.plan.hardware import Gpu, parse_gpu
from quantkit.plan.packed import packed_tables
from quantkit.plan.recipe import Recipe
from quantkit.plan.recipe_prune import parse_prune
from quantkit.plan.recipe_values import parse_size
from quantkit.plan.shorthand import Shorthand, shorthand_recipe
from quantkit.runtimes.gpus import Gpus, parse_gpus
from quantkit.tensors import Role


class Device(str, Enum):
    """Where the arithmetic runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Kept(NamedTuple):
    """--cache and --cache-dir."""

    nbytes: int | None
    folder: Path | None


def size(text: str) -> int:
    """Bytes of "20GiB"; for typer."""
    try:
        return parse_budget(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def cache_size(text: str) -> int:
    """Bytes of "50GiB", of which a few will do; for typer."""
    try:
        return parse_size(text)
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


def count(text: str) -> int:
    """131072 of "128Ki"; for typer."""
    try:
        return parse_count(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def pruned(text: str) -> str:
    """ "25%" or "64", see `parse_prune`; for typer."""
    try:
        return str(parse_prune(text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def chosen_recipe(
    source: str, config: Path | None, recipe: str | None, shorthand: Shorthand, cache_dir: Path | None, *, tune: bool
) -> Recipe:
    """The recipe of a file or of the options that stand for one. ``config``, ``cache_dir``: the values of the options,
    ``tune``: of --tune. Raises `RecipeError`, and typer's error of usage if neither is given."""
    found = _untuned(source, config, recipe, shorthand, cache_dir)
    return found.tuned() if tune else found


def _untuned(
    source: str, config: Path | None, recipe: str | None, shorthand: Shorthand, cache_dir: Path | None
) -> Recipe:
    if recipe is not None and shorthand.given:
        raise RecipeError(
            f"found --recipe and {shorthand.first}, needed a recipe or options that stand for one; options with "
            "--print-recipe write a recipe to be edited."
        )
    if recipe is not None:
        return Recipe.from_yaml(recipe)
    if shorthand.scheme is None and shorthand.preset is None and not shorthand.target.words:
        missing_option("'--scheme', '--preset', '--recipe' / '-r', '--fit' or '--target-bpw'")
    with opened_places(source, cache_dir=cache_dir) as opened:
        (given,) = opened.folders
        tables = packed_tables(given, config) if shorthand.scheme is not None else frozenset[Role]()
        return shorthand_recipe(config_folder(given, config), shorthand, tables)


class ManyFiles(TyperCommand):
    """A command whose --data (`many`) takes all words up to the next option: shells write globs so."""

    many = "--data"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See `spread`."""
        valued = {name for option in self.params if not getattr(option, "is_flag", True) for name in option.opts}
        return super().parse_args(ctx, spread(args, valued, self.many))


def spread(args: Sequence[str], valued: Container[str], many: str = "--data") -> list[str]:
    """``SOURCE --data A B`` as ``SOURCE --data A --data B``. ``valued``: options that take a word; ``many``: the one
    that takes several."""
    words: list[str] = []
    source = is_value = in_data = False
    for word in args:
        if is_value:
            is_value = False
        elif word.startswith("-"):
            is_value, in_data = word in valued, word == many
        elif in_data and source:
            words.append(many)
        else:
            source = True
        words.append(word)
    return words


Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Folder of the checkpoint: config.json and safetensors shards (BF16, F16, F32 or FP8). Or its address: "
        "hf://ORG/NAME@REVISION, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, https://HOST/PATH/. Or a GGUF file, see "
        "--config.",
    ),
]
Cache = Annotated[
    int | None,
    typer.Option(
        "--cache",
        parser=cache_size,
        metavar="SIZE",
        help="Disk that what is fetched of an address may take. Default: 50GiB, or what is free if that is less.",
    ),
]
CacheDir = Annotated[
    Path | None,
    typer.Option("--cache-dir", metavar="DIR", help="Where it lies. Default: ~/.cache/quantkit/remote."),
]
ConfigFolder = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="DIR",
        help="If SOURCE is GGUF: the folder of the original's config.json and tokenizer. Default: the one that holds "
        "the file.",
    ),
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        help="A recipe file (YAML), or the name of a shipped one (`quantkit recipes list`), in place of --scheme or "
        "--preset.",
    ),
]
SchemeName = Annotated[
    str | None,
    typer.Option(
        "--scheme",
        metavar="NAME",
        help="For vLLM and transformers. w4a16: routed experts int4, other linears int8, groups of 128; a dense model "
        "is int4 throughout. w3a16: experts int3; any width from w2a16 to w8a16 (all int8). With -all (w4a16-all): all "
        "linears as narrow as the experts. With -g32: groups of 32. w4afp8: as w4a16, inputs of the experts in FP8 "
        "(vLLM on Hopper). nvfp4, mxfp4, mxfp8: all linears in floats of 4 or 8 bits.",
    ),
]
PresetName = Annotated[
    str | None,
    typer.Option("--preset", metavar="NAME", help="For llama.cpp: a mix of llama-quantize, such as Q4_K_M, in GGUF."),
]
GroupSize = Annotated[
    int | None, typer.Option("--group-size", metavar="N", help="Of --scheme. -1: one scale a row. Default: 128.")
]
MethodName = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar="gptq|awq|rtn",
        help="gptq (the default) or awq (both calibrated), or rtn (round to nearest; data-free without --data).",
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="FILE...",
        help="Calibration text: .txt, .jsonl, .parquet, globs, or `builtin:NAME`. Default: builtin:mixed.",
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        "--tokens",
        parser=count,
        metavar="N",
        help="Calibration tokens, e.g. 131072, 512Ki, 64k, 1e5. Default: 131072; with --data and more than 64 experts "
        "524288.",
    ),
]
Prune = Annotated[
    str | None,
    typer.Option(
        "--prune",
        parser=pruned,
        metavar="25%|N",
        help="Leave out this share of the routed experts of each layer, or so many: those that the calibration text "
        "needs least. Off by default; the docs say what it risks.",
    ),
]
PrintRecipe = Annotated[
    bool, typer.Option("--print-recipe", help="Print the recipe that the options stand for (YAML), and do no work.")
]
Jobs = Annotated[
    int | None, typer.Option("--jobs", min=1, max=MOST_JOBS, metavar="N", help="CPU threads. Default: all cores.")
]
Restart = Annotated[
    bool,
    typer.Option(
        "--restart/--resume",
        help="Start anew and replace OUT (with --layers: OUT.trial.json); the default resumes where a killed run "
        "stopped.",
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(
        "--layers",
        metavar="0-4,10",
        help="A trial: quantise only these layers, compare them with the original on held-out text, and say what the "
        "whole will take. Keeps no tensors, only OUT.trial.json.",
    ),
]
Tuned = Annotated[
    bool,
    typer.Option(
        "--tune",
        help="Tune codes, scales and norms of each whole layer by gradients after it was quantised; also with a "
        "--recipe, whose key `tune` has the settings.",
    ),
]
LogFile = Annotated[
    Path | None,
    typer.Option(
        "--log", metavar="FILE", help="Append plain lines of progress to this file too, one at least every 5 minutes."
    ),
]
Force = Annotated[
    bool,
    typer.Option("--force", "-f", help="Replace FILE whatever it is; by default only an older result of the same job."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where to compute; auto takes a GPU if there is one.")]
Ranks = Annotated[
    int | None,
    typer.Option(
        "--gpus",
        min=1,
        metavar="N",
        help="Share the work among N GPUs of this machine: 1, 2, 4 or 8. Several machines: torchrun or Slurm.",
    ),
]
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
        help="Length of the sequence that --gpus or --fit must fit. Default: 32,768, or what the model is made for "
        "if less.",
    ),
]
MemoryBudget = Annotated[
    int | None,
    typer.Option(
        "--memory-budget",
        parser=size,
        metavar="SIZE",
        help="Memory that the work stays within, e.g. 20GiB; Python and its libraries take some 430 MB on top. "
        "Default: 60 % of the machine's memory, or of its container's.",
    ),
]
Fit = Annotated[
    str | None,
    typer.Option(
        "--fit",
        metavar="NxNAME-SIZEGB",
        help="Choose the type of each linear so that these GPUs hold the result with one sequence of --context, e.g. "
        "5xA100-80GB. Needs --sensitivity.",
    ),
]
TargetBpw = Annotated[
    float | None,
    typer.Option(
        "--target-bpw",
        metavar="N",
        help="Choose the type of each linear so that the whole takes this many bits per weight, e.g. 3.45. Needs "
        "--sensitivity.",
    ),
]
TargetSize = Annotated[
    str | None,
    typer.Option("--target-size", metavar="SIZE", help="The same for the bytes of the weight files, e.g. 350GB."),
]
FormatName = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="gguf|compressed-tensors",
        help="Of --fit, --target-bpw and --target-size: for llama.cpp, or for vLLM (default).",
    ),
]
SensitivityFolder = Annotated[
    str | None,
    typer.Option(
        "--sensitivity",
        metavar="FOLDER",
        help="What `quantkit sensitivity` made of SOURCE: how much the loss feels errors of each linear.",
    ),
]
FitContext = Annotated[
    int | None,
    typer.Option("--context", min=1, metavar="TOKENS", help="Of --fit. Default: 32,768, or what the model allows."),
]
