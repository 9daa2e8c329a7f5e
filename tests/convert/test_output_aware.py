"""Output-aware conversions: which output Hessian each linear is given, what is reported, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.arch.base import Block, DenseBlock, ExpertBlock
from quantkit.convert.fingerprint import pass_sha256
from quantkit.convert.output_hessians import SHRINK, LayerGradients, SublayerHessians
from quantkit.documents.sensitivity import read_sensitivity
from quantkit.errors import OutputError, QuantkitError
from quantkit.formats import open_source
from quantkit.plan.headers import headers_of
from quantkit.plan.recipe import Recipe
from quantkit.quantizers.ldlq.two_sided import DAMPING, OutputFactor
from quantkit.sensitivity.moments import head_blocks
from quantkit.sensitivity.open import open_sensitivity
from tests.convert.jobs import LINEARS, int4, recipe_of, run, shards_of, small_config, write_model
from tests.convert.test_resume_refused import Stop, stop_after
from tests.sensitivity.passes import fisher_pass, new_store

CPU = torch.device("cpu")
MOE_LAYER = 1
FISHER_TOKENS = 6 * 32


@pytest.fixture(scope="module")
def fisher(place: Path) -> Path:
    """A Fisher pass of the checkpoint, "fisher" beside it."""
    tokens = torch.randint(4, 260, (6, 32), generator=torch.Generator().manual_seed(0))
    fisher_pass(place / "model", place / "fisher", tokens)
    return place / "fisher"


@contextmanager
def sublayer(place: Path, fisher: Path, number: int) -> Iterator[tuple[SublayerHessians, list[Block]]]:
    """A sublayer of the MoE layer, and its blocks."""
    with open_source(place / "model") as source:
        arch = headers_of(source).arch
        weights = lambda name: source.read(name).float()  # noqa: E731
        found = open_sensitivity(fisher, source, arch)
        opened = partial(found.sublayer, MOE_LAYER, weights=weights, new_store=new_store, device=CPU)
        with LayerGradients(opened, head_blocks(arch), arch.parts()).sublayer(number) as hessians:
            yield hessians, list(arch.sublayers(MOE_LAYER)[number])


def shrunk(gradients: list[Tensor], blocks: int = 1, tokens: int | None = None) -> Tensor:
    """Sum of g g^T in float64, its off-diagonal weakened as for moments of so many blocks, and so many tokens."""
    g = torch.cat(gradients).double()
    count = tokens or len(g)
    whole, k = g.T @ g, SHRINK * g.shape[1] / blocks
    diagonal = torch.diag(whole.diagonal())
    return diagonal + (whole - diagonal) * count / (count + k)


def check(found: OutputFactor, place: tuple[int, int], expected: Tensor, mean: float) -> None:
    """R D R^T of one block is ``expected`` over the ``mean`` of the matrix's diagonal, damped, but for float32 sums."""
    layout, lower, pivots = (values[place] for values in (found.layout, found.lower, found.pivots))
    unit = lower.double().tril()
    back = layout.argsort()
    rebuilt = ((unit * pivots.double()) @ unit.T)[back][:, back]
    wanted = expected / mean
    wanted = wanted + DAMPING * wanted.diagonal().mean() * torch.eye(len(wanted), dtype=torch.float64)
    assert float((rebuilt - wanted).abs().max()) < 1e-4 * float(wanted.diagonal().max())


def aware(match: str = LINEARS, **options: Any) -> dict[str, Any]:
    return int4(match, output_aware=True, **options)


def test_attention_has_one_for_each_linear_by_heads_and_by_parts(place: Path, fisher: Path) -> None:
    with sublayer(place, fisher, 0) as (hessians, blocks):
        (block,) = blocks
        assert isinstance(block, DenseBlock)
        found = hessians.of_dense(block, [*block.linears, *{part.whole for part in hessians.parts.values()}])
        gradients: dict[str, list[Tensor]] = {}
        for name, values in hessians.gradients.dense(block):
            gradients.setdefault(name, []).append(values)
    config = small_config()
    heads, nope, v = config["num_attention_heads"], config["qk_nope_head_dim"], config["v_head_dim"]
    for name, own in gradients.items():
        n = found[name].lower.shape[1]
        whole = shrunk(own, n)
        mean = float(whole.diagonal().mean())
        height = len(whole) // n
        assert n == (heads if "q_b" in name or "kv_b" in name else 1)
        for head in range(n):
            rows = slice(head * height, (head + 1) * height)
            check(found[name], (0, head), whole[rows, rows], mean)
        if "kv_b" in name:
            assert f"{name}:k" not in found
            own_rows = torch.cat([torch.arange(nope, nope + v) + head * (nope + v) for head in range(heads)])
            mean = float(whole.diagonal()[own_rows].mean())
            for head, rows in enumerate(own_rows.view(heads, v)):
                check(found[f"{name}:v"], (0, head), whole[rows][:, rows], mean)
    assert len(gradients) == 5


def test_only_what_is_wanted_is_made(place: Path, fisher: Path) -> None:
    """A part of a linear takes the moments of the whole, whose own factor is not made."""
    with sublayer(place, fisher, 0) as (hessians, blocks):
        (block,) = blocks
        assert isinstance(block, DenseBlock)
        part = next(name for name in hessians.parts if name in block.linears and name.endswith(":v"))
        for wanted in ([part], [block.output], [part, block.output]):
            assert list(hessians.of_dense(block, wanted)) == wanted


