"""What a check is given and what it finds: limits, checks, verdicts."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from quantkit.errors import EvaluationError


@dataclass(frozen=True, slots=True)
class Limits:
    """When a number is worse than its baseline.

    The relative spreads are those of clean conversions that differ in the calibration seed only, as
    benchmarks/regression_gate.py measures them; each is rounded up.
    """

    sigmas: float = 4.0
    """Standard deviations of a difference that still count as chance. Where m numbers of a kind are looked at, as many
    as keep the chance of one false alarm among them."""
    spread: float = 0.015
    """Relative standard deviation of the mean KLD from seed to seed, beyond the noise of the text."""
    size_increase: float = 0.001
    """Relative, of the tensors' bytes."""
    max_kld: float | None = None
    """Nats per token, whatever the baseline has."""
    max_perplexity_increase: float | None = None
    """Relative, above the reference's."""
    losses: bool = True
    """Whether the losses in quantkit.json are compared."""

    domain_spread: float = 0.02
    """Spread of one domain's KLD, as a share of the whole text's: few tokens that diverge far may lie in any domain.
    Comes on top of ``spread``."""
    loss_times: float = 2.0
    """Spread of the mean loss in nats: so many times ``spread`` of the mean KLD. A loss moves in proportion to the
    error, the KLD to its square."""
    layer_spread: float = 0.02
    """Relative spread of a layer's squared hidden error."""
    expert_spread: float = 0.01
    """Relative spread of the error of one expert's tokens against its peers'."""
    expert_tokens: float = 1.0
    """With n tokens the difference of that gets this / sqrt(n) from the choice of text."""
    kind_spread: float = 0.01
    """Spread of the log loss that all linears of a kind have in common."""
    member_spread: float = 0.03
    """Spread of one linear's log loss against its kind's, as a rule: the mean over m linears has this / sqrt(m)."""
    linear_spread: float = 0.07
    """Spread of the log loss of the linear that varies most: a few tokens can rule an expert's down projection."""
    divergence_floor: float = 2e-5
    """Nats per token: what rounding in another order (threads, processors) may do."""

    def __post_init__(self) -> None:
        """Raises `EvaluationError` for a limit that is negative or no finite number."""
        for name, value in asdict(self).items():
            if value is not None and not 0 <= value < math.inf:
                raise EvaluationError(f"{name}: found {value}, needed a number of at least 0.")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was compared, as text. ``place``: where it is worst or nearest to its limit; ``detail``:
    more than a table has room for; ``better``: beyond the same limit, on the other side."""

    name: str
    was: str
    found: str
    limit: str
    passed: bool
    change: str = ""
    place: str = ""
    detail: str = ""
    better: bool = False

    @property
    def title(self) -> str:
        """Name and place."""
        return f"{self.name}: {self.place}" if self.place else self.name

    @property
    def line(self) -> str:
        """What a failure says, without a line break."""
        change = f" ({self.change})" if self.change else ""
        detail = f"; {self.detail}" if self.detail else ""
        return f"{self.title} got worse: {self.was} -> {self.found}{change}, allowed {self.limit}{detail}"


@dataclass(frozen=True, slots=True, repr=False)
class Verdict:
    """All checks of one candidate. ``notes``: what was not looked at, and what else is worth knowing."""

    candidate: str
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()

    @property
    def regressions(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if not check.passed)

    @property
    def passed(self) -> bool:
        """Whether nothing got worse."""
        return not self.regressions

    def __repr__(self) -> str:
        """How many checks failed, and what got worse."""
        worse = "".join(f"; {check.line}" for check in self.regressions)
        return f"<Verdict {self.candidate}: {len(self.regressions)} of {len(self.checks)} checks failed{worse}>"


def percent(share: float, digits: int = 1) -> str:
    """ "+4.2 %"."""
    if not math.isfinite(share):
        return "+inf %"
    return f"{100 * share:+.{digits}f} %" if abs(share) < 1e5 else f"{100 * share:+.0e} %"
