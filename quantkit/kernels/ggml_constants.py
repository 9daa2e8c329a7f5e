"""What the compiled searches for scales of ggml's block types and their torch twin have in common."""

from __future__ import annotations

HALF_MAX = 65504.0
HALF_TINY = 2.0**-24
"""The smallest float16."""
NEIGHBOUR = 1.001 * 2.0**-11
"""A float16 grown by this share is rounded to the next one."""
RANGES = {
    2: (0.4, 1.1, 12),
    3: (0.35, 1.4, 14),
    4: (0.5, 1.3, 20),
    5: (0.7, 1.3, 24),
    6: (0.85, 1.35, 18),
    8: (0.9, 1.2, 12),
}
"""Ranges tried, by bits of a code: least and greatest share of the group's own range, and how many. Beyond 1 no weight
takes the outermost levels, but those that matter may lie nearer to their levels."""
REFINED = 4
"""Ranges tried between the best one and its neighbours, in blocks of one group without offset."""
TIE = 1e-9
"""Errors that differ by less than this share of a group's energy count as equal: the first range wins, in all groups
alike, and their scales fit together."""
UNITS = 15
"""How many integers the largest scale of a block may become, from each end."""
NEAR, WIDE = 1, 4
"""How far from scale / d the integer of a group is looked for: on each d, and at last on the best."""
PAIRS = ((0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2), (2, 1), (3, 3))
"""Which d and dmin are tried together: 0 to 2 the best three, 3 the smallest."""
ENDS = 8
"""How many of the highest levels the largest weight of a block of its own scale and offset is tried on."""
POWERS = (-3, -2, -4, -5)
"""MXFP4: exponents tried, beside the power of two just above the largest weight."""
