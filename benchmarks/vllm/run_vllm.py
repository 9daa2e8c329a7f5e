"""Load checkpoints in vLLM on a GPU machine and record the log-probability of every prompt token, and of 16 greedy
tokens after each prompt. Needs vLLM and nothing of quantkit.

    python run_vllm.py DIR RESULTS.json [--jobs 4] [--limit 240] RUN...

RUN is a folder of DIR, or of a folder in it, with options behind ``@`` joined by ``+``: ``mtp`` (speculative decoding
with the checkpoint's MTP layer), ``graphs`` (CUDA graphs instead of eager mode), ``marlin`` (linears and attention as
an A100 would take them: Marlin, Triton MLA). Each run is a process of its own; its log is written beside RESULTS.json.

DeepGEMM is off: it compiles some two hundred shapes at start-up, which takes longer than everything else here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

N_NEW = 16
NOTED = re.compile(
    r"Using |Selected |WNA16|Marlin|Machete|MoE backend|must match|not supported|Falling back|prefill backend", re.I
)
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "2",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Load checkpoints in vLLM and record log-probabilities.")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--jobs", type=int, default=4, help="processes at a time")
    parser.add_argument("--limit", type=float, default=240, help="seconds for one run")
    parser.add_argument("directory", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("runs", nargs="+")
    given = parser.parse_args()
    if given.one:
        run_one(given.directory, given.results, given.runs[0])
    else:
        run_all(given.directory, given.results, given.runs, given.jobs, given.limit)


def run_one(directory: Path, result: Path, run: str) -> None:
    """Load, score, generate, write. Whatever goes wrong ends the process with its traceback in the log."""
    from vllm import LLM, SamplingParams

    case, options = split(run)
    settings: dict[str, Any] = {}
    if "mtp" in options:
        settings["speculative_config"] = {"method": "mtp", "num_speculative_tokens": 1}
    if "marlin" in options:
        settings["attention_backend"] = "TRITON_MLA"
        fp8_in_marlin()
    begun = time.time()
    llm = LLM(
        model=str(directory / case),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager="graphs" not in options,
        max_model_len=1024,
        max_num_seqs=8,
        max_num_batched_tokens=1024,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.1,
        kv_cache_memory_bytes=2**28,
        seed=0,
        **settings,
    )
    load_s = time.time() - begun
    prompts: list[list[int]] = json.loads((directory / case).with_name("prompts.json").read_text())
    sampling = SamplingParams(
        temperature=0, max_tokens=N_NEW, ignore_eos=True, detokenize=False, prompt_logprobs=0, logprobs=0
    )
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    record = {
        "load_s": round(load_s, 1),
        "prompt_logprobs": [
            [given[token].logprob for given, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
            for output, prompt in zip(outputs, prompts, strict=True)
        ],
        "new_tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "new_logprobs": [
            [given[token].logprob for given, token in zip(o.outputs[0].logprobs, o.outputs[0].token_ids, strict=True)]
            for o in outputs
        ],
    }
    result.write_text(json.dumps(record))
    # vLLM's threads can hold the interpreter for minutes.
    sys.stdout.flush()
    os._exit(0)


def fp8_in_marlin() -> None:
    """Let vLLM believe that this GPU cannot multiply in FP8, as an A100 cannot: weights stay FP8, inputs BF16."""
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsW8A8Fp8

    CompressedTensorsW8A8Fp8.get_min_capability = classmethod(lambda cls: 1000)


def run_all(directory: Path, results: Path, runs: list[str], jobs: int, limit_s: float) -> None:
    """Start the processes, ``jobs`` at a time; RESULTS.json is written anew whenever one ends."""
    document: dict[str, Any] = {**versions(), "runs": {}}
    waiting, live = list(runs), {}
    while waiting or live:
        while waiting and len(live) < jobs:
            run = waiting.pop(0)
            live[run] = (start(directory, results, run), time.time())
        time.sleep(0.3)
        for run, (process, begun) in list(live.items()):
            late = time.time() - begun > limit_s
            if process.poll() is None and not late:
                continue
            process.kill()
            process.wait()
            del live[run]
            document["runs"][run] = record = collect(results, run, late)
            results.write_text(json.dumps(document))
            print(f"{time.time() - begun:5.0f} s  {run}: {record.get('error', 'loads and runs')}", flush=True)


def start(directory: Path, results: Path, run: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **ENVIRONMENT}
    if "marlin" in split(run)[1]:
        environment["VLLM_DISABLED_KERNELS"] = "MacheteLinearKernel,CutlassW4A8LinearKernel"
        environment["VLLM_TEST_FORCE_FP8_MARLIN"] = "1"
    words = [sys.executable, __file__, "--one", str(directory), str(part_of(results, run, "json")), run]
    with part_of(results, run, "log").open("wb") as log:
        return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment)


def collect(results: Path, run: str, late: bool) -> dict[str, Any]:
    """What the process wrote, with the kernels that its log names; or the error."""
    log = part_of(results, run, "log").read_text(errors="replace")
    lines = re.findall(r"(?:INFO|WARNING|ERROR) [\d-]+ [\d:.]+ \[.*?\] (.*)", log)
    noted = list(dict.fromkeys(line[:200] for line in lines if NOTED.search(line)))
    written = part_of(results, run, "json")
    if written.exists():
        return {**json.loads(written.read_text()), "log": noted}
    said = (re.sub(r"^\[rank\d+\]: ", "", line) for line in reversed(log.splitlines()))
    last = next((line for line in said if re.match(r"\w[\w.]*(Error|Exception)\b", line)), "")
    return {"error": "out of time" if late else last[:500] or "no result", "log": noted}


def versions() -> dict[str, str]:
    import torch
    import vllm

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def processor() -> str:
    """Its name as Linux gives it, with what decides which of vLLM's builds it runs."""
    said = dict(line.partition(":")[::2] for line in Path("/proc/cpuinfo").read_text().splitlines())
    said = {key.strip(): value.strip() for key, value in said.items()}
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if flag in said.get("flags", "").split()]
    return f"{said.get('model name', 'unknown processor')} ({', '.join(wide)})"


def split(run: str) -> tuple[str, list[str]]:
    """ "case@a+b" -> ("case", ["a", "b"])."""
    case, _, options = run.partition("@")
    return case, options.split("+") if options else []


def part_of(results: Path, run: str, suffix: str) -> Path:
    return results.with_name(f"{results.stem}.{run.replace('/', '.')}.{suffix}")


if __name__ == "__main__":
    main()
