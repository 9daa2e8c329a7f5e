"""What a stopped job does not go on with: another job, a source that changed, files that are gone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from quantkit.convert.events import Event, LayerDone
from quantkit.errors import OutputError
from quantkit.plan.recipe_validation import Validation
from tests.convert.jobs import (
    BUDGET,
    data_free,
    files_of,
    int4,
    recipe_of,
    run,
    shards_of,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),  # one thread: nothing to lock
]


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
    with pytest.raises(OutputError, match=r"layer-0-stream-0-slice-0\.f32: has 0 bytes"):
        run(place / "model", recipe_of(int4()), tmp_path / "out")
