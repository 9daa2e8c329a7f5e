"""Sections of docs/results.md about speed and memory."""

from __future__ import annotations

from collections.abc import Mapping

from results_markdown import UNKNOWN, Document, code, gigabytes, number, run_facts, spread, table, yaml_block


def moe_layer(data: Document) -> str:
    """A layer of true size on a GPU."""
    rows, stages = [], []
    for name, case in data["layer"].items():
        spread = case.get("all seconds", [])
        repeats = f"{len(spread)}: {', '.join(f'{seconds:.2f}' for seconds in spread)}" if spread else UNKNOWN
        rows.append(
            [
                name,
                number(case.get("seconds"), 2),
                repeats,
                gigabytes(case.get("peak bytes of GPU memory")),
                gigabytes(case.get("bytes written")),
                number(case.get("mean relative loss"), 5),
            ]
        )
        parts = case.get("stages, synchronised", {})
        stages.append(
            f"- {name}: " + (", ".join(f"{what} {seconds:.2f}" for what, seconds in parts.items()) or UNKNOWN)
        )
    head = ("method", "s", "repeats, s", "GPU memory", "written", "mean relative loss")
    return "\n".join(
        [
            run_facts(
                data,
                recipe="int4 in groups of 128, from FP8 blocks; the methods are named in the table",
                tokens=f"{data['tokens']:,}" if "tokens" in data else "",
                note=data.get("how"),
            ),
            table(head, rows),
            "Seconds by stage, from a run of their own with a synchronisation around each:\n",
            *stages,
            _rates(data),
            _peers_of_layer(data),
            _extrapolated(data),
        ]
    )


def _rates(data: Document) -> str:
    """Stages beside the card's ceilings, a column for each case."""
    cases = data["layer"]
    stages = list(dict.fromkeys(stage for case in cases.values() for stage in case.get("rates of the stages", {})))
    if not stages:
        return ""
    rows = [
        [stage, *(_flat(case["rates of the stages"].get(stage, {})) for case in cases.values())] for stage in stages
    ]
    ceilings = _flat(data.get("ceilings", {}))
    return f"\nWhat the stages reach; the card's measured ceilings: {ceilings}.\n\n{table(('stage', *cases), rows)}"


def _peers_of_layer(data: Document) -> str:
    peers = data.get("peers, one expert")
    if not peers:
        return "\nPeers on the same matrices: not recorded.\n"
    keys = ("peer", "version", "setting", "total_ms", "gate_ms", "up_ms", "down_ms", "hessian_ms")
    rows = [[str(peer.get(key, UNKNOWN)) for key in keys] for peer in peers]
    return "\nPeers' own functions on an expert of this layer:\n\n" + table(keys, rows)


def _flat(values: Document) -> str:
    """ "a 1.23, b 4.5": what a file holds, as it is."""
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
    )


def _extrapolated(data: Document) -> str:
    whole = data.get("all of V3, extrapolated")
    if not isinstance(whole, Mapping):
        return ""
    rows = [
        [name, *(" / ".join(map(str, cell)) if isinstance(cell, list) else str(cell) for cell in case.values())]
        for name, case in whole.items()
        if isinstance(case, Mapping)
    ]
    keys = next((list(case) for case in whole.values() if isinstance(case, Mapping)), [])
    return f"\nAll of V3, extrapolated and not run: {whole.get('what', UNKNOWN)}.\n\n{table(('method', *keys), rows)}"


def gptq_expert(data: Document) -> str:
    """GPTQ of one expert."""
    sizes = data.get("sizes", {})
    runs = {name: case for name, case in data.items() if isinstance(case, Mapping) and "ms an expert" in case}
    rows = [
        [
            name,
            number(case["ms an expert"], 2),
            number(case.get("GPU-hours for 14848 experts"), 4),
            gigabytes(case.get("peak bytes beside inputs and weights")),
            ", ".join(f"{what} {ms:.2f}" for what, ms in case.get("ms an expert by stage", {}).items()),
        ]
        for name, case in runs.items()
    ]
    quality = [
        [f"{name}: {which}", number(of.get("loss / oracle"), 5), number(of.get("undamped loss / oracle"), 5)]
        for name, cases in data.items()
        if name.startswith("quality")
        for which, of in cases.items()
        if "loss / oracle" in of
    ]
    head = ("method", "ms an expert", "GPU-hours of 14,848 experts", "memory beside inputs and weights", "by stage, ms")
    return "\n".join(
        [
            run_facts(
                data,
                recipe="int4 in groups of 128, GPTQ with activation order and weighted scale search",
                sizes=", ".join(f"{name} {value:,}" for name, value in sizes.items()),
                note=data.get("how"),
            ),
            table(head, rows),
            "Loss beside the float64 oracle's on the same Hessian (1: as good):\n",
            table(("case", "loss / oracle's", "without damping"), quality),
        ]
    )


def ggml_encode_gpu(data: Document) -> str:
    """Block types on a GPU."""
    rows = [
        [
            name,
            number(case["G weights/s"], 2),
            number(case.get("s a layer"), 3),
            number(case.get("libggml, core-seconds a layer"), 0),
            spread(case.get("error / libggml's", {}), 3),
            spread(case.get("error / torch twin's", {}), 5),
            gigabytes(case.get("peak bytes")),
        ]
        for name, case in data.items()
        if isinstance(case, Mapping) and "G weights/s" in case
    ]
    head = (
        "type",
        "G weights/s",
        "s a layer",
        "libggml, s of a core",
        "error / libggml's",
        "error / twin's",
        "GPU memory",
    )
    return "\n".join(
        [
            run_facts(data, recipe="rounding to nearest with searched scales under importance; a layer is 256 experts"),
            table(head, rows),
            "Errors are weighted by importance; the ranges are over kinds of weights. libggml's seconds come from its\n"
            "speed on one core of another machine (`benchmarks/ggml_encode_gpu.py`), not from a run beside this one.\n",
        ]
    )


