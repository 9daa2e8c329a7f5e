"""Routers by least squares: against float64 solutions over what transformers' models read, in every output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.calibrate.dataset import Calibration, token_rows
from quantkit.calibrate.inputs import InputMoments, InputStats
from quantkit.convert.routers import DAMPING, least_squares
from quantkit.errors import CalibrationError, PlanError
from quantkit.plan.recipe import Recipe
from tests.convert.jobs import LINEARS, decoded, int4, recipe_of, run, shards_of, small_config, write_model, write_text
from tests.convert.test_resume_refused import Stop, stop_after
from tests.oracles.gguf_reader import read_weights
from tests.tiny_models import write_shards

transformers = pytest.importorskip("transformers")

FITTED = {"router": "least_squares"}
ROUTERS = [f"model.layers.{layer}.mlp.gate.weight" for layer in (1, 2)]
DROP_MTP = {"match": "role:mtp", "drop": True}
CPU = torch.device("cpu")


def solved(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The W' nearest to W that takes x (n, in) where W takes y, the pull to W as strong as the damping: float64."""
    x, y, weight = x.double(), y.double(), weight.double()
    pull = (DAMPING * x.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1], dtype=torch.float64)
    wanted = torch.cat([(y - x) @ weight.T, torch.zeros(x.shape[1], len(weight), dtype=torch.float64)])
    return weight + torch.linalg.lstsq(torch.cat([x, pull]), wanted).solution.T


def moments(x: Tensor, y: Tensor) -> InputStats:
    sums = InputMoments(x.shape[1], cross=True, device=CPU)
    sums.add(x, y)
    stats = sums.stats()
    assert isinstance(stats, InputStats)
    return stats


def test_the_weight_is_the_damped_solution_of_least_squares() -> None:
    random = torch.Generator().manual_seed(3)
    x = torch.randn(300, 48, generator=random) * torch.linspace(0.1, 3, 48)
    y = x + 0.2 * x.roll(1, 1) + 0.1 * torch.randn(300, 48, generator=random)
    weight = torch.randn(12, 48, generator=random)
    found, expected = least_squares(weight, moments(x, y)), solved(weight, x, y)
    assert float((found - expected).norm() / (expected - weight).norm()) < 1e-5
    before, after = ((y @ weight.T - x @ w.float().T).square().mean() for w in (weight, found))
    assert float(after) < 0.3 * float(before)


def test_inputs_without_any_signal_change_nothing_and_broken_ones_are_refused() -> None:
    weight, nothing = torch.randn(4, 8), torch.zeros(5, 8)
    assert torch.equal(least_squares(weight, moments(nothing, nothing)), weight)
    with pytest.raises(CalibrationError, match="overflow or are not numbers"):
        least_squares(weight, moments(nothing + torch.nan, nothing))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with two layers of experts whose routers are float32, and the texts."""
    folder = tmp_path_factory.mktemp("routers")
    write_text(folder / "calibration.txt")
    write_text(folder / "eval.txt", 200)
    write_model(folder / "model", small_config(num_hidden_layers=3), dtype=torch.float32)
    return folder


def fitted(*rules: dict[str, Any], **changes: Any) -> Recipe:
    return recipe_of(*(rules or (int4(),)), DROP_MTP, **{**FITTED, **changes})


def read_by_routers(folder: Path, tokens: Tensor) -> dict[str, Tensor]:
    """What each router of transformers' model reads: name -> (tokens, hidden)."""
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    found: dict[str, Tensor] = {}
    for name in ROUTERS:
        gate = model.get_submodule(name.removesuffix(".weight"))
        keep = lambda module, given, name=name: found.update({name: given[0].flatten(0, -2)})  # noqa: E731
        gate.register_forward_pre_hook(keep)
    with torch.inference_mode():
        model(tokens)
    return found


def as_plain(place: Path, made: Path, folder: Path) -> Path:
    """A finished output as a checkpoint of floats."""
    write_shards(folder, decoded(made))
    (folder / "config.json").write_text((place / "model" / "config.json").read_text())
    return folder


