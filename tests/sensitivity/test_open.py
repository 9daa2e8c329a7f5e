"""A finished pass is opened for the checkpoint that it was made of; whatever else lies there is refused in a line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.documents.sensitivity import SENSITIVITY, read_sensitivity
from quantkit.errors import OutputError, QuantkitError, SourceError
from quantkit.formats import open_source
from quantkit.plan.headers import headers_of
from quantkit.sensitivity.layer_files import file_name
from quantkit.sensitivity.open import Sensitivity, open_sensitivity
from tests.arch.relatives import deepseek_v2
from tests.convert.jobs import small_config, write_model
from tests.sensitivity.passes import fisher_pass

SMALL = small_config()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and a pass over it."""
    root = tmp_path_factory.mktemp("made")
    write_model(root / "model", SMALL)
    tokens = torch.randint(0, 1024, (2, 20), generator=torch.Generator().manual_seed(1))
    fisher_pass(root / "model", root / "pass", tokens)
    return root


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    shutil.copytree(made / "pass", tmp_path / "pass")
    return tmp_path / "pass"


def opened(model: Path, folder: Path) -> Sensitivity:
    with open_source(model) as source:
        return open_sensitivity(folder, source, headers_of(source).arch)


def refusal(model: Path, folder: Path) -> str:
    with pytest.raises((SourceError, OutputError)) as caught:
        opened(model, folder)
    assert isinstance(caught.value, QuantkitError)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_scalars_by_name(made: Path) -> None:
    found = opened(made / "model", made / "pass")
    one = found.fisher("model.layers.1.self_attn.q_b_proj.weight")
    assert one is not None
    assert one.tokens == 40
    assert one.fisher > 0
    assert found.fisher("lm_head.weight") is None


def test_round_trip_and_room_for_losses(made: Path) -> None:
    """What another program adds stays."""
    found = read_sensitivity(made / "pass")
    assert found.losses is None
    assert (made / "pass" / SENSITIVITY).read_text() == found.to_json()
    name = next(iter(found.linears))
    more = found.model_copy(update={"losses": {name: {"Q4_K": 1e-3}}})
    assert type(found).model_validate_json(more.to_json()) == more


@pytest.mark.parametrize("options", [{"seed": 7}, {"fp8": True}], ids=["other weights", "FP8"])
def test_other_files_of_the_same_model(options: dict[str, Any], made: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "other", SMALL, **options)
    assert "is of another checkpoint" in refusal(tmp_path / "other", made / "pass")


def test_other_models(made: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "deeper", small_config(num_hidden_layers=3))
    assert "is of another model: 2 layers of width 128; 3 layers" in refusal(tmp_path / "deeper", made / "pass")
    write_model(tmp_path / "v2", deepseek_v2(num_hidden_layers=2, vocab_size=1024))
    assert "is of another model; it names 'model.layers.0.self_attn.q_a_proj" in refusal(tmp_path / "v2", made / "pass")


def test_no_pass(made: Path, tmp_path: Path) -> None:
    assert f"holds no {SENSITIVITY}" in refusal(made / "model", tmp_path)
    assert f"holds no {SENSITIVITY}" in refusal(made / "model", tmp_path / "nowhere")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def absurd(path: Path) -> None:
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])


def renamed(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"gradient.1"', b'"gradient.7"', 1))


def narrower(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))


@pytest.mark.parametrize("damage", [Path.unlink, truncated, longer, emptied, absurd, renamed, narrower])
def test_damaged_layers(damage: Callable[[Path], None], made: Path, folder: Path) -> None:
    damage(folder / file_name(1))
    assert file_name(1) in refusal(made / "model", folder)


def test_a_layer_that_shrinks_later(made: Path, folder: Path) -> None:
    with open_source(made / "model") as source:
        found = open_sensitivity(folder, source, headers_of(source).arch)
        truncated(folder / file_name(0))
        with pytest.raises(SourceError, match="too early"):
            found.gradient_after(0, lambda *shape: _store(*shape))


def _store(n_rows: int, length: int, width: int) -> Any:
    from quantkit.calibrate.hidden_states import MemoryRows

    return MemoryRows(n_rows, length, width)


Change = Callable[[dict[str, Any]], object]
CHANGES: dict[str, Change] = {
    "rows": lambda d: d["job"].update(rows=2**30),
    "no rows": lambda d: d["job"].update(rows=0),
    "negative": lambda d: d["job"].update(length=-1),
    "endless": lambda d: d["job"].update(sublayers=[2, 2**30]),
    "no layers": lambda d: d["job"].update(sublayers=[]),
    "dtype": lambda d: d["job"].update(dtype="F64"),
    "no job": lambda d: d.pop("job"),
    "kind": lambda d: d.update(kind="quantkit evaluation"),
    "unknown linear": lambda d: d["linears"].update({"model.layers.9": {"tokens": 1, "fisher": 1}}),
    "no number": lambda d: next(iter(d["linears"].values())).update(fisher="much"),
    "null": lambda d: next(iter(d["linears"].values())).update(fisher=None),
    "below zero": lambda d: next(iter(d["linears"].values())).update(fisher=-1.0),
    "list": lambda d: d.update(linears=[]),
    "losses": lambda d: d.update(losses={"x": 3}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_hostile_documents(change: Change, made: Path, folder: Path) -> None:
    document = json.loads((folder / SENSITIVITY).read_text())
    change(document)
    (folder / SENSITIVITY).write_text(json.dumps(document))
    refusal(made / "model", folder)


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"[" * 100_000, b"[]", b'{"linears": 1e999}'])
def test_no_documents(text: bytes, made: Path, folder: Path) -> None:
    (folder / SENSITIVITY).write_bytes(text)
    assert SENSITIVITY in refusal(made / "model", folder)
