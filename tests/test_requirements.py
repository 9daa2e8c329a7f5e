"""requirements.lock pins everything but torch, by the sha256 of every file; torch's own needs are in it."""

from __future__ import annotations

import re
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
FROM_TORCH = re.compile(r"nvidia-|cuda-|triton")
"""What only torch's build for CUDA brings."""


def pins() -> dict[str, str]:
    """Name -> all that stands about it. A name occurs once for each marker."""
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    found: dict[str, str] = {}
    for line in lines:
        name = canonicalize_name(line.split("==")[0])
        found[name] = f"{found.get(name, '')} {line}"
        assert re.fullmatch(r"[\w.-]+==[\w.+]+( ; [^#]+?)?(\s+--hash=sha256:[0-9a-f]{64})+", line.strip()), line[:80]
    return found


def test_every_line_has_a_version_and_hashes() -> None:
    assert len(pins()) > 60


def test_torch_stands_alone() -> None:
    assert "torch" not in pins()
    lines = (ROOT / "requirements-torch.lock").read_text(encoding="utf-8").splitlines()
    (pin,) = [line for line in lines if not line.startswith("#")]
    assert re.fullmatch(r"torch==[\d.]+", pin)


def test_what_torch_needs_is_pinned() -> None:
    needs = [Requirement(text) for text in requires("torch") or ()]
    here = [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    names = {canonicalize_name(need.name) for need in here}
    assert {name for name in names - set(pins()) if not FROM_TORCH.match(name)} == set()
