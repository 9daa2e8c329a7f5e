"""What a plan says of a source that is quantised already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from quantkit.plan.decide import Action, Decision
from quantkit.plan.gguf_model import is_gguf_model
from quantkit.plan.headers import read_headers
from quantkit.plan.targets import Target
from quantkit.schemes import Float8Scheme, Scheme, describe
from quantkit.tensors import Role


def packed_linears(stored: Mapping[str, Scheme]) -> Mapping[str, int]:
    """How many linears of a source are in each scheme; FP8 blocks, which decode to BF16, do not count."""
    return Counter(describe(scheme) for scheme in stored.values() if not isinstance(scheme, Float8Scheme))


def rounded_again(decisions: Iterable[Decision], target: Target) -> Iterator[str]:
    """A line for each packed scheme of the source whose linears get another grid: that rounds them a second time."""
    again: dict[Scheme, list[Decision]] = {}
    for decision in decisions:
        stored = decision.stored
        if stored is not None and not isinstance(stored, Float8Scheme) and decision.action is Action.QUANTIZE:
            again.setdefault(stored, []).append(decision)
    for stored, found in again.items():
        first = found[0]
        exact = target.exact_rule(first.spec, stored)
        instead = f" {exact} keeps their numbers exactly." if exact else ""
        one = len(found) == 1
        which = f"{first.spec.name} is" if one else f"{len(found):,} linears, such as {first.spec.name}, are"
        yield (
            f"{which} {describe(stored)} in the source; as {describe(first.scheme)} {'it is' if one else 'they are'} "
            f"rounded a second time.{instead}"
        )


def packed_tables(source: Path, config: Path | None) -> frozenset[Role]:
    """Roles of the tables that a GGUF source holds in blocks, which folders of safetensors cannot keep. Raises what
    `read_headers` does."""
    if not is_gguf_model(source):
        return frozenset()
    headers = read_headers(source, config)
    return frozenset(spec.role for spec in headers.arch.tensors() if spec.table and spec.name in headers.stored)
