"""Reading ahead and writing behind give what doing it in place gives, and lose no error. (Conversions on a processor: a
GPU adds streams.)"""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from quantkit.convert import background, opening
from quantkit.convert.background import AheadSource, Deliveries
from quantkit.convert.events import Event, StageStarted, TensorDone
from quantkit.errors import SourceError
from quantkit.formats import open_source
from quantkit.plan.recipe import Recipe
from tests.convert.gguf_jobs import GPTQ, RTN, compressed, gguf_output, gguf_recipe, wide_config
from tests.convert.jobs import files_of, int4, recipe_of, run, small_config, write_model, write_text

CPU = torch.device("cpu")
devices = pytest.mark.parametrize(
    "device",
    [
        CPU,
        pytest.param(
            torch.device("cuda"),
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")],
        ),
    ],
    ids=str,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    write_model(folder, small_config(num_nextn_predict_layers=0), fp8=True)
    write_text(folder.parent / "calibration.txt")
    return folder


@devices
@pytest.mark.parametrize("ahead_bytes", [1, 10**9])
def test_what_was_announced_is_what_the_source_holds(
    ahead_bytes: int, device: torch.device, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, out of order, never announced, and announced but never read."""
    monkeypatch.setattr(background, "READ_AHEAD_BYTES", ahead_bytes)
    with open_source(model) as source:
        ahead, names = AheadSource(source, device), list(source.infos())
        assert ahead.infos() is source.infos()
        ahead.expect(names[:10])
        for name in (*names[:5], *names[12:6:-1]):
            assert torch.equal(ahead.read(name).cpu(), source.read(name)), name
        ahead.expect(names[20:])
        assert all(torch.equal(ahead.read(name).cpu(), source.read(name)) for name in names[20:])
        ahead.close()


@devices
@pytest.mark.parametrize("fp8", [False, True])
def test_a_bad_tensor_is_refused_where_it_is_read(fp8: bool, device: torch.device, tmp_path: Path) -> None:
    weights = write_model(tmp_path / "bad", small_config(num_nextn_predict_layers=0), fp8=fp8)
    name = next(name for name in weights if "experts.1.up" in name)
    with open_source(tmp_path / "bad") as source:
        stored = source.raw.stored(name)
        with source.raw.path_of(name).open("r+b") as file:
            file.seek(stored.start)
            file.write(b"\xff" * 8)
        ahead = AheadSource(source, device)
        ahead.expect([name, "lm_head.weight"])
        with pytest.raises(SourceError, match=r"8 of .* are NaN or infinite" if fp8 else "NaN or infinite") as found:
            ahead.read(name)
        with pytest.raises(SourceError) as expected:
            source.read(name)
        assert found.value.message == expected.value.message
        assert torch.equal(ahead.read("lm_head.weight").cpu(), source.read("lm_head.weight"))
        ahead.close()


def test_tasks_are_done_in_order_on_another_thread() -> None:
    deliveries, done = Deliveries(CPU), list[tuple[int, int]]()
    for number in range(20):
        deliveries.submit(lambda number=number: done.append((number, threading.get_ident())))
    deliveries.drain()
    assert [number for number, _ in done] == list(range(20))
    assert {thread for _, thread in done} != {threading.get_ident()}
    deliveries.close()


def test_an_error_ends_the_deliveries_and_is_raised_to_whom_hands_over() -> None:
    deliveries, done, handed_over = Deliveries(CPU), list[str](), threading.Event()

    def fail() -> None:
        handed_over.wait()
        raise OSError("the disk is full")

    deliveries.submit(fail)
    deliveries.submit(lambda: done.append("after"))
    handed_over.set()
    with pytest.raises(OSError, match="the disk is full"):
        deliveries.drain()
    with pytest.raises(OSError, match="the disk is full"):
        deliveries.submit(lambda: done.append("later"))
    deliveries.close()
    assert done == []


INT4 = recipe_of(int4(grid=2, polish=0), tokens=128)
TWO_FORMATS = gguf_recipe(
    gguf_output({"match": "role:expert", "scheme": "Q4_0", "method": RTN}, preset="Q4_K_M"),
    compressed({"match": "role:expert", "scheme": {"kind": "int", "bits": 4, "group_size": 64}, "method": GPTQ}),
    tokens=128,
)


@pytest.mark.parametrize("recipe", [INT4, TWO_FORMATS], ids=["int4", "two formats, with an imatrix"])
def test_a_conversion_writes_the_same_bytes_beside_its_work(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "model", wide_config(num_nextn_predict_layers=0), fp8=True)
    write_text(tmp_path / "calibration.txt")
    run(tmp_path / "model", recipe, tmp_path / "in-place")
    monkeypatch.setattr(opening, "_works_beside", lambda machine: True)
    run(tmp_path / "model", recipe, tmp_path / "beside")
    found, expected = files_of(tmp_path / "beside"), files_of(tmp_path / "in-place")
    assert found.keys() == expected.keys()
    assert {name for name in expected if found[name] != expected[name]} == set()


@pytest.mark.parametrize("kind", [StageStarted, TensorDone])
def test_an_interrupted_conversion_leaves_no_thread_and_goes_on(
    kind: type[Event], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the thread that computes, or in the one that writes."""
    run(model, INT4, tmp_path / "unbroken")
    monkeypatch.setattr(opening, "_works_beside", lambda machine: True)
    seen: list[int] = []

    def interrupt(event: Event) -> None:
        if isinstance(event, kind):
            seen.append(threading.get_ident())
        if len(seen) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, INT4, tmp_path / "out", on_event=interrupt)
    assert (seen[-1] == threading.get_ident()) == (kind is StageStarted)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(("read", "deliver"))]
    run(model, INT4, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "unbroken")
