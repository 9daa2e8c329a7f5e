"""Measuring the losses of types: where, how much at once, what an interrupted call leaves, and experts without
tokens."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit import choose_types
from quantkit.documents.sensitivity import LinearFisher, read_sensitivity
from quantkit.errors import OutputError, PlanError, SourceError
from quantkit.plan.forecast import forecast
from quantkit.plan.machine import Machine
from quantkit.plan.recipe import Recipe
from quantkit.schemes import IntScheme
from quantkit.sensitivity import losses
from quantkit.sensitivity.events import LossesLayer
from quantkit.sensitivity.folder import locked
from tests.cli.test_cli import quantkit
from tests.convert.jobs import int4, write_model, write_text
from tests.sensitivity.passes import PROCESSOR, fisher_pass, opened_pass
from tests.tiny_models import tiny_config, write_checkpoint

TOKENS = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(1))
LAYERS = 3
INT4 = IntScheme.model_validate({"bits": 4, "group_size": 32})


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_checkpoint(folder, tiny_config(num_nextn_predict_layers=0), seed=0)
    return folder


@pytest.fixture
def felt(source: Path, tmp_path: Path) -> Path:
    fisher_pass(source, tmp_path / "felt", TOKENS)
    return tmp_path / "felt"


def asked(felt: Path) -> Recipe:
    text = {"data": ["builtin:mixed"], "tokens": 256, "sequence_length": 32}
    made = {"name": "made", "format": "compressed-tensors", "target": {"bpw": 8, "types": ["int4-g32", "int8-g32"]}}
    return Recipe.from_dict({"version": 1, "calibration": text, "sensitivity": str(felt), "outputs": [made]})


def test_device_and_threads_reach_it(source: Path, felt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[str, int]] = []

    def machine(cls: type[Machine], device: str, budget: int | None) -> Machine:
        found.append((device, torch.get_num_threads()))
        raise PlanError("no further")

    monkeypatch.setattr(Machine, "of", classmethod(machine))
    size = ("--target-bpw", 8, "--sensitivity", felt, "--device", "cpu", "--jobs", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for words in (("convert", "--print-recipe"), ("convert", "--dry-run"), ("plan",), ("plan", "--print-recipe")):
            done = quantkit(words[0], source, *words[1:], *size)
            assert done.stderr.splitlines()[-1] == "error: no further"
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert found == [("cpu", 1)] * 4


def test_what_an_interrupted_call_measured_is_kept(source: Path, felt: Path) -> None:
    def stop(event: LossesLayer) -> None:
        if event.done == 1:
            raise Killed

    with pytest.raises(Killed):
        choose_types(source, asked(felt), device="cpu", on_event=stop)
    kept = read_sensitivity(felt).losses
    assert kept is not None
    assert {name.split(".")[2] for name in kept} == {"0"}
    told: list[LossesLayer] = []
    choose_types(source, asked(felt), device="cpu", on_event=told.append)
    assert [(one.done, one.layers) for one in told] == [(0, LAYERS - 1), (1, LAYERS - 1), (2, LAYERS - 1)]
    after = read_sensitivity(felt).losses
    assert after is not None
    assert {name: after[name] for name in kept} == kept


def test_two_processes(source: Path, felt: Path) -> None:
    with locked(felt), pytest.raises(OutputError, match="felt: another process is working on it"):
        choose_types(source, asked(felt), device="cpu")
    assert choose_types(source, asked(felt), device="cpu").outputs[0].target is None


def test_only_sampled_rows_are_read(source: Path, felt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the whole input of a layer: DeepSeek V3's has a gigabyte."""
    rows: list[int] = []

    class Counted(losses.MemoryRows):
        def __init__(self, n_rows: int, *shape: Any) -> None:
            rows.append(n_rows)
            super().__init__(n_rows, *shape)

    monkeypatch.setattr(losses, "TOKENS", 64)
    monkeypatch.setattr(losses, "MemoryRows", Counted)
    choose_types(source, asked(felt), device="cpu")
    assert set(rows) == {2}


def test_an_expert_that_no_token_reached_loses_like_a_mean_one(source: Path, felt: Path) -> None:
    names = [f"model.layers.1.mlp.experts.{expert}.gate_proj.weight" for expert in range(8)]
    with opened_pass(source, felt) as (found, _), _opened(source) as opened:
        unseen = {names[2]: LinearFisher(tokens=0, fisher=0.0)}
        document = found.document.model_copy(update={"linears": {**found.document.linears, **unseen}})
        wanted = {name: {INT4.label: INT4} for name in names}

        def measured(document: Any) -> dict[str, dict[str, float]]:
            changed = replace(found, document=document)
            made = losses.measure_losses(changed, opened, PROCESSOR, wanted, _ignore, _ignore)
            assert made.losses is not None
            return made.losses

        before, after = measured(found.document), measured(document)
    gates = {n: one for n, one in found.document.linears.items() if fnmatch(n, names[2].replace(".2.", ".*."))}
    others = [one.fisher for name, one in gates.items() if name != names[2] and one.tokens]
    ratio = sum(others) / len(others) / gates[names[2]].fisher
    assert after[names[2]][INT4.label] == pytest.approx(ratio * before[names[2]][INT4.label])
    assert all(after[name] == before[name] for name in names if name != names[2])


def _ignore(*_: object) -> None:
    """Listens to nothing."""


def _opened(source: Path) -> Any:
    from quantkit.formats import open_source

    return open_source(source)


def test_inputs_of_all_stand_for_those_of_an_expert_without_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "MOST_TOKENS", 4)
    h = losses.MemoryRows(2, 5, 3)
    assert losses._tokens_for(torch.tensor([7, 8]), h).tolist() == [7, 8]
    assert losses._tokens_for(torch.arange(9), h).tolist() == [0, 1, 2, 3]
    assert losses._tokens_for(torch.empty(0, dtype=torch.int64), h).tolist() == [0, 3, 6, 9]


def test_a_plan_refuses_a_pass_of_another_checkpoint_of_the_same_shape(tmp_path: Path) -> None:
    for name, seed in (("model", 0), ("other", 7)):
        write_model(tmp_path / name, seed=seed)
    write_text(tmp_path / "text.txt")
    felt = tmp_path / "felt"
    fisher_pass(tmp_path / "model", felt, TOKENS)
    rules = [int4(output_aware=True), {"match": "*", "keep": "source"}]
    output = {"name": "a", "format": "compressed-tensors", "rules": rules}
    text = {"data": [str(tmp_path / "text.txt")], "tokens": 64, "sequence_length": 32}
    recipe = Recipe.from_dict({"version": 1, "calibration": text, "sensitivity": str(felt), "outputs": [output]})
    with pytest.raises(SourceError, match="felt: is of another checkpoint; the same model in other files"):
        forecast(tmp_path / "other", recipe)
    assert forecast(tmp_path / "model", recipe).needs.work.fisher_tokens == TOKENS.numel()
