"""The commands as functions, with the same options. `quantkit` re-exports them; the command line calls them.

They print nothing. What a user, a file or the machine can cause is a `QuantkitError`, whose text is one line (a plan or
a recipe with several faults: one line each) and a hint. Recipes are given as file, as name of a shipped one, or as
`Recipe`; sizes in bytes or as "20GiB"; one path may stand where several can. An argument of another type than it is
declared with is a `TypeError`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from quantkit.arguments import (
    check_context,
    conversion_budget,
    let_threads_sleep,
    opened_places,
    optional_path,
    output_folder,
    parsed,
    path_of,
    paths_of,
    recipe_and_folder,
    settled,
    threads,
    write_text,
)
from quantkit.errors import CalibrationError

if TYPE_CHECKING:
    from quantkit.convert.events import OnEvent, Report
    from quantkit.documents.calibration_set import CalibrationSet
    from quantkit.documents.evaluation import Evaluation
    from quantkit.documents.trial import TrialDocument
    from quantkit.evaluate.events import OnEvaluation
    from quantkit.inspect.path import AnyInspection
    from quantkit.plan.forecast import Forecast
    from quantkit.plan.hardware import Gpu
    from quantkit.plan.recipe import Recipe
    from quantkit.runtimes.gpus import Gpus
    from quantkit.sensitivity.events import OnLosses
    from quantkit.verify.verification import Verification

DeviceName = Literal["auto", "cpu", "cuda"]
ProtocolName = Literal["windows", "llama.cpp"]


def convert(
    source: Path | str,
    recipe: Recipe | Path | str,
    out: Path | str,
    *,
    config: Path | str | None = None,
    base_dir: Path | str | None = None,
    device: DeviceName = "auto",
    memory_budget: int | str | None = None,
    jobs: int | None = None,
    restart: bool = False,
    cache: int | str | None = None,
    cache_dir: Path | str | None = None,
    on_event: OnEvent | None = None,
) -> Report:
    """Quantise ``source``, the folder of a checkpoint, its address (hf://, s3://, gs://, https://) or a GGUF file, by
    ``recipe`` into ``out``, layer by layer, and check the result.

    ``config``: the folder of a GGUF file's config.json and tokenizer (default: the one that holds the file);
    ``base_dir``: where the recipe's relative text files lie (default: the recipe file's folder); ``memory_budget``: to
    stay within (default: 60 % of the memory that the process may use); ``jobs``: CPU threads; ``restart``: discard an
    unfinished job and replace ``out``, else a call that was interrupted goes on where it stopped; ``cache``: bytes, or
    "50GiB", that what is fetched of an address may take in the folder ``cache_dir``; ``on_event``: is told of each
    step, such as `progress` makes.

    A result that exceeds the recipe's limits is no error: see ``validated`` of the report. Raises `QuantkitError`.
    """
    from quantkit.convert.prepare import prepared

    loaded, folder = recipe_and_folder(recipe, base_dir)
    budget = conversion_budget(device, jobs, memory_budget)
    place, result = optional_path(config), output_folder(out)
    with opened_places(source, cache=cache, cache_dir=cache_dir) as opened:
        (given,), storage = opened.folders, opened.storage
        loaded = settled(given, place, loaded, folder, device, budget, jobs, on_event, storage).recipe
        job = prepared(given, place, loaded, result, folder, budget, restart=restart, storage=storage)
        with job as found, threads(jobs):
            from quantkit.convert.events import ignore
            from quantkit.convert.run import convert as run
            from quantkit.plan.machine import Machine

            return run(found, Machine.of(device, budget), on_event or ignore)


def trial(
    source: Path | str,
    recipe: Recipe | Path | str,
    out: Path | str,
    layers: Sequence[int] | str,
    *,
    config: Path | str | None = None,
    base_dir: Path | str | None = None,
    device: DeviceName = "auto",
    memory_budget: int | str | None = None,
    jobs: int | None = None,
    restart: bool = False,
    cache: int | str | None = None,
    cache_dir: Path | str | None = None,
    on_event: OnEvent | None = None,
) -> TrialDocument:
    """Quantise only some ``layers`` ((0, 1, 10) or "0-1,10"), compare them with the original on held-out text, and say
    what the whole conversion would take. The other options are those of `convert`.

    ``out``: where the whole would go. Tensors are not kept: what is left is the report, ``OUT.trial.json``. An older
    one of the same source, recipe and layers is replaced, another file only with ``restart``. Raises `QuantkitError`.
    """
    from quantkit.convert.prepare import prepared
    from quantkit.convert.trial import refuse_other_trial, trial_folder, try_layers
    from quantkit.formats.preallocated import check_place, write_durably
    from quantkit.plan.trial import parse_layers

    wanted = parsed("layers", parse_layers, layers) if isinstance(layers, str) else tuple(sorted(set(layers)))
    loaded, folder = recipe_and_folder(recipe, base_dir)
    budget = conversion_budget(device, jobs, memory_budget)
    place = Path(f"{out}.trial.json")
    other = optional_path(config)
    with opened_places(source, cache=cache, cache_dir=cache_dir) as opened, trial_folder(output_folder(out)) as made:
        (given,), storage = opened.folders, opened.storage
        loaded = settled(given, other, loaded, folder, device, budget, jobs, on_event, storage).recipe
        check_place(place)
        job = prepared(given, other, loaded, made / "trial", folder, budget, restart=False, storage=storage)
        with job as found, threads(jobs):
            from quantkit.convert.events import ignore
            from quantkit.plan.machine import Machine

            if not restart:
                refuse_other_trial(place, found, wanted)
            document = try_layers(found, wanted, Machine.of(device, budget), on_event or ignore)
    write_durably(place, document.to_json().encode())
    return document


def plan(
    source: Path | str,
    recipe: Recipe | Path | str,
    *,
    config: Path | str | None = None,
    base_dir: Path | str | None = None,
    gpus: Gpus | str | None = None,
    context: int | None = None,
    memory_budget: int | str | None = None,
    convert_on: Gpu | str | None = None,
    hours: bool = False,
    device: DeviceName = "auto",
    jobs: int | None = None,
    cache: int | str | None = None,
    cache_dir: Path | str | None = None,
    on_event: OnLosses | None = None,
) -> Forecast:
    """Say what a conversion would give and need, from headers alone: bytes, bits per weight, memory, disk.

    ``source`` may hold only a config.json: then the official release of that config is planned; with GGUF ``config`` is
    as for `convert`. ``gpus``
    ("5xA100-80GB"): check whether vLLM (GGUF: llama.cpp) can serve a sequence of ``context`` tokens there (default:
    32,768, or what the model is made for). ``memory_budget`` (bytes, "20GiB"): refuse what needs more. ``convert_on``
    ("H200-141GB"): the GPU whose memory is planned for the conversion (default: one of 80 GB). ``hours``: also say how
    long it would take on this machine, which is measured for some seconds the first time; only then torch is loaded.
    ``device``, ``jobs``: where, and with how many CPU threads, losses of types are measured if a target needs some that
    its folder of sensitivity lacks; ``on_event``: is told how far that is.
    Raises `QuantkitError`: a `PlanError` lists every problem, one line each.
    """
    loaded, folder = recipe_and_folder(recipe, base_dir)
    check_context(context, gpus)
    from quantkit.plan.budget import budget_bytes
    from quantkit.plan.forecast import forecast
    from quantkit.plan.hardware import parse_gpu
    from quantkit.runtimes.gpus import parse_gpus

    budget = budget_bytes(memory_budget)
    place = optional_path(config)
    with opened_places(source, cache=cache, cache_dir=cache_dir) as opened:
        (given,), storage = opened.folders, opened.storage
        chosen = settled(given, place, loaded, folder, device, budget, jobs, on_event, storage)
        found = forecast(
            given,
            chosen.recipe,
            config=place,
            base_dir=folder,
            gpus=parsed("gpus", parse_gpus, gpus) if isinstance(gpus, str) else gpus,
            context=context,
            memory_budget=budget,
            convert_on=parsed("convert_on", parse_gpu, convert_on) if isinstance(convert_on, str) else convert_on,
            storage=storage,
        )
    found = replace(found, choices=chosen.choices)
    if not hours:
        return found
    from quantkit.plan.duration import duration_of

    let_threads_sleep()
    return replace(found, duration=duration_of(found))


def build_calibration(
    files: str | Sequence[str],
    out: Path | str,
    *,
    tokens: int = 524288,
    tokenizer: Path | str | None = None,
    seed: int = 0,
    exclude: str | Sequence[str] = (),
    domain_by: str = "file",
    sequence_length: int = 2048,
    force: bool = False,
    on_read: Callable[[int, int], object] | None = None,
) -> CalibrationSet:
    """Draw a calibration set from text of any size, and write it to ``out`` (.jsonl) with a manifest beside it.

    ``files``: files, globs or `builtin:NAME`, relative to the current folder; ``tokens``: how many, counted with the
    tokenizer of the checkpoint folder ``tokenizer`` or estimated at 4 bytes each; ``exclude``: text that the set must
    share nothing with, beside quantkit's own evaluation text; ``domain_by``: what is balanced, "file", "folder" or a
    key of the rows; ``sequence_length``: of the recipe's rows, longer texts are cut to about that; ``force``: replace
    ``out``; ``on_read``: is told (bytes read, bytes of all files).

    The same files, options and seed give the same bytes. Sources that hold fewer tokens are no error: see ``is_short``
    of the result. Loads no torch. Raises `QuantkitError`.
    """
    from quantkit.calibrate.sets.run import BuildOptions, build

    if tokens < 1 or sequence_length < 2:
        raise CalibrationError(
            f"found {tokens} tokens and sequence_length {sequence_length}, needed at least 1 and at least 2."
        )
    model = None if tokenizer is None else Path(tokenizer)
    kept_out = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    entries = (files,) if isinstance(files, str) else tuple(files)
    options = BuildOptions(tokens, model, seed, kept_out, domain_by, sequence_length)
    return build(entries, path_of(out), options, Path(), replace=force, on_read=on_read)


def inspect(path: Path | str, *, cache: int | str | None = None, cache_dir: Path | str | None = None) -> AnyInspection:
    """What a folder of safetensors, a GGUF model or an imatrix file holds: storage by role, bits per weight, and what
    is unusual; of a trial, its report; of a Fisher pass, its document. Reads headers only (an imatrix file as a whole).
    Raises `QuantkitError` for damaged files."""
    from quantkit.inspect.path import inspect_path

    with opened_places(path, cache=cache, cache_dir=cache_dir) as opened:
        (given,) = opened.folders
        return inspect_path(given, opened.storage)


def verify(
    path: Path | str,
    *,
    runtimes: str | Sequence[str] | None = None,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    source: Path | str | None = None,
    sample: int = 16,
    hashes: bool = True,
) -> Verification:
    """Hold a finished checkpoint against what runtimes need: names, shapes, dtypes and config, then its bytes.

    ``runtimes``: of "vllm", "transformers", "sglang" (folders of safetensors) and "llama.cpp" (GGUF), which must load
    it; by default vllm (what transformers cannot do is a note) or llama.cpp. ``tensor_parallel``,
    ``pipeline_parallel``: over how many GPUs the model is to be cut. ``sample``: linears that are decoded, and compared
    with those of the folder ``source`` if it is given. ``hashes``: compare every file with quantkit.json's sha256.

    A fault is no error: see ``passed`` and ``findings``. Raises `QuantkitError` for what is damaged or not known.
    """
    from quantkit.verify.run import Parallel, Scope, verify_path

    names = (runtimes,) if isinstance(runtimes, str) else tuple(runtimes or ())
    parallel = Parallel(tensor_parallel, pipeline_parallel)
    return verify_path(path_of(path), Scope(names, parallel, hashes, sample, optional_path(source)))


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
    force: bool = False,
    times: bool = False,
    base_dir: Path | str = ".",
    cache: int | str | None = None,
    cache_dir: Path | str | None = None,
    on_event: OnEvaluation | None = None,
) -> Evaluation:
    """Score checkpoints of any format against their reference, all through the same layers together.

    ``text``: `builtin:NAME`, files or globs, relative to ``base_dir`` (default: builtin:eval); ``context``: tokens of a
    window (default: 512); ``noise_floor``: also score the reference against itself, rounded to bfloat16;
    ``save_reference``: keep what later calls need of the reference in a file, which may be their ``reference``;
    ``out``: write the JSON document there, in place of an older one of the same models and text, with ``force`` of any
    file; ``times``: put wall seconds into it.

    Scores with standard errors, overall, by domain and by layer, are in ``candidates[i].result``; KLD in nats per
    token. Raises `QuantkitError`.
    """
    from quantkit.evaluate.events import ignore
    from quantkit.evaluate.prepare import Asked, prepared
    from quantkit.evaluate.replaceable import refuse_other_evaluation
    from quantkit.formats.preallocated import check_place, write_durably
    from quantkit.plan.budget import budget_bytes, check_device

    place = optional_path(out)
    if place is not None:
        check_place(place)
    check_device(device)
    let_threads_sleep()
    budget = budget_bytes(memory_budget)
    texts = [text] if isinstance(text, str) else text
    asked = Asked(texts, context, max_windows_per_file, protocol, path_of(base_dir))
    models = [reference, *([candidates] if isinstance(candidates, Path | str) else candidates)]
    with (
        opened_places(*models, cache=cache, cache_dir=cache_dir) as at,
        prepared(at.folders[0], at.folders[1:], asked, optional_path(save_reference), at.storage) as opened,
    ):
        if place is not None and not force:
            refuse_other_evaluation(place, opened)
        from quantkit.evaluate.run import evaluate as run
        from quantkit.plan.machine import Machine

        machine = Machine.of(device, budget)
        found = run(opened, machine, on_event or ignore, noise_floor=noise_floor, times=times)
    if place is not None:
        write_durably(place, found.to_json().encode())
    return found


def report(
    documents: Path | str | Sequence[Path | str],
    out: Path | str | None = None,
    *,
    markdown: bool | None = None,
    title: str | None = None,
    force: bool = False,
) -> str:
    """One HTML page, or markdown for a model card, about output folders of `convert` and documents of `evaluate`.

    ``markdown``: by default if ``out`` ends in .md. Returns the text, and writes it to ``out`` if that is given, in
    place of an older page about the same checkpoints, with ``force`` of any file. Raises `QuantkitError`.
    """
    from quantkit.documents.read import read_documents

    found = read_documents(paths_of(documents))  # what is missing is said before the page's templates load
    from quantkit.report.build import report_of
    from quantkit.report.markdown import markdown as markdown_of
    from quantkit.report.page import page
    from quantkit.report.place import is_markdown, refuse_other_report
    from quantkit.report.scored import scored_checkpoints

    place = optional_path(out)
    as_markdown = is_markdown(place, [file.path for file in found], markdown)
    contents = report_of(scored_checkpoints(found), title)
    made = markdown_of(contents) if as_markdown else page(contents)
    if place is not None:
        if not force:
            refuse_other_report(place, made)
        write_text(place, made)
    return made