def test_stored_routers_are_the_solutions_over_what_transformers_reads(place: Path, tmp_path: Path) -> None:
    recipe = fitted()
    run(place / "model", recipe, tmp_path / "out")
    assert recipe.calibration is not None
    settings: Calibration = recipe.calibration
    tokens = torch.from_numpy(token_rows(settings, place / "model", place).tokens).long()
    made = as_plain(place, tmp_path / "out", tmp_path / "plain")
    x, y = (read_by_routers(folder, tokens) for folder in (made, place / "model"))
    originals, stored = decoded_source(place), decoded(tmp_path / "out")
    for name in ROUTERS:
        expected = solved(originals[name], x[name], y[name])
        moved = (expected - originals[name]).norm()
        assert float(moved / originals[name].norm()) > 1e-3
        assert float((stored[name] - expected).norm() / moved) < 1e-2, name
        wanted = y[name] @ originals[name].T
        logits = [x[name] @ router.T for router in (originals[name], stored[name])]
        before, after = ((one - wanted).square().mean() for one in logits)
        assert after < before


def decoded_source(place: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {k: v for file in (place / "model").glob("*.safetensors") for k, v in load_file(file).items()}


def test_every_output_stores_the_same_routers(place: Path, tmp_path: Path) -> None:
    awq = {**int4(), "method": {"kind": "awq"}}
    run(place / "model", fitted(others={"awq": [awq, DROP_MTP]}), tmp_path / "two")
    run(place / "model", fitted(), tmp_path / "one")
    assert shards_of(tmp_path / "two" / "main") == shards_of(tmp_path / "one")
    own, folded = decoded(tmp_path / "one"), decoded(tmp_path / "two" / "awq")
    for name in ROUTERS:
        norm = name.replace("mlp.gate", "post_attention_layernorm")
        assert not torch.equal(folded[norm], own[norm])
        torch.testing.assert_close(folded[name] * folded[norm], own[name] * own[norm], rtol=1e-5, atol=1e-6)


def test_a_gguf_beside_the_folder_has_them_too(place: Path, tmp_path: Path) -> None:
    recipe = fitted()
    gguf = {
        "name": "gguf",
        "format": "gguf",
        "rules": [{"match": LINEARS, "scheme": "Q8_0"}, {"match": "*", "keep": "f32"}],
    }
    values = recipe.model_dump(mode="json", exclude_none=True)
    both = Recipe.from_dict({**values, "outputs": [*values["outputs"], gguf]})
    run(place / "model", both, tmp_path / "both")
    (file,) = (path for path in (tmp_path / "both" / "gguf").glob("*.gguf") if path.name != "imatrix.gguf")
    own = decoded(tmp_path / "both" / "main")
    stored = read_weights(file)
    for name in ROUTERS:
        assert torch.equal(torch.as_tensor(stored[name]), own[name])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_stopped_job_gives_the_same_bytes(place: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run(place / "model", fitted(), tmp_path / "out", on_event=stop_after(1))
    assert run(place / "model", fitted(), tmp_path / "out").resumed
    run(place / "model", fitted(), tmp_path / "unbroken")
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "unbroken")


def test_a_method_that_follows_one_stream_gets_the_other_for_the_routers(place: Path, tmp_path: Path) -> None:
    run(place / "model", fitted(int4(kind="rtn")), tmp_path / "out")
    assert not torch.equal(decoded(tmp_path / "out")[ROUTERS[0]], decoded_source(place)[ROUTERS[0]])


def test_what_cannot_be_fitted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found router: least_squares in a data-free recipe, needed calibration"):
        fitted(int4(kind="rtn"), tokens=None)
    with pytest.raises(ValueError, match="found router: least_squares and propagate: original"):
        fitted(propagate="original")
    write_text(tmp_path / "calibration.txt")
    write_model(tmp_path / "dense", small_config(first_k_dense_replace=2, num_nextn_predict_layers=0))
    with pytest.raises(PlanError, match="router: least_squares.*has no router"):
        run(tmp_path / "dense", recipe_of(int4(), **FITTED), tmp_path / "out")
