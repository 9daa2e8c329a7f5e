"""A forecast as text for people and as a document for --json."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.formats.sizes import short_size
from quantkit.plan.allocation.choose import Choice
from quantkit.plan.batch_sizes import Expected
from quantkit.plan.forecast import Forecast, OutputFit
from quantkit.plan.memory import Needs
from quantkit.plan.packed import packed_linears
from quantkit.plan.phases import Term
from quantkit.plan.plan import OutputPlan, RoleSize
from quantkit.plan.schedule import Duration
from quantkit.plan.text_notes import TokensPerExpert, expert_tokens
from quantkit.text.choices import choice_document, choice_text
from quantkit.text.fits import fit_document, fit_text
from quantkit.text.tables import both_units, counted, rough, table

BESIDE = "the interpreter comes on top of the budget; a first run, which compiles kernels, takes 0.1 to 0.4 GB more"


def forecast_text(found: Forecast) -> str:
    """A summary; tables of sizes by role, then needs, term by term, and notes."""
    headers, made, fits = found.source, found.plan, found.fits
    origin = "" if headers.has_shards else "  (no shards here: derived from config.json)"
    held = packed_linears(headers.stored).items()
    packed = "".join(f", {counted(count, 'linear')} in {scheme}" for scheme, count in held)
    size = both_units(made.source_bytes)
    blocks = [f"source  {headers.path}: {len(headers.infos):,} tensors{packed}, {size}{origin}"]
    blocks.append(_summary(found))
    for number, output in enumerate(made.outputs):
        blocks.append(f"\noutput  {output.output.name}: {output.output.format}\n\n{_size_table(output)}")
        if output.output.name in found.choices:
            blocks.append("\n" + choice_text(found.choices[output.output.name]))
        if fits is not None:
            blocks.append("\n" + fit_text(fits[number]))
    blocks.append("\n" + _needs_text(found))
    spread = expert_tokens(made.recipe, headers.arch)
    if spread is not None:
        blocks.append(f"\n{_expert_tokens_text(spread)}")
    if made.warnings:
        blocks.append("\n" + "\n".join(f"note: {warning}" for warning in made.warnings))
    return "\n".join(blocks)


def _summary(found: Forecast) -> str:
    """What most readers want to know, in a few lines: sizes, fits, needs, hours, and whether there are notes."""
    fits = found.fits or (None,) * len(found.outputs)
    lines = [_output_summary(output, fit) for output, fit in zip(found.outputs, fits, strict=True)]
    ram = f"{short_size(found.needs.working_bytes)} at least"
    peak = f", peak {short_size(found.expected.ram_bytes)} on the processor" if found.expected is not None else ""
    lines.append(f"RAM {ram}{peak}{_gpu_summary(found.on_gpu)}; disk {short_size(found.needs.disk_bytes)}")
    if found.duration is not None:
        lines.append(f"about {rough(found.duration.seconds)} on this machine ({_where(found.duration)})")
    lines.append(f"{counted(len(found.warnings), 'note')} at the end" if found.warnings else "no notes")
    return "\n".join(f"{'summary' if number == 0 else '':7} {line}" for number, line in enumerate(lines))


def _gpu_summary(expected: Expected | None) -> str:
    if expected is None or expected.hardware.gpu is None:
        return ""
    return f"; {short_size(expected.gpu_bytes)} of GPU memory on {expected.hardware.gpu.name}"


def _output_summary(output: OutputPlan, fit: OutputFit | None) -> str:
    """One line."""
    line = f"{output.output.name}: {output.nbytes:,} bytes, {both_units(output.nbytes)}, {output.bpw:.3f} bpw"
    return line if fit is None else f"{line}; {'fits' if fit.fits else 'does not fit'} {fit.fit.gpus}"


def _size_table(output: OutputPlan) -> str:
    head = ("role", "stored as", "tensors", "parameters", "bytes", "bpw", "GB", "GiB")
    rows = [_size_row(size.role.value, size.what, size) for size in output.sizes]
    total = (f"{output.tensors:,}", f"{output.parameters:,}", f"{output.nbytes:,}", f"{output.bpw:.3f}")
    rows.append(("total", "", *total, f"{output.nbytes / 1e9:.2f}", f"{output.nbytes / 2**30:.2f}"))
    return table(head, rows, left=2, rule_before_last=True)


def _size_row(role: str, what: str, size: RoleSize) -> tuple[str, ...]:
    bytes_of = (f"{size.nbytes:,}", f"{size.bpw:.3f}", f"{size.nbytes / 1e9:.2f}", f"{size.nbytes / 2**30:.2f}")
    return (role, what, f"{size.tensors:,}", f"{size.parameters:,}", *bytes_of)


def _needs_text(found: Forecast) -> str:
    """What the conversion needs at least, the peaks to be expected here and on a GPU, and disk."""
    needs = found.needs
    lines = [f"needs   RAM {short_size(needs.working_bytes)} at least" + _with_hidden(needs)]
    if found.expected is None:
        lines += _term_lines(needs.working)
        lines.append("        this machine's default budget is less (see --memory-budget)")
    else:
        lines.append(f"        {_expected_line(found.expected)}")
        lines += _term_lines(found.expected.ram)
        lines.append(f"          {BESIDE}")
    if found.on_gpu is not None:
        lines.append(f"        {_gpu_line(found.on_gpu)}")
        lines += _term_lines(found.on_gpu.gpu)
    lines.append(f"        disk {short_size(needs.disk_bytes)}")
    lines += _term_lines(needs.disk)
    if found.duration is not None:
        lines += _duration_lines(found.duration)
    return "\n".join(lines)


def _expert_tokens_text(spread: TokensPerExpert) -> str:
    return (
        f"text    {spread.tokens:,} tokens: {spread.mean:,} an expert on average ({spread.top_k} of {spread.experts} "
        "take a token)\n"
        "        routing is uneven: experts of a small trained model got 0.6 to 1.7 times the mean of mixed text, "
        "0.01 to 4 times of one domain's"
    )


def _duration_lines(found: Duration) -> list[str]:
    """How long it should take here, what limits it, and what that is an estimate of."""
    cost = found.cost
    shares = ((cost.computing, "computing"), (cost.reading + cost.ahead, "reading"), (cost.writing, "writing"))
    parts = ", ".join(f"{what} {rough(seconds)}" for seconds, what in sorted(shares, reverse=True))
    stages = f"layers {rough(found.seconds - found.after_layers)}, then validation and checksums"
    return [
        f"takes   about {rough(found.seconds)} on this machine ({_where(found)}): {parts}",
        f"          {stages} {rough(found.after_layers)}; estimated from a benchmark of some seconds, for a machine "
        "that does nothing else",
    ]


def _where(found: Duration) -> str:
    return f"{counted(found.threads, 'thread')} of the processor" if found.device == "cpu" else found.device


def _term_lines(terms: tuple[Term, ...]) -> list[str]:
    return [f"          {term.what}: {short_size(term.nbytes)} = {term.formula}" for term in terms]


def _with_hidden(needs: Needs) -> str:
    if needs.hidden_states is None:
        return ""
    return f"; hidden states take {short_size(needs.hidden_states.nbytes)} of RAM or disk (--memory-budget decides)"


def _expected_line(expected: Expected) -> str:
    budget = f"{expected.hardware.budget / 2**30:.2f}".rstrip("0").rstrip(".")
    return (
        f"on the processor, with a budget of {budget} GiB: peak {short_size(expected.ram_bytes)}, {_experts(expected)}"
    )


def _gpu_line(expected: Expected) -> str:
    gpu = expected.hardware.gpu
    assert gpu is not None, "a forecast for a GPU names it"
    fits = "" if expected.gpu_bytes <= gpu.nbytes else " (MORE THAN IT HAS)"
    beside = f"and {short_size(expected.ram_bytes)} of RAM"
    return f"on {gpu.name}: peak {short_size(expected.gpu_bytes)}{fits} {beside}, {_experts(expected)}"


def _experts(expected: Expected) -> str:
    count = expected.share.experts_at_once
    return f"{counted(count, 'expert')} at once (limited by: {expected.share.limited_by})"


def forecast_document(found: Forecast, recipe: str) -> Mapping[str, object]:
    """For --json. Sizes in bytes; ``recipe``: its name, as given."""
    headers, made, needs = found.source, found.plan, found.needs
    spread = expert_tokens(made.recipe, headers.arch)
    return {
        "source": {
            "path": str(headers.path),
            "has_shards": headers.has_shards,
            "tensors": len(headers.infos),
            "nbytes": made.source_bytes,
        },
        "recipe": recipe,
        "outputs": [_output_document(output, found.choices.get(output.output.name)) for output in made.outputs],
        "needs": {
            "ram_bytes": needs.working_bytes,
            "ram_bytes_with_hidden_states": needs.ram_bytes,
            "disk_bytes": needs.disk_bytes,
            "terms": [
                {"where": where, "what": term.what, "nbytes": term.nbytes, "formula": term.formula}
                for where, terms in (("ram", needs.working), ("disk", needs.disk))
                for term in terms
            ],
            **_expected_document(found.expected),
            "gpu": _gpu_document(found.on_gpu),
        },
        "duration": None if found.duration is None else _duration_document(found.duration),
        "expert_tokens": None
        if spread is None
        else {
            "calibration_tokens": spread.tokens,
            "experts": spread.experts,
            "top_k": spread.top_k,
            "mean": spread.mean,
            "inputs": spread.width,
            "calibration_tokens_for_full_rank": spread.needed,
        },
        "fit": None if found.fits is None else [fit_document(each) for each in found.fits],
        "warnings": list(made.warnings),
    }


def _duration_document(found: Duration) -> Mapping[str, object]:
    """Seconds; ``reading_ahead`` passes while something is computed."""
    cost = found.cost
    return {
        "device": found.device,
        "threads": found.threads,
        "seconds": round(found.seconds, 1),
        "computing": round(cost.computing, 1),
        "reading": round(cost.reading, 1),
        "reading_ahead": round(cost.ahead, 1),
        "writing": round(cost.writing, 1),
        "after_layers": round(found.after_layers, 1),
    }


def _expected_document(expected: Expected | None) -> Mapping[str, object]:
    """On the processor, under the budget; nulls if the default budget is too small."""
    share = None if expected is None else expected.share
    return {
        "memory_budget": None if expected is None else expected.hardware.budget,
        "expected_ram_bytes": None if expected is None else expected.ram_bytes,
        "expected_terms": [] if expected is None else _term_documents(expected.ram),
        "hidden_states_in": [] if expected is None else list(expected.hidden_states),
        "experts_at_once": None if share is None else share.experts_at_once,
        "limited_by": None if share is None else share.limited_by,
    }


def _gpu_document(expected: Expected | None) -> Mapping[str, object] | None:
    if expected is None or expected.hardware.gpu is None:
        return None
    gpu = expected.hardware.gpu
    return {
        "name": gpu.name,
        "nbytes": gpu.nbytes,
        "expected_bytes": expected.gpu_bytes,
        "terms": _term_documents(expected.gpu),
        "expected_ram_bytes": expected.ram_bytes,
        "hidden_states_in": list(expected.hidden_states),
        "experts_at_once": expected.share.experts_at_once,
        "limited_by": expected.share.limited_by,
    }


def _term_documents(terms: tuple[Term, ...]) -> list[Mapping[str, object]]:
    return [{"what": term.what, "nbytes": term.nbytes, "formula": term.formula} for term in terms]


def _output_document(output: OutputPlan, choice: Choice | None) -> Mapping[str, object]:
    return {
        "name": output.output.name,
        "format": output.output.format,
        "tensors": output.tensors,
        "parameters": output.parameters,
        "nbytes": output.nbytes,
        "gb": round(output.nbytes / 1e9, 3),
        "gib": round(output.nbytes / 2**30, 3),
        "bpw": round(output.bpw, 5),
        "roles": [
            {
                "role": size.role.value,
                "stored_as": size.what,
                "tensors": size.tensors,
                "parameters": size.parameters,
                "nbytes": size.nbytes,
                "bpw": round(size.bpw, 5),
            }
            for size in output.sizes
        ],
        "choice": None if choice is None else choice_document(choice),
    }
