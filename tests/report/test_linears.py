"""Tens of thousands of records -> a grid of layers and projections, and one of layers and experts."""

from __future__ import annotations

import pytest

from quantkit.documents.conversion import ConversionDocument
from quantkit.report.linears import error_grid, expert_grid, place_of, scheme_label, worst
from tests.counted import calls
from tests.report.jobs import conversion


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.experts.17.gate_proj.weight", (3, "expert gate", 17)),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", (0, "attention kv_a", None)),
        ("model.layers.12.self_attn.kv_b_proj.weight:k", (12, "attention kv_b k", None)),
        ("model.layers.1.mlp.shared_experts.down_proj.weight", (1, "shared down", None)),
        ("model.layers.1.mlp.up_proj.weight", (1, "dense up", None)),
        ("model.layers.61.eh_proj.weight", (61, "eh", None)),
        ("model.embed_tokens.weight", (None, "embed_tokens", None)),
        ("layers.<b>", (None, "layers.<b>", None)),
        ("", (None, "", None)),
    ],
)
def test_names_say_where_a_linear_sits(name: str, place: tuple[int | None, str, int | None]) -> None:
    assert place_of(name) == place


def test_experts_of_a_layer_share_a_cell() -> None:
    grid = error_grid(ConversionDocument.model_validate(conversion(experts=10)))
    assert grid.layers == (0, 1, 2)
    assert grid.projections == ("attention q_a", "attention o", "shared up", "expert down")
    cell = grid.cells[2, "expert down"]
    assert (cell.count, cell.median, cell.p90, cell.largest, cell.largest_expert) == (
        10,
        pytest.approx(0.0055),
        pytest.approx(0.009),
        pytest.approx(0.01),
        9,
    )
    assert (0, "expert down") not in grid.cells
    assert grid.cells[1, "expert down"].fallbacks == 1
    assert list(grid.outside) == ["lm_head"]
    assert grid.calibrated
    assert grid.blind == ()


def test_layers_that_saw_no_text_are_known() -> None:
    document = conversion()
    for name, linear in document["tensors"].items():
        if "layers.2." in name:
            linear["n_tokens"] = 0
    assert error_grid(ConversionDocument.model_validate(document)).blind == (2,)


def test_linears_without_a_loss_are_left_out() -> None:
    document = conversion()
    document["tensors"] = {"model.layers.0.mlp.up_proj.weight": {"scheme": {"kind": "float8"}}}
    grid = error_grid(ConversionDocument.model_validate(document))
    assert not grid.cells
    assert not worst(ConversionDocument.model_validate(document), 3)


def test_losses_weighed_by_the_models_loss_have_a_median_of_their_own() -> None:
    document = conversion()
    assert not error_grid(ConversionDocument.model_validate(document)).output_aware
    for name, linear in document["tensors"].items():
        if "layers.2.mlp.experts" in name:
            linear["output_loss"] = linear["relative_loss"] / 10
    grid = error_grid(ConversionDocument.model_validate(document))
    assert grid.output_aware
    assert grid.cells[2, "expert down"].weighed == pytest.approx(grid.cells[2, "expert down"].median / 10)
    assert grid.cells[1, "expert down"].weighed is None


def test_the_worst_come_first_and_by_name_if_they_are_equal() -> None:
    found = worst(ConversionDocument.model_validate(conversion()), 3)
    names = [name for name, _ in found]
    assert names[:2] == [f"model.layers.{layer}.mlp.experts.3.down_proj.weight" for layer in (1, 2)]


def test_schemes_have_short_names() -> None:
    assert scheme_label({"kind": "ggml", "type": "Q4_K"}) == "Q4_K"
    assert scheme_label({"kind": "int", "bits": 8, "group_size": None}) == "int8 per row"
    assert scheme_label({"kind": "new"}) == "new"
    assert scheme_label({}) == "unknown"


def test_tokens_of_experts_by_layer() -> None:
    grid = expert_grid(ConversionDocument.model_validate(conversion()))
    assert grid is not None
    assert grid.layers == (1, 2)
    assert grid.tokens[0][1] == 0
    assert grid.borrowed == (1, 0)
    data_free = conversion()
    data_free["expert_tokens"] = {}
    assert expert_grid(ConversionDocument.model_validate(data_free)) is None


def test_a_model_as_large_as_deepseek_v3_takes_little_work() -> None:
    """Half a second."""
    document = ConversionDocument.model_validate(conversion(layers=61, experts=768))
    assert len(document.tensors) > 46_000
    grid, experts = error_grid(document), expert_grid(document)
    assert calls(lambda: (error_grid(document), expert_grid(document))) < 100 * len(document.tensors)
    assert len(grid.cells) == 61 * 3 + 60
    assert experts is not None
    assert len(experts.counts) == 60 * 768
