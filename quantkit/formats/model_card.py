"""README.md of a finished checkpoint: what it is, how it was made, what was measured, how to serve it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class CardFacts:
    """All that the card states. ``measured``: label -> text with unit and standard error, as the report has them.
    ``contents``: rows of (role, how it is stored, parameters, bytes). ``serve``: shell lines, as the plan's fit found
    them. ``license`` and ``base_model`` are hub identifiers or "". ``notes``: limits of runtimes.
    """

    title: str
    recipe: str
    parameters: int
    nbytes: int
    contents: tuple[tuple[str, str, int, int], ...] = ()
    measured: Mapping[str, str] = field(default_factory=dict[str, str])
    notes: tuple[str, ...] = ()
    serve: tuple[str, ...] = ("vllm serve .",)
    format: str = "compressed-tensors"
    version: str = ""
    base_model: str = ""
    license: str = ""
    validated: bool = True

    @property
    def bpw(self) -> float:
        """All stored bits for each weight of the checkpoint."""
        return 8 * self.nbytes / self.parameters


def model_card(facts: CardFacts) -> str:
    """The text of README.md with front matter for model hubs."""
    parts = [_front_matter(facts), f"# {facts.title}\n", _summary(facts)]
    if facts.contents:
        parts.append(_contents(facts))
    if facts.measured:
        rows = "\n".join(f"| {label} | {text} |" for label, text in facts.measured.items())
        parts.append(f"## Measured\n\n| | |\n|---|---|\n{rows}\n")
    parts.append(_serving(facts))
    parts.append(f"## Recipe\n\n```yaml\n{facts.recipe.strip()}\n```\n")
    return "\n".join(parts)


def _front_matter(facts: CardFacts) -> str:
    lines = ["---"]
    # Quoted as JSON, which YAML reads: an identifier must not be able to add keys.
    if facts.license:
        lines.append(f"license: {json.dumps(facts.license)}")
    if facts.base_model:
        lines += [f"base_model: {json.dumps(facts.base_model)}", "base_model_relation: quantized"]
    library = "gguf" if facts.format == "gguf" else "transformers"
    lines += [f"library_name: {library}", "tags:", f"- {facts.format}", "- quantkit", "---\n"]
    return "\n".join(lines)


def _summary(facts: CardFacts) -> str:
    made = f"quantkit {facts.version}".strip()
    base = f" from {facts.base_model}" if facts.base_model else ""
    lines = [
        f"Quantised{base} by {made}: {facts.parameters:,} weights in {facts.nbytes:,} bytes of tensor data "
        f"= {facts.nbytes / 1e9:.2f} GB = {facts.nbytes / GIB:.2f} GiB, {facts.bpw:.3f} bits per weight.",
        f"Format: {facts.format}. Scheme and error of every tensor, token counts of the calibration and sha256 sums "
        "are in `quantkit.json`.",
    ]
    if not facts.validated:
        lines.insert(
            0, "**Not validated**: this checkpoint did not pass, or did not run, the validation of its recipe.\n"
        )
    return "\n".join(lines) + "\n"


def _contents(facts: CardFacts) -> str:
    rows = [
        f"| {role} | {scheme} | {parameters:,} | {nbytes / 1e9:.3f} | {nbytes / GIB:.3f} |"
        for role, scheme, parameters, nbytes in facts.contents
    ]
    return "\n".join(
        ["## Contents\n", "| role | stored as | weights | GB | GiB |", "|---|---|---:|---:|---:|", *rows, ""]
    )


def _serving(facts: CardFacts) -> str:
    lines = ["## Serving\n", "```", *facts.serve, "```\n"]
    lines += [f"- {note}" for note in facts.notes]
    if facts.notes:
        lines.append("")
    what = "vLLM does not notice a missing tensor of a quantised module: after" if facts.format != "gguf" else "After"
    lines.append(f"{what} copying, compare the files with the sha256 sums in `quantkit.json`.")
    return "\n".join(lines) + "\n"
