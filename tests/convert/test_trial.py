"""A trial quantises some layers as the whole conversion would, and leaves a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import quantkit
from quantkit import QuantkitError, trial
from quantkit.convert.events import Event, LayerDone, StageStarted
from quantkit.documents.trial import TrialDocument
from quantkit.errors import OutputError, PlanError
from quantkit.inspect.path import inspect_path
from quantkit.inspect.trial import TrialInspection
from quantkit.plan.schedule import KEPT, PASSING, VALIDATION, Cost, Step
from quantkit.plan.trial import parse_layers, trial_schedule
from quantkit.text.trial import trial_text
from tests.convert.gguf_jobs import RTN, gguf_output, gguf_recipe
from tests.convert.jobs import BUDGET, int4, recipe_of, run, small_config, write_model, write_text

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = recipe_of(int4(polish=0, grid=2), others={"second": [int4("role:expert", kind="rtn", grid=2)]}, validated=True)

HELD_OUT = {"text": ["eval.txt"], "context": 32, "max_windows_per_file": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trial")
    write_model(folder / "model", small_config(num_hidden_layers=3))
    write_text(folder / "calibration.txt")
    write_text(folder / "eval.txt")
    return folder


def tried(place: Path, layers: str, out: Path, events: list[Event] | None = None) -> TrialDocument:
    on_event = None if events is None else events.append
    return trial(
        place / "model", RECIPE, out, layers, base_dir=place, device="cpu", memory_budget=BUDGET, on_event=on_event
    )


def test_a_trial_of_the_first_layers_is_the_beginning_of_the_conversion(place: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    found = tried(place, "0-1", tmp_path / "out", events)
    run(place / "model", RECIPE, tmp_path / "whole", base_dir=place)
    assert found.trial == (0, 1)
    assert [event.layer for event in events if isinstance(event, LayerDone)] == [0, 1]
    for output in found.outputs:
        document = json.loads((tmp_path / "whole" / output.name / "quantkit.json").read_text())
        assert output.nbytes == document["tensor_bytes"]
        for layer in output.layers:
            losses = [
                tensor["relative_loss"]
                for name, tensor in document["tensors"].items()
                if f".layers.{layer.layer}." in name and "relative_loss" in tensor
            ]
            if losses:
                assert layer.relative_loss == pytest.approx(sum(losses) / len(losses))
    assert [layer.quantised for layer in found.outputs[0].layers] == [True, True]
    errors = [layer.hidden_error for layer in found.outputs[0].layers]
    assert 0 < errors[0] < 0.5
    assert found.outputs[1].layers[0].hidden_error == 0  # it keeps what is no expert, and layer 0 has none
    assert found.outputs[1].layers[1].hidden_error > 0


def test_only_the_report_is_left(place: Path, tmp_path: Path) -> None:
    found = tried(place, "0", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.trial.json"]
    written = TrialDocument.model_validate_json((tmp_path / "out.trial.json").read_text())
    assert written.trial == found.trial
    assert "second" in trial_text(found, tmp_path / "out.trial.json")
    assert found.total_seconds > 0
    assert {"attention", "experts", VALIDATION, "files"} <= found.whole_seconds.keys()


def test_another_file_is_replaced_only_with_restart(place: Path, tmp_path: Path) -> None:
    report = tmp_path / "out.trial.json"
    for _ in range(2):
        tried(place, "0", tmp_path / "out")
    for old in (report.read_bytes(), b"hours of work", b'{"trial": 1}'):
        report.write_bytes(old)
        with pytest.raises(OutputError, match=r"out\.trial\.json: exists already, and is no trial"):
            tried(place, "0-1", tmp_path / "out")
        assert report.read_bytes() == old
    trial(place / "model", RECIPE, tmp_path / "out", "0-1", restart=True, base_dir=place, memory_budget=BUDGET)
    shown = inspect_path(report)
    assert isinstance(shown, TrialInspection)
    assert shown.document.trial == (0, 1)
    assert quantkit.text(shown) == trial_text(shown.document, report)
    with pytest.raises(OutputError, match=r"is the report of a trial .*, of which no report is made.*quantkit inspect"):
        quantkit.report(report)


def test_layers_before_are_passed_as_they_are(place: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    found = tried(place, "2", tmp_path / "out", events)
    assert [event.layer for event in events if isinstance(event, StageStarted) and event.stage == PASSING] == [0, 1]
    before, also, after = found.outputs[0].layers
    assert (before.hidden_error, also.hidden_error, before.quantised, after.quantised) == (0, 0, False, True)
    assert after.hidden_error > 0
    assert after.relative_loss is not None


def test_a_trial_of_gguf(place: Path, tmp_path: Path) -> None:
    recipe = gguf_recipe(gguf_output(name="main", preset="Q5_1", method=RTN, mtp="keep"), validation=HELD_OUT)
    found = trial(place / "model", recipe, tmp_path / "out", [0, 1], base_dir=place, device="cpu", memory_budget=BUDGET)
    assert [layer.quantised for layer in found.outputs[0].layers] == [True, True]
    assert 0 < found.outputs[0].layers[1].hidden_error < 0.5


def test_a_trial_that_is_stopped_leaves_nothing(place: Path, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, LayerDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trial(place / "model", RECIPE, tmp_path / "out", "0-1", base_dir=place, device="cpu", on_event=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "layers"), [("3", (3,)), ("0-4", (0, 1, 2, 3, 4)), ("0-2,10", (0, 1, 2, 10)), ("2, 1,1-2", (1, 2))]
)
def test_layers_by_number(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "-1", "4-", "5-3", "1,,2", "0-99999", "٣", "1-2-3", "9" * 20])
def test_what_is_no_layer_is_refused(place: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(PlanError, match="layers: found"):
        tried(place, text, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("layers", "found"), [("0-4", r"3 \(an MTP layer, which is no part of trials\)"), ("0,3", "3 .an MTP"), ("4", "4,")]
)
def test_layers_that_the_model_lacks_are_refused(place: Path, tmp_path: Path, layers: str, found: str) -> None:
    with pytest.raises(QuantkitError, match=f"found {found}.*the model has decoder layers 0 to 2"):
        tried(place, layers, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_schedule_of_a_trial() -> None:
    kinds = ("attention", "experts", KEPT)
    layers = [Step(kind, layer, Cost(1.0)) for layer in range(4) for kind in kinds]
    whole = (Step("embeddings", None, Cost(9.0)), *layers, *(Step(VALIDATION, layer, Cost(6.0)) for layer in range(4)))
    steps = trial_schedule(whole, (2,), 1, passed=0.5)
    named = [(PASSING, 0), (PASSING, 1), *((kind, 2) for kind in kinds), ("files", None)]
    assert [(step.kind, step.layer) for step in steps] == [*named, *((VALIDATION, layer) for layer in range(3))]
    assert steps[0].seconds == 3.0
