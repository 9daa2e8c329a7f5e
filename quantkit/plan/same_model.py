"""Whether a Fisher pass is of the model at hand. No torch."""

from __future__ import annotations

from pathlib import Path

from quantkit.arch.base import ModelArch
from quantkit.documents.sensitivity import SensitivityDocument
from quantkit.errors import SourceError
from quantkit.formats.storage import LOCAL, Storage
from quantkit.plan.gguf_model import open_model
from quantkit.plan.headers import SourceHeaders


def fingerprint_of(headers: SourceHeaders, storage: Storage = LOCAL) -> str | None:
    """What a pass over these weights states as its source; None if only config.json is there. ``storage``:
    opens the shards."""
    if not headers.has_shards:
        return None
    config = None if headers.path == headers.directory else headers.directory
    with open_model(headers.path, config, storage) as opened:
        return opened.fingerprint()


def check_model(folder: Path, document: SensitivityDocument, fingerprint: str | None, arch: ModelArch) -> None:
    """Raise `SourceError` if the document is of another checkpoint than the one with this fingerprint; None: of which
    only config.json is there."""
    job = document.job
    sublayers = tuple(len(arch.sublayers(layer)) for layer in range(arch.n_layers))
    linears = {spec.name for spec in arch.tensors() if spec.linear}
    if (job.hidden, job.sublayers) != (arch.hidden_size, sublayers):
        what = f"of another model: {len(job.sublayers):,} layers of width {job.hidden:,}"
        needed = f"{arch.n_layers:,} layers of width {arch.hidden_size:,} were needed"
    elif unknown := sorted(document.linears.keys() - linears):
        what, needed = "of another model", f"it names {unknown[0]!r}, which this one lacks"
    elif fingerprint is not None and job.source != fingerprint:
        what, needed = "of another checkpoint", "the same model in other files counts as another"
    else:
        return
    raise SourceError(f"{folder}: is {what}; {needed}.", hint="Make it of this checkpoint: quantkit sensitivity.")
