"""A conversion as a whole: the files are what the report says, the same job gives the same bytes, bad input a line."""

from __future__ import annotations

import errno
import hashlib
import json
import os
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
from quantkit.errors import CalibrationError, OutputError, PlanError, QuantkitError, SourceError
from quantkit.evaluate.compare import Model, compare
from quantkit.evaluate.validation import summarise
from quantkit.formats.folder import FolderSource
from quantkit.formats.layouts.compressed_tensors import COMPRESSED_TENSORS
from quantkit.plan import machine as machine_module
from quantkit.plan.forecast import forecast
from quantkit.plan.headers import read_headers
from quantkit.plan.memory import conversion_needs
from quantkit.plan.plan import make_plan
from quantkit.plan.recipe import Validation
from quantkit.plan.schedule import COMPILING, VALIDATION
from quantkit.schemes import IntScheme
from quantkit.text.converted import report_text
from quantkit.text.progress import PlainProgress
from tests import tiny_models
from tests.convert.jobs import (
    BUDGET,
    INT4_RTN,
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
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The FP8 checkpoint "model", and the texts."""
    folder = tmp_path_factory.mktemp("job")
    write_text(folder / "calibration.txt")
    write_text(folder / "eval.txt", 200)
    write_model(folder / "model", fp8=True)
    return folder


@pytest.fixture(scope="module")
def original(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return write_checkpoint(tmp_path_factory.mktemp("same"), small_config(), fp8=True)


def data_free(**changes: Any) -> Any:
    return recipe_of(int4(kind="rtn"), tokens=None, **changes)


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
    assert found.scores == expected
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
    plan = make_plan(recipe_of(rule, tokens=128), headers.arch, headers.infos, headers.is_float8, headers.block_size)
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


# ------------------------------------------------------------------------------------------------- the output folder


def test_an_existing_out_is_refused_untouched_and_replaced_only_at_the_end(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(place / "model", data_free(), out)
    before = files_of(tmp_path)
    with pytest.raises(OutputError, match="exists already"):
        run(place / "model", data_free(), out)
    assert files_of(tmp_path) == before
    old = (out / "config.json").stat().st_ino
    seen: list[bool] = []
    run(
        place / "model",
        data_free(),
        out,
        restart=True,
        on_event=lambda event: (
            seen.append((out / "config.json").stat().st_ino == old) if not isinstance(event, Finished) else None
        ),
    )
    assert all(seen)
    assert (out / "config.json").stat().st_ino != old
    assert files_of(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_disk_forecast_counts_every_file(place: Path, tmp_path: Path) -> None:
    """Weights are few here, so what lies beside them shows."""
    recipe, seen = data_free(), []
    expected = forecast(place / "model", recipe, base_dir=place).needs.disk_bytes

    def count(event: Event) -> None:
        files = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
        seen.append(sum(files))

    run(place / "model", recipe, tmp_path / "out", on_event=count)
    assert max(seen) <= expected
    beside = sum(path.stat().st_size for path in (place / "model").glob("tokenizer*"))
    assert 0 < beside < expected


def test_a_second_process_is_refused_while_the_first_lives(place: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def second(event: Event) -> None:
        if isinstance(event, LayerDone):
            child = os.fork()
            if child == 0:
                try:
                    run(place / "model", data_free(), tmp_path / "out", restart=event.layer == 1)
                except OutputError as error:
                    os._exit(7 if "another process is working on it" in str(error) else 8)
                os._exit(9)
            refused.append(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))

    report = run(place / "model", data_free(), tmp_path / "out", on_event=second)
    assert refused == ["7", "7", "7"]
    assert not report.resumed
    assert decoded(tmp_path / "out")


def test_a_folder_that_holds_the_source_or_the_user_is_never_replaced(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place, tmp_path / "job")
    (tmp_path / "work" / "here").mkdir(parents=True)
    (tmp_path / "users" / "me").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "users" / "me"))
    before = files_of(tmp_path)
    source = tmp_path / "job" / "model"
    folders = (source, tmp_path / "job", tmp_path, tmp_path / "work", Path("../here"), Path.home(), Path.home().parent)
    for out in folders:
        for restart in (True, False):
            with pytest.raises(OutputError):
                run(source, data_free(), out, restart=restart)
    assert files_of(tmp_path) == before


class Stop(Exception):
    """A kill that leaves the test alive."""


def stop_after(layer: int) -> Any:
    def on_event(event: Event) -> None:
        if isinstance(event, LayerDone) and event.layer == layer:
            raise Stop

    return on_event


def test_an_unfinished_job_goes_on_only_as_the_same_job(place: Path, tmp_path: Path) -> None:
    recipe = data_free()
    with pytest.raises(Stop):
        run(place / "model", recipe, tmp_path / "out", on_event=stop_after(0))
    before = files_of(tmp_path / "out.partial")
    other = recipe_of(int4("role:expert", kind="rtn"), tokens=None)
    for changes, name in (
        ({"recipe": other}, "recipe"),
        ({"source": _changed(place, tmp_path)}, "source"),
    ):
        job = {"source": place / "model", "recipe": recipe, **changes}
        with pytest.raises(OutputError, match=rf"an unfinished job that differs from this one: {name}\. .*--restart"):
            run(out=tmp_path / "out", base_dir=place, **job)
    assert files_of(tmp_path / "out.partial") == before
    assert not (tmp_path / "out").exists()
    report = run(place / "model", recipe, tmp_path / "out")
    assert report.resumed
    run(place / "model", recipe, tmp_path / "unbroken")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "unbroken")


def test_validation_and_memory_budget_may_change_on_resume(place: Path, tmp_path: Path) -> None:
    """Neither changes a byte of the weights: an error that the end reports must not cost the layers."""
    recipe = data_free()
    with pytest.raises(Stop):
        run(place / "model", recipe, tmp_path / "out", on_event=stop_after(0))
    text = tmp_path / "held-out.txt"
    text.write_text("The river ran past the old mill and into the sea. " * 40)
    scored = recipe.model_copy(update={"validation": Validation(text=(str(text),), context=64)})
    layers: list[int] = []
    report = run(
        place / "model",
        scored,
        tmp_path / "out",
        memory_budget=BUDGET * 2,
        on_event=lambda event: layers.append(event.layer) if isinstance(event, LayerDone) else None,
    )
    assert report.resumed
    assert 0 not in layers
    assert report.outputs[0].validation is not None
    unbroken = run(place / "model", recipe, tmp_path / "unbroken")
    assert shards_of(report.outputs[0].path) == shards_of(unbroken.outputs[0].path)


def test_a_mount_point_is_refused_as_output(tmp_path: Path, place: Path) -> None:
    mounted = Path("/dev/shm")
    if not mounted.is_mount():
        pytest.skip("/dev/shm is no mount point here")
    before = sorted(mounted.iterdir())
    for restart in (True, False):
        with pytest.raises(OutputError, match="is a mount point.*-o /dev/shm/NAME"):
            run(place / "model", data_free(), mounted, restart=restart)
    assert sorted(mounted.iterdir()) == before
    assert not mounted.with_name("shm.partial").exists()


@pytest.mark.parametrize(
    ("passed", "whole"),
    [((None, None), None), ((True, None), True), ((True, True), True), ((True, False), False), ((None, False), False)],
)
def test_validated_means_that_all_limits_are_kept_and_that_there_are_some(
    passed: tuple[bool | None, ...], whole: bool | None
) -> None:
    assert validated_as_a_whole(passed) is whole


def test_a_disk_that_is_too_full_is_refused_before_anything_is_made(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second try with fewer tokens must not meet what the first one left."""
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4321))
        with pytest.raises(PlanError, match=r"out: needs .* of disk, .* has 4\.3 kB free"):
            run(place / "model", data_free(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def rewritten(path: Path) -> None:
    """Other bytes, but the size and the times that a program can set are the old ones."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-8:] = bytes(8)
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", ["rewritten", "touched", "replaced", "tokenizer_config.json", "chat_template.jinja"])
def test_a_source_that_changed_since_the_stop_is_refused_by_name(change: str, place: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(place / "model", source)
    with pytest.raises(Stop):
        run(source, data_free(), tmp_path / "out", on_event=stop_after(0))
    before = files_of(tmp_path / "out.partial")
    shard = max(source.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    said = rf"{shard.name} changed since this job began\. .*--restart"
    if change == "rewritten":
        rewritten(shard)
    elif change == "touched":
        shard.touch()
    elif change == "replaced":
        shutil.copy2(shard, tmp_path / "copy")
        (tmp_path / "copy").rename(shard)
    else:
        (source / change).write_text('{"bos_token": "<bos>"}')
        said = r"out\.partial: holds an unfinished job that differs from this one: tokenizer\. .*--restart"
    with pytest.raises(OutputError, match=said) as refused:
        run(source, data_free(), tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert files_of(tmp_path / "out.partial") == before


def _changed(place: Path, tmp_path: Path) -> Path:
    """The same checkpoint with one norm epsilon in config.json changed."""
    shutil.copytree(place / "model", tmp_path / "changed")
    config = json.loads((place / "model" / "config.json").read_text())
    (tmp_path / "changed" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    return tmp_path / "changed"


def test_shards_removed_from_an_unfinished_job_are_missed(place: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run(place / "model", data_free(), tmp_path / "out", on_event=stop_after(0))
    shutil.rmtree(tmp_path / "out.partial" / "result")
    with pytest.raises(OutputError, match="files of the unfinished job are gone"):
        run(place / "model", data_free(), tmp_path / "out")


def test_hidden_states_removed_from_an_unfinished_job_are_missed(place: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run(place / "model", recipe_of(int4()), tmp_path / "out", on_event=stop_after(0))
    for path in (tmp_path / "out.partial" / "hidden").iterdir():
        path.unlink()
    with pytest.raises(OutputError, match=r"layer-0-stream-0\.f32: has 0 bytes"):
        run(place / "model", recipe_of(int4()), tmp_path / "out")


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.experts.2.up_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.embed_tokens.weight",
        "model.layers.2.eh_proj.weight",
    ],
)
def test_a_weight_that_is_no_number_is_one_line(name: str, value: float, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path / "bad", ignore=lambda *_: ["model"])
    weights = write_model(tmp_path / "bad" / "model")
    weights[name][1, 3] = value
    write_shards(tmp_path / "bad" / "model", weights)
    with pytest.raises(SourceError) as caught:
        run(tmp_path / "bad" / "model", recipe_of(int4(kind="rtn"), tokens=64), tmp_path / "out")
    assert name in caught.value.message
    assert ".safetensors" in caught.value.message
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_refused_before_any_work(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path / "bad", ignore=lambda *_: ["model"])
    write_model(tmp_path / "bad" / "model", small_config(vocab_size=40))
    with pytest.raises(CalibrationError, match="vocab_size 40"):
        run(tmp_path / "bad" / "model", recipe_of(int4()), tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_what_cannot_work_is_refused_before_any_work(place: Path, tmp_path: Path) -> None:
    too_wide = {"match": "*", "scheme": {"kind": "int", "bits": 4, "group_size": 96}, "method": {"kind": "rtn"}}
    cases: tuple[tuple[Any, dict[str, Any]], ...] = (
        (recipe_of(int4(), tokens=None), {}),
        (recipe_of(too_wide, tokens=None), {}),
        (recipe_of(int4(), tokens=10**6), {}),
        (recipe_of(int4()), {"memory_budget": 1000}),
        (recipe_of(int4()), {"base_dir": tmp_path}),
    )
    for recipe, options in cases:
        with pytest.raises(QuantkitError):
            run(place / "model", recipe, tmp_path / "out", **options)
        assert not list(tmp_path.iterdir())


def test_a_device_that_is_not_there_is_refused(place: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(PlanError, match="torch sees no GPU"):
        run(place / "model", data_free(), tmp_path / "out", device="cuda")


# ---------------------------------------------------------------------------------------------------- full disk


def no_space(*_: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def unbroken(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    run(place / "model", recipe_of(int4(), validated=True), out)
    return files_of(out)


@pytest.mark.parametrize("writes", [0, 1, 20, 90, 150])
def test_a_full_disk_leaves_a_job_that_goes_on(
    writes: int, place: Path, unbroken: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the n-th pwrite: of a shard's header, a kept tensor, a linear, hidden states."""
    recipe = recipe_of(int4(), validated=True)
    real, count = os.pwrite, 0

    def pwrite(*arguments: Any) -> int:
        nonlocal count
        count += 1
        return real(*arguments) if count <= writes else no_space()

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(OutputError, match=r"full|disk|free"):
            run(place / "model", recipe, tmp_path / "out")
    assert count > writes
    assert not (tmp_path / "out").exists()
    run(place / "model", recipe, tmp_path / "out")
    assert files_of(tmp_path / "out") == unbroken


@pytest.mark.parametrize("call", ["posix_fallocate", "fsync"])
def test_a_disk_that_is_full_from_the_start(
    call: str, place: Path, unbroken: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(int4(), validated=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, no_space)
        with pytest.raises(OutputError):
            run(place / "model", recipe, tmp_path / "out")
    run(place / "model", recipe, tmp_path / "out")
    assert files_of(tmp_path / "out") == unbroken


def test_text_that_repeats_itself_is_named_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "model")
    (tmp_path / "calibration.txt").write_text("The same sentence stands here again and again. " * 2000)
    with PlainProgress() as on_event:
        run(tmp_path / "model", recipe_of(int4(kind="rtn"), tokens=8192), tmp_path / "out", on_event=on_event)
    compiling, first, second, *_ = capsys.readouterr().err.splitlines()
    assert compiling == COMPILING
    assert "8,192 calibration tokens" in first
    assert second.startswith("note: ")


def test_the_bar_follows_a_conversion_that_is_stopped_and_goes_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All stages are on the schedule, so the bar rises from 0 to 1, stands still nowhere, and falls nowhere."""
    monkeypatch.setattr(hidden_module, "SAVING_PAUSE", 0)
    rules = ({"match": "role:mtp", **INT4_RTN}, int4())
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
