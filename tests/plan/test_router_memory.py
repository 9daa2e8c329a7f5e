"""What a plan counts for routers that are moved by least squares: a second stream, sums and a solution."""

from __future__ import annotations

from typing import Any

import pytest

from quantkit.arch import arch_of
from quantkit.plan.memory import conversion_phases
from quantkit.plan.phases import Place
from quantkit.plan.plan import Plan, make_plan
from quantkit.plan.recipe import Recipe
from quantkit.plan.shapes import Work
from quantkit.tensors import TensorInfo
from tests.convert.jobs import int4, recipe_of, small_config


def planned(config: dict[str, Any], kind: str = "gptq", **changes: Any) -> Plan:
    recipe: Recipe = recipe_of(int4(kind=kind), **changes)
    arch = arch_of(config)
    infos = {spec.name: TensorInfo(spec.name, spec.shape, "F32" if spec.float32 else "BF16") for spec in arch.tensors()}
    return make_plan(recipe, arch, infos, {})


@pytest.mark.parametrize("kind", ["gptq", "rtn"])
def test_the_second_stream_and_the_solution_are_counted(kind: str) -> None:
    config = small_config()
    plain, fitted = (planned(config, kind, router=router) for router in ("keep", "least_squares"))
    assert plain.follows_original == (kind == "gptq")
    assert fitted.follows_original
    arch, hidden = arch_of(config), config["hidden_size"]
    works = [Work.of(plan, arch) for plan in (plain, fitted)]
    place = Place.of(works[0], None)
    found = [{phase.what: phase for phase in conversion_phases(work, place, 2, 10**6)} for work in works]
    assert set(found[1]) - set(found[0]) == {"router by least squares"}
    solving = hidden**2 * (2 * 4 + 3 * 8)
    tokens = min(works[1].tokens, 2048)
    assert found[1]["router by least squares"].nbytes == solving + 4 * tokens * hidden * 4
