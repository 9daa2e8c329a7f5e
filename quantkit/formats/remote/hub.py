"""A repository of the Hugging Face hub, at a commit: a branch or tag becomes the commit that it names now.

huggingface_hub lists the files, with who asks taken from HF_TOKEN or its own file, and HF_ENDPOINT heard. The token
goes to the hub and not to the storage that it redirects to.
"""

from __future__ import annotations

import os
import re
from functools import partial
from typing import NamedTuple
from urllib.parse import quote

from quantkit.errors import SourceError
from quantkit.formats.remote.extra import missing_package
from quantkit.formats.remote.files import Address, Listing, RemoteFile

UNREACHED = "Is the network up? HF_ENDPOINT and HF_HUB_OFFLINE say where and whether the hub is asked."
_NAME = re.compile(r"([\w.-]{1,96}/[\w.-]{1,96})(?:@([\w./-]{1,200}))?", re.ASCII)


class Repository(NamedTuple):
    """``revision``: None for the hub's default."""

    name: str
    revision: str | None


def repository(address: str) -> Repository:
    """Of ``hf://org/name@revision``. Raises `SourceError` for anything else."""
    match = _NAME.fullmatch(address.removeprefix("hf://").rstrip("/"))
    if match is None:
        raise SourceError(f"{address}: names no repository.", hint="Give hf://ORG/NAME or hf://ORG/NAME@REVISION.")
    return Repository(match[1], match[2])


def listing(address: str) -> Listing:
    """The files at the top of a repository. Raises `SourceError` in one line: not there, no permission, no such
    revision, not to be reached."""
    asked = repository(address)
    try:
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import HfHubHTTPError, HTTPError  # pyright: ignore[reportPrivateImportUsage]
    except ImportError:
        raise missing_package("hf://", "huggingface_hub") from None
    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
    try:
        info = HfApi(endpoint=endpoint).model_info(
            asked.name, revision=asked.revision, files_metadata=True, timeout=60.0
        )
    except HfHubHTTPError as error:
        raise _refusal(asked, error) from None
    except (HTTPError, OSError, ValueError) as error:  # the first is that of the library's HTTP client
        raise SourceError(f"hf://{asked.name}: cannot be asked for ({type(error).__name__}).", hint=UNREACHED) from None
    commit = info.sha or ""
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise SourceError(f"hf://{asked.name}: the hub names no commit.")
    origin = f"hf://{asked.name}@{commit}"
    base = f"{endpoint}/{asked.name}/resolve/{commit}"
    files = tuple(
        RemoteFile(
            name=sibling.rfilename,
            shown=f"{origin}/{sibling.rfilename}",
            nbytes=sibling.size or 0,
            etag=(sibling.lfs.sha256 if sibling.lfs else sibling.blob_id) or "",
            address=partial(_address, f"{base}/{quote(sibling.rfilename)}"),
            sha256=sibling.lfs.sha256 if sibling.lfs else "",
            git_sha1="" if sibling.lfs else sibling.blob_id or "",
            linked=True,
        )
        for sibling in info.siblings or ()
        if "/" not in sibling.rfilename
    )
    owner, _, model = asked.name.partition("/")
    return Listing(origin, f"models--{owner}--{model}/snapshots/{commit}", files)


def _address(url: str) -> Address:
    from huggingface_hub import get_token

    token = get_token()
    return Address(url, {"Authorization": f"Bearer {token}"} if token else {})


def _refusal(asked: Repository, error: Exception) -> SourceError:
    """What the hub says of a repository that it does not give, in a line."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    where = f"hf://{asked.name}"
    if isinstance(error, GatedRepoError):
        return SourceError(f"{where}: its owner must grant access.", hint="Ask for it on the hub, and set HF_TOKEN.")
    if isinstance(error, RepositoryNotFoundError):
        return SourceError(f"{where}: no such repository, or no permission to see it.", hint="Is HF_TOKEN set?")
    if isinstance(error, RevisionNotFoundError):
        return SourceError(f"{where}: has no revision {asked.revision}.", hint="Give a branch, a tag or a commit.")
    status = getattr(getattr(error, "response", None), "status_code", "an error")
    return SourceError(f"{where}: the hub answers {status}.", hint="Is HF_TOKEN set, and the hub up?")
