"""Puts the sha256 of every file that the package index has of each pinned version into requirements.lock.

    python tools/lock_hashes.py     after a change of a version or of a line; needs uv (pip install uv)

All wheels of all platforms count, and the source archives, so that the same file serves every Python from 3.10 on.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

LOCK = Path(__file__).resolve().parents[1] / "requirements.lock"
OLDEST_PYTHON = "3.10"


def main() -> None:
    lines = LOCK.read_text(encoding="utf-8").splitlines()
    head = [line for line in lines if line.startswith("#")]
    pins = [line.rstrip(" \\") for line in lines if "==" in line.split(";")[0]]
    found = subprocess.run(
        ["uv", "pip", "compile", "-", "--universal", "--python-version", OLDEST_PYTHON]
        + ["--no-deps", "--generate-hashes", "--no-header", "--no-annotate", "--quiet"],
        input="\n".join(pins),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    LOCK.write_text("\n".join([*head, found.stdout]), encoding="utf-8")


if __name__ == "__main__":
    main()
