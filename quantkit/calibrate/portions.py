"""How many tokens are computed at once. Constants: sums must not depend on the machine's memory."""

from __future__ import annotations

BATCH_TOKENS = 2048
"""Tokens that go through a dense block at once, in whole rows."""

EXPERT_CHUNK = 4096
"""Tokens of one expert gathered at once."""
