"""Writes docs/results.md: the tables of what was measured, from benchmarks/results/*.json.

    python tools/docs_results.py            write
    python tools/docs_results.py --check    exit 1 if the page is not up to date (a test does the same)

Nothing is computed here but roundings, ratios of a column and paired differences of windows that a file holds. A fact
that a file lacks is "not recorded"; a file that is missing has no section.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from results_families import peers_families, two_bits
from results_faults import faults, fuzz, remote_faults, verify_peers
from results_fisher import fisher_layer, output_aware_tiny, two_sided
from results_markdown import device, facts, versions
from results_prune import prune_tiny
from results_quality import (
    awq_tiny,
    convert_cuda,
    gguf_tiny,
    held_out,
    humming,
    peers_tiny,
    reference_file,
    regression_gate,
    relatives,
    vllm_load,
)
from results_speed import (
    cpu_gptq,
    eta,
    ggml_encode,
    ggml_encode_gpu,
    gptq_expert,
    memory_growth,
    memory_model,
    moe_layer,
    true_width,
)
from results_switches import switches, target_switches
from results_targets import target
from results_tuning import tuning_layer, tuning_tiny

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"

HEAD = """# Results

Written by `tools/docs_results.py` from [benchmarks/results](../benchmarks/README.md); how each number is measured, and
what did not run, is said there. ± is one standard error, over windows of held-out text where nothing else is said. What
a file does not say is "not recorded" here.

