"""An MTP layer in the calibration walk: what its methods are given, against a plain forward pass through the model, its
final norm, and the layer's own entrance; and that the last token of a row leads nowhere."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor
from torch.nn.functional import embedding

from quantkit.arch import arch_of
from quantkit.calibrate.dataset import token_rows
from quantkit.calibrate.inputs import InputStats
from quantkit.convert import dense as dense_module
from quantkit.convert import experts as experts_module
from quantkit.formats.folder import FolderSource
from quantkit.formats.layouts.compressed_tensors import COMPRESSED_TENSORS
from quantkit.plan.recipe import Recipe
from quantkit.quantizers import Gptq
from tests.convert.gguf_jobs import GPTQ, gguf_output, gguf_recipe, read_imatrix, wide_config
from tests.convert.jobs import files_of, int4, recipe_of, run, small_config, write_model, write_text
from tests.convert.layer_case import assert_given, noting
from tests.oracles import forward
from tests.oracles.inputs import attention_inputs
from tests.oracles.layer import Settings, Weights, expected_statistics
from tests.tiny_models import write_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
MTP = 2
"""The layer of `small_config`."""
PREFIX = f"model.layers.{MTP}."


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def entrance(config: dict[str, object], weights: Weights, original: Weights, tokens: Tensor, mtp: int = MTP) -> Tensor:
    """(rows, length - 1, hidden): what enters the decoder layer of layer ``mtp``, by section 2.2 of arXiv 2412.19437.
    ``weights`` of the main model's layers; norms, embeddings and eh_proj are never changed."""
    arch, prefix = arch_of(config), f"model.layers.{mtp}."
    x = embedding(tokens, original("model.embed_tokens.weight"))
    for layer in range(arch.n_layers):
        x = forward.forward_layer(arch.sublayers(layer), weights, x)
    hidden = rms_norm(x, original("model.norm.weight"))[:, :-1]
    following = embedding(tokens[:, 1:], original(f"{prefix}embed_tokens.weight"))
    both = (rms_norm(following, original(f"{prefix}enorm.weight")), rms_norm(hidden, original(f"{prefix}hnorm.weight")))
    return torch.cat(both, -1) @ original(f"{prefix}eh_proj.weight").T


def tokens_of(recipe: Recipe, place: Path) -> Tensor:
    assert recipe.calibration is not None
    return torch.from_numpy(token_rows(recipe.calibration, place / "model", place).tokens).long()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_text(tmp_path / "calibration.txt")
    return tmp_path


