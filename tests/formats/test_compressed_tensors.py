"""What we write, transformers reads: names, numbers, and the logits of our own decoded weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from quantkit.arch import arch_of
from quantkit.errors import OutputError, SchemeError
from quantkit.formats.bundle import write_config
from quantkit.formats.folder import FolderSink, FolderSource
from quantkit.formats.layouts.compressed_tensors import COMPRESSED_TENSORS
from quantkit.formats.layouts.compressed_tensors_config import quantization_config
from quantkit.formats.planned import PlannedTensor
from quantkit.schemes import (
    Float8Scheme,
    IntScheme,
    Mxfp4Scheme,
    Mxfp8Scheme,
    Nvfp4Scheme,
    QuantError,
    QuantizedTensor,
    Scheme,
    W4AFp8Scheme,
)
from quantkit.tensors import Role, TensorInfo, TensorSpec
from tests.tiny_models import encode_fp8_blocks, random_weights, tiny_config

Rule = Callable[[TensorSpec], Scheme | None]

INT4 = IntScheme()
INT8 = IntScheme(bits=8)
# Channel scales, three layers of which one dense, and no MTP: transformers does not load MTP layers.
CONFIG = tiny_config(num_nextn_predict_layers=0, num_hidden_layers=2, n_routed_experts=8, hidden_size=128)


def is_expert(spec: TensorSpec) -> bool:
    return spec.expert is not None


def plan(config: dict[str, object], rule: Rule) -> list[PlannedTensor]:
    planned: list[PlannedTensor] = []
    for spec in arch_of(config).tensors():
        dtype = "F32" if spec.float32 else "BF16"
        scheme = rule(spec) if spec.linear else None
        info = TensorInfo(spec.name, spec.shape, dtype)
        planned.append(PlannedTensor(info, scheme, None if scheme else dtype, spec))
    return planned


def quantize(name: str, weight: torch.Tensor, scheme: Scheme, *, negate: bool = False) -> QuantizedTensor:
    """Round to nearest; ``negate`` turns every other scale negative."""
    if isinstance(scheme, Nvfp4Scheme | Mxfp4Scheme | Mxfp8Scheme | W4AFp8Scheme):
        stored = scheme.rounded(weight.float().unsqueeze(0), None, points=0, signed=False)
        return QuantizedTensor(name, scheme, {key: value[0] for key, value in stored.items()}, QuantError(0.0))
    if isinstance(scheme, Float8Scheme):
        codes, scale = encode_fp8_blocks(weight.float())
        return QuantizedTensor(name, scheme, {"codes": codes, "scale": scale}, QuantError(0.0))
    assert isinstance(scheme, IntScheme)
    scale, zero_point = scheme.fit(weight.float(), grid=0)
    if negate:
        scale[::2] *= -1
    codes = scheme.encode(weight.float(), scale, zero_point)
    stored = {"codes": codes, "scale": scale} | ({} if zero_point is None else {"zero_point": zero_point})
    return QuantizedTensor(name, scheme, stored, QuantError(0.0))


def write_all(
    directory: Path,
    planned: list[PlannedTensor],
    weights: dict[str, torch.Tensor],
    max_shard_bytes: int = 300_000,
    *,
    negate: bool = False,
    backwards: bool = False,
) -> dict[str, QuantizedTensor]:
    directory.mkdir(exist_ok=True)
    sink = FolderSink.open(COMPRESSED_TENSORS, directory, planned, max_shard_bytes)
    quantized: dict[str, QuantizedTensor] = {}
    for tensor in reversed(planned) if backwards else planned:
        weight = weights[tensor.name]
        if tensor.scheme is None:
            middle = len(weight) // 2
            sink.write_kept(tensor.name, middle, weight[middle:])
            sink.write_kept(tensor.name, 0, weight[:middle])
        else:
            quantized[tensor.name] = quantize(tensor.name, weight, tensor.scheme, negate=negate)
            sink.write(quantized[tensor.name])
    sink.sync()
    sink.finish()
    return quantized


def decoded(weights: dict[str, torch.Tensor], quantized: dict[str, QuantizedTensor]) -> dict[str, torch.Tensor]:
    """float32 weights as transformers computes with them: it decodes FP4 in bfloat16, and routed experts of integers in
    the dtype of their scales (vLLM all linears)."""
    result = {name: weight.float() for name, weight in weights.items()}
    for name, tensor in quantized.items():
        weight = tensor.decode()
        if isinstance(tensor.scheme, Nvfp4Scheme | Mxfp4Scheme | Mxfp8Scheme):
            weight = weight.bfloat16().float()
        elif ".experts." in name:
            weight = weight.to(tensor.stored["scale"].dtype).float()
        result[name] = weight
    return result


def loaded_logits(directory: Path, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    transformers_logging.disable_progress_bar()
    model, report = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not report.get(kind), f"{kind}: {report[kind]}"
    if dtype != torch.float32:
        model(tokens)  # the first pass decodes linears, FP4 always to bfloat16
    # transformers leaves routed experts in the dtype of their scales, whatever was asked for, and would compute in it.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    with torch.no_grad():
        return model.eval()(tokens).logits


def dense_logits(
    directory: Path, config: dict[str, object], weights: dict[str, torch.Tensor], tokens: torch.Tensor
) -> torch.Tensor:

    directory.mkdir()
    save_file(
        {name: weight.contiguous() for name, weight in weights.items()},
        directory / "model.safetensors",
        {"format": "pt"},
    )
    write_config(directory, config, {})
    return loaded_logits(directory, tokens)


CASES: dict[str, Rule] = {
    "int4 g128": lambda spec: INT4,
    "int4 experts, int8 rest": lambda spec: INT4 if is_expert(spec) else INT8,
    "int4 g128, float32 scales": lambda spec: IntScheme(scale_dtype="float32"),
    "experts only": lambda spec: INT4 if is_expert(spec) else None,
    "int8 channel": lambda spec: IntScheme(bits=8, group_size=None),
    "mxfp4": lambda spec: Mxfp4Scheme(),
    "w4afp8 experts, int8 rest": lambda spec: W4AFp8Scheme() if is_expert(spec) else INT8,
    "nvfp4 beside int4 experts": lambda spec: INT4 if is_expert(spec) else Nvfp4Scheme(),
    "int3 g64, kv_b kept": lambda spec: None if "kv_b" in spec.name else IntScheme(bits=3, group_size=64),
    "int5 experts, int4 f32 shared, kept dense": lambda spec: (
        IntScheme(bits=5)
        if is_expert(spec)
        else IntScheme(scale_dtype="float32", group_size=32)
        if spec.role is Role.SHARED_EXPERT
        else None
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_transformers_gives_the_logits_of_our_decoded_weights(case: str, tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    planned = plan(CONFIG, CASES[case])
    quantized = write_all(tmp_path / "out", planned, weights, negate=case == "int4 g128")
    write_config(tmp_path / "out", CONFIG, quantization_config(planned))
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    expected = dense_logits(tmp_path / "twin", CONFIG, decoded(weights, quantized), tokens)
    found = loaded_logits(tmp_path / "out", tokens, torch.bfloat16 if "fp4" in case else torch.float32)
    assert (found - expected).abs().max() <= 1e-4
    assert expected.std() > 0.01


@pytest.mark.parametrize("scheme", [Float8Scheme(), Mxfp8Scheme(), W4AFp8Scheme()], ids=["blocks", "mxfp8", "w4afp8"])
def test_weights_with_fp8_inputs_beside_int4_experts_load_in_transformers(scheme: Scheme, tmp_path: Path) -> None:
    """transformers rounds the inputs of such linears while computing, as the config asks; the weights themselves are
    exact."""
    weights = random_weights(CONFIG)
    planned = plan(CONFIG, lambda spec: INT4 if is_expert(spec) else scheme)
    quantized = write_all(tmp_path / "out", planned, weights)
    section = quantization_config(planned)
    assert section["format"] == ("pack-quantized" if isinstance(scheme, W4AFp8Scheme) else "mixed-precision")
    groups = section["config_groups"]
    assert isinstance(groups, dict)
    write_config(
        tmp_path / "out",
        CONFIG,
        {**section, "config_groups": {k: {**g, "input_activations": None} for k, g in groups.items()}},
    )
    dtype = torch.bfloat16 if isinstance(scheme, Mxfp8Scheme) else torch.float32
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    expected = dense_logits(tmp_path / "twin", CONFIG, decoded(weights, quantized), tokens)
    assert (loaded_logits(tmp_path / "out", tokens, dtype) - expected).abs().max() <= 1e-4
    write_config(tmp_path / "out", CONFIG, section)
    assert (loaded_logits(tmp_path / "out", tokens, dtype) - expected).abs().max() > 1e-4


def with_config(directory: Path, planned: list[PlannedTensor]) -> Path:
    write_config(directory, CONFIG, quantization_config(planned))
    return directory


def test_stored_names_and_bytes_are_those_in_the_file(tmp_path: Path) -> None:
    schemes = [IntScheme(bits=3), IntScheme(symmetric=False), Float8Scheme(), None]
    planned = plan(CONFIG, lambda spec: schemes[sum(map(ord, spec.name)) % 4])
    write_all(tmp_path, planned, random_weights(CONFIG), max_shard_bytes=10**9)
    found = {name: (tuple(t.shape), t.nbytes) for name, t in load_file(tmp_path / "model.safetensors").items()}
    assert found == {
        info.name: (info.shape, info.nbytes) for tensor in planned for info in COMPRESSED_TENSORS.infos(tensor)
    }


def test_a_whole_checkpoint_comes_back_through_our_source(tmp_path: Path) -> None:
    weights = random_weights(tiny_config())  # with its MTP layer, kept

    def rule(spec: TensorSpec) -> IntScheme | None:
        if spec.role is Role.MTP:
            return None
        return INT4 if is_expert(spec) else IntScheme(bits=8, symmetric=False)

    planned = plan(tiny_config(), rule)
    quantized = write_all(tmp_path, planned, weights)
    with FolderSource(with_config(tmp_path, planned), COMPRESSED_TENSORS.reader) as source:
        assert set(source.infos()) == set(weights)
        source.prefetch(list(weights))
        for name, weight in weights.items():
            expected = quantized[name].decode() if name in quantized else weight
            assert torch.equal(source.read(name), expected), name
            assert source.infos()[name].shape == tuple(weight.shape)


# --- the sink ---------------------------------------------------------------------------------------------------------


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_bytes_do_not_depend_on_order_or_interruption(tmp_path: Path) -> None:
    weights, planned = random_weights(CONFIG), plan(CONFIG, lambda spec: INT4 if is_expert(spec) else INT8)
    write_all(tmp_path / "a", planned, weights)
    write_all(tmp_path / "b", planned, weights, backwards=True)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    (tmp_path / "c").mkdir()
    first = FolderSink.open(COMPRESSED_TENSORS, tmp_path / "c", planned, 300_000)
    assert first.fresh
    for tensor in planned[5:30]:
        if tensor.scheme:
            first.write(quantize(tensor.name, torch.ones(tensor.info.shape), tensor.scheme))  # overwritten later
    first.close()
    assert not FolderSink.open(COMPRESSED_TENSORS, tmp_path / "c", planned, 300_000).fresh
    write_all(tmp_path / "c", planned, weights)
    assert files(tmp_path / "a") == files(tmp_path / "c")
    assert len(files(tmp_path / "a")) > 3


def test_finish_refuses_linears_that_were_never_written(tmp_path: Path) -> None:
    planned = plan(CONFIG, lambda spec: INT4)
    sink = FolderSink.open(COMPRESSED_TENSORS, tmp_path, planned)
    with pytest.raises(
        OutputError, match=r"model\.layers\.0\.self_attn\.q_a_proj\.weight and \d+ other linears were never written"
    ):
        sink.finish()


def test_values_that_a_narrower_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    planned = [PlannedTensor(TensorInfo("norm.weight", (4,), "BF16"), None, "F16")]
    sink = FolderSink.open(COMPRESSED_TENSORS, tmp_path, planned)
    sink.write_kept("norm.weight", 0, torch.tensor([1.0, -65504.0]))
    with pytest.raises(SchemeError, match=r"norm\.weight: 1 values are too large for F16"):
        sink.write_kept("norm.weight", 2, torch.tensor([1.0, 70000.0], dtype=torch.bfloat16))


def test_float8_scales_of_other_dtypes_become_float32(tmp_path: Path) -> None:
    planned = [PlannedTensor(TensorInfo("a.weight", (130, 128), "BF16"), Float8Scheme(), None)]
    tensor = quantize("a.weight", torch.randn(130, 128), Float8Scheme())
    scale = tensor.stored["scale"].to(torch.bfloat16)
    sink = FolderSink.open(COMPRESSED_TENSORS, tmp_path, planned)
    sink.write(QuantizedTensor("a.weight", tensor.scheme, {**tensor.stored, "scale": scale}, tensor.error))
    sink.finish()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a.weight_scale"], scale.float())


def test_scales_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    planned = [PlannedTensor(TensorInfo("a.weight", (8, 128), "BF16"), INT4, None)]
    tensor = quantize("a.weight", torch.ones(8, 128), INT4)
    tensor.stored["scale"][3, 0] = torch.nan
    with pytest.raises(SchemeError, match=r"a\.weight: a scale is NaN or infinite"):
        FolderSink.open(COMPRESSED_TENSORS, tmp_path, planned).write(tensor)


# --- what transformers cannot do --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "note"),
    [
        (lambda spec: IntScheme(symmetric=False), "cannot load zero points"),
        (lambda spec: Float8Scheme(), "cannot load FP8 block routed experts"),
        (lambda spec: Mxfp8Scheme(), "cannot load MXFP8 routed experts"),
        (lambda spec: None if is_expert(spec) else INT4, "loses unquantised routed experts"),
    ],
)
def test_notes_are_true_of_this_transformers(rule: Rule, note: str, tmp_path: Path) -> None:
    """When this fails after an upgrade, transformers has learnt it: drop the note."""
    from quantkit.runtimes.transformers import notes

    config = {**CONFIG, "moe_intermediate_size": 256}  # more than one FP8 block
    weights, planned = random_weights(config), plan(config, rule)
    assert any(note in line for line in notes(planned, "compressed-tensors"))
    write_all(tmp_path / "out", planned, weights)
    write_config(tmp_path / "out", config, quantization_config(planned))
    with pytest.raises(Exception):  # noqa: B017, PT011
        loaded_logits(tmp_path / "out", torch.zeros(1, 4, dtype=torch.int64))


def test_written_config_is_plain_json_in_the_order_of_the_source(tmp_path: Path) -> None:
    config = json.loads(with_config_text(tmp_path))
    assert list(config)[:-1] == list(CONFIG)
    assert {key: config[key] for key in CONFIG} == CONFIG


def with_config_text(directory: Path) -> str:
    return (with_config(directory, plan(CONFIG, lambda spec: INT4)) / "config.json").read_text()
