"""Generated documents are what the code says now."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


def test_generated_documents_are_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("docs_reference", ROOT / "tools" / "docs_reference.py")
    assert spec is not None
    assert spec.loader is not None
    docs_reference: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docs_reference)
    assert docs_reference.outdated() == [], "run python tools/docs_reference.py"
