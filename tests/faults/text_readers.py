"""Readers of text files, each with a sound file and what is done to it."""

from __future__ import annotations

import json
import os
import resource
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any
from xml.etree import ElementTree

import torch
import yaml

from quantkit import check, plan, report
from quantkit.calibrate import template_process
from quantkit.calibrate.chat_template import TemplateFailure, answer_of
from quantkit.calibrate.documents import TextDocument, TextFile, read_documents
from quantkit.calibrate.tokenizer import load_tokenizer
from quantkit.convert.journal import Journal, checked_line
from quantkit.documents.read import read_documents as read_reported
from quantkit.documents.sensitivity import SENSITIVITY, FisherJob, FisherProgress, LinearFisher, read_sensitivity
from quantkit.errors import CalibrationError, QuantkitError
from quantkit.evaluate.check.reports import junit_xml, markdown
from quantkit.formats import open_source
from quantkit.formats.gguf.vocabulary import vocabulary
from quantkit.formats.safetensors.header import printable
from quantkit.formats.side_files import check_side_files, folder_notes
from quantkit.inspect.path import inspect_path
from quantkit.plan.headers import headers_of
from quantkit.plan.recipe import Recipe
from quantkit.report.build import report_of
from quantkit.report.markdown import markdown as as_markdown
from quantkit.report.page import page
from quantkit.report.scored import scored_checkpoints
from quantkit.sensitivity.folder import PROGRESS, PassFolder
from quantkit.sensitivity.open import open_sensitivity
from quantkit.text.inspection import inspection_text
from quantkit.text.sensitivity import sensitivity_text
from quantkit.text.verdict import verdicts_text
from tests.convert.jobs import INT4_RTN, LINEARS, recipe_of, small_config, write_model, write_text
from tests.convert.test_journal import HEADER, SOURCE, written
from tests.evaluate.evaluations import Made
from tests.evaluate.evaluations import evaluation as random_evaluation
from tests.faults.fuzzing import Reader, empty_folder
from tests.faults.mutations import mutated_bytes, mutated_json, mutated_json_text, mutated_words
from tests.faults.words import CHAT_TEMPLATE, RECIPE_WORDS, TEMPLATE_WORDS
from tests.report.jobs import conversion, evaluation
from tests.sensitivity.passes import fisher_pass

RTN = recipe_of({"match": LINEARS, **INT4_RTN}, tokens=None)
TEXTS = [TextDocument("x", "Hello world, ünïcode \U0001f600 12345\n\n\tx"), TextDocument("y", "zz")]


def text_readers(place: Path) -> list[Reader]:
    """One reader for each kind of file; files lie below folder ``place``."""
    makers = (
        *(recipe, config, index, tokenizer, tokenizer_config, conversion_record, evaluation_file, baseline, journal),
        *(calibration_text, chat_template, sensitivity, unfinished_pass),
    )
    return [maker(empty_folder(place / maker.__name__)) for maker in makers]


def _json_reader(name: str, file: Path, value: Any, read: Callable[[], object]) -> Reader:
    sound = json.dumps(value).encode()
    return Reader(name, file, sound, lambda draw: mutated_json_text(draw, value), read, binary=False)


def recipe(folder: Path) -> Reader:
    """Values of another kind, and YAML's own signs at places that are not theirs; what is accepted is planned."""
    write_model(folder / "model", small_config(num_nextn_predict_layers=0))
    write_text(folder / "calibration.txt")
    value = recipe_of({"match": LINEARS, **INT4_RTN}, others={"b": [{"match": "*", "keep": "source"}]})
    document = json.loads(value.model_dump_json(exclude_unset=True))
    text = yaml.safe_dump(document)
    file = folder / "recipe.yaml"

    def damaged(draw: Random) -> bytes:
        if draw.random() < 0.5:
            return mutated_words(draw, text, RECIPE_WORDS)
        changed = mutated_json(draw, document)
        style = None if draw.random() < 0.5 else True
        raw = yaml.safe_dump(changed, allow_unicode=True, default_flow_style=style).encode("utf-8", "surrogatepass")
        return mutated_bytes(draw, raw) if draw.random() < 0.2 else raw

    def read() -> None:
        plan(folder / "model", Recipe.from_yaml(file))

    return Reader("recipe", file, text.encode(), damaged, read, binary=False)


def config(folder: Path) -> Reader:
    """config.json of a checkpoint."""
    write_model(folder, small_config(num_nextn_predict_layers=0), fp8=True)
    file = folder / "config.json"

    def read() -> None:
        plan(folder, RTN)
        inspection_text(inspect_path(folder))

    return _json_reader("config.json", file, json.loads(file.read_bytes()), read)


