"""What a conversion will give and need, from headers alone: plan, memory, disk, and whether the result can be served.
No weight is read, no torch loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from quantkit.calibrate.dataset import check_text
from quantkit.calibrate.imatrix_file import ImportanceFile
from quantkit.documents.sensitivity import read_sensitivity
from quantkit.errors import CalibrationError, SourceError
from quantkit.formats.fp8_source import ZEROS_HINT
from quantkit.formats.side_files import side_file_bytes
from quantkit.formats.sizes import short_size
from quantkit.formats.storage import LOCAL, Storage
from quantkit.formats.tiktoken_model import tokenizer_file
from quantkit.plan.allocation.choose import CONTEXT, Choice
from quantkit.plan.batch_sizes import Expected, expected
from quantkit.plan.hardware import Gpu, Hardware, default_budget
from quantkit.plan.headers import SourceHeaders, read_headers
from quantkit.plan.known_scores import known_scores, refuse_unscored
from quantkit.plan.lengths import length_notes
from quantkit.plan.memory import Needs, check_budget, conversion_needs, least_budget
from quantkit.plan.plan import OutputPlan, Plan, make_plan
from quantkit.plan.pruning import layers_to_score, pruned_headers, pruning_notes
from quantkit.plan.recipe import GgufOutput, Recipe
from quantkit.plan.same_model import check_model, fingerprint_of
from quantkit.plan.schedule import Duration
from quantkit.runtimes.gpus import Gpus
from quantkit.runtimes.llama_cpp.memory import LlamaFit, fit_llama
from quantkit.runtimes.vllm import contract
from quantkit.runtimes.vllm.memory import Fit, fit

COMMON_GPU = Gpu("a GPU of 80 GB", 80 * 10**9)
"""What a plan shows if no GPU is named."""
OUT = "OUT"
"""Stands for the folder that a conversion will be given."""


@dataclass(frozen=True, slots=True)
class OutputFit:
    """How an output lies on given GPUs, and the command that serves it there ("" if it does not fit)."""

    fit: Fit | LlamaFit
    command: str

    @property
    def fits(self) -> bool:
        """Whether the GPUs can serve it."""
        return bool(self.command)


@dataclass(frozen=True, slots=True, repr=False)
class Forecast:
    """``plan``: what happens to every tensor, exact sizes; ``needs``: the least memory and the disk of the conversion,
    estimates; ``expected``: its peaks under the memory budget if a processor computes, and ``on_gpu`` if a GPU does;
    None if the budget of this machine is too small. ``fits``: one for each output if GPUs were named; ``duration``: how
    long it should take here, if that was asked for; ``choices``: by the name of the output, what was chosen for those
    that had a target."""

    source: SourceHeaders
    plan: Plan
    needs: Needs
    expected: Expected | None
    on_gpu: Expected | None
    fits: tuple[OutputFit, ...] | None = None
    duration: Duration | None = None
    choices: Mapping[str, Choice] = field(default_factory=dict[str, Choice])

    @property
    def outputs(self) -> tuple[OutputPlan, ...]:
        """The checkpoints that would be written."""
        return self.plan.outputs

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader should know before the work begins."""
        return self.plan.warnings

    def __repr__(self) -> str:
        """Sizes and needs in one line."""
        sizes = ", ".join(f"{o.output.name}: {o.nbytes:,} bytes, {o.bpw:.3f} bpw" for o in self.outputs)
        needs = f"RAM {short_size(self.needs.working_bytes)}, disk {short_size(self.needs.disk_bytes)}"
        return f"<Forecast {sizes}; needs {needs}>"


def forecast(
    source: Path | str,
    recipe: Recipe,
    *,
    config: Path | None = None,
    base_dir: Path = Path(),
    gpus: Gpus | None = None,
    context: int | None = None,
    memory_budget: int | None = None,
    convert_on: Gpu | None = None,
    storage: Storage = LOCAL,
) -> Forecast:
    """Plan the conversion of a checkpoint folder, which may hold only a config.json: then the official release of it.

    ``config``: the folder of config.json and tokenizer where ``source`` is GGUF; ``base_dir``: where the recipe's
    relative files lie; ``gpus``: try to serve a sequence of ``context`` tokens there (default: `CONTEXT`, or what the
    model is made for if that is less); ``memory_budget``: bytes to stay under (default: `default_budget`, which may be
    less than the conversion needs); ``convert_on``: the GPU that would compute the conversion (default: `COMMON_GPU`);
    ``storage``: opens the source's shards.

    Raises `PlanError` with every problem, `SourceError` or `ConfigError` for a damaged source, `CalibrationError` for
    text that is not there.
    """
    return forecast_of(
        read_headers(source, config, storage),
        recipe,
        base_dir=base_dir,
        gpus=gpus,
        context=context,
        memory_budget=memory_budget,
        convert_on=convert_on,
        storage=storage,
    )


