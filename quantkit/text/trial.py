"""A trial's report as text."""

from __future__ import annotations

from pathlib import Path

from quantkit.documents.trial import TrialDocument, TrialLayer, TrialOutput
from quantkit.formats.sizes import short_size
from quantkit.plan.schedule import AFTER_LAYERS
from quantkit.text.tables import both_units, counted, duration, rough, table


def trial_text(found: TrialDocument, path: Path) -> str:
    """A table of layers for each output, then what the whole conversion will take. ``path``: of the document."""
    outputs = [_output_text(output) for output in found.outputs]
    after = sum(seconds for kind, seconds in found.whole_seconds.items() if kind in AFTER_LAYERS)
    kinds = sorted(found.whole_seconds.items(), key=lambda pair: -pair[1])[:4]
    largest = ", ".join(f"{kind} {rough(seconds)}" for kind, seconds in kinds)
    rows = [
        ("trial", f"layers {_ranges(found.trial)}, {found.tokens:,} held-out tokens; its tensors are not kept"),
        ("took", f"{duration(sum(found.seconds.values()))}, peak memory {short_size(found.peak_rss_bytes)}"),
        ("the whole", f"about {rough(found.total_seconds)}: {largest}"),
        ("", f"of it {rough(after)} after the layers (checksums, validation); disk {short_size(found.disk_bytes)}"),
        ("report", str(path)),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n\n".join([*outputs, "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)])


def _output_text(output: TrialOutput) -> str:
    head = ("layer", "hidden error", "same experts", "loss of linears")
    text = table(head, [_row(layer) for layer in output.layers])
    fallbacks = f"; {counted(output.fallbacks, 'linear')} fell back to a weaker method" if output.fallbacks else ""
    return f"{output.name}: {both_units(output.nbytes)} as a whole{fallbacks}\n\n{text}"


def _row(layer: TrialLayer) -> tuple[str, ...]:
    same = "-" if layer.router_agreement is None else f"{100 * layer.router_agreement:.1f} %"
    loss = "-" if layer.relative_loss is None else f"{layer.relative_loss:.5f}"
    return (f"{layer.layer}{'' if layer.quantised else ' (original)'}", f"{100 * layer.hidden_error:.2f} %", same, loss)


def _ranges(layers: tuple[int, ...]) -> str:
    """ "0-4, 10"."""
    found: list[tuple[int, int]] = []
    for layer in layers:
        if found and layer == found[-1][1] + 1:
            found[-1] = (found[-1][0], layer)
        else:
            found.append((layer, layer))
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)