def index(folder: Path) -> Reader:
    """The index of its shards. Some names lead elsewhere."""
    write_model(folder, small_config(num_nextn_predict_layers=0))
    file = folder / "model.safetensors.index.json"
    value = json.loads(file.read_bytes())

    def damaged(draw: Random) -> bytes:
        if draw.random() < 0.7:
            return mutated_json_text(draw, value)
        changed = json.loads(json.dumps(value))
        places = ("../x.safetensors", "/etc/passwd", "a/b.safetensors", "C:\\x.safetensors", "config.json", "")
        changed["weight_map"][draw.choice(list(changed["weight_map"]))] = draw.choice(places)
        return mutated_json_text(draw, changed)

    def read() -> None:
        inspection_text(inspect_path(folder))

    return Reader("index.json", file, json.dumps(value).encode(), damaged, read, binary=False)


def tokenizer(folder: Path) -> Reader:
    """tokenizer.json, for calibration and for GGUF."""
    return _tokenizer_reader(folder, "tokenizer.json")


def tokenizer_config(folder: Path) -> Reader:
    """tokenizer_config.json with a chat template."""
    return _tokenizer_reader(folder, "tokenizer_config.json")


def _tokenizer_reader(folder: Path, name: str) -> Reader:
    write_model(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": CHAT_TEMPLATE}))

    def read() -> None:
        _all_of(
            lambda: load_tokenizer(folder).encode("x", TEXTS),
            lambda: vocabulary(folder, 1024, pre="gpt-2"),
            lambda: check_side_files(folder),
            lambda: folder_notes(folder),
        )

    return _json_reader(name, folder / name, json.loads((folder / name).read_bytes()), read)


def _all_of(*readers: Callable[[], object]) -> None:
    """Each of them, whatever an earlier one refuses; raises the first refusal."""
    refusals = [refusal for read in readers if (refusal := _refusal_of(read))]
    if refusals:
        raise refusals[0]


def _refusal_of(read: Callable[[], object]) -> QuantkitError | None:
    try:
        read()
    except QuantkitError as error:
        return error
    return None


def conversion_record(folder: Path) -> Reader:
    """quantkit.json, shown as markdown and, every tenth, as a page, which takes a tenth of a second."""
    file = folder / "quantkit.json"

    def read() -> None:
        contents = report_of(scored_checkpoints(read_reported([folder])))
        as_markdown(contents)
        if zlib.crc32(file.read_bytes()) % 10 == 0:
            page(contents)

    return _json_reader("quantkit.json", file, conversion(), read)


def evaluation_file(folder: Path) -> Reader:
    """An evaluation, checked against a baseline and shown."""
    first, second = random_evaluation(Made()), random_evaluation(Made(seed=1))
    document = {"kind": "quantkit baseline", "schema_version": 1, "evaluation": first.document()}
    (folder / "baseline.json").write_text(json.dumps(document))
    shown = {**second.document(), "noise_floor": evaluation({"a": (1, 0.1)})["noise_floor"]}
    file = folder / "evaluation.json"

    def read() -> None:
        _all_of(lambda: _check(file, folder / "baseline.json"), lambda: report(file, markdown=True))

    return _json_reader("evaluation", file, shown, read)


def baseline(folder: Path) -> Reader:
    """What evaluations are checked against."""
    first, second = random_evaluation(Made()), random_evaluation(Made(seed=1))
    (folder / "evaluation.json").write_text(second.to_json())
    losses = {"calibration": {"tokens": 4096}, "losses": {"model.layers.0.self_attn.o_proj.weight": 0.001}}
    document = {
        "kind": "quantkit baseline",
        "schema_version": 1,
        "evaluation": first.document(),
        "conversions": {"int4": losses},
    }
    file = folder / "baseline.json"
    return _json_reader("baseline", file, document, lambda: _check(folder / "evaluation.json", file))


def _check(found: Path, old: Path) -> None:
    verdicts = check(found, old)
    verdicts_text(verdicts)
    ElementTree.fromstring(junit_xml(verdicts))
    markdown(verdicts).encode()


def journal(folder: Path) -> Reader:
    """The journal of an unfinished job."""
    file = folder / "journal.jsonl"
    sound = written(file)
    header, *entries = map(json.loads, sound.splitlines())
    values = [header, *({key: value for key, value in entry.items() if key != "crc32"} for entry in entries)]

    def damaged(draw: Random) -> bytes:
        lines = _lines(draw, values, sound)
        return lines if draw.random() < 0.3 else _summed(lines)

    def read() -> None:
        found = Journal(file, HEADER, SOURCE)
        for output in range(2):
            found.tensors_of(output)
            found.steps_of(output)
        found.rewind(len(found.layers))
        found.close()

    return Reader("journal", file, sound, damaged, read, binary=False)


def _summed(lines: bytes) -> bytes:
    """The lines with right checksums, so that what they say is looked at."""
    first, *others = lines.splitlines() or [b""]
    content, end = checked_line(first, None)
    for line in others:
        summed, end = checked_line(line, end)
        content += summed
    return content


def sensitivity(folder: Path) -> Reader:
    """sensitivity.json beside a pass's layers, as a conversion opens it, and what is printed of it."""
    model, made = folder / "model", folder / "pass"
    write_model(model, small_config(num_nextn_predict_layers=0))
    fisher_pass(model, made, torch.zeros(1, 8, dtype=torch.int64))
    document = json.loads((made / SENSITIVITY).read_bytes())
    linears = dict(list(document["linears"].items())[:6])
    losses = {"model.layers.0.self_attn.o_proj.weight": {"Q4_K": 0.001}}

    def read() -> None:
        sensitivity_text(read_sensitivity(made))
        with open_source(model) as source:
            open_sensitivity(made, source, headers_of(source).arch)

    return _json_reader("sensitivity", made / SENSITIVITY, {**document, "linears": linears, "losses": losses}, read)


def unfinished_pass(folder: Path) -> Reader:
    """What an interrupted Fisher pass has done."""
    job = FisherJob(
        quantkit="1",
        torch="2",
        source="s",
        tokens_sha256="t",
        rows=1,
        length=8,
        seed=0,
        device="cpu",
        threads=1,
        dtype="F32",
        hidden=8,
        sublayers=(2, 2),
    )
    progress = FisherProgress(job=job, forward=2, backward=1, linears={"a": LinearFisher(tokens=3, fisher=0.5)})

    def read() -> None:
        PassFolder(folder, job, restart=False).close()

    return _json_reader("unfinished pass", folder / PROGRESS, progress.model_dump(mode="json"), read)


def calibration_text(folder: Path) -> Reader:
    """Lines of texts and chats."""
    values = [
        {"text": "hello"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}], "tools": []},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "chat_template_kwargs": "{}"},
    ]
    sound = b"\n".join(json.dumps(value).encode() for value in values)
    file = TextFile("text.jsonl", folder / "text.jsonl")

    def damaged(draw: Random) -> bytes:
        return _lines(draw, values, sound)

    return Reader("jsonl", file.path, sound, damaged, lambda: read_documents(file), binary=False)


