"""A folder of a web server: what its files are is asked one by one, because HTTP lists nothing.

The index names the shards, config.json names code files; tokenizer and licence files are tried by their usual names.
A query (`?token=...`) goes along with every request, a user and password as Basic authentication; neither is shown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from quantkit.errors import SourceError
from quantkit.formats.remote.addresses import without_secrets
from quantkit.formats.remote.connections import basic
from quantkit.formats.remote.fetch import PERMISSION, Fetcher
from quantkit.formats.remote.files import Address, Listing, RemoteFile, plain
from quantkit.formats.safetensors.header import INDEX_NAME, as_strings, parse_json_object
from quantkit.formats.safetensors.index import MAX_JSON_BYTES, MAX_SHARDS, SINGLE_NAME

USUAL = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tiktoken.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "params.json",
    "README.md",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "LICENSE-MODEL",
    "LICENSE-CODE",
    "NOTICE",
    "NOTICE.txt",
)
_AT_ONCE = 8
_MODULE = re.compile(r"(?:[\w./-]+--)?([A-Za-z_]\w*)\.[A-Za-z_]\w*", re.ASCII)


def listing(address: str, fetcher: Fetcher) -> Listing:
    """The files of ``https://host/path/``. Raises `SourceError` for one without config.json, or that cannot be
    asked."""
    parts = urlsplit(address)
    if not parts.hostname or "\\" in address or ".." in parts.path.split("/"):
        raise SourceError(f"{without_secrets(address)}: is no address of a folder.", hint="Give https://HOST/PATH/.")
    look = partial(_file, address, fetcher)
    config = look("config.json")
    if config is None:
        raise SourceError(f"{without_secrets(address)}: holds no config.json that can be read.", hint=PERMISSION)
    index = look(INDEX_NAME)
    names = {SINGLE_NAME} if index is None else _shards(_json(index, fetcher))
    code = _code(_json(config, fetcher))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        others = tuple(file for file in pool.map(look, sorted({*names, *code, *USUAL})) if file is not None)
    folder = plain(unquote(parts.path.rstrip("/").rpartition("/")[2]) or parts.hostname)
    return Listing(without_secrets(address), folder, (config, *((index,) if index else ()), *others))


def _file(address: str, fetcher: Fetcher, name: str) -> RemoteFile | None:
    parts = urlsplit(address)
    path = f"{parts.path.rstrip('/')}/{quote(name)}"
    bare = parts.netloc.rpartition("@")[2]
    headers = {"Authorization": basic(parts.username, parts.password)} if parts.username else {}
    made = Address(urlunsplit((parts.scheme, bare, path, parts.query, "")), headers)
    named = f"{without_secrets(address)}/{name}"
    found = fetcher.probe(named, made)
    return None if found is None else RemoteFile(name, named, found[0], found[1], lambda: made)


def _json(file: RemoteFile, fetcher: Fetcher) -> dict[str, object]:
    if file.nbytes > MAX_JSON_BYTES:
        raise SourceError(f"{file.shown}: has {file.nbytes:,} bytes, at most {MAX_JSON_BYTES:,} are allowed.")
    return parse_json_object(bytes(fetcher.fetch(file, 0, file.nbytes)), file.shown)


def _shards(index: dict[str, object]) -> set[str]:
    """Plain names of the index; who reads it refuses others."""
    files = set((as_strings(index.get("weight_map")) or {}).values())
    return {name for name in sorted(files)[:MAX_SHARDS] if "/" not in name and not name.startswith(".")}


def _code(config: dict[str, object]) -> Iterable[str]:
    """Python files that config.json names (auto_map), from this folder."""
    named = json.dumps(config.get("auto_map", {}))
    return {f"{match[1]}.py" for match in _MODULE.finditer(named)}
