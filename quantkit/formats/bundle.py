"""config.json and the model card of an output.

config.json is copied as the source has it, key by key in its order; only what the conversion changed is replaced.
Configs rebuilt by a library lose keys that decide about the computation (scoring_func, topk_method).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from quantkit.formats.model_card import CardFacts, model_card
from quantkit.formats.preallocated import write_durably
from quantkit.formats.source import language_config

__all__ = ["CardFacts", "model_card", "write_config", "write_model_card"]


def write_config(
    directory: Path,
    source_config: Mapping[str, object],
    quantization_config: Mapping[str, object],
    *,
    mtp_dropped: bool = False,
) -> None:
    """Write config.json: the raw source config with ``quantization_config`` replaced (removed if empty), in the
    source's key order.

    If the MTP layers were dropped, num_nextn_predict_layers becomes 0, else vLLM would look for them; in text_config if
    there is one, which loses its own quantization_config. Raises `OutputError`.
    """
    config = dict(source_config)
    config.pop("compression_config", None)  # the section's name in old files
    if quantization_config:
        config["quantization_config"] = dict(quantization_config)
    else:
        config.pop("quantization_config", None)
    language = dict(language_config(config))
    if mtp_dropped and "num_nextn_predict_layers" in language:
        language["num_nextn_predict_layers"] = 0
    if isinstance(config.get("text_config"), Mapping):
        for section in ("quantization_config", "compression_config"):
            language.pop(section, None)
        config["text_config"] = language
    else:
        config = language
    write_durably(directory / "config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())


def write_model_card(directory: Path, facts: CardFacts) -> None:
    """Write README.md. Raises `OutputError`."""
    write_durably(directory / "README.md", model_card(facts).encode())
