"""What a new layout of folders costs: a value of a few functions. Plan, conversion and reading are there already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.errors import OutputError, PlanError, SchemeError, SourceError
from quantkit.formats import layouts
from quantkit.formats.folder import (
    FolderLayout,
    FolderReader,
    FolderSink,
    FolderSource,
    PackedLinear,
    Rows,
    by_runs,
    part,
)
from quantkit.formats.planned import PlannedTensor
from quantkit.formats.safetensors.reader import SafetensorsSource
from quantkit.schemes import Float8Scheme, IntScheme, QuantError, QuantizedTensor, Scheme
from quantkit.tensors import TensorInfo
from tests.convert.jobs import decoded, files_of, int4, recipe_of, run, write_model, write_text

# --- the layout -------------------------------------------------------------------------------------------------------
#
#     P.codes   uint8 (in, out)       one code a byte; outputs run fastest, as in GPTQ
#     P.scales  float32 (out, groups)


def check(name: str, shape: tuple[int, ...], scheme: Scheme) -> None:
    """Symmetric integers."""
    if not isinstance(scheme, IntScheme) or not scheme.symmetric:
        raise SchemeError(f"{name}: toy cannot store {scheme.label}.", hint="Take symmetric integers.")


def stored(tensor: PlannedTensor) -> tuple[TensorInfo, ...]:
    """Codes and scales."""
    assert isinstance(tensor.scheme, IntScheme)
    n_out, n_in = tensor.info.shape
    return (
        TensorInfo(f"{tensor.module}.codes", (n_in, n_out), "U8"),
        TensorInfo(f"{tensor.module}.scales", (n_out, tensor.scheme.n_groups(n_in)), "F32"),
    )


def pack(tensor: QuantizedTensor) -> Mapping[str, Tensor]:
    """The same, filled."""
    module = tensor.name.removesuffix(".weight")
    return {f"{module}.codes": tensor.stored["codes"].T, f"{module}.scales": tensor.stored["scale"].float()}


def config(planned: Sequence[PlannedTensor]) -> dict[str, object]:
    """One number of bits for all."""
    bits = {tensor.scheme.bits for tensor in planned if isinstance(tensor.scheme, IntScheme)}
    return {"quant_method": "toy", "bits": bits.pop()} if bits else {}


def problems(planned: Sequence[PlannedTensor]) -> list[str]:
    """Two numbers of bits."""
    bits = {tensor.scheme.bits for tensor in planned if isinstance(tensor.scheme, IntScheme)}
    return [f"toy holds linears of one width, planned are {sorted(bits)} bits."] if len(bits) > 1 else []


@dataclass(frozen=True, slots=True)
class ToyLinear:
    """A `PackedLinear`."""

    info: TensorInfo
    scheme: IntScheme
    parts: tuple[str, str]

    def decode(self, raw: SafetensorsSource, rows: Rows) -> Tensor:
        """Rows of the weight are columns of the codes: all of them are read."""
        codes, scales = (raw.read(name) for name in self.parts)
        n_in = self.info.shape[1]
        return by_runs(rows, n_in, lambda a, b: self.scheme.decode(codes[:, a:b].T.contiguous(), scales[a:b]))


def find(raw: SafetensorsSource, section: Mapping[str, object]) -> Mapping[str, PackedLinear]:
    """A linear for each ``P.codes``."""
    linears: dict[str, PackedLinear] = {}
    for module in [name.removesuffix(".codes") for name in raw.infos() if name.endswith(".codes")]:
        n_in, n_out = part(raw, f"{module}.codes", ("U8",), (None, None)).shape
        n_groups = part(raw, f"{module}.scales", ("F32",), (n_out, None)).shape[1]
        scheme = IntScheme.model_validate({"bits": section["bits"], "group_size": n_in // n_groups})
        info = TensorInfo(f"{module}.weight", (n_out, n_in), "F32")
        linears[info.name] = ToyLinear(info, scheme, (f"{module}.codes", f"{module}.scales"))
    return linears


TOY = FolderLayout(FolderReader("toy", find), check, stored, pack, config, problems)

# --- what it is worth -------------------------------------------------------------------------------------------------

INT4 = IntScheme(group_size=64)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout under a name that recipes know."""
    monkeypatch.setitem(layouts.LAYOUTS, "compressed-tensors", TOY)  # pyright: ignore[reportArgumentType]
    monkeypatch.setitem(layouts.READERS, "toy", TOY.reader)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("toy")
    write_model(root / "model")
    write_text(root / "calibration.txt")
    write_text(root / "eval.txt", 200)
    return root


