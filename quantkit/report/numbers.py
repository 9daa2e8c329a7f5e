"""Numbers -> text for people."""

from __future__ import annotations

import math

from quantkit.documents.values import Mean

GB, GIB = 1e9, 2**30


def size(nbytes: int) -> str:
    """ "348.91 GB", "8.08 MB", "12.3 kB", "96 B"."""
    for unit, name, digits in ((GB, "GB", 2), (1e6, "MB", 2), (1e3, "kB", 1)):
        if nbytes >= unit:
            return f"{nbytes / unit:.{digits}f} {name}"
    return f"{nbytes} B"


def binary_size(nbytes: int) -> str:
    """ "324.95 GiB", below 1 GB "7.70 MiB"."""
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GB else f"{nbytes / 2**20:.2f} MiB"


def parts(shown: str) -> tuple[str, str]:
    """ "0.0143 ± 0.0011" -> ("0.0143", "± 0.0011"); "92.65 ± 0.34 %" -> ("92.65 %", "± 0.34")."""
    value, sign, rest = shown.partition(" ± ")
    if not sign:
        return shown, ""
    unit = " %" if rest.endswith(" %") else ""
    return value + unit, f"± {rest.removesuffix(unit)}"


def decimals(value: float, significant: int) -> int:
    """Digits after the point that show so many significant ones, at most 9."""
    if not math.isfinite(value) or value == 0:
        return significant
    return min(9, max(0, significant - 1 - math.floor(math.log10(abs(value)))))


def number(value: float, significant: int = 3) -> str:
    """ "0.0143", "1,234"; "–" for what is unknown."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "infinite"
    return f"{value:,.{decimals(value, significant)}f}".replace("-", "−")


def estimate(value: Mean, significant: int = 2) -> str:
    """ "0.0143 ± 0.0011": as many digits as the error has that are worth something."""
    error = value.standard_error
    if not math.isfinite(error) or error <= 0 or not math.isfinite(value.mean):
        return number(value.mean, 4)
    digits = decimals(error, significant)
    return f"{value.mean:,.{digits}f} ± {error:.{digits}f}".replace("-", "−")


def percentage(value: float, significant: int = 3) -> str:
    """ "0.0143 %" of 0.000143."""
    return f"{number(100 * value, significant)} %" if math.isfinite(value) else "–"


def percentage_estimate(value: Mean, *, signed: bool = False) -> str:
    """ "92.65 ± 0.34 %", signed "+0.98 ± 0.18 %"."""
    text = estimate(Mean(mean=100 * value.mean, standard_error=100 * value.standard_error))
    return f"{'+' if signed and value.mean > 0 else ''}{text} %"


def counted(amount: int, thing: str) -> str:
    """ "1 expert", "12 experts"."""
    return f"{amount:,} {thing}" + ("" if amount == 1 else "s")
