"""When is a number worse than its baseline? Pairs of windows, their standard error, and the luck of a quantiser.

Two conversions by the same code but other calibration tokens differ in truth, not only in measurement. So with d the
differences of the same n windows, b the baseline's mean, and r the relative spread of a conversion's true value from
seed to seed, the difference of two clean conversions has the variance

    SE(d)^2 + 2 (r b)^2          SE(d) = std(d) / sqrt(n)

(twice, because the baseline had luck of its own). A difference beyond ``sigmas`` such deviations is a regression.
Windows of one file are taken as independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, median, stdev

_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Paired:
    """Means of the same windows, then and now, and the standard error of their difference (NaN for one window)."""

    was: float
    found: float
    standard_error: float
    windows: int

    @property
    def change(self) -> float:
        """found - was."""
        return self.found - self.was


def paired(was: Sequence[float], found: Sequence[float]) -> Paired:
    """Values of each window, in the same order."""
    differences = [after - before for before, after in zip(was, found, strict=True)]
    n = len(differences)
    error = stdev(differences) / math.sqrt(n) if n > 1 else math.nan
    return Paired(fmean(was), fmean(found), error, n)


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
    error = 0.0 if pair.standard_error == 0 else student(sigmas, pair.windows) * pair.standard_error
    return math.hypot(error, math.sqrt(2) * sigmas * spread)


def robust_spread(values: Sequence[float]) -> float:
    """Standard deviation of the bulk of the values: 1.4826 times the median distance from the median."""
    middle = median(values)
    return 1.4826 * median(abs(value - middle) for value in values)
