"""Names of schemes that people type -> schemes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from quantkit.errors import SchemeError
from quantkit.schemes import ChosenScheme


def named_schemes(
    known: Mapping[str, ChosenScheme], names: Sequence[str], usual: Sequence[ChosenScheme]
) -> tuple[ChosenScheme, ...]:
    """``usual`` if there are no ``names``, else the schemes that they mean: labels without case and punctuation
    ("int4-g128"), integers also without their usual group size ("int4"). Raises `SchemeError` for another name."""
    by_name = {_plain(label): scheme for label, scheme in known.items()}
    found = {name: by_name.get(_plain(name)) or by_name.get(_plain(f"{name}g128")) for name in names}
    unknown = next((name for name, scheme in found.items() if scheme is None), None)
    if unknown is not None:
        raise SchemeError(f"found {unknown[:40]!r}, needed some of {', '.join(known)}.")
    return tuple(scheme for scheme in found.values() if scheme is not None) or tuple(usual)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