**The tiny model** (tiny-deepseek-v3) is a trained model of 25 million weights with the exact architecture of DeepSeek
V3. It is not in the repository. **Nano** is `examples/nano-deepseek-v3`, which is: a smaller one of the same kind. The
whole of DeepSeek V3 has not been converted yet.
"""

Section = tuple[str, str, str, Callable[[Any], str]]
SECTIONS: tuple[Section, ...] = (
    (
        "Quality: integers, the tiny model",
        "peers_tiny",
        "benchmarks/peers/run.sh, benchmarks/quality_tiny.py",
        peers_tiny,
    ),
    ("Quality: AWQ, trained models", "awq_tiny", "benchmarks/awq_tiny.py", awq_tiny),
    (
        "Quality: GPTQ with output Hessians, trained models",
        "output_aware_tiny",
        "benchmarks/output_aware_tiny.py",
        output_aware_tiny,
    ),
    ("Quality: switches of GPTQ, trained models", "switches", "benchmarks/switches.py", switches),
    ("Quality: tuning of whole layers, trained models", "tuning_tiny", "benchmarks/tuning_tiny.py", tuning_tiny),
    ("Quality: fewer experts, the tiny model", "prune_tiny", "benchmarks/prune_tiny.py", prune_tiny),
    ("Quality: small models of other families", "relatives", "benchmarks/relatives.py", relatives),
    (
        "Quality: small models of other families beside other tools",
        "peers_families",
        "benchmarks/peers/families.py",
        peers_families,
    ),
    ("Quality: GGUF, the tiny model", "gguf_tiny", "benchmarks/llama_cpp/quality.py, rows.py", gguf_tiny),
    ("Quality: types chosen for a size", "target", "benchmarks/target.py", target),
    ("Quality: types chosen for a size, with switches", "target_switches", "benchmarks/target.py", target_switches),
    ("Quality: experts in two bits, the tiny model", "two_bits", "benchmarks/two_bits.py", two_bits),
    (
        "Quality: GGUF below three bits, the tiny model",
        "gguf_low_bits",
        "benchmarks/llama_cpp/quality.py, rows.py",
        gguf_tiny,
    ),
    ("Quality: the tiny model on a GPU", "convert_cuda", "", convert_cuda),
    ("Quality: a file in the reference's place", "reference_file", "benchmarks/reference_file.py", reference_file),
    ("Quality: held-out error at DeepSeek V3's shapes", "held_out", "benchmarks/held_out.py", held_out),
    ("Speed: one MoE layer of DeepSeek V3", "moe_layer", "benchmarks/moe_layer.py", moe_layer),
    ("Speed: one MoE layer in a Fisher pass", "fisher_layer", "benchmarks/fisher_layer.py", fisher_layer),
    ("Speed: codes with output Hessians", "two_sided", "benchmarks/two_sided.py", two_sided),
    ("Speed: tuning of one layer", "tuning_layer", "benchmarks/tuning_layer.py", tuning_layer),
    ("Speed: GPTQ of an expert", "gptq_expert", "benchmarks/gptq_expert.py", gptq_expert),
    ("Speed: block types of ggml on a GPU", "ggml_encode_gpu", "benchmarks/ggml_encode_gpu.py", ggml_encode_gpu),
    ("Speed: block types of ggml on a processor", "ggml_encode", "benchmarks/ggml_encode.py", ggml_encode),
    (
        "Speed: low-bit types of ggml on a processor",
        "ggml_low_bits",
        "benchmarks/ggml_encode.py --low-bits",
        ggml_encode,
    ),
    ("Speed: GPTQ on a processor", "cpu_gptq", "benchmarks/cpu_gptq.py", cpu_gptq),
    ("Time: forecast and ETA", "eta", "benchmarks/eta.py", eta),
    ("Memory: does it grow with the layers?", "memory_growth", "benchmarks/memory_growth.py", memory_growth),
    ("Memory: does convert take what plan says?", "memory_model", "benchmarks/memory_model.py", memory_model),
    ("Memory: DeepSeek V3's true widths", "true_width", "benchmarks/true_width.py", true_width),
    ("vLLM computes what was written", "vllm_load", "benchmarks/vllm", vllm_load),
    ("vLLM computes what was written: other families", "vllm_families", "benchmarks/vllm", vllm_load),
    ("vLLM computes what was written: GPTQ, AWQ, NVFP4, MXFP4", "vllm_layouts", "benchmarks/vllm", vllm_load),
    ("vLLM on a processor computes what was written", "vllm_cpu", "benchmarks/vllm", vllm_load),
    (
        "vLLM's Humming kernels multiply what was packed",
        "humming",
        "benchmarks/vllm/humming_kernels.py",
        humming,
    ),
    ("Verify: what other packages write", "verify_peers", "benchmarks/verify_peers.py", verify_peers),
    ("Reliability: damaged files", "fuzz", "benchmarks/fuzz.py", fuzz),
    ("Reliability: failing disks, kills, tampering", "faults", "benchmarks/faults.py", faults),
    ("Reliability: a hostile web server", "remote_faults", "benchmarks/remote_faults.py", remote_faults),
    ("The regression gate", "regression_gate", "benchmarks/regression_gate.py", regression_gate),
)


def page(results: Path = RESULTS) -> str:
    """The whole page's text."""
    parts = [HEAD]
    for title, name, script, section in SECTIONS:
        file = results / f"{name}.json"
        if file.exists():
            made = f", made by `{script}`" if script else ""
            source = f"All numbers: [{name}.json](../benchmarks/results/{name}.json){made}.\n"
            parts.append(f"## {title}\n\n{source}\n{section(json.loads(file.read_text(encoding='utf-8'))).rstrip()}\n")
    known = {name for _, name, _, _ in SECTIONS}
    others = [file for file in sorted(results.glob("*.json")) if file.stem not in known]
    if others:
        parts.append("## Other files\n\nNot shown here as tables yet.\n")
        parts += [_other(file) for file in others]
    return "\n".join(parts).replace("\n\n\n", "\n\n")


def _other(file: Path) -> str:
    """What a file without a section of its own says on top."""
    data = json.loads(file.read_text(encoding="utf-8"))
    said = data if isinstance(data, dict) else {}
    what = facts(what=said.get("what"), device=device(said), date=said.get("date"), versions=versions(said))
    return f"### {file.stem}\n\nAll numbers: [{file.name}](../benchmarks/results/{file.name}).\n\n{what}"


def outdated() -> bool:
    """Whether the page differs from what the files say."""
    return not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page()


def main() -> None:
    if "--check" in sys.argv[1:]:
        if outdated():
            print("docs/results.md: out of date, run python tools/docs_results.py")
            raise SystemExit(1)
        return
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
