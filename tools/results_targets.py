"""Section of docs/results.md about types that were chosen for a size."""

from __future__ import annotations

from results_markdown import Document, run_facts, table

CASES = {
    "q4": "the bytes of Q4_K_M, GGUF",
    "q3": "the bytes of Q3_K_M, GGUF",
    "q2": "the bytes of Q2_K, GGUF",
    "mix": "the bytes of int4 experts, the rest int8, compressed-tensors",
}
HAND = {"q4": "IQ4_XS, rest Q8_0", "q3": "Q3_K, rest wider", "mix": "int4, rest int8"}


def target(data: Document) -> str:
    """Chosen types beside hand-made plans of as many bytes, and expected beside measured KLD."""
    hand = {row["output"]: row["kld"] for row in data["fitted"]}
    rows = [
        [
            CASES[row["case"]],
            f"{row['tokens']:,}",
            f"{row['file_bytes']:,}",
            f"{row['limit']:,}",
            f"{hand[HAND[row['case']]]:.4f}",
            f"{row['kld']:.4f} ± {row['kld_se']:.4f}",
            f"{100 * (row['kld'] / hand[HAND[row['case']]] - 1):+.0f} %",
            f"{row['second_order']:.4f}",
            f"{row['kld'] / row['expected']:.2f}",
        ]
        for row in data["rows"]
    ]
    head = ("size", "calibration tokens", "bytes of the files", "limit", "hand-made plan's KLD", "KLD", "difference")
    fitted = [
        [row["output"], f"{row['second_order']:.4f}", f"{row['kld']:.4f}", f"{row['kld'] / row['expected']:.2f}"]
        for row in data["fitted"]
    ]
    rounding, flips = data["coefficients"]
    alone = " and ".join(f"{value:.3f}" for value in data["coefficients_without_rows"])
    return "\n".join(
        (
            "The tiny model, GPTQ with defaults, 88 windows of 512 tokens. Hand-made plans are quantkit's own of the\n"
            "tables above (131,072 calibration tokens). A Fisher pass of 32,768 tokens. Embeddings and head of GGUF\n"
            "are F32.\n",
            run_facts(data, recipe="target: {size: ...} of the limit shown"),
            table((*head, "second-order loss", "KLD / expected"), rows),
            "Expected is a · D + b · Σ √D of each layer, D the second-order loss of rounding to nearest: least\n"
            f"squares over the rows above and these, a = {rounding:.3f}, b = {flips:.3f} (over the hand-made alone\n"
            f"{alone}).\n",
            table(("hand-made output", "second-order loss", "KLD", "KLD / expected"), fitted),
        )
    )
