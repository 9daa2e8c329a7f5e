"""Sections of docs/results.md about quality."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from results_markdown import UNKNOWN, Document, code, device, estimate, facts, number, run_facts, table, versions

TITLES = {
    "int4": "Everything int4, groups of 128, symmetric",
    "int3": "Everything int3, groups of 128, symmetric",
    "mixed": "Routed experts int4, the other projections int8, groups of 128, symmetric",
}


def peers_tiny(data: Document) -> str:
    """Integers beside other tools."""
    parts = [
        "Bits per weight are those of the projections, scales included. Settings of a tool were compared on the same\n"
        "windows, so the best of several is a little flattered. Against quantkit's: the mean difference by windows.\n",
        _rows_facts(data, recipe="scheme of each heading; method and options under settings"),
    ]
    for scheme in dict.fromkeys(row["scheme"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["scheme"] == scheme]
        parts.append(f"### {TITLES.get(scheme, scheme)}\n\n{_quality_table(rows)}")
    return "\n".join(parts)


def gguf_tiny(data: Document) -> str:
    """GGUF beside llama-quantize."""
    parts = [
        "Embeddings and head are F32 in every file. -bytes: a plan of quantkit's own in no more bytes than the mix of\n"
        "that name; -imatrix: the same mix, rounded to nearest under the importance alone. Seconds of quantkit hold\n"
        "the calibration, those of llama-quantize only the rounding.\n",
        _rows_facts(data, recipe="mix of types of each heading; method under settings"),
    ]
    for scheme in dict.fromkeys(row["scheme"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["scheme"] == scheme]
        plain = next((row for row in rows if row["name"] == "quantkit"), None)
        parts.append(f"### {scheme}\n\n{_quality_table(rows, plain)}")
    return "\n".join(parts)


def _rows_facts(data: Document, recipe: str) -> str:
    rows: Sequence[Document] = data["rows"]
    runs = _distinct(row.get("run", {}) for row in rows)
    missing = sum("run" not in row for row in rows)
    conversion = "; ".join(runs) or ""
    if runs and missing:
        conversion += f"; {UNKNOWN} for {missing} of {len(rows)} rows"
    return facts(
        what=data.get("what"),
        recipe=recipe,
        command=code(data.get("command")),
        evaluated="; ".join(_distinct(row.get("evaluation", {}) for row in rows)),
        quantised=conversion,
    )


def _distinct(machines: Iterable[Document]) -> list[str]:
    """Date, device and packages, each combination once."""
    found: dict[str, None] = {}
    for machine in machines:
        if machine:
            told = {key: value for key, value in machine.items() if key != "load_average"}
            found[", ".join(filter(None, (machine.get("date", UNKNOWN), device(told), versions(told))))] = None
    return list(found)


def _quality_table(rows: Sequence[Document], against: Document | None = None) -> str:
    rows = sorted(rows, key=lambda row: row["kld"])
    other = against or next((row for row in rows if row["name"] == "quantkit"), None)
    head = [
        "tool",
        "settings",
        "bpw",
        "mean KLD, nats",
        "against quantkit's",
        "median",
        "perplexity",
        "same top token",
        "s",
    ]
    cells = [
        [
            f"**{row['name']}**" if row["name"] == "quantkit" else row["name"],
            row.get("settings", UNKNOWN),
            f"{row['bpw']:.3f}",
            estimate(row["kld"], row.get("kld_se"), 5),
            "" if other is None or row is other else paired(row, other),
            f"{row['kld_median']:.5f}",
            f"{row['ppl']:.3f}",
            f"{row['top1']:.2f} %",
            number(row.get("seconds"), 0),
        ]
        for row in rows
    ]
    references = sorted({f"{row['ppl_reference']:.3f}" for row in rows if "ppl_reference" in row})
    return table(head, cells) + f"\nPerplexity of the original: {', '.join(references) or UNKNOWN}.\n"


def paired(row: Document, other: Document) -> str:
    """Mean difference of the KLD with its standard error over the windows."""
    if not row.get("kld_windows") or not other.get("kld_windows"):
        return UNKNOWN
    differences = [a - b for a, b in zip(row["kld_windows"], other["kld_windows"], strict=True)]
    mean = sum(differences) / len(differences)
    variance = sum((difference - mean) ** 2 for difference in differences) / (len(differences) - 1)
    return f"{mean:+.5f} ± {math.sqrt(variance / len(differences)):.5f}"


def awq_tiny(data: Document) -> str:
    """AWQ beside rounding, GPTQ and another tool's AWQ."""
    parts = [
        "Change: from the method without rescaling (rtn for awq, gptq for awq+gptq; of llm-compressor's AWQ, from\n"
        "awq), the mean difference by windows. Seconds are of a machine that had much other work.\n",
        _rows_facts(data, recipe="scheme and method of each row, defaults of quantkit"),
    ]
    for model in dict.fromkeys(row["model"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["model"] == model]
        head = ("scheme", "method", "tokens", "windows", "mean KLD, nats", "change", "layers, s")
        parts.append(f"### {model}\n\n{table(head, [_awq_row(row, rows) for row in rows])}")
    return "\n".join(parts)


def relatives(data: Document) -> str:
    """Trained models of other families, under several treatments."""
    parts = [
        "Models of 18 to 24 million weights, trained by `tools/train_relatives.py`: 48 experts in one group\n"
        "(tiny-kimi), softmax routing without a query latent (tiny-v2-lite), sparse attention of 256 keys (tiny-v32).\n"
        "KL divergence from the original on builtin:eval, windows of 512 tokens, with one standard error;\n"
        "builtin:mixed calibrates.\n"
    ]
    head = ("treatment", "bits per weight", "mean KLD, nats", "perplexity", "same first token")
    for model in data["rows"]:
        rows = [
            [
                case,
                number(found["bpw"], 3),
                f"{found['mean_kl']['mean']:.4f} ± {found['mean_kl']['standard_error']:.4f}",
                f"{100 * (found['perplexity_ratio']['mean'] - 1):+.2f} %",
                f"{100 * found['top1']:.1f} %",
            ]
            for case, found in model["cases"].items()
        ]
        windows = next(iter(model["cases"].values()))["windows"]
        told = run_facts(
            model,
            what="conversion and validation of each treatment",
            recipe="in the script",
            command=code("python benchmarks/relatives.py MODEL --device cuda"),
            gpu=model["device_used"],
            calibration=f"{model['tokens']:,} tokens",
            windows=str(windows),
        )
        parts.append(f"### {model['model']}\n\n{told}\n\n{table(head, rows)}")
    return "\n".join(parts)


def _awq_row(row: Document, rows: Sequence[Document]) -> list[str]:
    plain = {"awq": "rtn", "awq+gptq": "gptq", "rtn": "", "gptq": ""}.get(row["method"], "awq")
    other = next((one for one in rows if (one["scheme"], one["method"]) == (row["scheme"], plain)), None)
    return [
        row["scheme"],
        row["method"],
        f"{row['tokens']:,}",
        f"{len(row['kld_windows'])}",
        estimate(row["kld"], row["kld_se"], 5),
        "" if other is None else f"{paired(row, other)} ({100 * (row['kld'] / other['kld'] - 1):+.1f} %)",
        number(row.get("layers_s"), 0),
    ]


def convert_cuda(data: Document) -> str:
    """The whole command on a GPU."""
    rows = [
        [
            row["output"],
            f"{row['bpw']:.3f}",
            f"{row['bytes']:,}",
            estimate(row["kld"]["mean"], row["kld"].get("standard_error"), 5),
            number(row["seconds"].get("layers")),
            number(row["seconds"].get("validation")),
            number(row["seconds"].get("total")),
        ]
        for row in data["rows"]
    ]
    head = ("output", "bpw of all", "bytes", "mean KLD, nats", "layers, s", "validation, s", "all, s")
    return run_facts(data) + "\n" + table(head, rows)


SETTING = "llm-compressor mse damp .1"
REDUCED = "reduced"


def held_out(data: Document) -> str:
    """Output error on held-out tokens at V3's shapes, and at reduced ones."""
    parts = [
        "Relative error of a linear's output over held-out tokens; ± over experts and seeds, of the ratios expert by\n"
        f"expert. The setting is `{SETTING}`: static activation order, mse scales. Inputs are synthetic, with\n"
        "channels that are so many times as large as others; `benchmarks/held_out.py` describes them. The file has\n"
        "all rows: more settings of the peers, and quantkit without single steps.\n",
        run_facts(
            data,
            recipe="int4 in groups of 128, GPTQ with quantkit's defaults",
            peers="; ".join(dict.fromkeys(text.split(":")[0] for text in data.get("peers", {}).values())),
            note=data.get("note"),
        ),
        _held_out_table(data["cases"]),
    ]
    for name, reduced in data.items():
        if name.startswith(REDUCED):
            parts += [
                f"### {name[0].upper()}{name[1:]}\n",
                run_facts(reduced, recipe="as above"),
                _held_out_table(reduced["cases"]),
            ]
    return "\n".join(parts)


def _held_out_table(cases: Document) -> str:
    head = (
        "case",
        "experts",
        "round to nearest",
        "setting",
        "quantkit",
        "/ setting's",
        "without shrinkage / setting's",
    )
    head = (*head, "/ best peer's", "best peer")
    rows = [
        [
            name,
            str(case.get("n", UNKNOWN)),
            _error(case, "round to nearest"),
            _error(case, SETTING),
            f"**{_error(case, 'quantkit')}**",
            _ratio(case, "quantkit", "/ the target's setting"),
            _ratio(case, "quantkit, no shrinkage", "/ the target's setting"),
            _ratio(case, "quantkit", "/ best peer"),
            case.get("best peer", UNKNOWN),
        ]
        for name, case in cases.items()
    ]
    return table(head, rows)


def _error(case: Document, row: str) -> str:
    found = case["rows"].get(row, {})
    return number(found.get("error"), 4)


def _ratio(case: Document, row: str, key: str) -> str:
    found = case["rows"].get(row, {})
    return estimate(found[key], found.get(f"{key}, se"), 3) if key in found else UNKNOWN


def vllm_load(data: Document) -> str:
    """What vLLM computes of the files."""
    rows = [
        [
            run["run"],
            "yes" if run.get("loads") else f"no: {run.get('error', UNKNOWN)}",
            number(run.get("load_s")),
            f"{run['nll_vllm']:.4f} / {run['nll_twin']:.4f}" if "nll_vllm" in run else UNKNOWN,
            _distance(run.get("prompt")),
            _distance(run.get("noise")),
            _distance(run.get("controls", {}).get("unquantized")),
        ]
        for run in data["runs"]
    ]
    head = ("run", "loads", "load, s", "NLL, vLLM / own forward", "difference", "noise", "to the original")
    prompts = "{} prompts of {} tokens".format(*data["prompts"]) if "prompts" in data else ""
    return "\n".join(
        [
            "Absolute difference of the tokens' log-probabilities, mean and median in nats, between vLLM and\n"
            "quantkit's own forward of the files that `quantkit convert` wrote; beside it how far that forward moves\n"
            "in bfloat16 arithmetic (noise), and vLLM's distance from the model that was not quantised, as a scale: a\n"
            "file that vLLM misreads would be far from its own forward, too.\n",
            run_facts(
                data, recipe="one for each run: [the cases](../benchmarks/vllm/README.md#the-cases)", text=prompts
            ),
            table(head, rows),
        ]
    )


def humming(data: Document) -> str:
    """What vLLM's Humming kernels compute of the packed bytes."""
    rows = [
        [
            row["case"],
            "yes" if row.get("right") else f"no: {row['error']}" if "error" in row else "no",
            f"{row['difference']:.5f}" if "difference" in row else UNKNOWN,
            f"{row['noise']:.5f}",
            f"{row['unquantised']:.4f}",
            f"{row['signs_dropped']:.4f}" if "signs_dropped" in row else "",
            f"{row['ms']:.3f}" if "ms" in row else UNKNOWN,
            f"{row['ms_bf16']:.3f}" if "ms_bf16" in row else "",
        ]
        for row in data["rows"]
    ]
    head = ("case", "right", "difference", "noise", "to the original", "signs dropped", "ms", "torch bf16, ms")
    shapes = {f"{row['tokens']} tokens, {row['shape'][0]} x {row['shape'][1]}" for row in data["rows"]}
    return "\n".join(
        [
            "Relative difference from the float64 product of the weights as quantkit decodes the same bytes; noise is\n"
            "torch's bf16 product. A file that the kernels misread would be as far as the two columns after it say.\n",
            run_facts(data, recipe="one for each row", text="random; " + ", ".join(sorted(shapes))),
            table(head, rows),
        ]
    )


def _distance(value: Document | None) -> str:
    return f"{value['mean']:.4f}, {value['median']:.4f}" if value else UNKNOWN


def regression_gate(data: Document) -> str:
    """Does the gate alarm, and only then?"""
    clean = data["clean"]
    pairs = clean.get("every run against every other", {})
    rows = [["clean, other seeds", number(clean.get("runs"), 0), number(clean.get("false alarms"), 0), "", ""]]
    if pairs:
        rows.append(
            ["clean, each pair of them", number(pairs.get("pairs"), 0), number(pairs.get("with an alarm"), 0), "", ""]
        )
    for name, bug in data["bugs"].items():
        caught = ", ".join(f"{output} {count} of {bug['runs']}" for output, count in bug["caught"].items())
        change = "; ".join(
            f"{output} {100 * of['change']:+.1f} ± {100 * of['standard error']:.1f} %"
            for output, of in bug.get("mean KLD with seed 0", {}).items()
        )
        evidence = "; ".join(dict.fromkeys(what for each in bug.get("by", {}).values() for what in each))
        rows.append([f"bug: {name}", number(bug.get("runs"), 0), caught, change or UNKNOWN, evidence or UNKNOWN])
    levels = ", ".join(
        f"{output} {of['mean']:.5f} (from seed to seed ± {of['std']:.5f})"
        for output, of in clean.get("mean KLD", {}).items()
    )
    head = ("runs", "number", "failed", "mean KLD, paired with the clean run", "seen by")
    return "\n".join(
        [
            run_facts(
                data,
                recipe="`tests/baselines/nano.yaml`: int4 and int8 for vLLM, Q4_K_M for llama.cpp, GPTQ",
                windows=data.get("windows"),
                commits=", ".join(data.get("commits", ())),
                mean_KLD_of_clean_runs=levels,
            ),
            table(head, rows),
        ]
    )


def reference_file(rows: Sequence[Document]) -> str:
    """Divergences by a file of the reference's statistics, beside the true ones."""
    cells = [
        [
            row["model"],
            row["candidate"],
            str(row["top"]),
            number(row.get("bytes_per_token"), 0),
            number(row.get("mean_rest"), 5),
            estimate(row["kld"], row.get("kld_standard_error"), 5),
            number(row.get("kld_by_file"), 5),
            UNKNOWN if "less" not in row else f"{100 * row['less']:.2f} %",
        ]
        for row in rows
    ]
    head = (
        "model",
        "candidate",
        "logits kept",
        "bytes a token",
        "mean rest",
        "mean KLD, true",
        "by the file",
        "less by",
    )
    return "\n".join(
        [
            "What `quantkit evaluate --save-reference` keeps of each position, and the lower bound of the KL\n"
            "divergence (nats) that it gives. Mean rest: the probability of all other tokens together, by the\n"
            "reference.\n",
            run_facts({}, what="KL divergence by a reference's file against the true one"),
            table(head, cells),
        ]
    )