def ggml_encode(data: Document) -> str:
    """Block types on one core."""
    rows = [
        [
            row["type"],
            number(row.get("quantkit_mweights_s")),
            number(row.get("libggml_mweights_s")),
            number(row.get("speed_ratio"), 2),
            spread({k: v for k, v in row.get("error_ratio", {}).items() if "importance" not in k}, 3),
            spread({k: v for k, v in row.get("error_ratio", {}).items() if "importance" in k}, 3),
        ]
        for row in data["rows"]
    ]
    shape = " x ".join(map(str, data["shape"])) if "shape" in data else ""
    head = ("type", "quantkit, M weights/s", "libggml", "ratio", "error / libggml's", "the same, with importance")
    return "\n".join(
        [
            run_facts(data, recipe="rounding to nearest with searched scales", matrix=shape, pairs=data.get("pairs")),
            table(head, rows),
            "Ratios of speed are medians of pairs taken in turns, in processor time; ranges of errors are over kinds\n"
            "of weights.\n",
        ]
    )


def eta(data: Document) -> str:
    """Forecast and ETA of conversions against the time that they took."""
    rows = [
        [name, number(run["seconds"], 1), *(number(run[key], 2) for key in _ETA)]
        for name, runs in data["cases"].items()
        for run in runs
    ]
    head = ("conversion", "s", "forecast / real", "ETA off, from a tenth on", "from half on")
    told = run_facts(data, recipe="scheme or preset, and method, of each row", source=data["source"])
    return "\n".join([told, table(head, rows)])


_ETA = ("forecast_of_real", "worst_from_a_tenth", "worst_from_half")


def cpu_gptq(data: Document) -> str:
    """GPTQ on a processor: kernels beside their torch twins."""
    rows = [
        [
            row["what"],
            " x ".join(map(str, row.get("shape", ()))) or UNKNOWN,
            _stages(row.get("kernels_s", {})),
            _stages(row.get("twin_s", {})),
            number(row.get("speed_ratio", {}).get("all"), 2),
            number(row.get("loss_ratio"), 5),
        ]
        for row in data["rows"]
    ]
    head = ("matrices", "shape", "kernels, s", "torch twin, s", "ratio of all", "loss / twin's")
    told = run_facts(
        data,
        recipe="int4, GPTQ",
        threads=data.get("threads"),
        repeats=data.get("repeats"),
        seconds_of_compiling_once=data.get("cold_compile_s"),
    )
    return told + "\n" + table(head, rows)


def _stages(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{stage} {value:.3f}" for stage, value in seconds.items()) or UNKNOWN


def memory_growth(data: Document) -> str:
    """Peak memory against layers."""
    runs = list(data["rows"])
    budget = data.get("under_budget")
    rows = [
        [
            f"{run['layers']}" + (f", under {run['budget_bytes'] / 2**30:.0f} GiB" if "budget_bytes" in run else ""),
            gigabytes(run["peak_rss_bytes"]),
            gigabytes(run["allowed_bytes"]) if "allowed_bytes" in run else "",
            number(run.get("seconds"), 0),
            number(run.get("cpu_seconds"), 0),
            code(run.get("command")) or UNKNOWN,
        ]
        for run in [*runs, *([budget] if budget else [])]
    ]
    head = ("layers", "peak memory", "allowed", "s", "CPU s", "command")
    growth = f"From the fewest layers to the most: x {data['growth']:.3f} (allowed: {data['growth_allowed']})."
    told = run_facts(data, recipe="below", command="in the table")
    return "\n".join([told, table(head, rows), growth, yaml_block(data.get("recipe"))])


def memory_model(data: Document) -> str:
    """Peaks of conversions beside what their plans said."""
    rows = [
        [
            run["model"],
            run["recipe"],
            run["budget"],
            number(run["experts_at_once"], 0),
            gigabytes(run["planned_bytes"]),
            gigabytes(run["measured_bytes"]),
            number(run["ratio"], 3),
        ]
        for run in data["rows"]
    ]
    head = ("model", "recipe", "budget", "experts at once", "planned peak", "measured peak", "measured / planned")
    least, most = data["bounds"]
    told = run_facts(data, command="python benchmarks/memory_model.py, with other models by --models")
    return "\n".join([told, table(head, rows), f"Allowed: {least} to {most} of the plan."])


def true_width(data: Document) -> str:
    """Memory and time at V3's widths."""
    rows = [
        ["peak memory", gigabytes(data.get("peak_rss_bytes"))],
        ["budget; allowed", f"{gigabytes(data.get('budget_bytes'))}; {gigabytes(data.get('allowed_bytes'))}"],
        ["source", gigabytes(data.get("source_bytes"))],
        ["experts", number(data.get("experts"), 0)],
        ["calibration tokens", number(data.get("tokens"), 0)],
        ["seconds; of CPU", f"{number(data.get('seconds'), 0)}; {number(data.get('cpu_seconds'), 0)}"],
    ]
    return "\n".join([run_facts(data, recipe="below"), table(("", ""), rows), yaml_block(data.get("recipe"))])
