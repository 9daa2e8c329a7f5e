"""What holds in llama.cpp whatever the architecture: how much it holds, and how it takes yarn."""

from __future__ import annotations

from dataclasses import replace

from quantkit.arch.rope import Rope

MAX_LAYERS, MAX_EXPERTS = 512, 1024  # LLAMA_MAX_LAYERS, LLAMA_MAX_EXPERTS: asserts when a file is loaded
YARN_BETAS = (32.0, 1.0)  # of llama_hparams, fast and slow


def yarn_flags(rope: Rope) -> tuple[str, ...]:
    """Words of a command line without which llama.cpp takes another ramp than the model's; () if it needs none."""
    yarn = rope.yarn
    if yarn is None:
        return ()
    fast, slow = YARN_BETAS
    default = yarn.model_copy(update={"beta_fast": fast, "beta_slow": slow})
    if rope.yarn_ramp(yarn) == replace(rope, yarn=default).yarn_ramp(default):
        return ()
    # The keys are written, but not read: seen in logits, October 2026.
    return "--yarn-beta-fast", f"{yarn.beta_fast:g}", "--yarn-beta-slow", f"{yarn.beta_slow:g}"


def yarn_difference(rope: Rope, architecture: str) -> tuple[str, ...]:
    """A line for a plan, if `yarn_flags` are needed."""
    flags, (fast, slow) = yarn_flags(rope), YARN_BETAS
    if not flags:
        return ()
    return (
        f"llama.cpp takes beta_fast {fast:g} and beta_slow {slow:g} for {architecture} whatever the file says: "
        f"start it with {' '.join(flags)}.",
    )
