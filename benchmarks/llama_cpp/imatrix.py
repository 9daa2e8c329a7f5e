"""An imatrix.gguf by the rules of llama-imatrix, for a float GGUF of tiny-deepseek-v3 and the peers' calibration text.

    python benchmarks/llama_cpp/imatrix.py MODEL.gguf OUT.gguf [--windows 256] [--threads 1]

llama.cpp itself runs the windows (those that every peer gets: 512 tokens, BOS first); what its graph multiplies is
recorded as its own tool would.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "peers")]

from protocol import WINDOW, calibration_windows  # noqa: E402  (its folder is no package)

from tests.oracles.llama_imatrix import collect, write  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    windows = calibration_windows(args.windows).numpy()
    start = time.perf_counter()
    records = collect(args.model, windows, args.threads)
    write(args.out, records, chunk_size=WINDOW, chunks=len(windows), datasets=["calibration text of the peers"])
    print(f"{len(records)} weights, {windows.size:,} tokens, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
