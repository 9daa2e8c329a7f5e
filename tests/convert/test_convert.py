"""A conversion as a whole: the files are what the report says, and the same job gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantkit.arch import arch_of
from quantkit.calibrate.hidden_states import MemoryRows
from quantkit.convert import hidden as hidden_module
from quantkit.convert.events import Event, Finished, LayerDone, StageStarted, Started, TensorDone
from quantkit.convert.finish import validated_as_a_whole
from quantkit.convert.tally import Tally
from quantkit.evaluate.compare import Model, compare
from quantkit.evaluate.validation import summarise
from quantkit.formats.folder import FolderSource
from quantkit.formats.layouts.compressed_tensors import COMPRESSED_TENSORS
from quantkit.plan import machine as machine_module
from quantkit.plan.headers import read_headers
from quantkit.plan.memory import conversion_needs
from quantkit.plan.plan import make_plan
from quantkit.plan.schedule import COMPILING, VALIDATION
from quantkit.schemes import IntScheme
from quantkit.text.converted import report_text
from quantkit.text.progress import PlainProgress
from tests import tiny_models
from tests.convert.jobs import (
    INT4_RTN,
    data_free,
    decoded,
    files_of,
    int4,
    recipe_of,
    run,
    shards_of,
    small_config,
    write_model,
    write_text,
    write_tokenizer,
)
from tests.tiny_models import write_checkpoint, write_shards

MTP = "role:mtp"


pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),  # one thread: nothing to lock
]


@pytest.fixture(scope="module")
def original(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return write_checkpoint(tmp_path_factory.mktemp("same"), small_config(), fp8=True)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


# ------------------------------------------------------------------------------------------------- what comes out


def test_the_files_hold_what_the_report_says(place: Path, original: dict[str, torch.Tensor], tmp_path: Path) -> None:
    events: list[Event] = []
    report = run(place / "model", recipe_of(int4(), validated=True), tmp_path / "out", on_event=events.append)
    (output,) = report.outputs
    assert (output.path, report.validated, report.resumed, report.tokens) == (tmp_path / "out", None, False, 256)
    document = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    with FolderSource(tmp_path / "out", COMPRESSED_TENSORS.reader) as written:
        names = list(written.infos())
        quantised = {name for name in names if isinstance(written.scheme(name), IntScheme)}
        for name in names:
            stored, before = written.read(name), original[name]
            if name in quantised:
                loss = document["tensors"][name]["relative_loss"]
                assert 0 < loss < 0.03
                assert 0 < relative(stored, before) < 0.2
                assert document["tensors"][name]["n_tokens"] > 0
            else:
                assert torch.equal(stored.to(before.dtype), before), name  # FP8 decodes to float32 here
    assert set(names) == set(original)
    assert quantised == {name for name, entry in document["tensors"].items() if entry["scheme"]["kind"] == "int"}
    assert output.quantized == len(quantised)
    assert {name for name in names if "_proj" in name and ".layers.2." not in name} == quantised
    assert output.tensors == len(original)
    shards = [load_file(path) for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert len(shards) > 1
    assert output.nbytes == sum(tensor.nbytes for shard in shards for tensor in shard.values())
    assert output.bpw == pytest.approx(output.nbytes * 8 / sum(tensor.numel() for tensor in original.values()))
    assert events[0] == StageStarted(COMPILING)
    assert isinstance(events[1], Started)
    assert events[-1] == Finished(report)
    assert [event.layer for event in events if isinstance(event, LayerDone)] == [0, 1, 2]
    assert {event.name for event in events if isinstance(event, TensorDone)} == quantised
    assert not (tmp_path / "out.partial").exists()


def test_the_validation_is_that_of_the_written_files(
    place: Path, original: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    report = run(place / "model", recipe_of(int4(), validated=True), tmp_path / "out")
    found = report.outputs[0].validation
    assert found is not None
    text = (place / "eval.txt").read_bytes()
    alphabet = json.loads((place / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    ids = [alphabet[chr(byte) if byte > 32 else chr(byte + 256)] for byte in text]
    chunks = torch.linspace(0, len(ids) // 31 - 1, 4, dtype=torch.float64).long().tolist()
    tokens = torch.tensor([[0, *ids[chunk * 31 : chunk * 31 + 31]] for chunk in chunks])
    arch = arch_of(small_config())
    models = [
        Model(
            lambda name, w=weights: w[name].float(),
            lambda ids, w=weights: w[arch.embed][ids].float(),
            lambda start, stop, w=weights: w[arch.lm_head][start:stop].float(),
        )
        for weights in (original, decoded(tmp_path / "out"))
    ]
    expected = summarise(compare(arch, models[0], models[1], tokens, MemoryRows))
    assert found.scores.draft is not None  # tests/evaluate/test_drafts.py says what it is
    assert found.scores.model_copy(update={"draft": None}) == expected
    assert found.scores.mean_kl.mean > 1e-4


def test_fp8_and_its_bf16_form_give_the_same_bytes(
    place: Path, original: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    shutil.copytree(place, tmp_path / "bf16", ignore=lambda *_: ["model"])
    write_shards(tmp_path / "bf16" / "model", original, shards=2)
    (tmp_path / "bf16" / "model" / "config.json").write_text(json.dumps(small_config()))
    write_tokenizer(tmp_path / "bf16" / "model")
    recipe = recipe_of(int4(), {"match": "*e_score_correction_bias", "keep": "source"}, {"match": "*", "keep": "bf16"})
    run(place / "model", recipe, tmp_path / "a")
    run(tmp_path / "bf16" / "model", recipe, tmp_path / "b")
    assert shards_of(tmp_path / "a") == shards_of(tmp_path / "b")


def test_fp8_blocks_of_another_size_are_kept_as_they_are(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_models, "FP8_BLOCK", 64)
    shutil.copytree(place, tmp_path / "job", ignore=lambda *_: ["model"])
    before = write_model(tmp_path / "job" / "model", fp8=True)
    report = run(tmp_path / "job" / "model", recipe_of(tokens=None), tmp_path / "out")
    after = decoded(tmp_path / "out")
    assert all(torch.equal(after[name].to(tensor.dtype), tensor) for name, tensor in before.items())
    shards = [load_file(path) for path in (tmp_path / "out").glob("*.safetensors")]
    assert report.outputs[0].nbytes == sum(tensor.nbytes for shard in shards for tensor in shard.values())


def test_the_same_job_gives_the_same_files(place: Path, tmp_path: Path) -> None:
    recipe = recipe_of(int4(), validated=True)
    for out in ("a", "b"):
        run(place / "model", recipe, tmp_path / out)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    files = files_of(tmp_path / "a")
    assert {"quantkit.json", "README.md", "config.json", "tokenizer.json"} <= set(files)
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    del sums["quantkit.json"], sums["README.md"]
    assert json.loads(files["quantkit.json"])["sha256"] == sums


def test_hidden_states_on_disk_give_the_same_weights(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(int4())
    run(place / "model", recipe, tmp_path / "a")
    monkeypatch.setattr(machine_module.Stores, "__init__", _no_memory(machine_module.Stores.__init__))
    run(place / "model", recipe, tmp_path / "b")
    assert shards_of(tmp_path / "a") == shards_of(tmp_path / "b")


@pytest.mark.parametrize("cross", [0, 0.5])
@pytest.mark.parametrize("config", [{}, {"first_k_dense_replace": 0, "n_shared_experts": 2}], ids=["dense", "shared"])
def test_the_plan_knows_the_most_that_hidden_states_take(
    config: dict[str, Any], cross: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "model", small_config(**config))
    write_text(tmp_path / "calibration.txt")
    rule = int4(grid=2, polish=0, cross=cross)
    most, make = [0], machine_module.Stores.new

    def noting(self: machine_module.Stores, *size: Any) -> Any:
        made = make(self, *size)
        most.append(sum(store.nbytes for store in self._made))
        return made

    monkeypatch.setattr(machine_module.Stores, "new", noting)
    run(tmp_path / "model", recipe_of(rule, tokens=128), tmp_path / "out")
    headers = read_headers(tmp_path / "model")
    plan = make_plan(recipe_of(rule, tokens=128), headers.arch, headers.infos, headers.stored)
    needed = conversion_needs(plan, headers.arch).hidden_states
    assert needed is not None
    assert needed.nbytes == max(most)


def _no_memory(real: Any) -> Any:
    def init(self: Any, folder: Path, budget: int, *device: Any) -> None:
        real(self, folder, 0)

    return init


def test_mtp_is_kept_quantised_or_dropped(place: Path, original: dict[str, torch.Tensor], tmp_path: Path) -> None:
    mtp_layer = ".layers.2."
    wanted = {
        "kept": [],
        "quantised": [{"match": MTP, **INT4_RTN}],
        "dropped": [{"match": MTP, "drop": True}],
    }
    for name, rules in wanted.items():
        run(place / "model", recipe_of(int4(kind="rtn"), *rules, tokens=None), tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["num_nextn_predict_layers"] == (0 if name == "dropped" else 1)
        tensors = {key: tensor for key, tensor in decoded(tmp_path / name).items() if mtp_layer in key}
        if name == "dropped":
            assert not tensors
            continue
        assert set(tensors) == {key for key in original if mtp_layer in key}
        for key, tensor in tensors.items():
            same = torch.equal(tensor.to(original[key].dtype), original[key])
            linear = "_proj" in key and "eh_proj" not in key
            assert same == (name == "kept" or not linear), key
            assert relative(tensor, original[key]) < 0.15


def test_a_nano_model_keeps_its_quality(tmp_path: Path) -> None:
    nano = Path(__file__).parents[2] / "examples" / "nano-deepseek-v3"
    if not (nano / "model.safetensors.index.json").exists():
        pytest.skip("its weights are not here")
    calibration = {"data": ["builtin:mixed"], "tokens": 2048, "sequence_length": 128}
    validation = {"text": ["builtin:eval"], "context": 128, "max_windows_per_file": 1, "max_mean_kl": 0.2}
    means: list[float] = []
    for name, rule in {"gptq": int4(polish=1), "rtn": int4(kind="rtn")}.items():
        recipe = recipe_of(rule, calibration=calibration, validation=validation)
        report = run(nano, recipe, tmp_path / name)
        result = report.outputs[0].validation
        assert result is not None
        assert report.validated
        assert 0.9 < result.scores.perplexity_ratio.mean < 1.2
        means.append(result.scores.mean_kl.mean)
    assert means[0] < means[1]


# ---------------------------------------------------------------------------------------------------- validation


def test_without_limits_nothing_is_kept_or_exceeded(place: Path, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_bytes((place / "eval.txt").read_bytes())
    validation = {"text": [str(tmp_path / "own.txt")], "context": 32, "max_windows_per_file": 2}
    report = run(place / "model", data_free(validation=validation), tmp_path / "out")
    assert report.validated is None
    assert "no limits set" in report_text(report)
    text = (tmp_path / "out" / "quantkit.json").read_text()
    assert json.loads(text)["validated"] is None
    assert json.loads(text)["validation"]["limits"] is False
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| limits of the recipe | no limits set |" in card
    assert "Not validated" not in card
    # The text's folder is this machine's business.
    assert str(tmp_path) not in text + card
    assert "own.txt" in card


def test_a_result_beyond_its_limits_is_kept_and_marked(place: Path, tmp_path: Path) -> None:
    validation = {"text": ["eval.txt"], "context": 32, "max_windows_per_file": 2, "max_mean_kl": 0.0}
    report = run(place / "model", data_free(validation=validation), tmp_path / "out")
    assert not report.validated
    assert report.outputs[0].validation is not None
    (problem,) = report.outputs[0].validation.problems
    assert "the recipe allows 0.00000" in problem
    document = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert document["validated"] is False
    assert document["validation"]["problems"] == [problem]
    assert "**Not validated**" in (tmp_path / "out" / "README.md").read_text()
    assert decoded(tmp_path / "out")


def test_a_single_window_leaves_valid_json(place: Path, tmp_path: Path) -> None:
    """It has no standard error, and JSON has no NaN."""
    validation = {"text": ["eval.txt"], "context": 32, "max_windows_per_file": 1}
    run(place / "model", data_free(validation=validation), tmp_path / "out")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    document = json.loads((tmp_path / "out" / "quantkit.json").read_text(), parse_constant=refuse)
    assert document["validation"]["scores"]["mean_kl"]["standard_error"] is None


@pytest.mark.parametrize(
    ("passed", "whole"),
    [((None, None), None), ((True, None), True), ((True, True), True), ((True, False), False), ((None, False), False)],
)
def test_validated_means_that_all_limits_are_kept_and_that_there_are_some(
    passed: tuple[bool | None, ...], whole: bool | None
) -> None:
    assert validated_as_a_whole(passed) is whole


def test_text_that_repeats_itself_is_named_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "model")
    (tmp_path / "calibration.txt").write_text("The same sentence stands here again and again. " * 2000)
    with PlainProgress() as on_event:
        run(tmp_path / "model", recipe_of(int4(kind="rtn"), tokens=8192), tmp_path / "out", on_event=on_event)
    compiling, first, second, *_ = capsys.readouterr().err.splitlines()
    assert compiling == COMPILING
    assert "8,192 calibration tokens" in first
    assert second.startswith("note: ")


@pytest.mark.parametrize("mtp", ["gptq", "rtn"])
def test_the_bar_follows_a_conversion_that_is_stopped_and_goes_on(
    mtp: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All stages are on the schedule, so the bar rises from 0 to 1, stands still nowhere, and falls nowhere."""
    monkeypatch.setattr(hidden_module, "SAVING_PAUSE", 0)
    rules = (int4("role:mtp", kind=mtp), int4())
    recipe = recipe_of(*rules, others={"second": [int4("role:expert", kind="rtn")]}, validated=True)
    first, second = Followed(stop_after=0), Followed()
    with pytest.raises(KeyboardInterrupt):
        run(place / "model", recipe, tmp_path / "out", on_event=first)
    run(place / "model", recipe, tmp_path / "out", on_event=second)
    for followed in (first, second):
        assert followed.fractions == sorted(followed.fractions)
        assert followed.unknown <= {COMPILING}
    assert 0 < second.fractions[0] <= first.fractions[-1] < 1
    assert second.fractions[-1] == 1.0
    assert len(set(second.fractions)) > 10  # it moves by blocks: four experts are not many


class Followed:
    """A tally of a conversion. ``unknown``: stages that no step is for."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.tally = Tally()
        self.stop_after = stop_after
        self.fractions: list[float] = []
        self.unknown: set[str] = set()

    def __call__(self, event: Event) -> None:
        self.tally.add(event)
        pace = self.tally.pace
        if isinstance(event, StageStarted) and event.stage != VALIDATION:
            here = None if pace is None else pace.steps[min(pace.current, len(pace.steps) - 1)]
            if here is None or (here.kind, here.layer) != (event.stage, event.layer):
                self.unknown.add(event.stage)
        if pace is not None:
            self.fractions.append(self.tally.fraction)
        if isinstance(event, LayerDone) and event.layer == self.stop_after:
            raise KeyboardInterrupt
