"""The shipped example model: its config, its files, its measured quality, and the two forms' way into one another."""

from __future__ import annotations

import importlib.util
import json
import lzma
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "examples" / "nano-deepseek-v3"
BLOCK = 128
PROJECTION = re.compile(r"\.(self_attn\.\w+_proj(_with_mqa)?|mlp\.(.*\.)?(gate|up|down)_proj)\.weight$")


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


fp8_cast = load_tool("fp8_cast")


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return json.loads((NANO / "config.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def weight_map() -> dict[str, str]:
    return json.loads((NANO / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]


@pytest.fixture(scope="module")
def tensors(weight_map: dict[str, str]) -> dict[str, torch.Tensor]:
    return dict(stored_tensors(NANO))


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nano") / "bf16"
    run_cast("to-bf16", NANO, out)
    return out


def stored_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, file.get_tensor(name)


def run_cast(direction: str, source: Path, out: Path, *options: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fp8_cast.py", direction, str(source), str(out), *options])
        fp8_cast.main()


def readme_perplexities(row: str) -> dict[str, float]:
    lines = (NANO / "README.md").read_text(encoding="utf-8").splitlines()
    header = next(line for line in lines if line.startswith("| weights |"))
    values = next(line for line in lines if line.startswith(f"| {row} |"))
    names, numbers = ([cell.strip() for cell in line.strip("|").split("|")][1:] for line in (header, values))
    return dict(zip(names, map(float, numbers), strict=True))


# -------------------------------------------------------------------------------------------------- config and files


def test_config_has_every_feature_of_the_big_model(config: dict[str, Any]) -> None:
    big = json.loads((ROOT / "examples" / "deepseek-v3-671b" / "config.json").read_text(encoding="utf-8"))
    assert set(big) - set(config) <= {"auto_map", "transformers_version"}  # the hub's code, a library's version
    same = ("scoring_func", "topk_method", "norm_topk_prob", "routed_scaling_factor", "num_nextn_predict_layers")
    same += ("quantization_config", "architectures", "n_shared_experts", "moe_layer_freq", "ep_size", "torch_dtype")
    assert {name: config[name] for name in same} == {name: big[name] for name in same}
    assert set(config["rope_scaling"]) == set(big["rope_scaling"])
    assert config["q_lora_rank"]
    assert 1 < config["topk_group"] < config["n_group"]
    assert config["n_routed_experts"] == 12  # llama.cpp takes 8 for Mixtral
    assert all(config[name] % 256 == 0 for name in ("hidden_size", "moe_intermediate_size", "intermediate_size"))


def test_fits_in_twelve_megabytes() -> None:
    assert sum(path.stat().st_size for path in NANO.rglob("*") if path.is_file()) <= 12_000_000


def test_index_names_exactly_what_the_shards_hold(weight_map: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
    shards = sorted(set(weight_map.values()))
    assert shards == [f"model-{n:05d}-of-{len(shards):06d}.safetensors" for n in range(1, len(shards) + 1)]
    assert len(shards) >= 4
    for shard in shards:
        with safe_open(NANO / shard, framework="pt") as file:
            assert set(file.keys()) == {name for name, home in weight_map.items() if home == shard}
    index = json.loads((NANO / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_some_scale_lies_in_another_shard_than_its_weight(weight_map: dict[str, str]) -> None:
    scales = [name for name in weight_map if name.endswith("_scale_inv")]
    assert any(weight_map[name] != weight_map[name.removesuffix("_scale_inv")] for name in scales)


def test_dtypes_follow_the_release(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if name.endswith(("_scale_inv", "e_score_correction_bias")):
            assert tensor.dtype == torch.float32, name
        elif PROJECTION.search(name):
            assert tensor.dtype == torch.float8_e4m3fn, name
            grid = [math.ceil(size / BLOCK) for size in tensor.shape]
            assert list(tensors[name + "_scale_inv"].shape) == grid, name
        else:
            assert tensor.dtype == torch.bfloat16, name
    assert tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].shape[0] % BLOCK  # a partial block


def test_mtp_layer_is_whole(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    mtp, last_moe = f"model.layers.{config['num_hidden_layers']}.", "model.layers.2."
    extra = {"eh_proj.weight", "enorm.weight", "hnorm.weight", "shared_head.norm.weight"}
    extra |= {"embed_tokens.weight", "shared_head.head.weight"}
    parts = {name.removeprefix(mtp) for name in tensors if name.startswith(mtp)}
    assert parts == extra | {name.removeprefix(last_moe) for name in tensors if name.startswith(last_moe)}
    assert torch.equal(tensors[mtp + "embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors[mtp + "shared_head.head.weight"], tensors["lm_head.weight"])
    assert list(tensors[mtp + "eh_proj.weight"].shape) == [256, 512]
    # Trained, not left at its start: norms begin at exactly 1.
    assert (tensors[mtp + "hnorm.weight"].float() - 1).abs().max() > 0.05


# ----------------------------------------------------------------------------------------------------------- quality


def test_transformers_measures_the_perplexity_of_the_readme(bf16: Path) -> None:
    transformers = pytest.importorskip("transformers")
    report = load_tool("nano_report")
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bf16)
    model, info = transformers.DeepseekV3ForCausalLM.from_pretrained(
        bf16, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert all(name.startswith("model.layers.3.") for name in info["unexpected_keys"])  # transformers has no MTP
    expected = readme_perplexities("FP8 as shipped")
    # The README's eight windows of each file, but of three files only: a few seconds.
    for domain, suffix in (("prose", "txt"), ("code", "txt"), ("chat", "jsonl")):
        windows = report.eval_windows(tokenizer, report.EVAL_FOLDER / f"{domain}.{suffix}", 8)
        # The README rounds to 4 digits; another order of float32 sums moves far less than 0.1 %.
        assert math.exp(report.mean_loss(model, windows)) == pytest.approx(expected[domain], rel=1e-3), domain


def test_readme_says_that_fp8_costs_little() -> None:
    trained, shipped = readme_perplexities("BF16 as trained"), readme_perplexities("FP8 as shipped")
    assert shipped["mean"] / trained["mean"] - 1 < 0.005
    for table in (trained, shipped):
        nats = [math.log(value) for name, value in table.items() if name != "mean"]
        assert math.exp(sum(nats) / len(nats)) == pytest.approx(table["mean"], rel=1e-4)


def test_chat_template_equals_the_training_text(bf16: Path) -> None:
    transformers = pytest.importorskip("transformers")
    rendered = load_tool("nano_tokenizer").render_chat
    tokenizer = transformers.AutoTokenizer.from_pretrained(bf16)
    first = (ROOT / "calibration_data" / "mixed" / "chat.jsonl").read_text(encoding="utf-8").splitlines()[0]
    messages = json.loads(first)["messages"]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == rendered(messages)
    assert tokenizer("a")["input_ids"][0] == 0  # BOS
    assert len(tokenizer) == 1280


# --------------------------------------------------------------------------------------------------- fp8 <-> bf16


def test_fp8_to_bf16_to_fp8_gives_the_same_files(bf16: Path, tmp_path: Path) -> None:
    run_cast("to-fp8", bf16, tmp_path / "fp8", "--shard-bytes", "2500000")
    again = {path.name: path.read_bytes() for path in (tmp_path / "fp8").iterdir()}
    assert again == {path.name: path.read_bytes() for path in NANO.iterdir() if path.name != "README.md"}


def test_bf16_form_has_no_trace_of_fp8(bf16: Path) -> None:
    assert "quantization_config" not in json.loads((bf16 / "config.json").read_text(encoding="utf-8"))
    index = json.loads((bf16 / "model.safetensors.index.json").read_text(encoding="utf-8"))
    stored = dict(stored_tensors(bf16))
    assert set(stored) == set(index["weight_map"])
    assert {tensor.dtype for name, tensor in stored.items() if "e_score" not in name} == {torch.bfloat16}


@pytest.mark.parametrize("shape", [(128, 128), (160, 256), (1, 1), (300, 130)])
def test_blocks_equal_a_plain_loop(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    weight[:128, :64] *= 1e-3
    codes, scale = fp8_cast.quantize_block(weight)
    for row in range(0, shape[0], BLOCK):
        for column in range(0, shape[1], BLOCK):
            tile = weight[row : row + BLOCK, column : column + BLOCK].float()
            want = tile.abs().max() / 448
            assert scale[row // BLOCK, column // BLOCK] == want
            got = codes[row : row + BLOCK, column : column + BLOCK]
            assert torch.equal(got.float(), (tile / want).to(torch.float8_e4m3fn).float())
    back, scale_back = fp8_cast.quantize_block(fp8_cast.dequantize_block(codes, scale))
    assert torch.equal(back.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(scale_back, scale)


def test_a_block_of_zeros_stays_zero() -> None:
    codes, scale = fp8_cast.quantize_block(torch.zeros(130, 4))
    assert scale.tolist() == [[1.0], [1.0]]
    assert not fp8_cast.dequantize_block(codes, scale).any()


def test_casting_refuses_an_existing_folder_and_a_wrong_direction(bf16: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="exists already"):
        run_cast("to-bf16", NANO, tmp_path)
    with pytest.raises(SystemExit, match="is torch.float8_e4m3fn already"):
        run_cast("to-fp8", NANO, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------- training


def test_training_writes_the_names_and_shapes_that_are_shipped(
    bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    train_nano = load_tool("train_nano")
    tokens = torch.randint(5, 1280, (600,), generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    for domain in (*train_nano.MIX, "eval_prose"):
        (tmp_path / f"{domain}.u16.xz").write_bytes(lzma.compress(tokens.numpy().tobytes()))
    options = ["--steps", "2", "--batch", "1", "--length", "16", "--device", "cpu", "--model", str(NANO)]
    monkeypatch.setattr(sys, "argv", ["train_nano.py", str(tmp_path), str(tmp_path / "out"), *options])
    train_nano.main()
    written, shipped = dict(stored_tensors(tmp_path / "out")), dict(stored_tensors(bf16))
    described = {name: (tensor.shape, tensor.dtype) for name, tensor in written.items()}
    assert described == {name: (tensor.shape, tensor.dtype) for name, tensor in shipped.items()}
    assert (tmp_path / "out" / "config.json").read_bytes() == (bf16 / "config.json").read_bytes()
