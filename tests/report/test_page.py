"""The HTML page as text: one file, nothing from outside, nothing from a document taken for markup."""

from __future__ import annotations

import base64
import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from quantkit.documents.read import read_documents
from quantkit.report.build import report_of
from quantkit.report.page import page
from quantkit.report.scored import scored_checkpoints
from tests.report.jobs import conversion, evaluation, written

HOSTILE = "</script><script>window.taken=1</script><img src=x onerror='window.taken=1'>\u2028\"'&amp;{{ 7 * 7 }}"


class Elements(HTMLParser):
    """Tags with their attributes, and the texts of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data


def page_of(*paths: Path, title: str | None = None) -> str:
    return page(report_of(scored_checkpoints(read_documents(paths)), title))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    document = conversion(source=HOSTILE)
    document["output"] = document["validation"]["problems"] = document["sha256"][HOSTILE] = HOSTILE
    document["validation"]["problems"] = [HOSTILE]
    document["validated"] = False
    document["recipe"] = {HOSTILE: HOSTILE}
    document["job"] = {HOSTILE: HOSTILE}
    document["contents"][0] |= {"role": HOSTILE, "stored_as": HOSTILE}
    document["tensors"][f"model.layers.0.{HOSTILE}"] = document["tensors"]["lm_head.weight"] | {"fallback": HOSTILE}
    document["calibration"][0]["file"] = HOSTILE
    scored = evaluation({HOSTILE: (1, 0.1), f"{HOSTILE}2": (2, 0.2)})
    scored["candidates"][0]["result"]["domains"] = {HOSTILE: scored["candidates"][0]["result"]["overall"]}
    scored["versions"] = {HOSTILE: HOSTILE}
    folder = tmp_path_factory.mktemp("hostile")
    return page_of(written(folder / "w4", document), written(folder, scored, "e.json"), title=HOSTILE)


def test_the_page_is_small_and_carries_plotly(tmp_path: Path) -> None:
    text = page_of(written(tmp_path / "w4", conversion(layers=61, experts=256)))
    assert len(text.encode()) < 3_000_000
    found = Elements(text)
    assert len(found.scripts) == 3
    assert b"plotly.js" in gzip.decompress(base64.b64decode(found.scripts[1]))[:200]
    json.loads(found.scripts[0])


def test_the_page_refers_to_nothing_outside(hostile: str) -> None:
    for tag, attributes in Elements(hostile).tags:
        assert tag not in ("img", "iframe", "object", "embed", "base", "form"), tag
        for name in ("src", "href", "action", "srcset", "poster", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:,")), f"{tag} {name}={value}"
        assert not any(name.startswith("on") for name in attributes)
    style = re.search(r"<style>(.*?)</style>", hostile, re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    (policy,) = [a["content"] for tag, a in Elements(hostile).tags if tag == "meta" and "http-equiv" in a]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_texts_of_files_do_not_end_elements(hostile: str) -> None:
    assert len(Elements(hostile).scripts) == 3
    assert "<script>window" not in hostile
    assert "{{ 7 * 7 }}" in hostile
    figures = json.loads(Elements(hostile).scripts[0])
    assert figures


def test_ids_are_unique_and_links_lead_to_them(tmp_path: Path) -> None:
    text = page_of(*(written(tmp_path / name, conversion()) for name in "abc"))
    tags = Elements(text).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] or "" for tag, attributes in tags if tag == "a"]
    assert links
    assert {link.removeprefix("#") for link in links} <= set(ids)


def test_many_checkpoints_are_folded_away(tmp_path: Path) -> None:
    paths = [written(tmp_path / name, conversion()) for name in "abc"]
    for amount in (2, 3):
        groups = [a for tag, a in Elements(page_of(*paths[:amount])).tags if tag == "details" and a["class"] == "group"]
        assert len(groups) == amount
        assert all(("open" in group) == (amount == 2) for group in groups)


def test_a_table_for_each_plot_and_an_alternative_text(tmp_path: Path) -> None:
    text = page_of(written(tmp_path / "w4", conversion()), written(tmp_path, evaluation({"x": (1, 0.1)}), "e.json"))
    plots = [a for _, a in Elements(text).tags if a.get("class") == "plot"]
    assert plots
    assert all(a["role"] in ("img", "group") and a["aria-label"] for a in plots)
    assert text.count("The numbers as a table") == len(plots)


def test_a_checkpoint_that_failed_its_limits_says_so(tmp_path: Path) -> None:
    document = conversion()
    document["validated"] = False
    document["validation"]["problems"] = ["mean KL divergence is 0.2, the recipe allows 0.1"]
    assert "did not pass the validation of its recipe: mean KL divergence is 0.2" in page_of(
        written(tmp_path / "w4", document)
    )
    unmeasured = conversion(kld=None)
    assert "Nothing was measured" in page_of(written(tmp_path / "w0", unmeasured))


def test_the_loss_that_an_output_aware_method_lowers_has_a_column(tmp_path: Path) -> None:
    document = conversion()
    assert "median weighed loss" not in page_of(written(tmp_path / "plain", document))
    for linear in document["tensors"].values():
        linear["output_loss"] = 0.0123
    text = page_of(written(tmp_path / "aware", document))
    assert "median weighed loss" in text
    assert "1.23 %" in text
    assert "what was lowered is the weighed loss" in text


def test_a_divergence_is_said_in_words_of_the_same_measurement(tmp_path: Path) -> None:
    text = page_of(written(tmp_path, evaluation({"x": (1, 0.03)}), "e.json"))
    assert (
        "In practice, x: with a mean KLD of 0.0300 ± 0.0030 nats the most likely token is the original&#39;s in 93.0 % "
        "of all places, and perplexity is 1.0305 ± 0.0021 times the original&#39;s. Half of the tokens have a KLD "
        "below 0.0150."
    ) in text
    several = page_of(written(tmp_path, evaluation({"x": (1, 0.03), "y": (2, 0.02), "z": (3, 0.01)}), "three.json"))
    assert [name for name in "xyz" if f"In practice, {name}:" in several] == ["x", "z"]


@pytest.mark.parametrize("reference", [True, False])
def test_drafts_of_an_mtp_layer_are_a_sentence(reference: bool, tmp_path: Path) -> None:
    document = evaluation({"x": (1, 0.03)})
    original = {"mean": 0.7, "standard_error": 0.01} if reference else None
    own = {"mean": 0.68, "standard_error": 0.012}
    document["candidates"][0]["result"]["draft"] = {"reference": original, "candidate": own}
    text = page_of(written(tmp_path, document, "e.json"))
    said = "Its MTP layer drafts the token that it chooses itself at 68.0 ± 1.2 % of all places"
    more = ", the original&#39;s at 70.0 ± 1.0 %." if reference else "."
    assert f"below 0.0150. {said}{more}" in text
    assert "MTP layer drafts" not in page_of(written(tmp_path, evaluation({"x": (1, 0.03)}), "e.json"))


def test_outputs_of_one_job_state_it_once(tmp_path: Path) -> None:
    paths = [written(tmp_path / name, conversion()) for name in "ab"]
    text = page_of(*paths)
    assert text.count("source, sha256") == text.count("quantkit convert nano") == 1
    assert "as a: written in the same pass" in text
    other = conversion()
    other["job"]["threads"] = 16
    assert page_of(paths[0], written(tmp_path / "c", other)).count("source, sha256") == 2
    assert "imatrix, sha256" not in text
