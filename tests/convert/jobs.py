"""Conversions small enough for a unit test: a random checkpoint with a tokenizer, a text, a recipe, the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from quantkit import convert
from quantkit.convert.events import OnEvent, Report, ignore
from quantkit.formats.folder import FolderSource
from quantkit.formats.layouts.compressed_tensors import COMPRESSED_TENSORS
from quantkit.plan.recipe import Recipe
from tests.tiny_models import tiny_config, write_checkpoint

INT4_GPTQ = {"scheme": {"kind": "int", "bits": 4, "group_size": 64}, "method": {"kind": "gptq", "grid": 8}}
INT4_RTN = {"scheme": {"kind": "int", "bits": 4, "group_size": 64}, "method": {"kind": "rtn", "grid": 8}}
LINEARS = "role:attention|mlp|shared_expert|expert"
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "17", "lazy", "dogs", "and", "brews", "230", "litres")
BUDGET = 2 * 2**30


def small_config(**changes: Any) -> dict[str, Any]:
    """A dense layer, an MoE layer with 4 experts, an MTP layer, every feature of the real one; several shards."""
    sizes = {"num_hidden_layers": 2, "n_routed_experts": 4, "n_group": 2, "topk_group": 2, "num_experts_per_tok": 2}
    return tiny_config(**{"vocab_size": 1024, **sizes, **changes})


def write_model(folder: Path, config: dict[str, Any] | None = None, **options: Any) -> dict[str, torch.Tensor]:
    """A random checkpoint (options of `write_checkpoint`) with a byte-level tokenizer; returns its decoded tensors."""
    weights = write_checkpoint(folder, config or small_config(), **options)
    write_tokenizer(folder)
    return weights


def write_tokenizer(folder: Path) -> None:
    """One token a byte, 0 is BOS."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = ("<bos>", "<eos>", "<user>", "<assistant>")
    vocabulary = {token: i + 4 for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {token: i for i, token in enumerate(special)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": true}\n'
    )


def write_text(path: Path, n_words: int = 600) -> str:
    """Words in an order that repeats late; returns the file's name."""
    path.write_text(" ".join(WORDS[(i * i + i // 7) % len(WORDS)] for i in range(n_words)) + "\n")
    return path.name


def recipe_of(
    *rules: dict[str, Any],
    others: dict[str, list[dict[str, Any]]] | None = None,
    tokens: int | None = 256,
    validated: bool = False,
    **changes: Any,
) -> Recipe:
    """A recipe whose output "main" has these rules, and more outputs from ``others``; what no rule names is kept.

    The texts are "calibration.txt" and "eval.txt". ``tokens`` None: data-free.
    """
    calibration = None
    if tokens is not None:
        calibration = {"data": ["calibration.txt"], "tokens": tokens, "sequence_length": 32, "min_expert_tokens": 16}
    validation = {"text": ["eval.txt"], "context": 32, "max_windows_per_file": 4} if validated else None
    outputs = [_output(name, listed) for name, listed in {"main": list(rules), **(others or {})}.items()]
    document = {"version": 1, "calibration": calibration, "validation": validation, "outputs": outputs}
    return Recipe.model_validate({**document, **changes})


def _output(name: str, rules: list[dict[str, Any]]) -> dict[str, Any]:
    keep = {"match": "*", "keep": "source"}
    return {"name": name, "format": "compressed-tensors", "max_shard_size": "1MiB", "rules": [*rules, keep]}


def int4(match: str = LINEARS, kind: str = "gptq", **options: Any) -> dict[str, Any]:
    """A rule: int4 in groups of 64."""
    base = INT4_GPTQ if kind == "gptq" else INT4_RTN
    return {"match": match, "scheme": base["scheme"], "method": {**base["method"], **options}}


def run(
    source: Path, recipe: Recipe, out: Path, *, restart: bool = False, on_event: OnEvent = ignore, **options: Any
) -> Report:
    """`convert` under a fixed budget; the texts lie beside the source."""
    chosen: dict[str, Any] = {"memory_budget": BUDGET, "base_dir": source.parent, **options}
    return convert(source, recipe, out, restart=restart, on_event=on_event, **chosen)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def shards_of(folder: Path) -> dict[str, bytes]:
    """The weights alone."""
    return {name: content for name, content in files_of(folder).items() if name.endswith(".safetensors")}


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a finished output as a runtime computes with it."""
    with FolderSource(folder, COMPRESSED_TENSORS.reader) as source:
        return {name: source.read(name) for name in source.infos()}


def data_free(**changes: Any) -> Any:
    """A recipe without calibration."""
    return recipe_of(int4(kind="rtn"), tokens=None, **changes)
