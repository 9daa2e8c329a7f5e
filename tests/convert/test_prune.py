"""Experts that are pruned: scores against transformers, files against a checkpoint pruned by hand, the model that is
left in transformers and llama.cpp, and its evaluation against the whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit import evaluate, plan, trial, verify
from quantkit.arch import arch_of
from quantkit.calibrate.dataset import token_rows
from quantkit.convert import hidden as hidden_module
from quantkit.convert.events import Event, StageStarted
from quantkit.errors import OutputError, PlanError, QuantkitError, RecipeError, SourceError
from quantkit.plan.recipe import Recipe
from quantkit.plan.schedule import SCORING
from quantkit.plan.shorthand import Shorthand, shorthand_recipe
from tests.arch.relatives import deepseek_v2, deepseek_v32, glm4_moe_lite, glm_moe_dsa, kimi_k25
from tests.arch.test_forward import read_decoded, reference_model
from tests.convert.jobs import INT4_GPTQ, files_of, run, shards_of, write_model, write_text
from tests.convert.test_resume_refused import Stop, stop_after
from tests.oracles.forward import logits
from tests.oracles.llama_cpp import LlamaModel
from tests.tiny_models import tiny_config, write_shards

NANO = Path(__file__).parents[2] / "examples" / "nano-deepseek-v3"
TEXT = {"data": ["builtin:mixed"], "tokens": 1024, "sequence_length": 128}
KEEP = ({"match": "*.mlp.gate.*", "keep": "source"}, {"match": "*", "keep": "bf16"})
NO_MTP = {"match": "role:mtp", "drop": True}
OUTPUTS = [
    {"name": "plain", "format": "compressed-tensors", "rules": [*KEEP]},
    {
        "name": "int4",
        "format": "compressed-tensors",
        "rules": [NO_MTP, {"match": "role:expert", **INT4_GPTQ}, *KEEP],
    },
    {"name": "gguf", "format": "gguf", "preset": "F32", "mtp": "keep"},
]


def recipe(outputs: Sequence[Mapping[str, Any]], **changes: Any) -> Recipe:
    return Recipe.model_validate({"version": 1, "calibration": TEXT, "outputs": outputs, **changes})


RECIPE = partial(recipe, OUTPUTS)
VALIDATION = {"text": ["builtin:eval"], "context": 64, "max_windows_per_file": 1}
PRUNED = RECIPE(prune={"experts": "34%"}, validation=VALIDATION)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano model with 8 of 12 experts in each layer, in three outputs."""
    folder = tmp_path_factory.mktemp("pruned") / "out"
    run(NANO, PRUNED, folder)
    return folder


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "quantkit.json").read_text())["pruning"]


def prune_by_hand(source: Path, kept: Mapping[int, Sequence[int]], target: Path, key: str = "n_routed_experts") -> None:
    """A checkpoint with these experts alone, made by names: experts renumbered, rows of router and bias taken."""
    config, tensors = read_decoded(source)
    left: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        if layer is None or int(layer[1]) not in kept:
            left[name] = tensor
            continue
        numbers = kept[int(layer[1])]
        expert = re.search(r"\.mlp\.experts\.(\d+)\.", name)
        if expert is None:
            left[name] = tensor[list(numbers)] if ".mlp.gate." in name else tensor
        elif int(expert[1]) in numbers:
            new = numbers.index(int(expert[1]))
            left[name.replace(f".experts.{expert[1]}.", f".experts.{new}.")] = tensor
    text = config.get("text_config", config)
    text[key] = len(next(iter(kept.values())))
    write_shards(target, left)
    (target / "config.json").write_text(json.dumps(config))
    for path in source.glob("*token*"):
        shutil.copy(path, target)


def kept_by_layer(folder: Path) -> dict[int, list[int]]:
    return {int(layer): numbers for layer, numbers in record(folder)["kept"].items()}