@pytest.mark.usefixtures("toy")
def test_a_conversion_into_it_decodes_to_the_same_bits(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = run(place / "model", recipe_of(int4(), validated=True), place / "toy")
    assert report.outputs[0].validation is not None
    monkeypatch.undo()
    run(place / "model", recipe_of(int4()), place / "ct")
    expected = decoded(place / "ct")
    with FolderSource(place / "toy", TOY.reader) as source:
        linears = [name for name in source.infos() if source.scheme(name)]
        assert set(source.infos()) == set(expected)
        assert len(linears) > 20
        assert source.config["quantization_config"] == {"quant_method": "toy", "bits": 4}
        source.prefetch(list(expected))
        for name, weight in expected.items():
            assert torch.equal(source.read(name), weight), name
        name = linears[0]
        assert torch.equal(source.read(name, (3, 9)), expected[name][3:9])
        assert torch.equal(source.read_rows(name, [7, 0, 7]), expected[name][[7, 0, 7]])
        assert torch.equal(torch.cat(list(source.chunks(name, 4096))), expected[name])


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("rules", "line"),
    [
        ([int4("role:expert"), int4("role:mlp") | {"scheme": {"kind": "int", "bits": 8}}], "are [4, 8] bits."),
        ([int4() | {"scheme": {"kind": "int", "symmetric": False}}], "toy cannot store int4 g128 asymmetric (and"),
        ([int4() | {"scheme": {"kind": "ggml", "type": "Q4_0"}}], "toy cannot store Q4_0 (and"),
    ],
)
def test_the_plan_refuses_what_it_cannot_hold(rules: list[dict[str, Any]], line: str, place: Path) -> None:
    with pytest.raises(PlanError) as refused:
        run(place / "model", recipe_of(*rules), place / "refused")
    assert line in refused.value.message


@pytest.mark.usefixtures("toy")
def test_kept_fp8_is_refused_where_the_layout_lacks_it(tmp_path: Path) -> None:
    write_model(tmp_path / "model", fp8=True)
    with pytest.raises(PlanError, match=r"toy cannot store fp8 block\. Take symmetric integers\."):
        run(tmp_path / "model", recipe_of(int4("role:expert", kind="rtn"), tokens=None), tmp_path / "out")


# --- what every layout gets from the sink -----------------------------------------------------------------------------


def planned(*names: str) -> list[PlannedTensor]:
    return [PlannedTensor(TensorInfo(name, (8, 128), "BF16"), INT4, None) for name in names]


def quantised(name: str, weight: Tensor) -> QuantizedTensor:
    scale, _ = INT4.fit(weight, grid=0)
    return QuantizedTensor(name, INT4, {"codes": INT4.encode(weight, scale), "scale": scale}, QuantError(0.0))


def test_an_interrupted_sink_gives_the_same_bytes_and_misses_what_was_never_written(tmp_path: Path) -> None:
    plan = planned("a.weight", "b.weight")
    tensors = [quantised(tensor.name, torch.randn(8, 128)) for tensor in plan]
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    whole = FolderSink.open(TOY, tmp_path / "whole", plan)
    for tensor in tensors:
        whole.write(tensor)
    whole.finish()
    first = FolderSink.open(TOY, tmp_path / "parts", plan)
    first.write(tensors[1])
    first.close()
    second = FolderSink.open(TOY, tmp_path / "parts", plan)
    assert not second.fresh
    with pytest.raises(OutputError, match=r"a\.weight and 0 other linears were never written"):
        second.finish()
    second.write(tensors[0])
    second.finish()
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "parts")


def test_what_the_plan_does_not_say_is_not_written(tmp_path: Path) -> None:
    sink = FolderSink.open(TOY, tmp_path, planned("a.weight"))
    tensor = quantised("a.weight", torch.randn(8, 128))
    tensor.stored["scale"][0, 0] = torch.inf
    with pytest.raises(SchemeError, match=r"a\.weight: a scale is NaN or infinite"):
        sink.write(tensor)
    with pytest.raises(AssertionError, match="planned kind='int'"):
        sink.write(QuantizedTensor("a.weight", Float8Scheme(), tensor.stored, QuantError(0.0)))


def test_a_folder_without_a_section_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceError, match="quantization_config is None, an object was needed"):
        FolderSource(tmp_path, TOY.reader)
