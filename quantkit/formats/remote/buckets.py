"""A folder of a bucket: S3 and what speaks like it (s3fs), Google's storage (gcsfs).

fsspec's libraries list the files and find out who asks, in their own places (~/.aws, AWS_PROFILE, instance roles;
GOOGLE_APPLICATION_CREDENTIALS). Objects then come by plain HTTP: of S3 by signed addresses that live for an hour, of
Google's by its media address with a token. AWS_ENDPOINT_URL names another S3. Without credentials a bucket is asked as
a stranger.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar, cast

from quantkit.errors import SourceError
from quantkit.formats.remote.connections import bare_etag
from quantkit.formats.remote.extra import missing_package
from quantkit.formats.remote.fetch import PERMISSION
from quantkit.formats.remote.files import Address, Listing, RemoteFile, plain

SIGNED_SECONDS = 3600
Answered = TypeVar("Answered")


class Bucket(Protocol):
    """What is used of an fsspec file system."""

    def ls(self, path: str, detail: bool, refresh: bool) -> list[Mapping[str, Any]]: ...
    def sign(self, path: str, expiration: int) -> str: ...
    def url(self, path: str) -> str: ...


def listing(address: str) -> Listing:
    """The files of ``s3://bucket/prefix`` or ``gs://bucket/prefix``, without folders in it. Raises `SourceError` in one
    line for a bucket that is not there or refuses."""
    scheme, _, rest = address.partition("://")
    place = rest.strip("/")
    if not place or "?" in place or "@" in place:
        raise SourceError(f"{scheme}://: names no bucket and prefix.", hint=f"Give {scheme}://BUCKET/PREFIX.")
    origin = f"{scheme}://{place}"
    bucket, failures = opened(scheme)
    entries = asked(origin, failures, lambda: bucket.ls(place, detail=True, refresh=True))
    made = _signed if scheme == "s3" else _media

    def address_of(path: str) -> Address:
        return asked(f"{scheme}://{path}", failures, lambda: made(bucket, path))

    files = tuple(
        RemoteFile(
            name=str(entry["name"]).rpartition("/")[2],
            shown=f"{scheme}://{entry['name']}",
            nbytes=int(entry.get("size") or 0),
            etag=bare_etag(cast("str | None", entry.get("ETag") or entry.get("etag"))),
            address=partial(address_of, str(entry["name"])),
        )
        for entry in entries
        if entry.get("type") == "file" and str(entry["name"]).startswith(f"{place}/")
    )
    return Listing(origin, plain(place.rpartition("/")[2]), files)


class Opened(NamedTuple):
    """``failures``: what its libraries raise beside errors of the operating system."""

    bucket: Bucket
    failures: tuple[type[Exception], ...]


def opened(scheme: str) -> Opened:
    """The file system behind a scheme. Raises `SourceError` if its library is missing."""
    if scheme == "gs":
        try:
            import gcsfs  # pyright: ignore[reportMissingImports]
            from aiohttp import ClientError  # pyright: ignore[reportMissingImports]
            from gcsfs.retry import HttpError  # pyright: ignore[reportMissingImports]
            from google.auth.exceptions import GoogleAuthError  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise missing_package("gs://", "gcsfs") from None
        system = gcsfs.GCSFileSystem(skip_instance_cache=True)
        return Opened(cast("Bucket", system), (ClientError, HttpError, GoogleAuthError))
    try:
        import s3fs  # pyright: ignore[reportMissingImports]
        from botocore.exceptions import BotoCoreError, ClientError  # pyright: ignore[reportMissingImports]
        from botocore.session import get_session  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise missing_package("s3://", "s3fs") from None
    stranger = get_session().get_credentials() is None
    system = s3fs.S3FileSystem(anon=stranger, skip_instance_cache=True)
    return Opened(cast("Bucket", system), (BotoCoreError, ClientError))


def asked(origin: str, failures: tuple[type[Exception], ...], question: Callable[[], Answered]) -> Answered:
    """The answer of a bucket. Raises `SourceError` in one line."""
    try:
        return question()
    except FileNotFoundError:
        raise SourceError(f"{origin}: no such bucket or folder.", hint="Give the folder of config.json.") from None
    except PermissionError:
        raise SourceError(f"{origin}: the bucket refuses.", hint=PERMISSION) from None
    except (OSError, ValueError, *failures) as error:  # their text may quote a signature
        raise SourceError(f"{origin}: cannot be asked for ({type(error).__name__}).", hint=PERMISSION) from None


def _signed(bucket: Bucket, path: str) -> Address:
    return Address(bucket.sign(path, expiration=SIGNED_SECONDS))


def _media(bucket: Bucket, path: str) -> Address:
    headers: dict[str, str] = {}
    credentials = getattr(bucket, "credentials", None)
    if credentials is not None:
        credentials.apply(headers)
    return Address(bucket.url(path), headers)
