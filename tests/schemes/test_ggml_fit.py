"""Scales of ggml's block types: no more error than ggml's own search leaves, storable, the same on any number of
threads, and of the torch twin's quality."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from quantkit.errors import SchemeError
from quantkit.schemes.ggml.fit import encode, fit, fit_in_torch
from quantkit.schemes.ggml.layout import decode, pack
from quantkit.schemes.ggml.measure import nearest_codes
from quantkit.schemes.ggml.types import BLOCK_TYPES, BlockParams, BlockType
from tests.oracles import ggml

KINDS = [kind for kind in BLOCK_TYPES.values() if kind.levels]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
ROWS, IN_FEATURES = 16, 512


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)) * 0.02


def student(*shape: int, seed: int = 0) -> Tensor:
    """Three degrees of freedom."""
    square = torch.randn(3, *shape, generator=generator(seed + 1)).square().sum(0) / 3
    return normal(*shape, seed=seed) / square.sqrt()


def gamma(n: int, seed: int = 0) -> Tensor:
    return torch.empty(n).exponential_(generator=generator(seed)).square()


def outliers() -> Tensor:
    weight = normal(ROWS, IN_FEATURES)
    return torch.where(torch.rand(ROWS, IN_FEATURES, generator=generator(1)) < 0.005, weight * 20, weight)


def huge() -> Tensor:
    weight = normal(ROWS, IN_FEATURES)
    weight[torch.arange(ROWS), torch.arange(ROWS) * 7] = torch.linspace(-800, 1000, ROWS)
    return weight


MATRICES = {
    "normal": normal(ROWS, IN_FEATURES),
    "heavy tails": student(ROWS, IN_FEATURES),
    "outliers": outliers(),
    "one huge": huge(),
    "constant rows": normal(ROWS, 1).expand(ROWS, IN_FEATURES).contiguous(),
    "zero": torch.zeros(ROWS, IN_FEATURES),
    "scales at the end of float16": normal(ROWS, IN_FEATURES) * 1e-4,
    "smaller than any float16": normal(ROWS, IN_FEATURES) * 1e-7,
    "subnormal": normal(ROWS, IN_FEATURES) * 1e-38,
    "large": normal(ROWS, IN_FEATURES) * 5e5,
    "positive": normal(ROWS, IN_FEATURES).abs() + 0.01,
    "negative": -normal(ROWS, IN_FEATURES).abs() - 0.01,
    "of many magnitudes": normal(ROWS, IN_FEATURES) * torch.randn(ROWS, 1, generator=generator(2)).mul(3).exp(),
    "on a grid": torch.randint(-8, 8, (ROWS, IN_FEATURES), generator=generator(3))
    * normal(ROWS, IN_FEATURES // 32).half().float().repeat_interleave(32, -1),
}
some_dead = gamma(IN_FEATURES) * (torch.rand(IN_FEATURES, generator=generator(4)) > 0.3)
IMPORTANCES = {"equal": None, "gamma": gamma(IN_FEATURES), "some zero": some_dead}


def stored(kind: BlockType, weight: Tensor, importance: Tensor | None) -> Tensor:
    """What llama.cpp will compute with."""
    params = fit(kind, weight, importance)
    blocks = pack(kind, encode(kind, weight, params), params)
    assert ggml.is_valid(kind.name, blocks)
    return ggml.dequantize(kind.name, blocks)


def error(weight: Tensor, decoded: Tensor, importance: Tensor | None) -> float:
    squared = (weight.double() - decoded.double()).square()
    return float((squared if importance is None else squared * importance.double()).sum())


@pytest.mark.parametrize("importance", IMPORTANCES.values(), ids=IMPORTANCES)
@pytest.mark.parametrize("weight", MATRICES.values(), ids=MATRICES)
@every_kind
def test_no_more_error_than_ggml(kind: BlockType, weight: Tensor, importance: Tensor | None):
    theirs = ggml.dequantize(kind.name, ggml.quantize(kind.name, weight, importance))
    assert error(weight, stored(kind, weight, importance), importance) <= error(weight, theirs, importance)


@pytest.mark.parametrize("importance", [None, gamma(IN_FEATURES)], ids=["equal", "gamma"])
@pytest.mark.parametrize(("make", "tolerance"), [(normal, 3e-3), (student, 2e-2)], ids=["normal", "student"])
@every_kind
def test_kernel_is_as_good_as_its_torch_twin(kind: BlockType, make, tolerance: float, importance: Tensor | None):
    """Where two choices are nearly equal, rounding decides, either way; few weights make most of a heavy tail's
    error."""
    weight = make(96, IN_FEATURES, seed=5)
    errors = [
        error(weight, decode(kind, pack(kind, encode(kind, weight, params), params)), importance)
        for params in (fit(kind, weight, importance), fit_in_torch(kind, weight, importance))
    ]
    assert errors[0] == pytest.approx(errors[1], rel=tolerance)


@every_kind
def test_parameters_are_what_a_block_stores(kind: BlockType):
    params = fit(kind, MATRICES["heavy tails"], gamma(IN_FEATURES))
    if kind.name == "MXFP4":
        assert (torch.frexp(params.d)[0] == 0.5).all()
    else:
        assert torch.equal(params.d, params.d.half().float())
    assert params.d.shape == (ROWS, IN_FEATURES // kind.block)
    for values, limits in ((params.sub_scale, kind.sub_scale), (params.sub_min, kind.sub_min)):
        assert (values is None) == (limits is None)
        if values is not None and limits is not None:
            assert values.dtype == torch.int16
            assert values.shape == (ROWS, IN_FEATURES // kind.group)
            assert limits[0] <= int(values.min()) <= int(values.max()) <= limits[1]
    assert (params.dmin is not None) == bool(kind.offset)
    if params.dmin is not None:
        assert torch.equal(params.dmin, params.dmin.half().float())


@every_kind
def test_codes_are_nearest(kind: BlockType):
    weight = MATRICES["outliers"]
    params = fit(kind, weight)
    codes = encode(kind, weight, params)
    assert torch.equal(codes, nearest_codes(kind, weight, params))
    levels = torch.tensor(kind.levels, dtype=torch.float64)
    scale = params.scale().double().repeat_interleave(kind.group, -1).unsqueeze(-1)
    values, offset = scale * levels, params.offset()
    if offset is not None:
        values = values + offset.double().repeat_interleave(kind.group, -1).unsqueeze(-1)
    distance = (values - weight.double().unsqueeze(-1)).abs()
    chosen = distance.gather(-1, codes.long().unsqueeze(-1))[..., 0]
    torch.testing.assert_close(chosen, distance.amin(-1), rtol=1e-5, atol=1e-9)


@every_kind
def test_a_batch_is_its_matrices(kind: BlockType):
    weight, importance = student(2, 3, 20, 256), torch.stack([gamma(256, seed) for seed in range(6)]).view(2, 3, 256)
    batch = fit(kind, weight, importance)
    codes = encode(kind, weight, batch)
    for a in range(2):
        for b in range(3):
            alone = fit(kind, weight[a, b], importance[a, b])
            assert_same(BlockParams(*(None if v is None else v[a, b] for v in fields(batch))), alone)
            assert torch.equal(codes[a, b], encode(kind, weight[a, b], alone))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@every_kind
def test_threads_change_nothing(kind: BlockType):
    weight, importance = student(2, 150, 1024), torch.stack([gamma(1024), gamma(1024, 1)])
    results: list[BlockParams] = []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(fit(kind, weight, importance))
    assert_same(*results)


def fields(params: BlockParams) -> tuple[Tensor | None, ...]:
    return params.d, params.dmin, params.sub_scale, params.sub_min


def assert_same(first: BlockParams, second: BlockParams) -> None:
    for a, b in zip(fields(first), fields(second), strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert torch.equal(a, b)


@every_kind
def test_the_scale_of_the_importance_is_free(kind: BlockType):
    weight, importance = MATRICES["normal"], gamma(IN_FEATURES)
    assert_same(fit(kind, weight, importance), fit(kind, weight, importance * 2.0**60))
    assert_same(fit(kind, weight, importance), fit(kind, weight, importance * 2.0**-60))


@every_kind
def test_importance_of_zero_everywhere_means_equal(kind: BlockType):
    weight = MATRICES["normal"]
    assert_same(fit(kind, weight, torch.zeros(IN_FEATURES)), fit(kind, weight))


@every_kind
def test_a_dead_input_does_not_stretch_the_range(kind: BlockType):
    weight, importance = normal(ROWS, IN_FEATURES), torch.ones(IN_FEATURES)
    alive = error(weight, stored(kind, weight, importance), importance)
    weight[:, ::64], importance[::64] = 50.0, 0.0
    assert error(weight, stored(kind, weight, importance), importance) < 1.3 * alive


@every_kind
def test_largest_weights_are_finite(kind: BlockType):
    low = -65504.0 * (kind.sub_min or (0, 1))[1] if kind.offset else -65504.0 * max(map(abs, kind.sub_scale or (1,)))
    weight = normal(2, IN_FEATURES)
    weight[0, 3], weight[1, 300] = -low, low
    assert stored(kind, weight, None).isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38], ids=str)
@every_kind
def test_weights_that_no_scale_fits(kind: BlockType, value: float):
    weight = normal(2, 3, IN_FEATURES)
    weight[1, 2, 100] = value
    with pytest.raises(SchemeError, match=rf"^row 2: no scale of {kind.name} fits the value"):
        fit(kind, weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0], ids=str)
def test_importance_that_is_none(value: float):
    importance = torch.ones(IN_FEATURES)
    importance[7] = value
    with pytest.raises(SchemeError, match="^importance: negative or non-finite values"):
        fit(BLOCK_TYPES["Q4_K"], normal(2, IN_FEATURES), importance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("weight", MATRICES.values(), ids=MATRICES)
@every_kind
def test_a_gpu_is_as_good(kind: BlockType, weight: Tensor):
    importance = gamma(IN_FEATURES)
    theirs = ggml.dequantize(kind.name, ggml.quantize(kind.name, weight, importance))
    device = weight.cuda()
    params = fit(kind, device, importance.cuda())
    codes = encode(kind, device, params)
    on_cpu = BlockParams(*(None if values is None else values.cpu() for values in fields(params)))
    decoded = ggml.dequantize(kind.name, pack(kind, codes.cpu(), on_cpu))
    assert error(weight, decoded, importance) <= error(weight, theirs, importance)
