"""The public names: the commands as functions, results that show themselves, and an import that costs nothing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import quantkit
from quantkit import Recipe, convert, evaluate, inspect, plan
from quantkit.convert.events import Event, Finished, LayerDone, Started
from quantkit.errors import EvaluationError, OutputError, PlanError, RecipeError, SourceError
from quantkit.evaluate.events import EvaluationEvent, EvaluationStarted, LayerPassed

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "examples" / "nano-deepseek-v3"
VALUES: dict[str, Any] = {
    "version": 1,
    "calibration": {"data": ["words.txt"], "tokens": 512, "sequence_length": 64},
    "outputs": [
        {
            "name": "w4a16",
            "format": "compressed-tensors",
            "rules": [
                {"match": "role:expert", "scheme": {"kind": "int", "bits": 4, "group_size": 64}},
                {"match": "*", "keep": "source"},
            ],
        }
    ],
}
SMALL = {"context": 32, "max_windows_per_file": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and the text it names."""
    made = tmp_path_factory.mktemp("library")
    (made / "recipe.yaml").write_text(yaml.safe_dump(VALUES), encoding="utf-8")
    (made / "words.txt").write_text("One word after another, and no two alike. " * 200, encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def converted(folder: Path) -> tuple[quantkit.Report, list[Event]]:
    events: list[Event] = []
    threads = torch.get_num_threads()
    report = convert(
        NANO, folder / "recipe.yaml", str(folder / "out"), jobs=1, memory_budget="1GiB", on_event=events.append
    )
    assert torch.get_num_threads() == threads
    return report, events


@pytest.fixture(scope="module")
def evaluated(folder: Path, converted: object) -> tuple[quantkit.Evaluation, list[EvaluationEvent]]:
    events: list[EvaluationEvent] = []
    found = evaluate(
        NANO,
        folder / "out",
        text="builtin:eval",
        out=folder / "evaluation.json",
        noise_floor=False,
        on_event=events.append,
        **SMALL,
    )
    return found, events


# -------------------------------------------------------------------------------------------------------------- import


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout


def test_the_import_loads_nothing_heavy() -> None:
    code = "import sys, quantkit; print(sorted({'torch', 'numpy', 'pydantic', 'rich', 'plotly'} & set(sys.modules)))"
    assert python(code) == "[]\n"


@pytest.mark.parametrize(
    ("before", "policy"),
    [("pass", "PASSIVE"), ("os.environ['OMP_WAIT_POLICY'] = 'ACTIVE'", "ACTIVE"), ("import torch", "None")],
)
def test_waiting_threads_sleep_unless_the_caller_decided_or_it_is_too_late(before: str, policy: str) -> None:
    code = (
        "import os; os.environ.pop('OMP_WAIT_POLICY', None)\n"
        f"{before}\n"
        "import quantkit\n"
        "for call in (quantkit.convert, quantkit.evaluate):\n"
        "    try: call('absent', 'nano-demo', *['out'] * (call is quantkit.convert))\n"
        "    except quantkit.QuantkitError: print(os.environ.get('OMP_WAIT_POLICY'))"
    )
    assert python(code).split() == [policy] * 2


def test_planning_and_inspecting_load_no_torch() -> None:
    code = (
        "import sys; from quantkit import Recipe, inspect, plan; "
        "plan('examples/nano-deepseek-v3', Recipe.from_yaml('nano-demo')); inspect('examples/nano-deepseek-v3'); "
        "print('torch' in sys.modules)"
    )
    assert python(code) == "False\n"


@pytest.mark.parametrize("first", ["quantkit.documents.evaluation", "quantkit.report.build", "quantkit.cli.app"])
def test_functions_keep_their_names_from_packages(first: str) -> None:
    code = (
        f"import {first}, quantkit; from quantkit import evaluate, report; print(callable(evaluate), callable(report))"
    )
    assert python(code) == "True True\n"


def test_public_names() -> None:
    assert dir(quantkit) == sorted(quantkit.__all__)
    for name in quantkit.__all__:
        assert getattr(quantkit, name) is not None
        if not name.startswith("_") and name not in ("Event", "EvaluationEvent"):
            assert getattr(quantkit, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'evaluator'"):
        _ = getattr(quantkit, "evaluator")  # noqa: B009


def test_functions_have_the_options_of_the_commands() -> None:
    import inspect as signatures

    import typer

    from quantkit.cli.app import app

    renamed = {"documents": "documents", "candidate": "candidates", "as_json": "", "dry_run": "", "update_baseline": ""}
    renamed |= {"print_recipe": "", "log": "", "layers": ""}  # of `progress`, and of `trial`
    shorthand = set(signatures.signature(quantkit.recipe_for).parameters)  # makes the recipe for convert and plan
    # What `Limits` holds, and what is written of verdicts.
    beside = {
        "sigmas",
        "spread",
        "max_kld",
        "max_perplexity_increase",
        "max_size_increase",
        "losses",
        "junit",
        "markdown",
    }
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name in ("convert", "plan", "inspect", "evaluate", "check", "report"):
        known = set(signatures.signature(getattr(quantkit, name)).parameters)
        options = {renamed.get(option.name, option.name) for option in commands[name].params} - {"", "help"}
        shared = shorthand | {"gpus"}  # processes that share the work: `quantkit.on_ranks` for each of them
        elsewhere = {"check": beside, "convert": shared, "plan": shorthand}.get(name, set())
        assert options - known <= elsewhere, name


# ----------------------------------------------------------------------------------------------------------- functions


def test_plan_forecasts_what_convert_makes(folder: Path, converted: tuple[quantkit.Report, list[Event]]) -> None:
    found = plan(str(NANO), folder / "recipe.yaml", gpus="1xA100-80GB", context=128)
    assert isinstance(found, quantkit.Forecast)
    assert isinstance(found.plan, quantkit.Plan)
    (output,) = converted[0].outputs
    assert (found.outputs[0].nbytes, found.outputs[0].bpw) == (output.nbytes, output.bpw)
    assert found.fits is not None
    assert found.fits[0].fits
    assert f"{output.nbytes:,} bytes" in repr(found)
    assert all(len(repr(value)) < 300 for value in (found, found.plan, found.outputs[0]))
    assert "role" in quantkit.text(found)
    json.dumps(quantkit.document(found), allow_nan=False)


def test_convert_tells_of_each_step_in_order(converted: tuple[quantkit.Report, list[Event]]) -> None:
    report, events = converted
    assert isinstance(events[1], Started)
    assert [event.layer for event in events if isinstance(event, LayerDone)] == [0, 1, 2, 3]
    assert events[-1] == Finished(report)
    assert report.tokens == 512
    assert repr(report).startswith(f"<Report w4a16: {report.outputs[0].nbytes:,} bytes")
    assert "bits per weight" in quantkit.text(report)
    assert quantkit.document(report)["tokens"] == 512


def test_inspect_and_evaluate(folder: Path, evaluated: tuple[quantkit.Evaluation, list[EvaluationEvent]]) -> None:
    held = inspect(folder / "out")
    assert isinstance(held, quantkit.Inspection)
    assert quantkit.document(held)["nbytes"] == held.nbytes
    assert f"{held.nbytes:,} bytes" in repr(held)
    assert "int4 g64" in quantkit.text(held)
    found, events = evaluated
    assert isinstance(events[0], EvaluationStarted)
    assert events[1:] == [LayerPassed(layer, 3) for layer in (1, 2, 3)]
    assert found.to_json() == (folder / "evaluation.json").read_text(encoding="utf-8")
    score = found.candidates[0].result.overall
    assert 0 < score.kld.mean < 1
    assert len(repr(found)) < 300
    assert "out: perplexity" in str(found)
    assert "same top" in quantkit.text(found)
    assert quantkit.document(found) == json.loads(found.to_json())


def test_check_and_report(folder: Path, evaluated: tuple[quantkit.Evaluation, list[EvaluationEvent]]) -> None:
    found, baseline = evaluated[0], folder / "baseline.json"
    quantkit.update_baseline(folder / "evaluation.json", baseline)
    for evaluation in (found, str(folder / "evaluation.json")):
        (verdict,) = quantkit.check(evaluation, baseline, candidates="out")
        assert verdict.passed
    (verdict,) = quantkit.check(found, baseline, limits=quantkit.Limits(max_kld=0.0))
    assert not verdict.passed
    assert "mean KLD, absolute got worse" in repr(verdict)
    assert "WORSE" in quantkit.text([verdict])
    with pytest.raises(EvaluationError, match="no such baseline"):
        quantkit.check(found, folder / "none.json")
    page = folder / "page.md"
    written = quantkit.report([folder / "out", folder / "evaluation.json"], page, markdown=True, title="Mine")
    assert page.read_text(encoding="utf-8") == written
    assert written.startswith("## Mine")
    assert quantkit.report(folder / "out").startswith("<!doctype html>")
    with pytest.raises(OutputError, match="is a document that the report is made of"):
        quantkit.report(folder / "evaluation.json", folder / "evaluation.json")


def test_refusals_are_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        convert(tmp_path / "nothing", folder / "recipe.yaml", tmp_path / "out")
    for call in (
        lambda: convert(NANO, folder / "recipe.yaml", tmp_path / "out", memory_budget="a lot"),
        lambda: convert(NANO, folder / "recipe.yaml", tmp_path / "out", memory_budget=1000),
        lambda: evaluate(NANO, NANO, memory_budget=-1),
        lambda: plan(NANO, folder / "recipe.yaml", gpus="many"),
    ):
        with pytest.raises(PlanError, match=r"^(memory_budget|gpus): found .*, needed [^\n]*\.$"):
            call()
    with pytest.raises(OutputError, match="is no place for a file"):
        evaluate(NANO, NANO, out=tmp_path)
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------- recipes


def test_recipes_know_their_folder(folder: Path) -> None:
    recipe = Recipe.from_yaml(folder / "recipe.yaml")
    assert recipe.folder == folder
    assert Recipe.from_dict(VALUES, folder).folder == folder
    assert Recipe.from_dict(VALUES).folder == Path()
    assert recipe.model_dump() == Recipe.from_dict(VALUES).model_dump()
    assert "folder" not in recipe.model_dump_json()
    assert Recipe.from_dict(recipe.model_dump(mode="json")).model_dump() == recipe.model_dump()


def test_shipped_recipes_are_there_by_name() -> None:
    assert "nano-demo" in Recipe.shipped()
    for name in Recipe.shipped():
        assert Recipe.from_yaml(name).version == 1


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"outputs": []}, "version: found nothing, needed this key."),
        ({"version": 1, "outputs": 3}, "outputs: found 3, needed a list."),
        ({**VALUES, "calibraton": None}, "calibraton: found an unknown key, needed calibration (allowed: version,"),
        (
            {
                "version": 1,
                "outputs": [{**VALUES["outputs"][0], "rules": [{"match": "*", "scheme": {"kind": "int", "bits": 9}}]}],
            },
            "outputs[0].rules[0].scheme.bits: found 9, needed less than or equal to 8.",
        ),
        (
            {"version": 1, "outputs": [{**VALUES["outputs"][0], "rules": [{"match": "*"}]}]},
            "outputs[0].rules[0]: found no action, needed exactly one of: keep, drop, or scheme",
        ),
    ],
)
def test_faults_of_a_dictionary_name_their_keys(values: dict[str, Any], line: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.from_dict(values)
    assert any(found.startswith(line) for found in error.value.message.splitlines()), error.value.message


# ------------------------------------------------------------------------------------------------------------ progress


def test_progress_takes_events_of_both_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    with quantkit.progress() as on_event:
        on_event(Started(2, 10**9, 64))
        on_event(LayerDone(0, 1.0, 64))
        on_event(EvaluationStarted(1, 2, 64, 3))
        on_event(LayerPassed(3, 3))
    printed = capsys.readouterr()
    assert printed.out == ""
    first, layer, second, passed = printed.err.splitlines()
    assert first.startswith("2 layers, 1.00 GB to read, 64 calibration tokens")
    assert layer.startswith("layer 1/2")
    assert second == "1 candidate, 2 windows, 64 tokens"
    assert passed.startswith("layer 3/3  100 %")


def test_live_progress_follows_an_evaluation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantkit.text.progress import LiveProgress

    monkeypatch.setenv("TERM", "xterm")
    with LiveProgress() as on_event:
        on_event(EvaluationStarted(1, 2, 64, 3))
        on_event(LayerPassed(1, 3))
    assert "1 candidate, 2 windows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("misuse", "said"),
    [
        (lambda: quantkit.convert("x", "nano-demo", "y", jobs=0), "jobs 0: a whole number from 1 to 1,024 was needed"),
        (lambda: quantkit.convert("x", "nano-demo", "y", jobs=10**9), "jobs 1000000000: "),
        (lambda: quantkit.convert("x", "nano-demo", "y", jobs=1.5), "jobs 1.5: "),  # pyright: ignore[reportArgumentType]
        (lambda: quantkit.convert("x", "nano-demo", "y\0"), "is no name of a file"),
        (lambda: quantkit.plan("x", "nano-demo", memory_budget=-1), "memory_budget: found '-1B'"),
        (lambda: quantkit.plan("x", "nano-demo", context=0), "context: found 0, needed at least 1"),
        (lambda: quantkit.plan("x" * 5000, "nano-demo"), "is no name of a file"),
        (lambda: quantkit.report([]), "The documents are about no checkpoint"),
        (lambda: quantkit.report("a\0b"), "is no name of a file"),
        (lambda: quantkit.inspect("x" * 5000), "is no name of a file"),
        (lambda: quantkit.evaluate(NANO, [NANO], max_windows_per_file=-1), "max_windows_per_file -1"),
        (lambda: quantkit.Limits(sigmas=-1), "sigmas: found -1, needed a number of at least 0"),
        (lambda: quantkit.Limits(spread=math.nan), "spread: found nan"),
        (lambda: quantkit.recipe_for(NANO, scheme="w4a16", tokens=0), "calibration.tokens: found 0"),
    ],
)
def test_misuse_is_refused_in_a_line(misuse: Callable[[], object], said: str) -> None:
    with pytest.raises(quantkit.QuantkitError) as caught:
        misuse()
    assert said in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_recipe_of_another_type_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="recipe: found dict, needed a Recipe"):
        quantkit.plan("x", {"version": 1})  # pyright: ignore[reportArgumentType]
