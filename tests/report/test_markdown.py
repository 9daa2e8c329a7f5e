"""Markdown for a model card."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from markdown_it import MarkdownIt

from quantkit.documents.read import read_documents
from quantkit.report.build import report_of
from quantkit.report.markdown import escaped, markdown
from quantkit.report.scored import scored_checkpoints
from tests.report.jobs import conversion, evaluation, written

HOSTILE = "a|b\n# `x` <img src=x onerror=alert(1)> [l](javascript:alert(1)) ![i](http://x) **b** https://x.example"


def text_of(*paths: Path, title: str | None = None) -> str:
    return markdown(report_of(scored_checkpoints(read_documents(paths)), title))


def test_one_checkpoint(tmp_path: Path) -> None:
    folder = written(tmp_path / "w4", conversion(kld=0.02)).parent
    text = text_of(folder)
    assert text.startswith("## w4\n\nnano, quantised by quantkit 0\\.1\\.0\n".replace("\\.", "."))
    assert "| Mean KL divergence | 0.0200 ± 0.0010 (nats per token, validation of the conversion) |" in text
    assert "| expert | int4 g128 gptq | 8 | 6,000,000 | 4.000 | 3.00 MB | 75.0% |" in text
    assert "8 experts in 2 layers: 0 to" in text
    assert "1 unseen, 1 calibrated with borrowed tokens." in text
    recipe = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert recipe is not None
    assert yaml.safe_load(recipe[1]) == conversion()["recipe"]


def test_the_command_of_several_outputs_names_the_folder_of_all(tmp_path: Path) -> None:
    document = conversion()
    assert "-o w4 " in text_of(written(tmp_path / "w4", document))
    document["recipe"]["outputs"].append({"name": "q4", "format": "gguf"})
    assert "-o OUT " in text_of(written(tmp_path / "w4", document))


def test_rows_for_each_layer_stay_in_the_page(tmp_path: Path) -> None:
    text = text_of(written(tmp_path / "w4", conversion(layers=50)))
    assert len(text.splitlines()) < 100


def test_several_checkpoints_are_compared(tmp_path: Path) -> None:
    folders = [written(tmp_path / name, conversion(nbytes=size)).parent for name, size in (("w4", 40), ("w3", 30))]
    candidates = {str(folders[0]): (40, 0.01), str(folders[1]): (30, 0.1)}
    text = text_of(*folders, written(tmp_path, evaluation(candidates), "evaluation.json"))
    assert text.startswith("## 2 checkpoints of nano\n")
    assert "| w4 | 40 B | 4.923 | 0.0100 ± 0.0010 |" in text
    assert "### w3: Where the bytes are" in text
    assert "| code | w4 | 2,000 |" in text


def test_texts_of_files_are_no_markup(tmp_path: Path) -> None:
    document = conversion(source=HOSTILE)
    document["contents"][0]["role"] = HOSTILE
    document["recipe"] = {"description": "```\n<script>alert(1)</script>"}
    document["tensors"][f"model.layers.0.{HOSTILE}"] = document["tensors"]["lm_head.weight"]
    text = text_of(written(tmp_path / "w4", document), title=HOSTILE)
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    inline = [child.type for token in tokens for child in token.children or ()]
    assert {"html_inline", "image", "link_open"}.isdisjoint(inline)
    assert "html_block" not in [token.type for token in tokens]
    assert [token.tag for token in tokens if token.type == "heading_open"].count("h1") == 0
    tables = [token for token in tokens if token.type == "table_open"]
    assert len(tables) == text.count("\n|--") + text.count("\n|:-")
    (recipe, _) = [token for token in tokens if token.type == "fence"]
    assert "<script>" in recipe.content


def test_escaping_is_undone_by_a_reader() -> None:
    (paragraph,) = [t for t in MarkdownIt("commonmark").parse(escaped(HOSTILE)) if t.type == "inline"]
    assert "".join(child.content for child in paragraph.children or ()) == " ".join(HOSTILE.split())
