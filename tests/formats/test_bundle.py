"""config.json as the source has it, and a model card whose numbers add up."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from quantkit.formats.bundle import CardFacts, model_card, write_config, write_model_card

SOURCE_CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "scoring_func": "sigmoid",
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "num_nextn_predict_layers": 1,
    "name": "Ünïcode",
    "unknown_key": {"b": 1, "a": [None, True]},
}


def read_config(directory: Path) -> dict[str, object]:
    return json.loads((directory / "config.json").read_text())


def test_config_keeps_keys_and_order(tmp_path: Path) -> None:
    before = json.dumps(SOURCE_CONFIG)
    write_config(tmp_path, SOURCE_CONFIG, {"quant_method": "compressed-tensors"})
    config = read_config(tmp_path)
    assert list(config) == list(SOURCE_CONFIG)
    assert config == {**SOURCE_CONFIG, "quantization_config": {"quant_method": "compressed-tensors"}}
    assert '"rms_norm_eps": 1e-06' in (tmp_path / "config.json").read_text()
    assert json.dumps(SOURCE_CONFIG) == before


def test_config_of_an_unquantised_result_has_no_section(tmp_path: Path) -> None:
    write_config(tmp_path, {**SOURCE_CONFIG, "compression_config": {}}, {})
    assert read_config(tmp_path) == {key: value for key, value in SOURCE_CONFIG.items() if key != "quantization_config"}


def test_config_says_when_the_mtp_layers_are_gone(tmp_path: Path) -> None:
    write_config(tmp_path, SOURCE_CONFIG, {}, mtp_dropped=True)
    assert read_config(tmp_path)["num_nextn_predict_layers"] == 0
    write_config(tmp_path, {"a": 1}, {}, mtp_dropped=True)
    assert read_config(tmp_path) == {"a": 1}


FACTS = CardFacts(
    title="DeepSeek-V3 W4A16",
    recipe="version: 1\noutputs: []\n",
    parameters=671_026_419_200,
    nbytes=348_909_324_928,
    contents=(("expert", "int4 g128 gptq", 653_908_770_816, 337_173_000_000),),
    measured={"perplexity": "3.21 ± 0.02", "mean KLD": "0.0123 ± 0.0004"},
    notes=("vLLM 0.24 something.",),
    serve=("vllm serve . --pipeline-parallel-size 5",),
    version="0.1",
    base_model="deepseek-ai/DeepSeek-V3",
    license="mit",
)


def test_model_card_states_sizes_measurements_and_commands(tmp_path: Path) -> None:
    write_model_card(tmp_path, FACTS)
    text = (tmp_path / "README.md").read_text()
    assert "671,026,419,200 weights in 348,909,324,928 bytes" in text
    assert "348.91 GB = 324.95 GiB, 4.160 bits per weight" in text
    for part in (
        "| mean KLD | 0.0123 ± 0.0004 |",
        "pipeline-parallel-size 5",
        "outputs: []",
        "- vLLM 0.24 something.",
        "int4 g128 gptq",
    ):
        assert part in text
    assert "Not validated" not in text
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "mit"
    assert front["base_model"] == "deepseek-ai/DeepSeek-V3"
    assert front["base_model_relation"] == "quantized"
    assert "compressed-tensors" in front["tags"]


def test_model_card_of_little_knowledge(tmp_path: Path) -> None:
    text = model_card(CardFacts("x", "recipe", 10, 5, validated=False, license="mit\nevil: 1"))
    assert "**Not validated**" in text
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "mit\nevil: 1"
    assert "evil" not in front
    assert "base_model" not in front
    assert "## Measured" not in text
