"""Addresses of remote places, as users type them and as they may be shown."""

from __future__ import annotations

import re
from urllib.parse import urlsplit, urlunsplit

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.ASCII)


def scheme_of(name: str) -> str:
    """ "https" of "https://host/path", "" of a path."""
    match = _SCHEME.match(name)
    return match[1] if match else ""


def is_remote(name: str) -> bool:
    """Whether a name is an address, ``SCHEME://...``."""
    return bool(scheme_of(name))


def without_secrets(name: str) -> str:
    """An address without user, password, query and fragment. Anything else stays as it is."""
    if scheme_of(name) not in ("http", "https"):
        return name
    parts = urlsplit(name)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))