def test_experts_have_their_own_gate_and_up_and_share_the_down(place: Path, fisher: Path) -> None:
    with sublayer(place, fisher, 1) as (hessians, blocks):
        block = next(block for block in blocks if isinstance(block, ExpertBlock))
        found = hessians.of_experts(block)
        weights = {name: found.gradients.weights(name) for name in block.linears}
        gate, up = found.of_gate_up((1, 3), weights)
        gradients: dict[str, list[Tensor]] = {}
        for expert in range(block.n_experts):
            for name, values in found.gradients.named(expert):
                gradients.setdefault(name, []).append(values)
        down = found.down
        found.close()
    expected = shrunk([g for name in block.downs for g in gradients[name]], tokens=FISHER_TOKENS)
    check(down, (0, 0), expected, float(expected.diagonal().mean()))
    for made, names in ((gate, block.gates), (up, block.ups)):
        for number, expert in enumerate((1, 3)):
            expected = shrunk(gradients[names[expert]])
            check(made, (number, 0), expected, float(expected.diagonal().mean()))


def test_the_loss_that_was_lowered_is_recorded_and_the_bytes_repeat(place: Path, fisher: Path, tmp_path: Path) -> None:
    plain, asked = recipe_of(int4()), recipe_of(aware(), sensitivity=fisher.name)
    run(place / "model", plain, tmp_path / "plain")
    run(place / "model", recipe_of(int4(), sensitivity=fisher.name), tmp_path / "unasked")
    run(place / "model", asked, tmp_path / "aware")
    run(place / "model", asked, tmp_path / "again")
    made = [shards_of(tmp_path / name) for name in ("plain", "unasked", "aware", "again")]
    assert made[0] == made[1]
    assert made[0] != made[2]
    assert made[2] == made[3]
    documents = [json.loads((tmp_path / name / "quantkit.json").read_text()) for name in ("plain", "aware")]
    assert documents[0]["job"]["sensitivity"] is None
    assert len(documents[1]["job"]["sensitivity"]) == 64
    assert not any("output_loss" in linear for linear in documents[0]["tensors"].values())
    taught = {name: linear for name, linear in documents[1]["tensors"].items() if "layers.2." not in name}
    assert len(taught) > 20
    assert all(0 < linear["output_loss"] < 1 for linear in taught.values())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_stopped_job_goes_on_with_the_same_pass_only(place: Path, tmp_path: Path) -> None:
    tokens = torch.randint(4, 260, (2, 16), generator=torch.Generator().manual_seed(1))
    recipe = recipe_of(aware(), sensitivity=str(tmp_path / "felt"))
    fisher_pass(place / "model", tmp_path / "felt", tokens)
    with pytest.raises(Stop):
        run(place / "model", recipe, tmp_path / "out", on_event=stop_after(0))
    fisher_pass(place / "model", tmp_path / "felt", tokens + 1, restart=True)
    with pytest.raises(OutputError, match=r"an unfinished job that differs from this one: sensitivity\."):
        run(place / "model", recipe, tmp_path / "out")
    fisher_pass(place / "model", tmp_path / "felt", tokens, restart=True)
    assert run(place / "model", recipe, tmp_path / "out").resumed
    run(place / "model", recipe, tmp_path / "unbroken")
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "unbroken")


def test_losses_that_a_later_plan_adds_are_no_other_pass(fisher: Path) -> None:
    document = read_sensitivity(fisher)
    more = document.model_copy(update={"losses": {"a.weight": {"int4 g32": 0.5}}})
    other = document.model_copy(update={"job": document.job.model_copy(update={"seed": 9})})
    assert pass_sha256(more) == pass_sha256(document) != pass_sha256(other)


def test_a_recipe_without_gradients_is_refused() -> None:
    with pytest.raises(ValueError, match="found output_aware, needed sensitivity: FOLDER"):
        recipe_of(aware())
    with pytest.raises(ValueError, match="found output_aware in a data-free recipe, needed calibration"):
        recipe_of(aware(), tokens=None, sensitivity="fisher")
    after = {"kind": "awq", "then": {"kind": "gptq", "output_aware": True}}
    rule = {"match": LINEARS, "scheme": {"kind": "int", "bits": 4, "group_size": 64}, "method": after}
    with pytest.raises(ValueError, match="found output_aware after awq"):
        recipe_of(rule, sensitivity="fisher")


@pytest.mark.parametrize(
    ("folder", "message"),
    [("nowhere", "nowhere: holds no sensitivity.json"), ("other", "is of another checkpoint"), ("cut", "layer-00001")],
)
def test_a_pass_that_does_not_fit_is_refused_before_the_work(
    place: Path, fisher: Path, tmp_path: Path, folder: str, message: str
) -> None:
    if folder == "other":
        write_model(tmp_path / "model2")
        fisher_pass(tmp_path / "model2", tmp_path / "other", torch.randint(4, 260, (2, 8)))
    if folder == "cut":
        (tmp_path / "cut").mkdir()
        for path in fisher.iterdir():
            if path.name != "layer-00001.safetensors":
                (tmp_path / "cut" / path.name).symlink_to(path)
    recipe: Recipe = recipe_of(aware(), sensitivity=str(tmp_path / folder))
    with pytest.raises(QuantkitError, match=message):
        run(place / "model", recipe, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
