"""Losses of types against plain arithmetic, and recipes with targets from a real pass to real files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit import choose_types, convert
from quantkit.documents.sensitivity import SENSITIVITY, SensitivityDocument, read_sensitivity
from quantkit.errors import OutputError, PlanError, QuantkitError, RecipeError, SourceError
from quantkit.formats import open_source
from quantkit.plan.headers import headers_of
from quantkit.plan.recipe import Recipe
from quantkit.quantizers import Rtn
from quantkit.quantizers.rtn import floored
from quantkit.schemes import ChosenScheme, GgmlScheme, IntScheme
from quantkit.sensitivity import losses
from quantkit.sensitivity.events import LossesLayer
from quantkit.sensitivity.open import open_sensitivity
from tests.oracles import fisher as oracle
from tests.sensitivity.passes import PROCESSOR, SEED, fisher_pass
from tests.tiny_models import tiny_config, write_checkpoint

NANO = Path(__file__).resolve().parents[2] / "examples" / "nano-deepseek-v3"
INT4 = IntScheme.model_validate({"bits": 4, "group_size": 32})
Q5 = GgmlScheme.model_validate({"type": "Q5_0"})

TOKENS = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(1))
KV = "model.layers.1.self_attn.kv_b_proj.weight"
WANTED: dict[str, dict[str, ChosenScheme]] = {
    name: {scheme.label: scheme for scheme in (INT4, Q5)}
    for name in (
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.self_attn.q_a_proj.weight",
        "model.layers.1.mlp.experts.3.gate_proj.weight",
        "model.layers.2.mlp.experts.5.down_proj.weight",
        "model.layers.2.mlp.shared_experts.up_proj.weight",
        f"{KV}:k",
        f"{KV}:v",
    )
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_checkpoint(folder, tiny_config(num_nextn_predict_layers=0), seed=0)
    return folder


@pytest.fixture(scope="module")
def felt(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pass") / "felt"
    fisher_pass(source, folder, TOKENS)
    return folder


def measured(source: Path, felt: Path) -> dict[str, dict[str, float]]:
    told: list[tuple[int, int]] = []
    kept: list[SensitivityDocument] = []
    with open_source(source) as opened:
        found = open_sensitivity(felt, opened, headers_of(opened).arch)
        document = losses.measure_losses(found, opened, PROCESSOR, WANTED, kept.append, lambda *done: told.append(done))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert document.losses is not None
    assert [len(one.losses or {}) for one in kept] == [1, 5, 7]
    return document.losses


def rounding_error(weight: Tensor, x: Tensor, scheme: ChosenScheme, *, weighted: bool = True) -> Tensor:
    importance = floored(x.square().mean(0, keepdim=True)).expand(len(weight), -1) if weighted else None
    return Rtn.model_validate({}).quantize(weight, scheme, importance).decode() - weight


def test_losses_are_those_of_the_whole_model(source: Path, felt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(losses, "ROWS", 10**6)
    found = measured(source, felt)
    whole = oracle.fisher(source, TOKENS, SEED)
    with open_source(source) as opened:
        parts = headers_of(opened).arch.parts()
        for name, schemes in WANTED.items():
            own, part = name.partition(":")[0], parts.get(name)
            weight, x, g = opened.read(own).float(), whole.inputs[own], whole.outputs[own]
            scalar = float(g.square().mean(1).sum())
            for label, scheme in schemes.items():
                if part is None:
                    error = rounding_error(weight.unsqueeze(0), x, scheme)[0]
                else:
                    error = torch.zeros_like(weight)
                    own_weight = part.take(weight).contiguous()
                    part.put(error, rounding_error(own_weight, x, scheme, weighted=name.endswith(":v")))
                hessian = x.T @ x / len(x)
                expected = scalar / (2 * 4 * 64) * float((error @ hessian * error).sum())
                assert found[name][label] == pytest.approx(expected, rel=2e-2), (name, label)


def test_a_sample_of_rows_is_near_all(source: Path, felt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = measured(source, felt)
    monkeypatch.setattr(losses, "ROWS", 10**6)
    for name, own in measured(source, felt).items():
        for label, loss in own.items():
            assert some[name][label] == pytest.approx(loss, rel=0.2)


# ------------------------------------------------------------------------------------------------- from pass to files


def recipe(folder: Path, *outputs: dict[str, Any]) -> Recipe:
    text = {"data": ["builtin:mixed"], "tokens": 2048, "sequence_length": 256}
    return Recipe.from_dict({"version": 1, "calibration": text, "sensitivity": str(folder), "outputs": list(outputs)})


def output(form: str, **target: object) -> dict[str, Any]:
    return {"name": form, "format": form, "target": target, "method": {"kind": "rtn"}}


@pytest.fixture(scope="module")
def nano_felt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano") / "felt"
    fisher_pass(NANO, folder, torch.randint(0, 1000, (4, 64), generator=torch.Generator().manual_seed(0)))
    return folder


def test_files_keep_the_size_and_losses_are_measured_once(nano_felt: Path, tmp_path: Path) -> None:
    asked = recipe(nano_felt, output("gguf", size=5_000_000), output("compressed-tensors", size="5.6MB"))
    events: list[object] = []
    report = convert(NANO, asked, tmp_path / "out", device="cpu", on_event=events.append)
    assert [event.done for event in events if isinstance(event, LossesLayer)] == [0, 1, 2, 3]
    for folder, most in (("gguf", 5_000_000), ("compressed-tensors", 5_600_000)):
        files = [file for file in (tmp_path / "out" / folder).iterdir() if is_weights(file)]
        size = sum(file.stat().st_size for file in files)
        assert most - 200_000 < size <= most
    assert len(report.outputs) == 2

    before = (nano_felt / SENSITIVITY).read_bytes()
    settled = choose_types(NANO, asked, on_event=pytest.fail)
    assert all(made.target is None and made.rules and made.predicted_kl for made in settled.outputs)
    assert choose_types(NANO, settled) == settled
    assert (nano_felt / SENSITIVITY).read_bytes() == before
    assert read_sensitivity(nano_felt).losses


WIDER = ["Q2_K", "IQ3_XXS", "Q3_K", "IQ3_S", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0"]
"""What is chosen among without IQ2."""


@pytest.mark.slow
def test_iq2_reaches_smaller_sizes_and_never_loses_more(nano_felt: Path, tmp_path: Path) -> None:
    tables = {"rules": [{"match": "role:embed|lm_head", "scheme": "Q4_K"}]}
    small = recipe(nano_felt, {**output("gguf", size=2_300_000), **tables})
    with pytest.raises(PlanError, match="the smallest choice of types takes"):
        choose_types(NANO, recipe(nano_felt, {**output("gguf", size=2_300_000, types=WIDER), **tables}), device="cpu")
    (made,) = choose_types(NANO, small, device="cpu").outputs
    chosen = {rule.scheme.type for rule in made.rules if isinstance(rule.scheme, GgmlScheme)}
    assert chosen & {"IQ2_XXS", "IQ2_XS", "IQ2_S"}
    for bpw in (3.1, 3.6):
        with_iq2, without = (
            choose_types(NANO, recipe(nano_felt, {**output("gguf", bpw=bpw, **types), **tables}), device="cpu")
            for types in ({}, {"types": WIDER})
        )
        assert with_iq2.outputs[0].predicted_kl is not None
        assert without.outputs[0].predicted_kl is not None
        assert with_iq2.outputs[0].predicted_kl <= without.outputs[0].predicted_kl

    report = convert(NANO, small, tmp_path / "out", device="cpu")
    size = sum(file.stat().st_size for file in report.outputs[0].path.iterdir() if is_weights(file))
    assert 2_250_000 < size <= 2_300_000


def is_weights(file: Path) -> bool:
    return (file.suffix in (".gguf", ".safetensors") or "safetensors.index" in file.name) and file.stem != "imatrix"


def test_a_plan_needs_no_weights_where_losses_are_known(nano_felt: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((NANO / "config.json").read_bytes())
    asked = recipe(nano_felt, output("gguf", bpw=6, types=["Q4_1", "Q8_0"]))
    with pytest.raises(PlanError, match="lacks the losses of .*Q4_1.*bare holds no weights"):
        choose_types(bare, asked)
    choose_types(NANO, asked)
    assert choose_types(bare, asked).outputs[0].target is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sensitivity": "nowhere"}, OutputError, "nowhere: holds no sensitivity.json."),
        ({"sensitivity": None}, RecipeError, "found a target, needed sensitivity: FOLDER"),
        ({"calibration": None}, RecipeError, "found a target in a data-free recipe, needed calibration"),
    ],
)
def test_what_a_target_lacks_is_said(
    change: dict[str, Any], error: type[QuantkitError], message: str, nano_felt: Path
) -> None:
    values = recipe(nano_felt, output("gguf", bpw=6)).model_dump(mode="json", exclude_unset=True)
    with pytest.raises(error, match="needed|holds") as refused:
        choose_types(NANO, Recipe.from_dict({**values, **change}))
    assert message in refused.value.message


def test_a_pass_of_another_model_is_refused(felt: Path) -> None:
    with pytest.raises(SourceError, match="felt: is of another model: 3 layers of width 128; .* were needed"):
        choose_types(NANO, recipe(felt, output("gguf", bpw=6)))