def test_gptq_is_given_what_a_plain_forward_gives(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both streams, with quantised layers before. Each row has one position less."""
    config = small_config()
    original = {name: weight.float() for name, weight in write_model(place / "model", config).items()}
    recipe = recipe_of(int4("role:mtp", grid=2, polish=0), int4(grid=2, polish=0), tokens=128)
    given: dict[str, InputStats] = {}
    with monkeypatch.context() as patch:
        for module in (dense_module, experts_module):
            patch.setattr(module, "quantize_linears", noting(given, original))
        run(place / "model", recipe, place / "out")
    with FolderSource(place / "out", COMPRESSED_TENSORS.reader) as written:
        carried = {name: written.read(name).float() for name in written.infos()}
    tokens = tokens_of(recipe, place)
    x, x_original = (
        entrance(config, weights.__getitem__, original.__getitem__, tokens) for weights in (carried, original)
    )
    method = Gptq()
    assert recipe.calibration is not None
    least = recipe.calibration.min_expert_tokens
    settings = Settings(original.__getitem__, carried.__getitem__, least, method.shrink, method.down_shrink)
    expected = expected_statistics(arch_of(config).sublayers(MTP), settings, x, x_original)
    own = {name: stats for name, stats in given.items() if name.startswith(PREFIX)}
    linears = {s.name for s in arch_of(config).tensors() if s.linear and s.layer == MTP}
    assert own.keys() == linears
    assert own[f"{PREFIX}self_attn.o_proj.weight"].n_tokens == (tokens.numel() - len(tokens),)
    assert_given(own, expected, tolerance=2e-5)


def test_two_mtp_layers_follow_each_other(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second reads the first's normed output and the token after the next."""
    config = small_config(num_nextn_predict_layers=2)
    write_model(place / "model", config)
    recipe = recipe_of(int4("role:mtp", grid=2, polish=0), int4(grid=2, polish=0), tokens=128)
    given: dict[str, InputStats] = {}
    original = {name: w.float() for name, w in write_checkpoint(place / "same", config).items()}
    for module in (dense_module, experts_module):
        monkeypatch.setattr(module, "quantize_linears", noting(given, original))
    run(place / "model", recipe, place / "out")
    rows, length = tokens_of(recipe, place).shape
    for layer in (1, 2):
        name = f"model.layers.{MTP + layer - 1}.self_attn.o_proj.weight"
        assert given[name].n_tokens == (rows * (length - layer),)


def test_the_model_and_an_mtp_layer_that_is_rounded_do_not_change(place: Path) -> None:
    """Rules of the MTP layer touch no other bytes; where none of them learns from text, none is spent on it."""
    write_model(place / "model")
    for name, kind in (("learned", "gptq"), ("rounded", "rtn")):
        report = run(place / "model", recipe_of(int4("role:mtp", kind=kind), int4(), tokens=128), place / name)
        assert ("layers without calibration" in report.seconds) == (kind == "rtn")
    run(place / "model", recipe_of(int4("role:mtp", kind="rtn"), int4(kind="rtn"), tokens=None), place / "free")
    stored = {name: _tensors(place / name) for name in ("learned", "rounded", "free")}
    for name, tensor in stored["rounded"].items():
        assert torch.equal(tensor, stored["free" if name.startswith(PREFIX) else "learned"][name]), name
    changed = [
        n for n, t in stored["learned"].items() if n.startswith(PREFIX) and not torch.equal(t, stored["free"][n])
    ]
    assert any("experts" in name for name in changed)
    assert any("self_attn" in name for name in changed)


def _tensors(folder: Path) -> dict[str, Tensor]:
    with FolderSource(folder, COMPRESSED_TENSORS.reader) as source:
        return {name: source.read(name) for name in source.infos()}


def test_gguf_has_an_imatrix_of_its_mtp_block(place: Path) -> None:
    config = wide_config()
    original = {name: weight.float() for name, weight in write_model(place / "model", config).items()}
    output = gguf_output(preset="Q4_0", mtp="keep", method=GPTQ)
    recipe = gguf_recipe(output, tokens=128, propagate="original")
    run(place / "model", recipe, place / "out")
    found = read_imatrix(place / "out")
    (model,) = (path for path in (place / "out").glob("*.gguf") if path.name != "imatrix.gguf")
    block = {t.name for t in gguf.GGUFReader(model).tensors if t.name.startswith(f"blk.{MTP}.") and len(t.shape) > 1}
    unseen = {name for name in block if "nextn" in name or "ffn_gate_inp" in name}
    assert {name for name in found if name.startswith(f"blk.{MTP}.")} == block - unseen
    x = entrance(config, original.__getitem__, original.__getitem__, tokens_of(recipe, place))
    expected = attention_inputs(config, original.__getitem__, MTP, x)["attn_q_a"]
    sums, counts = found[f"blk.{MTP}.attn_q_a.weight"]
    assert counts.tolist() == [len(expected)]
    torch.testing.assert_close(
        torch.from_numpy(sums.copy()).double().view(-1), expected.square().sum(0), rtol=1e-4, atol=0
    )


def test_an_imatrix_stands_for_the_text_in_the_mtp_block_too(place: Path) -> None:
    write_model(place / "model", wide_config())
    output = gguf_output(preset="Q4_K_M", mtp="keep", method={"kind": "rtn"})
    run(place / "model", gguf_recipe(output, tokens=128, propagate="original"), place / "text")
    run(place / "model", gguf_recipe(output, imatrix="text/imatrix.gguf"), place / "imatrix")
    name = "model-main.gguf"
    assert files_of(place / "text")[name] == files_of(place / "imatrix")[name]
