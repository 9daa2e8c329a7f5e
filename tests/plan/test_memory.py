"""The memory model: peaks that were measured, what a budget decides, the default budget in containers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantkit import plan as plan_of
from quantkit.plan.batch_sizes import expected, share_of, share_on_ranks
from quantkit.plan.hardware import DEFAULT_SHARE, Gpu, Hardware, default_budget, parse_gpu, usable_memory
from quantkit.plan.headers import SourceHeaders, headers_from_arch, read_headers
from quantkit.plan.memory import Needs, conversion_needs, evaluation_needs, least_budget
from quantkit.plan.phases import Place, phases
from quantkit.plan.plan import Plan, make_plan
from quantkit.plan.recipe import Recipe
from quantkit.plan.shapes import ModelSizes

ROOT = Path(__file__).parents[2]
V3 = ROOT / "examples" / "deepseek-v3-671b"
NANO = ROOT / "examples" / "nano-deepseek-v3"
MOE_LAYER: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "moe_layer.json").read_text())
METHODS = {
    "gptq": {"kind": "gptq", "cross": 0, "polish": 0},
    "gptq with the cross term": {"kind": "gptq", "polish": 0},
    "default: cross term and 2 rounds of polish": {"kind": "gptq"},
}
"""Of `benchmarks/moe_layer.py`."""


def v3_layer() -> SourceHeaders:
    """One MoE layer of V3, as `benchmarks/moe_layer.py` writes it."""
    headers = read_headers(V3)
    sizes = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0, "vocab_size": 1024}
    config = {**headers.config, **sizes}
    arch = type(headers.arch)(config)
    infos, stored = headers_from_arch(arch, config)
    return replace(headers, config=config, arch=arch, infos=infos, stored=stored)


def planned(headers: SourceHeaders, method: dict[str, object], tokens: int) -> Plan:
    linears = {
        "match": "role:attention|mlp|shared_expert|expert",
        "scheme": {"kind": "int", "bits": 4, "group_size": 128},
        "method": method,
    }
    recipe = Recipe.from_dict(
        {
            "version": 1,
            "calibration": {"data": ["builtin:mixed"], "tokens": tokens, "sequence_length": 2048},
            "outputs": [
                {"name": "a", "format": "compressed-tensors", "rules": [linears, {"match": "*", "keep": "source"}]}
            ],
        }
    )
    return make_plan(recipe, headers.arch, headers.infos, headers.stored)


@pytest.mark.parametrize("case", METHODS)
def test_the_model_gives_the_peaks_that_a_gpu_measured(case: str) -> None:
    headers, measured = v3_layer(), MOE_LAYER["layer"][case]
    plan = planned(headers, METHODS[case], MOE_LAYER["tokens"])
    found = expected(conversion_needs(plan, headers.arch), Hardware(2**36, parse_gpu("H100-80GB")))
    assert found.share.experts_at_once == measured["experts at once"]
    assert found.hidden_states == ("GPU",)
    assert 0.75 <= measured["peak bytes of GPU memory"] / found.gpu_bytes <= 1.05


def test_convert_takes_about_what_plan_says(tmp_path: Path) -> None:
    """A looser bound than that of `benchmarks/memory_model.py`: other versions of torch are of other sizes."""
    recipe = ROOT / "recipes" / "nano-demo.yaml"
    found = plan_of(NANO, recipe, memory_budget="1GiB").expected
    assert found is not None
    # A child's peak begins with its parent's, which has torch and other tests: so a small process stands between.
    convert = [sys.executable, "-m", "quantkit", "convert", str(NANO), "-r", str(recipe), "-o", str(tmp_path / "out")]
    between = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"
    done = subprocess.run(
        [sys.executable, "-c", between, *convert, "--memory-budget", "1GiB", "--json", "--device", "cpu"],
        capture_output=True,
        check=True,
        cwd=ROOT,
    )
    report = json.loads(done.stdout)
    assert report["peak_gpu_bytes"] is None
    assert 0.6 <= report["peak_rss_bytes"] / found.ram_bytes <= 1.15


# ------------------------------------------------------------------------------------------------ what a budget decides


@pytest.fixture(scope="module")
def v3() -> Needs:
    return needs_of("deepseek-v3-w4a16-gptq")


def needs_of(recipe: str) -> Needs:
    headers = read_headers(V3)
    plan = make_plan(Recipe.from_yaml(recipe), headers.arch, headers.infos, headers.stored)
    return conversion_needs(plan, headers.arch)


def test_a_larger_budget_takes_more_at_once_and_stays_within(v3: Needs) -> None:
    least = least_budget(v3)
    found = [expected(v3, Hardware(budget)) for budget in (least, 2 * least, 8 * least, 100 * least)]
    counts = [one.share.experts_at_once for one in found]
    assert counts == sorted(counts)
    # Five experts take no more than the largest dense linear does anyway.
    assert (counts[0], counts[-1]) == (5, 32)
    assert [one.share.limited_by for one in found[::3]] == ["the memory budget", "no gain from more"]
    assert [one.hidden_states for one in found[::3]] == [("disk",), ("RAM",)]
    for one in found:
        interpreter, *others = one.ram
        assert interpreter.what == "interpreter"
        assert sum(term.nbytes for term in others) <= one.hardware.budget


def test_the_least_budget_is_what_the_plan_states(v3: Needs) -> None:
    assert expected(v3, Hardware(least_budget(v3))).ram_bytes == v3.working_bytes
    with pytest.raises(AssertionError):
        share_of(v3, Hardware(least_budget(v3) - 1))


@pytest.mark.parametrize(("name", "ranks"), [("H200-141GB", 2), ("H200-141GB", 8), ("A100-80GB", 2)])
def test_ranks_leave_room_for_what_they_exchange(v3: Needs, name: str, ranks: int) -> None:
    """Rows of a batch's tokens, a quarter more than the mean: of two streams there and sent, and twice what is added;
    or sums that wait for the rank before. What a rank has of the hidden states still lies on its GPU."""
    hardware = Hardware(2**36, parse_gpu(name))
    alone, shared = share_of(v3, hardware), share_on_ranks(v3, hardware, ranks)
    work = v3.work
    rows = int(shared.experts_at_once * work.tokens * work.top_k / 256 * 1.25)
    left = max(6 * 2 * rows * work.hidden, (8 // ranks + 1) * 2 * 18432**2 * 4)  # the dense MLP's down
    assert work.streams == 2
    assert shared.experts_at_once == alone.experts_at_once
    assert alone.device_stores - shared.device_stores == pytest.approx(left, rel=1e-3)
    assert 2 * work.tokens // ranks * work.hidden * 4 + work.tokens // ranks * 16384 * 2 < shared.device_stores


def test_one_rank_has_the_share_of_a_process(v3: Needs) -> None:
    for hardware in (Hardware(2**36), Hardware(2**36, parse_gpu("H200-141GB"))):
        assert share_on_ranks(v3, hardware, 1) == share_of(v3, hardware)


@pytest.mark.parametrize(
    ("name", "limit", "places"),
    [
        ("H200-141GB", "1.5 GiB of rows at once", ("GPU",)),
        ("A100-40GB", "GPU memory", ("GPU",)),
        ("L4-24GB", "GPU memory", ("GPU", "RAM")),
    ],
)
def test_gpus(v3: Needs, name: str, limit: str, places: tuple[str, ...]) -> None:
    gpu = parse_gpu(name)
    found = expected(v3, Hardware(2**35, gpu))
    assert (found.share.limited_by, found.hidden_states) == (limit, places)
    assert 1 <= found.share.experts_at_once <= 13
    assert 0 < found.gpu_bytes <= gpu.nbytes


def test_without_kernels_a_gpu_computes_in_float32(v3: Needs) -> None:
    work, gpu = v3.work, parse_gpu("H100")
    widths = [Place.of(work, replace(gpu, kernels=kernels)).width for kernels in (True, False)]
    assert widths == [2, 4]
    assert Place.of(replace(work, bf16=False), gpu).width == 4


def test_a_data_free_conversion_keeps_no_hidden_states() -> None:
    work = needs_of("deepseek-v3-w4a16-rtn").work
    assert (work.tokens, work.experts, len(work.untaught)) == (0, (), 2)
    assert not any(phase.scratch for phase in phases(work, Place.of(work, None), 4, 2**26))


def test_an_evaluation_needs_more_for_more_models() -> None:
    sizes = ModelSizes.of(read_headers(NANO).arch)
    one, two = (sum(term.nbytes for term in evaluation_needs(sizes, n, (8, 512))) for n in (1, 2))
    assert one < two
    assert {term.what for term in evaluation_needs(sizes, 1, (8, 512), top=10)} > {"most likely tokens", "logits"}


# --------------------------------------------------------------------------------------------------------- this machine


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("H200-141GB", Gpu("H200-141GB", round(139.8 * 2**30))),
        ("h100", Gpu("H100-80GB", round(79.1 * 2**30))),
        ("L4-24GB", Gpu("L4-24GB", round(0.98 * 24 * 2**30))),
    ],
)
def test_gpu_names(text: str, found: Gpu) -> None:
    assert parse_gpu(text) == found


@pytest.mark.parametrize(
    ("text", "needed"),
    [("2xH100", "NAME-SIZEGB such as A100-80GB"), ("", "NAME-SIZEGB"), ("A100", "A100-40GB or A100-80GB")],
)
def test_wrong_gpu_names(text: str, needed: str) -> None:
    with pytest.raises(ValueError, match=f"needed {needed}"):
        parse_gpu(text)


def groups(root: Path, lines: str, limits: dict[str, object]) -> Path:
    """A root folder with /proc/self/cgroup and files of limits."""
    for path, text in {"proc/self/cgroup": lines, **limits}.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    return root


PHYSICAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
V2 = "0::/a/b"
V1 = "12:cpu,memory:/docker/x\n1:name=systemd:/"


@pytest.mark.parametrize(
    ("lines", "limits", "wanted"),
    [
        (V2, {"a/b/memory.max": "max", "a/memory.max": "max"}, PHYSICAL),
        (V2, {"a/b/memory.max": 2**31}, 2**31),
        (V2, {"a/b/memory.max": 2**31, "a/memory.max": 2**30}, 2**30),
        (V2, {"memory.max": 2**29}, 2**29),  # a container sees its own group as the top
        ("0::/", {"memory.max": 2**30}, 2**30),
        ("0::/../outside", {"memory.max": 2**30}, 2**30),
        (V1, {"memory/docker/x/memory.limit_in_bytes": 2**30}, 2**30),
        (V1, {"memory/docker/memory.limit_in_bytes": 2**30}, 2**30),
        (V1, {"memory/memory.limit_in_bytes": 9223372036854771712}, PHYSICAL),
        (f"{V1}\n{V2}", {"a/b/memory.max": 2**31, "memory/docker/x/memory.limit_in_bytes": 2**30}, 2**30),
        ("nonsense", {}, PHYSICAL),
        ("4:cpu:/x", {"memory/x/memory.limit_in_bytes": 2**30}, PHYSICAL),
    ],
)
def test_limits_of_control_groups(lines: str, limits: dict[str, object], wanted: int, tmp_path: Path) -> None:
    root = groups(tmp_path, lines, {f"sys/fs/cgroup/{name}": limit for name, limit in limits.items()})
    assert usable_memory(root) == wanted


def test_the_default_budget(tmp_path: Path) -> None:
    assert usable_memory(tmp_path) == PHYSICAL  # no /proc at all
    root = groups(tmp_path, V2, {"sys/fs/cgroup/a/b/memory.max": 10 * 2**30})
    if PHYSICAL >= 10 * 2**30:
        assert default_budget(root) == round(10 * DEFAULT_SHARE) * 2**30
    assert default_budget(groups(tmp_path, V2, {"sys/fs/cgroup/a/b/memory.max": 2**28})) == 2**30
