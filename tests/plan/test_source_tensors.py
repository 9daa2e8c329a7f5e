"""Checkpoints as they are published: tensors more or fewer than config.json says, without being another model."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantkit.convert.events import Event, Started
from quantkit.errors import PlanError, QuantkitError, SourceError
from quantkit.formats.source import checkpoint_name, hub_repository
from quantkit.inspect.folder import inspect_folder
from quantkit.plan.forecast import Forecast, forecast
from quantkit.plan.recipe import Recipe
from tests.convert.jobs import decoded, int4, recipe_of, run, small_config, write_tokenizer
from tests.tiny_models import random_weights, write_shards

DROP_MTP = {"match": "role:mtp", "drop": True}
INT4 = int4("role:expert", "rtn")
MTP = "model.layers.2."
NANO = Path(__file__).parents[2] / "examples" / "nano-deepseek-v3"


def model(folder: Path, change: Any = lambda tensors: None, **config: Any) -> Path:
    """A random checkpoint after ``change`` to its tensors; ``config``: keys of config.json, changed after that."""
    official = small_config(**{key: value for key, value in config.items() if key == "tie_word_embeddings"})
    tensors = random_weights(official)
    change(tensors)
    write_shards(folder, tensors)
    (folder / "config.json").write_text(json.dumps({**official, **config}))
    write_tokenizer(folder)
    return folder


def planned(folder: Path, *rules: dict[str, Any]) -> Forecast:
    return forecast(folder, recipe_of(*rules, INT4, tokens=None))


def notes(made: Forecast) -> str:
    return "\n".join(made.warnings)


def without(*endings: str) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(endings) or name.startswith(endings)]:
            del tensors[name]

    return change


def test_buffers_that_follow_from_the_config_are_left_out(tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(16)

    made = planned(model(tmp_path / "m", add), DROP_MTP)
    assert "2 tensors such as model.layers.0.self_attn.rotary_emb.inv_freq: left out" in notes(made)
    run(tmp_path / "m", recipe_of(DROP_MTP, INT4, tokens=None), tmp_path / "out")
    assert not [name for name in decoded(tmp_path / "out") if "rotary" in name]


def test_a_head_beside_tied_embeddings_must_be_equal(tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def add_other(tensors: dict[str, torch.Tensor]) -> None:
        add(tensors)
        tensors["lm_head.weight"][-1, -1] += 1

    made = planned(model(tmp_path / "equal", add, tie_word_embeddings=True), DROP_MTP)
    assert "lm_head.weight: left out, it equals model.embed_tokens.weight" in notes(made)
    with pytest.raises(SourceError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight") as caught:
        planned(model(tmp_path / "other", add_other, tie_word_embeddings=True), DROP_MTP)
    assert "tie_word_embeddings" in caught.value.hint


def test_a_missing_head_names_the_key_that_allows_it(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        planned(model(tmp_path / "m", without("lm_head.weight")), DROP_MTP)
    assert "tie_word_embeddings" in caught.value.hint


def test_copies_that_mtp_layers_leave_out_are_the_main_models(tmp_path: Path) -> None:
    source = model(tmp_path / "m", without(f"{MTP}embed_tokens.weight", f"{MTP}shared_head.head.weight"))
    assert f"{MTP}embed_tokens.weight: not in the source, taken from model.embed_tokens.weight" in notes(
        planned(source)
    )
    run(source, recipe_of(INT4, tokens=None), tmp_path / "out")
    written = decoded(tmp_path / "out")
    assert torch.equal(written[f"{MTP}embed_tokens.weight"], written["model.embed_tokens.weight"])
    assert torch.equal(written[f"{MTP}shared_head.head.weight"], written["lm_head.weight"])


def test_a_declared_mtp_layer_may_be_absent_if_no_output_keeps_it(tmp_path: Path) -> None:
    source = model(tmp_path / "m", without(MTP))
    assert "of MTP layers: not in the source" in notes(planned(source, DROP_MTP))
    run(source, recipe_of(DROP_MTP, INT4, tokens=None), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    with pytest.raises(PlanError, match="missing from the source") as caught:
        planned(source)
    assert "Drop the MTP layer" in caught.value.hint


@pytest.mark.parametrize("tied", [False, True])
def test_a_layer_of_the_decoder_is_not_taken_for_an_mtp_layer(tmp_path: Path, tied: bool) -> None:
    """Layers 0 and 1 and MTP layer 2, of which config.json counts one fewer."""
    source = model(tmp_path / "m", num_hidden_layers=1, tie_word_embeddings=tied)
    attempts: tuple[Callable[[], object], ...] = (
        lambda: planned(source, DROP_MTP),
        lambda: run(source, recipe_of(DROP_MTP, INT4, tokens=None), tmp_path / "out"),
    )
    for attempt in attempts:
        with pytest.raises(
            SourceError, match="num_hidden_layers is 1, which makes layer 1 the MTP layer.* eh_proj"
        ) as caught:
            attempt()
        assert "num_hidden_layers in config.json is wrong" in caught.value.hint
        assert caught.value.message in [f"{source / 'config.json'}: {line}" for line in inspect_folder(source).unusual]
    assert not (tmp_path / "out").exists()


def test_nano_with_a_layer_too_few(tmp_path: Path) -> None:
    source = tmp_path / "nano"
    source.mkdir()
    for path in NANO.iterdir():
        (source / path.name).symlink_to(path)
    config = json.loads((NANO / "config.json").read_text())
    (source / "config.json").unlink()
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": config["num_hidden_layers"] - 1}))
    with pytest.raises(SourceError, match="num_hidden_layers is 2, which makes layer 2 the MTP layer"):
        planned(source, DROP_MTP)


def test_every_way_out_that_a_hint_names_leads_out(tmp_path: Path) -> None:
    source = model(tmp_path / "m", without(f"{MTP}enorm.weight"))
    with pytest.raises(PlanError, match="enorm"):
        planned(source)
    planned(source, DROP_MTP)
    undeclared = model(tmp_path / "n", without(f"{MTP}enorm.weight"), num_nextn_predict_layers=0)
    assert "an MTP layer that config.json does not declare" in notes(planned(undeclared))


def test_a_layer_that_is_no_mtp_layer_is_not_left_out(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no such tensor"):
        planned(model(tmp_path / "m", without(f"{MTP}eh_proj.weight"), num_nextn_predict_layers=0))


def test_inspect_says_what_plan_says(tmp_path: Path) -> None:
    def buffers_and_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def another_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    tied = model(tmp_path / "tied", buffers_and_head, tie_word_embeddings=True)
    copies = model(tmp_path / "copies", without(f"{MTP}embed_tokens.weight", f"{MTP}shared_head.head.weight"))
    undeclared = model(tmp_path / "undeclared", num_nextn_predict_layers=0)
    for source in (tied, copies, undeclared):
        unusual = inspect_folder(source).unusual
        assert unusual
        assert set(unusual) <= set(planned(source).warnings)
    (line,) = inspect_folder(model(tmp_path / "other", another_head, tie_word_embeddings=True)).unusual
    assert line.startswith("lm_head.weight differs from model.embed_tokens.weight")


def test_tensors_of_another_architecture_are_named_so(tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.indexer.wk.weight"] = torch.ones(8, 8)

    with pytest.raises(PlanError, match="indexer") as caught:
        planned(model(tmp_path / "m", add), DROP_MTP)
    assert "DeepSeek V3.2" in caught.value.hint


def test_whole_numbers_as_floats_and_a_byte_order_mark(tmp_path: Path) -> None:
    source = model(tmp_path / "m", hidden_size=128.0, max_position_embeddings=256.0, first_k_dense_replace=1.0)
    path = source / "config.json"
    path.write_bytes(BOM_UTF8 + path.read_bytes())
    assert planned(source, DROP_MTP).outputs[0].tensors > 0
    gguf = {"name": "f32", "format": "gguf", "preset": "F32"}
    assert forecast(source, Recipe.model_validate({"version": 1, "outputs": [gguf]})).outputs[0].tensors > 0


def test_convert_begins_with_what_the_outputs_will_lack(tmp_path: Path) -> None:
    events: list[Event] = []
    recipe = recipe_of(DROP_MTP, INT4, tokens=None)
    run(model(tmp_path / "m"), recipe, tmp_path / "out", on_event=events.append)
    (started,) = (event for event in events if isinstance(event, Started))
    assert started.warnings[0] == (
        "The source has no chat template: outputs have none, runtimes refuse chats or guess the format."
    )
    assert any("leaves out the MTP layer" in line for line in started.warnings)


@pytest.mark.parametrize("method", ["mxfp4", "awq", "gptq"])
def test_a_config_alone_is_checked_as_a_checkpoint_is(tmp_path: Path, method: str) -> None:
    quantised = {**small_config(), "quantization_config": {"quant_method": method}}
    (tmp_path / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(QuantkitError, match="already quantised"):
        planned(tmp_path, DROP_MTP)


def test_side_files_are_checked_by_plan(tmp_path: Path) -> None:
    source = model(tmp_path / "m")
    (source / "modeling_x.py").symlink_to(source / "gone")
    with pytest.raises(SourceError, match="leads nowhere"):
        planned(source, DROP_MTP)


def test_names_from_a_hub_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--my-org--Deep-V3--x" / "snapshots" / "e9b33add"
    snapshot.mkdir(parents=True)
    assert hub_repository(snapshot) == "my-org/Deep-V3--x"
    assert checkpoint_name(snapshot) == "Deep-V3--x"
    assert hub_repository(tmp_path) is None
    assert checkpoint_name(tmp_path) == tmp_path.name


def test_shards_that_end_in_zeros_are_refused_unless_allowed(tmp_path: Path) -> None:
    source = model(tmp_path / "m")
    planned(source, DROP_MTP)
    shard = sorted(source.glob("*.safetensors"))[0]
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size - 40_000)
        file.truncate(size)
    with pytest.raises(SourceError, match=r"00001.*rows hold only zeros, up to the end of the file") as caught:
        planned(source, DROP_MTP)
    assert "allow_zeros: true" in caught.value.hint
    assert forecast(source, recipe_of(DROP_MTP, INT4, tokens=None, allow_zeros=True)).outputs


def test_a_vector_of_zeros_and_some_padded_rows_are_no_fault(tmp_path: Path) -> None:
    def zeros(tensors: dict[str, torch.Tensor]) -> None:
        table = tensors["model.embed_tokens.weight"]
        table[-int(0.01 * len(table)) :] = 0

    source = model(tmp_path / "m")
    tensors = {name: tensor for name, tensor in random_weights(small_config()).items() if "embed" not in name}
    for path in source.glob("*.safetensors"):
        path.unlink()
    zeros(whole := random_weights(small_config()))
    save_file({"model.embed_tokens.weight": whole["model.embed_tokens.weight"]}, source / "model-1.safetensors")
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"].zero_()
    save_file(tensors, source / "model-2.safetensors")
    (source / "model.safetensors.index.json").unlink()
    assert planned(source, DROP_MTP).outputs