def forecast_of(
    headers: SourceHeaders,
    recipe: Recipe,
    *,
    base_dir: Path = Path(),
    gpus: Gpus | None = None,
    context: int | None = None,
    memory_budget: int | None = None,
    convert_on: Gpu | None = None,
    storage: Storage = LOCAL,
) -> Forecast:
    """As `forecast`, of headers that are read already. With ``prune`` all but the weights that are read are those of
    the model that is left."""
    if headers.zeros and not recipe.allow_zeros:
        more = f"\n... and {len(headers.zeros) - 5:,} more shards." if len(headers.zeros) > 5 else ""
        raise SourceError(
            "\n".join(headers.zeros[:5]) + more,
            hint=ZEROS_HINT,
        )
    recipe = recipe.within(base_dir)  # what the plan counts of texts and passes lies there too
    whole = headers.arch
    if recipe.prune is not None:
        headers = pruned_headers(headers, recipe.prune)
    plan = make_plan(recipe, headers.arch, headers.infos, headers.stored)
    plan = replace(
        plan,
        warnings=(
            *headers.notes,
            *pruning_notes(recipe.prune, whole.routed_experts(), headers.arch),
            *length_notes(recipe, headers.arch),
            *plan.warnings,
        ),
    )
    if headers.has_shards or os.path.lexists(tokenizer_file(headers.directory)):
        for output in plan.outputs:
            notes = (f"output {output.output.name}: {line}" for line in output.target.check_source(headers.directory))
            plan = replace(plan, warnings=(*plan.warnings, *notes))
    if recipe.prune is not None and recipe.prune.scores is not None:
        path = base_dir / recipe.prune.scores
        refuse_unscored(path, known_scores(path, whole), layers_to_score(plan))
    _find_text(recipe, headers, base_dir)
    if recipe.imatrix is not None:
        ImportanceFile.open(base_dir / recipe.imatrix, headers.arch).close()
    if recipe.sensitivity is not None and recipe.output_aware:
        felt = base_dir / recipe.sensitivity
        check_model(felt, read_sensitivity(felt), fingerprint_of(headers, storage), headers.arch)
    needs = conversion_needs(plan, headers.arch, side_file_bytes(headers.directory))
    if memory_budget is not None:
        check_budget(needs, memory_budget)
    context = context or _usual_context(headers)
    fits = None if gpus is None else tuple(_fit(headers, plan, output, gpus, context) for output in plan.outputs)
    budget = memory_budget or default_budget()
    on_cpu, on_gpu = (
        expected(needs, Hardware(budget, gpu)) if budget >= least_budget(needs) else None
        for gpu in (None, convert_on or COMMON_GPU)
    )
    return Forecast(headers, plan, needs, on_cpu, on_gpu, fits)


def _find_text(recipe: Recipe, headers: SourceHeaders, base_dir: Path) -> None:
    """Raise `CalibrationError` if the recipe's text is unusable or too short, or the tokenizer that cuts it missing."""
    for name, text, context in (
        ("Calibration", recipe.calibration, 2),
        ("Validation", recipe.validation and recipe.validation.text, recipe.validation and recipe.validation.context),
    ):
        if text:
            check_text(text, headers.directory, base_dir, context or 2)
            if headers.has_shards and not tokenizer_file(headers.directory).exists():
                raise CalibrationError(
                    f"{headers.directory / 'tokenizer.json'}: no such file.",
                    hint=f"{name} needs the checkpoint's tokenizer files.",
                )


def _usual_context(headers: SourceHeaders) -> int:
    return min(CONTEXT, headers.arch.serving().max_positions)


def _fit(headers: SourceHeaders, plan: Plan, output: OutputPlan, gpus: Gpus, context: int) -> OutputFit:
    """Raises `PlanError` if the model is not made for ``context`` tokens."""
    folder = OUT if len(plan.outputs) == 1 else f"{OUT}/{output.output.name}"
    if isinstance(output.output, GgufOutput):
        llama = fit_llama(output, headers.arch, gpus, context)
        (serve,) = output.target.serve_commands(headers.directory, output.planned, folder)
        return OutputFit(llama, f"{serve} {llama.options()}" if llama.fits else "")
    vllm = fit(output, headers.arch, gpus, context)
    served = vllm.utilization is not None and output.output.format != contract.BITSANDBYTES
    return OutputFit(vllm, vllm.command(folder) if served else "")
