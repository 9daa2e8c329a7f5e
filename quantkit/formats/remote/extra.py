"""Libraries that only remote places need."""

from __future__ import annotations

from quantkit.errors import SourceError


def missing_package(scheme: str, package: str) -> SourceError:
    """What is said where an optional library is not installed."""
    return SourceError(f"{scheme}: needs {package}, which is not installed.", hint='pip install "quantkit-moe[remote]"')