def _lines(draw: Random, values: Sequence[Any], sound: bytes) -> bytes:
    """JSON lines, of which one has changed, or damaged bytes."""
    if draw.random() < 0.3:
        return mutated_bytes(draw, sound)
    lines = [json.dumps(value).encode() for value in values]
    at = draw.randrange(len(lines))
    lines[at] = mutated_json_text(draw, values[at])
    return b"\n".join(lines) + b"\n"


def chat_template(folder: Path) -> Reader:
    """chat_template.jinja in the process that renders it, forked from this one in place of a new interpreter."""
    file = folder / "chat_template.jinja"
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}], "tools": None}
    chats = [{**chat, "documents": None, "bos_token": "<s>"}] * 2

    def read() -> None:
        source = file.read_text(encoding="utf-8", errors="replace")
        try:
            answer_of(_rendered({"default": source}, chats))
        except TemplateFailure as failure:
            raise CalibrationError(printable(str(failure), 300)) from failure  # as the tokenizer says it

    def damaged(draw: Random) -> bytes:
        return mutated_words(draw, CHAT_TEMPLATE, TEMPLATE_WORDS)

    return Reader("chat template", file, CHAT_TEMPLATE.encode(), damaged, read, binary=False)


def _rendered(templates: dict[str, str], chats: list[dict[str, Any]]) -> bytes:
    """What the process says; its end by a limit is a refusal, as in `render_chats`."""
    answer, asked = os.pipe()
    child = os.fork()
    if child == 0:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        template_process.limit_resources(2, template_process.ADDRESS_SPACE + pages * resource.getpagesize())
        with os.fdopen(asked, "wb") as pipe:
            pipe.write(json.dumps(template_process.render_all(templates, chats)).encode())
        os._exit(0)
    os.close(asked)
    with os.fdopen(answer, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return text if status == 0 else json.dumps({"error": "killed", "index": None}).encode()
