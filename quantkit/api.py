"""The commands as functions, with the same options. `quantkit` re-exports them; the command line calls them.

They print nothing. What a user, a file or the machine can cause is a `QuantkitError`, whose text is one line (a plan or
a recipe with several faults: one line each) and a hint. Recipes are given as file, as name of a shipped one, or as
`Recipe`; sizes in bytes or as "20GiB"; one path may stand where several can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from quantkit.errors import OutputError, PlanError

if TYPE_CHECKING:
    from quantkit.convert.events import OnEvent, Report
    from quantkit.documents.baseline import Baseline
    from quantkit.documents.evaluation import Evaluation
    from quantkit.evaluate.check.verdict import Limits, Verdict
    from quantkit.evaluate.events import OnEvaluation
    from quantkit.inspect.folder import Inspection
    from quantkit.inspect.gguf import GgufInspection
    from quantkit.inspect.imatrix import ImatrixInspection
    from quantkit.plan.forecast import Forecast
    from quantkit.plan.hardware import Gpu
    from quantkit.plan.recipe import Recipe
    from quantkit.runtimes.gpus import Gpus

DeviceName = Literal["auto", "cpu", "cuda"]
ProtocolName = Literal["windows", "llama.cpp"]
Parsed = TypeVar("Parsed")


def convert(
    source: Path | str,
    recipe: Recipe | Path | str,
    out: Path | str,
    *,
    base_dir: Path | str | None = None,
    device: DeviceName = "auto",
    memory_budget: int | str | None = None,
    jobs: int | None = None,
    restart: bool = False,
    on_event: OnEvent | None = None,
) -> Report:
    """Quantise the checkpoint in folder ``source`` by ``recipe`` into ``out``, layer by layer, and check the result.

    ``base_dir``: where the recipe's relative text files lie (default: the recipe file's folder); ``memory_budget``: to
    stay within (default: 60 % of the memory that the process may use); ``jobs``: CPU threads; ``restart``: discard an
    unfinished job and replace ``out``, else a call that was interrupted goes on where it stopped; ``on_event``: is told
    of each step, such as `progress` makes.

    A result that exceeds the recipe's limits is no error: see ``validated`` of the report. Raises `QuantkitError`.
    """
    from quantkit.convert.prepare import prepared
    from quantkit.plan.budget import budget_bytes, check_device
    from quantkit.plan.hardware import default_budget

    check_device(device)
    loaded, folder = _recipe(recipe, base_dir)
    budget = budget_bytes(memory_budget) or default_budget()
    job = prepared(Path(source), loaded, Path(out), base_dir=folder, memory_budget=budget, restart=restart)
    with job as found:
        import torch

        from quantkit.convert.events import ignore
        from quantkit.convert.run import convert as run
        from quantkit.plan.machine import Machine

        threads = torch.get_num_threads()
        try:
            if jobs is not None:
                torch.set_num_threads(jobs)
            return run(found, Machine.of(device, budget), on_event or ignore)
        finally:
            # ``jobs`` is for this conversion, not for what else the process does with torch.
            torch.set_num_threads(threads)


def plan(
    source: Path | str,
    recipe: Recipe | Path | str,
    *,
    base_dir: Path | str | None = None,
    gpus: Gpus | str | None = None,
    context: int | None = None,
    memory_budget: int | str | None = None,
    convert_on: Gpu | str | None = None,
) -> Forecast:
    """Say what a conversion would give and need, from headers alone: bytes, bits per weight, memory, disk.

    ``source`` may hold only a config.json: then the official release of that config is planned. ``gpus``
    ("5xA100-80GB"): check whether vLLM (GGUF: llama.cpp) can serve a sequence of ``context`` tokens there (default:
    32,768, or what the model is made for). ``memory_budget`` (bytes, "20GiB"): refuse what needs more. ``convert_on``
    ("H200-141GB"): the GPU whose memory is planned for the conversion (default: one of 80 GB). Loads no torch.
    Raises `QuantkitError`: a `PlanError` lists every problem, one line each.
    """
    loaded, folder = _recipe(recipe, base_dir)
    from quantkit.plan.budget import budget_bytes
    from quantkit.plan.forecast import forecast
    from quantkit.plan.hardware import parse_gpu
    from quantkit.runtimes.gpus import parse_gpus

    return forecast(
        Path(source),
        loaded,
        base_dir=folder,
        gpus=_parsed("gpus", parse_gpus, gpus) if isinstance(gpus, str) else gpus,
        context=context,
        memory_budget=budget_bytes(memory_budget),
        convert_on=_parsed("convert_on", parse_gpu, convert_on) if isinstance(convert_on, str) else convert_on,
    )


def recipe_for(
    source: Path | str,
    *,
    scheme: str | None = None,
    preset: str | None = None,
    group_size: int | None = None,
    method: str | None = None,
    data: str | Sequence[str] = (),
    tokens: int | None = None,
) -> Recipe:
    """The recipe that ``scheme`` ("w4a16", for vLLM) or ``preset`` ("Q4_K_M", for llama.cpp) stands for on a model.

    ``group_size``: of a scheme, -1 for one scale a row; ``method``: "gptq" (default), "awq" or "rtn"; ``data``:
    calibration text, relative to the current folder (default: builtin:mixed); ``tokens``: how much of it. Raises
    `QuantkitError`.
    """
    from quantkit.plan.shorthand import Shorthand, shorthand_recipe

    text = (data,) if isinstance(data, str) else tuple(data)
    return shorthand_recipe(Path(source), Shorthand(scheme, preset, group_size, method, text, tokens))


def inspect(path: Path | str) -> Inspection | GgufInspection | ImatrixInspection:
    """What a folder of safetensors, a GGUF model or an imatrix file holds: storage by role, bits per weight, and what
    is unusual. Reads headers only (an imatrix file as a whole). Raises `QuantkitError` for damaged files."""
    from quantkit.inspect.path import inspect_path

    return inspect_path(Path(path))


def evaluate(
    reference: Path | str,
    candidates: Path | str | Sequence[Path | str] = (),
    *,
    text: str | Sequence[str] | None = None,
    context: int | None = None,
    max_windows_per_file: int | None = None,
    protocol: ProtocolName | None = None,
    noise_floor: bool = True,
    save_reference: Path | str | None = None,
    device: DeviceName = "auto",
    memory_budget: int | str | None = None,
    out: Path | str | None = None,
    times: bool = False,
    base_dir: Path | str = ".",
    on_event: OnEvaluation | None = None,
) -> Evaluation:
    """Score checkpoints of any format against their reference, all through the same layers together.

    ``text``: `builtin:NAME`, files or globs, relative to ``base_dir`` (default: builtin:eval); ``context``: tokens of a
    window (default: 512); ``noise_floor``: also score the reference against itself, rounded to bfloat16;
    ``save_reference``: keep what later calls need of the reference in a file, which may be their ``reference``;
    ``out``: write the JSON document there; ``times``: put wall seconds into it.

    Scores with standard errors, overall, by domain and by layer, are in ``candidates[i].result``; KLD in nats per
    token. Raises `QuantkitError`.
    """
    from quantkit.evaluate.events import ignore
    from quantkit.evaluate.prepare import Asked, prepared
    from quantkit.formats.preallocated import check_place, write_durably
    from quantkit.plan.budget import budget_bytes, check_device

    if out is not None:
        check_place(Path(out))
    check_device(device)
    budget = budget_bytes(memory_budget)
    texts = [text] if isinstance(text, str) else text
    asked = Asked(texts, context, max_windows_per_file, protocol, Path(base_dir))
    save = None if save_reference is None else Path(save_reference)
    with prepared(Path(reference), _paths(candidates), asked, save) as opened:
        from quantkit.evaluate.run import evaluate as run
        from quantkit.plan.machine import Machine

        machine = Machine.of(device, budget)
        found = run(opened, machine, on_event or ignore, noise_floor=noise_floor, times=times)
    if out is not None:
        write_durably(Path(out), found.to_json().encode())
    return found


def check(
    evaluation: Evaluation | Path | str,
    baseline: Path | str,
    *,
    candidates: str | Sequence[str] = (),
    limits: Limits | None = None,
) -> tuple[Verdict, ...]:
    """What of an evaluation is worse than its ``baseline``, a file of `update_baseline`, beyond noise: one verdict for
    each candidate, or for those named. ``limits``: what counts as noise, and limits of your own.

    A regression is no error: see ``passed`` of the verdicts. Raises `EvaluationError` for what cannot be compared:
    another text, other windows, another reference.
    """
    from quantkit.evaluate.check.baseline import check_comparable, read_baseline, read_losses
    from quantkit.evaluate.check.run import check as run
    from quantkit.evaluate.check.verdict import Limits

    chosen = limits or Limits()
    found, old = _evaluation(evaluation), read_baseline(Path(baseline))
    check_comparable(found, old, Path(baseline))
    losses = read_losses(found, Path()) if chosen.losses else {}
    return run(found, old, chosen, losses, (candidates,) if isinstance(candidates, str) else candidates)


def update_baseline(evaluation: Evaluation | Path | str, baseline: Path | str) -> Baseline:
    """Make an evaluation the baseline of later checks: a JSON file to be committed. Raises `QuantkitError`."""
    from quantkit.documents.baseline import Baseline
    from quantkit.evaluate.check.baseline import by_name, check_windows, read_losses

    found = _evaluation(evaluation)
    by_name(found)  # refuses two candidates of one name
    check_windows("evaluation", found)
    made = Baseline(evaluation=found, conversions=read_losses(found, Path()))
    write_text(Path(baseline), made.to_json())
    return made


def report(
    documents: Path | str | Sequence[Path | str],
    out: Path | str | None = None,
    *,
    markdown: bool = False,
    title: str | None = None,
) -> str:
    """One HTML page, or markdown for a model card, about output folders of `convert` and documents of `evaluate`.

    Returns the text, and writes it to ``out`` if that is given. The page needs no network. Raises `QuantkitError`.
    """
    from quantkit.documents.read import read_documents
    from quantkit.formats.preallocated import check_place
    from quantkit.report.build import report_of
    from quantkit.report.markdown import markdown as markdown_of
    from quantkit.report.scored import scored_checkpoints

    found = read_documents(_paths(documents))
    contents = report_of(scored_checkpoints(found), title)
    if out is not None:
        check_place(Path(out))
        if Path(out).resolve() in (file.path.resolve() for file in found):
            raise OutputError(f"{out}: is a document that the report is made of.", hint="Give another file name.")
    if markdown:
        made = markdown_of(contents)
    else:
        from quantkit.report.page import page

        made = page(contents)
    if out is not None:
        write_text(Path(out), made)
    return made


def write_text(path: Path, text: str, *, append: bool = False) -> None:
    """Write UTF-8 with plain line ends. Raises `OutputError`."""
    try:
        with path.open("a" if append else "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}.") from None


# --------------------------------------------------------------------------------------------------------------- parts


def _recipe(recipe: Recipe | Path | str, base_dir: Path | str | None) -> tuple[Recipe, Path]:
    """The recipe, and the folder that its relative paths count from."""
    from quantkit.plan.recipe import Recipe

    loaded = Recipe.from_yaml(recipe) if isinstance(recipe, Path | str) else recipe
    return loaded, loaded.folder if base_dir is None else Path(base_dir)


def _parsed(name: str, parse: Callable[[str], Parsed], text: str) -> Parsed:
    """Raises `PlanError` for a value that cannot be read."""
    try:
        return parse(text)
    except ValueError as error:
        raise PlanError(f"{name}: {error}.") from None


def _evaluation(evaluation: Evaluation | Path | str) -> Evaluation:
    if not isinstance(evaluation, Path | str):
        return evaluation
    from quantkit.evaluate.check.baseline import read_evaluation

    return read_evaluation(Path(evaluation))


def _paths(paths: Path | str | Sequence[Path | str]) -> list[Path]:
    return [Path(paths)] if isinstance(paths, Path | str) else [Path(path) for path in paths]
