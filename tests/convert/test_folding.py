"""Rescaled input channels: what a method folds into norms and earlier linears leaves the model as it was."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from quantkit.arch import arch_of
from quantkit.arch.base import NormWeight
from quantkit.calibrate.inputs import InputMoments, InputStats
from quantkit.convert import run as run_module
from quantkit.errors import CalibrationError
from quantkit.plan.targets import target_of
from quantkit.quantizers.batch import Quantizer
from quantkit.quantizers.rescaling import Channels, Folding, Rescaled
from quantkit.quantizers.rtn import Rtn
from tests.convert.gguf_jobs import gguf_output, gguf_recipe, wide_config
from tests.convert.jobs import LINEARS, decoded, files_of, int4, recipe_of, run, small_config, write_model, write_text
from tests.convert.unrounded import decoded_plainly, kept, write_unrounded
from tests.oracles.forward import logits


def powers_of_two(producer: str, width: int) -> Tensor:
    """Exact factors in any float, the same for the same producer."""
    generator = torch.Generator().manual_seed(zlib.crc32(producer.encode()))
    return torch.randint(-2, 3, (width,), generator=generator).float().exp2()


class PowersOfTwo(Rtn, frozen=True):
    """Round to nearest after a rescaling that means nothing. ``exact``: nothing is rounded at all."""

    kind: Literal["rtn"] = "rtn"
    exact: bool = False

    @property
    def needs_hessian(self) -> bool:
        """So that calibration takes whole moments, as for the outputs without factors that it is compared with."""
        return True

    def rescale(self, channels: Channels) -> Tensor:
        """Factors by name; checks what the method is shown."""
        count, width = channels.inputs.importance.shape
        readers = list(channels.readers())
        assert readers
        assert len(channels.producers) == count
        for reader in readers:
            assert reader.weight.shape[2] == width
            assert count in (1, len(reader.weight))
            assert reader.inputs.importance.shape == (len(reader.weight), width)
        return torch.stack([powers_of_two(producer.tensor, width) for producer in channels.producers])

    def quantizer(self, stats: Any) -> Quantizer:
        """See `Rtn.quantizer`."""
        return kept if self.exact else super().quantizer(stats)


def by_method(monkeypatch: pytest.MonkeyPatch, **methods: PowersOfTwo) -> None:
    """Let outputs, by name, choose codes by these methods in place of what their rules say."""
    real = run_module._methods

    def replaced(output: Any, layer: int) -> dict[str, tuple[Any, Any]]:
        found = real(output, layer)
        own = methods.get(output.output.name)
        return found if own is None else {name: (scheme, own) for name, (scheme, _) in found.items()}

    monkeypatch.setattr(run_module, "_methods", replaced)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folding")
    write_text(root / "calibration.txt")
    write_text(root / "eval.txt", 200)
    return root


CONFIGS: dict[str, Callable[[], dict[str, Any]]] = {
    "all features": small_config,
    "no q_lora, tied": lambda: small_config(q_lora_rank=None, tie_word_embeddings=True),
    "two shared experts": lambda: small_config(n_shared_experts=2, v_head_dim=96),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_folded_unquantised_checkpoint_gives_the_same_logits(
    place: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIGS[name]()
    source = place / name.replace(" ", "-")
    weights = write_model(source, config)
    write_unrounded(monkeypatch)
    by_method(monkeypatch, main=PowersOfTwo(exact=True))
    run(source, recipe_of(int4(f"{LINEARS}"), {"match": "*", "keep": "f32"}), place / f"{source.name}-folded")
    folded = {name: weight.float() for name, weight in decoded_plainly(place / f"{source.name}-folded").items()}
    arch = arch_of(config)
    changed = [name for name in weights if not torch.equal(folded[name], weights[name].float())]
    layers = [changed_name.split(".", 3)[-1] for changed_name in changed]
    for expected in ("input_layernorm.weight", "post_attention_layernorm.weight", "mlp.gate.weight"):
        assert expected in layers, expected
    assert any(".experts.3.up_proj" in changed_name for changed_name in changed)
    tokens = torch.randint(arch.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    expected = logits(arch, lambda key: weights[key].float(), tokens)
    torch.testing.assert_close(logits(arch, folded.__getitem__, tokens), expected, rtol=0, atol=1e-4)


def folded_by_hand(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> Folding:
    """All that `PowersOfTwo` rescales in a model."""
    arch = arch_of(config)
    rescaled: dict[Any, Rescaled] = {}
    for layer in range(arch.n_layers):
        for block in (block for sublayer in arch.sublayers(layer) for block in sublayer):
            groups = [group.producer for stage in getattr(block, "stages", ()) for group in stage.groups]
            for producer in (*groups, getattr(block, "producer", None), *getattr(block, "down_producers", ())):
                if producer is not None:
                    width = weights[producer.readers[0]].shape[1]
                    rescaled[producer] = Rescaled(producer, powers_of_two(producer.tensor, width))
    return Folding(rescaled.values())


def test_the_files_of_gguf_hold_folded_parts(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kv_b is stored in two parts, of which one is turned: they are cut from the folded linear."""
    config = wide_config()
    source = place / "wide"
    weights = write_model(source, config)
    q8 = {"match": "role:attention|mlp|expert|shared_expert", "scheme": "Q8_0"}
    recipe = gguf_recipe(gguf_output(q8, {"match": "*", "keep": "source"}), tokens=256)
    by_method(monkeypatch, main=PowersOfTwo())
    run(source, recipe, place / "wide-gguf")
    folding = folded_by_hand(weights, config)
    arch = arch_of(config)
    target = target_of(recipe.outputs[0], recipe, arch, tuple(arch.tensors()))
    with target.open_written(place / "wide-gguf") as written:
        names = [spec.name for spec in arch.tensors() if spec.name in written.infos()]
        assert sum(folding.changes(name) for name in names) == 37
        for name in names:
            expected = folding.folded(name, weights[name]).float()
            error = (written.read(name).float() - expected).norm() / expected.norm()
            assert error < 0.03, name  # Q8_0 across factors from 1/4 to 4; a factor left out is 0.5 or more


