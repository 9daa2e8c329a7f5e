"""The tokens that experts borrow, where scores are equal too."""

from __future__ import annotations

import pytest
import torch

from quantkit.calibrate.stream import ExpertTokens
from quantkit.convert.routing import _Nearest

TOKENS, EXPERTS = 60, 5


@pytest.mark.parametrize("levels", [2, 3, 1000])
@pytest.mark.parametrize("batch", [1, 7, 60])
@pytest.mark.parametrize("keep", [0, 4, 25, 100])
def test_the_nearest_that_did_not_choose_the_expert_whatever_the_batches(levels: int, batch: int, keep: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    scores = torch.randint(-levels, levels, (TOKENS, EXPERTS), generator=generator) / 7.0
    scores[3], scores[4] = 0.0, -0.0
    chosen = scores.topk(2, dim=1).indices
    tokens = ExpertTokens.of(chosen, torch.ones(chosen.shape), EXPERTS)
    nearest = _Nearest(EXPERTS, keep, scores.device)
    for start in range(0, TOKENS, batch):
        nearest.add(start, scores[start : start + batch], chosen[start : start + batch])
    for expert, found in enumerate(nearest.missing(tokens, keep)):
        others = [token for token in range(TOKENS) if expert not in chosen[token].tolist()]
        # -0 is below 0: any order of theirs will do, if it is always the same.
        others.sort(key=lambda token: (-float(scores[token, expert]), bool(scores[token, expert].signbit()), token))
        assert found.tolist() == sorted(others[: max(0, keep - tokens.count(expert))])
