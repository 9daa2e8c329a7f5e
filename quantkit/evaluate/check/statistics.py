"""When is a number worse than its baseline? Pairs of windows, their standard error, and how far conversions differ by
chance.

Two conversions by the same code but other calibration tokens differ in truth, not only in measurement. So with d the
differences of the same n windows, b the baseline's mean, and r the relative spread of a conversion's true value from
seed to seed, the difference of two clean conversions has the variance

    SE(d)^2 + 2 (r b)^2          SE(d) = std(d) / sqrt(n)

(twice, because the baseline differs by chance, too). A difference beyond ``sigmas`` such deviations is a regression.
Windows of one file are taken as independent.

A bug widens the scatter of the pairs, too, and most where it hits a few windows only: that must not excuse it. So
SE(d) counts up to the baseline's own standard error over windows. Clean conversions stay far below: for them
var(d) = 2 var(b) (1 - correlation), and they find the same windows hard, with correlations near one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Paired:
    """Means of the same windows, then and now, the standard error of their difference (NaN for one window), and the
    baseline's own."""

    was: float
    found: float
    standard_error: float
    own_error: float
    windows: int

    @property
    def change(self) -> float:
        """found - was."""
        return self.found - self.was


def paired(was: Sequence[float], found: Sequence[float]) -> Paired:
    """Values of each window, in the same order."""
    differences = [after - before for before, after in zip(was, found, strict=True)]
    return Paired(_mean(was), _mean(found), _standard_error(differences), _standard_error(was), len(differences))


def of_limit(change: float, limit: float) -> float:
    """The change as a multiple of its limit, to rank checks: above 1 is worse than allowed; NaN ranks worst."""
    if not change <= limit:
        return change / limit if limit > 0 and math.isfinite(change) else math.inf
    return change / limit if limit > 0 else 0.0


def _mean(values: Sequence[float]) -> float:
    """Mean of numbers, infinity and NaN among them, which the module `statistics` refuses."""
    return sum(values) / len(values)


def _standard_error(values: Sequence[float]) -> float:
    n, mean = len(values), _mean(values)
    # A product becomes infinite where a power raises.
    return math.sqrt(sum((value - mean) * (value - mean) for value in values) / (n - 1) / n) if n > 1 else math.nan


def of_many(sigmas: float, comparisons: int) -> float:
    """Sigmas for each of several comparisons, so that one of them exceeds its limit by chance no more often than one
    comparison would exceed ``sigmas`` (Bonferroni, one-sided)."""
    tail = _NORMAL.cdf(-sigmas) / max(comparisons, 1)
    # Below the smallest float, where no inverse exists, the tail's leading term does.
    return -_NORMAL.inv_cdf(tail) if tail > 1e-300 else math.sqrt(sigmas**2 + 2 * math.log(max(comparisons, 1)))


def student(sigmas: float, windows: int) -> float:
    """The quantile of Student's t that is as rare as ``sigmas`` of a normal, for a standard error from so many windows.

    Wallace 1959, doi 10.1214/aoms/1177706095, solved for t: at four sigmas within 2 % from eight windows on, for
    fewer too large.
    """
    if windows < 2:
        return math.inf
    freedom = windows - 1
    exponent = (sigmas * (8 * freedom + 3) / (8 * freedom + 1)) ** 2 / freedom
    return math.sqrt(freedom * math.expm1(exponent)) if exponent < 700 else math.inf


def allowed(pair: Paired, sigmas: float, spread: float) -> float:
    """How far the mean may move. ``spread``: from seed to seed, absolute, of one conversion's true mean."""
    scatter = min(pair.standard_error, pair.own_error)
    error = student(sigmas, pair.windows) * scatter if scatter else 0.0
    return math.hypot(error, math.sqrt(2) * sigmas * spread)