def test_scores_are_those_of_transformers(out: Path, tmp_path: Path) -> None:
    """Gate weight times norm of the output, averaged over an expert's tokens, from transformers' own modules."""
    config, weights = read_decoded(NANO)
    write_shards(tmp_path, weights, 1)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = reference_model(tmp_path)
    calls: dict[int, tuple[torch.Tensor, ...]] = {}
    moe = {n: layer.mlp for n, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")}
    for number, module in moe.items():
        module.experts.register_forward_hook(lambda _, inputs, __, number=number: calls.update({number: inputs}))
    calibration = PRUNED.calibration
    assert calibration is not None
    tokens = torch.from_numpy(token_rows(calibration, NANO, NANO).tokens).long()
    with torch.inference_mode():
        model(tokens)
        for number, module in moe.items():
            hidden, indices, gains = calls[number]
            for expert, (score, n_tokens) in enumerate(record(out / "plain")["scores"][str(number)]):
                rows, place = (indices == expert).nonzero(as_tuple=True)
                gate, up = (hidden[rows] @ module.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
                outputs = (torch.nn.functional.silu(gate) * up) @ module.experts.down_proj[expert].T
                assert n_tokens == len(rows)
                assert score == pytest.approx(float((outputs.norm(dim=-1) * gains[rows, place]).mean()), rel=1e-4)


def test_the_best_of_each_group_stay(out: Path) -> None:
    found = record(out / "int4")
    assert found["experts"] == 12
    assert sorted(found["kept"]) == ["1", "2", "3"]  # the MTP layer too: two outputs keep it
    for layer, numbers in found["kept"].items():
        scores = [score for score, _ in found["scores"][layer]]
        for group in range(4):
            own = [number for number in numbers if number // 3 == group]
            (gone,) = {3 * group, 3 * group + 1, 3 * group + 2} - set(own)
            assert own == sorted(own)
            assert scores[gone] == min(scores[3 * group : 3 * group + 3])


def test_files_are_those_of_a_checkpoint_pruned_by_hand(out: Path, tmp_path: Path) -> None:
    """Every weight, header and config, of every output."""
    prune_by_hand(NANO, kept_by_layer(out / "plain"), tmp_path / NANO.name)
    run(tmp_path / NANO.name, RECIPE(), tmp_path / "out")
    expected, found = files_of(tmp_path / "out"), files_of(out)
    own = re.compile(r"README.md|quantkit.json|generation_config.json|imatrix")
    assert any("imatrix" in name for name in found)
    compared = [name for name in expected if not own.search(name)]
    assert {name.rpartition(".")[2] for name in compared} >= {"safetensors", "gguf", "json"}
    assert [name for name in compared if _content(name, expected) != _content(name, found)] == []


def _content(name: str, files: Mapping[str, bytes]) -> Any:
    return json.loads(files[name]) if name.endswith(".json") else files[name]


def test_transformers_computes_the_model_that_is_left(out: Path) -> None:
    config, stored = read_decoded(out / "plain")
    assert config["n_routed_experts"] == 8
    tokens = torch.randint(4, 260, (1, 100), generator=torch.Generator().manual_seed(5))
    weights = {name: tensor.float() for name, tensor in stored.items()}
    with torch.inference_mode():
        expected = reference_model(out / "plain")(tokens).logits
        found = logits(arch_of(config), weights.__getitem__, tokens)
    assert (found - expected).abs().max() <= 1e-4


def test_llama_cpp_computes_the_model_that_is_left(out: Path) -> None:
    pytest.importorskip("xllamacpp")
    (path,) = (path for path in (out / "gguf").glob("*.gguf") if "imatrix" not in path.name)
    tokens = torch.randint(4, 260, (1, 100), generator=torch.Generator().manual_seed(5))
    with LlamaModel(path) as model, model.context(tokens.shape[1]) as context:
        found = torch.from_numpy(context.logits(tokens[0].numpy()))
    config, stored = read_decoded(out / "plain")
    weights = {name: tensor.float() for name, tensor in stored.items()}
    with torch.inference_mode():
        expected = logits(arch_of(config), weights.__getitem__, tokens)[0]
    assert (found - expected).abs().max() <= 1e-3


@pytest.mark.parametrize("output", ["plain", "int4", "gguf"])
def test_verify_finds_no_fault(output: str, out: Path) -> None:
    assert not verify(out / output).faults


@pytest.mark.parametrize("output", ["int4", "gguf"])
def test_verify_compares_with_the_experts_that_stayed(output: str, out: Path) -> None:
    found = verify(out / output, source=NANO, sample=64)
    assert not found.faults
    assert found.contents.compared == 64


def test_an_evaluation_takes_it_beside_the_whole_model(out: Path, tmp_path: Path) -> None:
    """The price is against the original, in `evaluate`, from a recorded reference, and in the conversion's own
    validation. Experts have other numbers, so how many routers agree on is not said."""
    options: dict[str, Any] = {"text": "builtin:eval", "context": 64, "max_windows_per_file": 1}
    recorded = tmp_path / "nano.reference"
    scored = evaluate(NANO, [out / "plain", out / "gguf"], save_reference=recorded, noise_floor=False, **options)
    plain, gguf = (candidate.result for candidate in scored.candidates)
    assert plain.overall.kld.mean > 0.05
    assert gguf.overall.kld.mean == pytest.approx(plain.overall.kld.mean, abs=1e-4)
    validation = json.loads((out / "plain" / "quantkit.json").read_text())["validation"]["scores"]
    assert validation["mean_kl"]["mean"] == pytest.approx(plain.overall.kld.mean, rel=0.05)  # it scores all positions
    assert [layer.router_agreement for layer in plain.layers] == [None] * 3
    (again,) = evaluate(recorded, [out / "plain"]).candidates
    assert again.result.overall.kld.mean == pytest.approx(plain.overall.kld.mean, rel=0.05)


def test_scores_of_an_earlier_conversion_are_taken(out: Path, tmp_path: Path) -> None:
    told: list[Event] = []
    chosen = RECIPE(prune={"experts": 4, "scores": str(out / "int4")})
    run(NANO, chosen, tmp_path / "out", on_event=told.append)
    assert not any(isinstance(event, StageStarted) and event.stage == SCORING for event in told)
    assert shards_of(tmp_path / "out") == shards_of(out)
    assert record(tmp_path / "out" / "int4") == record(out / "int4")
    document = trial(NANO, chosen, tmp_path / "tried", "1")
    assert [output.name for output in document.outputs] == ["plain", "int4", "gguf"]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("where", [(SCORING, 1), (SCORING, 3), ("experts", 2)])
def test_killed_and_taken_up_it_is_the_same(where: tuple[str, int], tmp_path: Path) -> None:
    rules = [{"match": "role:expert", **INT4_GPTQ}, *KEEP]
    chosen = recipe([{**OUTPUTS[1], "rules": rules}], prune={"experts": 4})
    run(NANO, chosen, tmp_path / "whole")
    child = os.fork()
    if child == 0:
        try:
            pytest.MonkeyPatch().setattr(hidden_module, "SAVING_PAUSE", 0)
            run(NANO, chosen, tmp_path / "out", on_event=partial(_kill_in, where))
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert (tmp_path / "out.partial" / "scores.json").exists()
    told: list[int | None] = []

    def hear(event: Event) -> None:
        if isinstance(event, StageStarted) and event.stage == SCORING:
            told.append(event.layer)

    run(NANO, chosen, tmp_path / "out", on_event=hear)
    assert told == {(SCORING, 1): [1, 2, 3], (SCORING, 3): [2, 3]}.get(where, [])
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def _kill_in(where: tuple[str, int], event: Event) -> None:
    if isinstance(event, StageStarted) and (event.stage, event.layer) == where:
        os.kill(os.getpid(), signal.SIGKILL)


FAMILIES = {
    "deepseek_v3, FP8": partial(tiny_config, num_nextn_predict_layers=0),
    "deepseek_v2": deepseek_v2,
    "glm4_moe_lite": partial(glm4_moe_lite, first_k_dense_replace=1, num_nextn_predict_layers=0),
    "kimi_k25": kimi_k25,
    "deepseek_v32": deepseek_v32,
    "glm_moe_dsa": partial(glm_moe_dsa, topk_method="noaux_tc", scoring_func="sigmoid", num_nextn_predict_layers=0),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    """Each is what a checkpoint pruned by hand gives, in a folder and in GGUF."""
    config = FAMILIES[family](vocab_size=1024, n_routed_experts=16, num_experts_per_tok=3)
    source, hand = tmp_path / "whole" / "model", tmp_path / "hand" / "model"
    write_model(source, config, fp8=family.endswith("FP8"))
    for folder in (source.parent, hand.parent):
        folder.mkdir(exist_ok=True)
        write_text(folder / "calibration.txt")
    outputs = [OUTPUTS[1], {"name": "gguf", "format": "gguf", "preset": "Q8_0"}]
    text = {"data": ["calibration.txt"], "tokens": 256, "sequence_length": 32, "min_expert_tokens": 16}
    run(source, recipe(outputs, calibration=text, prune={"experts": "25%"}), tmp_path / "pruned")
    kept = kept_by_layer(tmp_path / "pruned" / "int4")
    assert {len(numbers) for numbers in kept.values()} == {12}
    prune_by_hand(source, kept, hand)
    run(hand, recipe(outputs, calibration=text), tmp_path / "expected")
    expected, found = files_of(tmp_path / "expected"), files_of(tmp_path / "pruned")
    weights = [name for name in expected if name.endswith((".safetensors", ".gguf")) and "imatrix" not in name]
    assert [name for name in weights if expected[name] != found[name]] == []
    left = json.loads(found["int4/config.json"])
    assert left.get("text_config", left)["n_routed_experts"] == 12
    assert not verify(tmp_path / "pruned" / "int4").faults
    assert not verify(tmp_path / "pruned" / "gguf").faults


@pytest.mark.parametrize(
    ("experts", "line"),
    [
        (5, "found experts 5, needed at least 4 and a multiple of 4: the router ranks 4 groups"),
        ("10%", "found experts 10%, needed at least 4 and a multiple of 4"),
        (8, "8 of 12; needed at most 4: a token takes 3 experts, from 2 of 4 groups, so at least 2 of each group stay"),
    ],
)
def test_what_breaks_the_routing_is_refused(experts: object, line: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=re.escape(line)):
        run(NANO, RECIPE(prune={"experts": experts}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "model", tiny_config(first_k_dense_replace=3, num_nextn_predict_layers=0, vocab_size=1024))
    with pytest.raises(PlanError, match=r"prune: the model has no routed experts\."):
        plan(tmp_path / "model", RECIPE(prune={"experts": "25%"}))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"calibration": None}, "found prune in a data-free recipe, needed calibration"),
        ({"sensitivity": "felt"}, "found prune and sensitivity, needed one of them"),
        ({"prune": {"experts": "0%"}}, "found '0%', needed a share such as \"25%\", or how many"),
        ({"prune": {"experts": 0}}, "found 0, needed a share"),
        ({"prune": {"experts": "many"}}, "found 'many', needed a share"),
        ({"prune": {"experts": True}}, "found True, needed a share"),
    ],
)
def test_recipes_that_mean_nothing(changes: dict[str, Any], line: str) -> None:
    values = {"version": 1, "calibration": TEXT, "outputs": OUTPUTS, "prune": {"experts": "25%"}, **changes}
    with pytest.raises(RecipeError, match=re.escape(line)):
        Recipe.from_dict(values)


def test_scores_of_something_else_are_refused(out: Path, tmp_path: Path) -> None:
    def refused(kind: type[QuantkitError], line: str, scores: Path, source: Path = NANO, **changes: Any) -> None:
        chosen = RECIPE(prune={"experts": "34%", "scores": str(scores)}, **changes)
        with pytest.raises(kind, match=line):
            run(source, chosen, tmp_path / "result")

    refused(OutputError, r"holds no quantkit\.json", tmp_path)
    run(NANO, recipe([OUTPUTS[1]]), tmp_path / "unpruned")
    refused(OutputError, "no experts were pruned there", tmp_path / "unpruned")
    run(NANO, recipe([OUTPUTS[1]], prune={"experts": "34%"}), tmp_path / "no-mtp")
    assert sorted(record(tmp_path / "no-mtp")["kept"]) == ["1", "2"]
    refused(PlanError, "has no scores of layer 3, whose experts an output keeps", tmp_path / "no-mtp")
    config, weights = read_decoded(NANO)
    write_shards(tmp_path / "other", weights)
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    for path in NANO.glob("*token*"):
        shutil.copy(path, tmp_path / "other")
    refused(SourceError, "has scores of another checkpoint", out / "int4", tmp_path / "other")
    with pytest.raises(PlanError, match="a trial scores no experts"):
        trial(NANO, PRUNED, tmp_path / "tried", "1")


def test_a_stopped_job_goes_on_with_the_same_scores_only(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out / "int4", tmp_path / "scored")
    rules = [{"match": "role:expert", **INT4_GPTQ}, *KEEP]
    chosen = recipe(
        [{**OUTPUTS[1], "rules": [NO_MTP, *rules]}], prune={"experts": 4, "scores": str(tmp_path / "scored")}
    )
    with pytest.raises(Stop):
        run(NANO, chosen, tmp_path / "out", on_event=stop_after(1))
    file = tmp_path / "scored" / "quantkit.json"
    document = json.loads(file.read_text())
    document["pruning"]["scores"]["1"][0][0] += 0.5
    file.write_text(json.dumps(document))
    with pytest.raises(OutputError, match=r"differs from this one: expert scores\."):
        run(NANO, chosen, tmp_path / "out")


def test_experts_that_are_stored_otherwise_are_refused(tmp_path: Path) -> None:
    config = tiny_config(vocab_size=1024, num_nextn_predict_layers=0)
    weights = write_model(tmp_path / "model", config)
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    write_shards(tmp_path / "model", {**weights, name: weights[name].float()})
    with pytest.raises(PlanError, match=rf"prune: {re.escape(name)} is stored otherwise than .*experts\.0\.up_proj"):
        plan(tmp_path / "model", RECIPE(prune={"experts": 4}))


def test_an_expert_that_is_missing_is_refused(tmp_path: Path) -> None:
    """Even one that a plan could do without: which ones stay is not known yet."""
    weights = write_model(tmp_path / "model", tiny_config(vocab_size=1024))
    gone = "model.layers.2.mlp.experts.11.up_proj.weight"
    write_shards(tmp_path / "model", {name: tensor for name, tensor in weights.items() if name != gone})
    with pytest.raises(PlanError, match=rf"{re.escape(gone)}: missing from the source"):
        plan(tmp_path / "model", RECIPE(prune={"experts": 4}))


def test_the_option_stands_for_the_key() -> None:
    assert shorthand_recipe(NANO, Shorthand("w4a16", prune="34%")).prune == PRUNED.prune
    assert Shorthand("w4a16", prune="34%").words == ("--scheme", "w4a16", "--prune", "34%")
    with pytest.raises(RecipeError, match="found prune in a data-free recipe"):
        shorthand_recipe(NANO, Shorthand("w4a16", method="rtn", prune="34%"))


def test_a_plan_of_config_json_alone_says_what_is_left() -> None:
    v3 = NANO.parent / "deepseek-v3-671b"
    whole, pruned = (plan(v3, shorthand_recipe(v3, Shorthand("w4a16", prune=prune))) for prune in (None, "25%"))
    experts = [
        sum(size.nbytes for size in found.outputs[0].sizes if size.role.value == "expert") for found in (whole, pruned)
    ]
    assert experts[1] * 4 == experts[0] * 3
    assert any("64 of 256 routed experts of each layer are left out (25.0 %)" in line for line in pruned.warnings)