def test_another_output_knows_nothing_of_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first output carries the stream unfolded; the second is what it is beside the same output without factors:
    powers of two commute with rounding to nearest in groups of one."""
    source = place / "plain"
    write_model(source)
    recipe = recipe_of(int4(kind="rtn"), others={"other": [int4()]})
    run(source, recipe, place / "apart")
    by_method(monkeypatch, other=PowersOfTwo())
    run(source, recipe, place / "beside")
    first = [files_of(place / out / "main") for out in ("apart", "beside")]
    for name in first[0]:
        if name.endswith(".safetensors"):
            assert first[0][name] == first[1][name]
    assert not torch.equal(*(decoded(place / out / "other")[ROUTER] for out in ("apart", "beside")))


ROUTER = "model.layers.1.mlp.gate.weight"


def test_a_second_conversion_gives_the_same_bytes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = place / "again"
    write_model(source)
    by_method(monkeypatch, main=PowersOfTwo())
    for out in ("first", "second"):
        run(source, recipe_of(int4()), place / f"again-{out}")
    assert files_of(place / "again-first") == files_of(place / "again-second")


@pytest.mark.parametrize("full", [True, False])
def test_statistics_are_those_of_divided_inputs(full: bool) -> None:
    random = torch.Generator().manual_seed(2)
    x, original = torch.randn(50, 16, generator=random), torch.randn(50, 16, generator=random)
    producer = NormWeight("norm", ("a",))
    factors = torch.rand(16, generator=random) + 0.5
    sums = [InputMoments(16, cross=full, device=torch.device("cpu"), full=full) for _ in range(2)]
    sums[0].add(x, original)
    sums[1].add(x / factors, original / factors)
    found, expected = Folding([Rescaled(producer, factors)]).inputs((producer,), sums[0].stats()), sums[1].stats()
    torch.testing.assert_close(found.importance, expected.importance)
    if isinstance(found, InputStats) and isinstance(expected, InputStats):
        torch.testing.assert_close(found.hessian, expected.hessian)
        torch.testing.assert_close(found.cross, expected.cross)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_factors_that_cannot_be(value: float) -> None:
    with pytest.raises(CalibrationError, match=r"^norm: a factor of its channels is zero, negative or no number"):
        Folding([Rescaled(NormWeight("norm", ("a",)), torch.tensor([1.0, value]))])
