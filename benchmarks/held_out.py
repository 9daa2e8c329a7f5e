"""Relative output error on held-out tokens: quantkit's GPTQ beside gptqmodel's and llm-compressor's, int4 g128.

    python benchmarks/held_out.py [--tokens 2048 4096 16384] [--seeds 2] [--experts 3]     # a GPU, DeepSeek V3's shapes
    python benchmarks/held_out.py --features 1024 --out 512 --device cpu --no-peers        # anywhere

A layer of 16 experts. Inputs are made of directions with a falling spectrum and noise. 0.6 % of the channels are large,
token sizes are Student-t with 6 degrees of freedom (the hidden units' second moments need the fourth one of these). The
layer's tokens come from 32 topics. A topic has its own mean, its own weighting of the directions that all share, and
directions that are its own; an expert sees its own mixture of topics (Dirichlet .3), all experts the same number of
tokens. Calibration tokens are an expert's own; the held-out ones come from the same mixture. Rows of the weights differ
in size and have tails. --inputs 20:0.5 means: large channels are 20 times as large, and half of the energy lies in
directions that are a topic's own; the less of it, the more an expert can learn from the layer's other tokens.

Every method gets the same mean of x x^T in float32 and float32 weights with bfloat16 values. quantkit stores bfloat16
scales, the peers' stay float32. Error: |(Q - W) X| / |W X| over the held-out tokens; means and standard errors over
experts and seeds, and of the ratio expert by expert. With --features the tokens shrink alike, so that tokens / inputs
stays. "all tokens": the peer gets the layer's tokens for every expert, as llm-compressor does by default
(moe_calibrate_all_experts).
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.calibrate.inputs import InputStats, shrunk, shrunk_to_diagonal
from quantkit.quantizers.gptq import Gptq
from quantkit.quantizers.rtn import Rtn
from quantkit.schemes import IntScheme

SCHEME = IntScheme(bits=4, group_size=128)
TOPICS = 32
EXPERTS = 16
HELD_OUT = 4096
V3_FEATURES = 7168
TARGETS = {16384: 0.95, 2048: 0.92}
"""At most this share of the best peer's setting, by tokens."""
THE_SETTING = "llm-compressor mse damp .1"
"""Activation order, mse scales, damping .1 on static groups: what was the best of the peers when the target was set."""


@dataclass(frozen=True)
class Kind:
    """Of inputs. outliers: size of the large channels; own: share of the energy in a topic's own directions."""

    outliers: float
    own: float

    @classmethod
    def of(cls, text: str) -> Kind:
        outliers, own = text.split(":")
        return cls(float(outliers), float(own))

    def __str__(self) -> str:
        return f"outliers x{self.outliers:g}, {self.own:.0%} in own directions"


@dataclass(frozen=True)
class Sizes:
    features: int
    out: int
    device: torch.device

    def tokens(self, at_v3: int) -> int:
        return max(64, at_v3 * self.features // V3_FEATURES)


class Layer:
    """Draws the inputs of a layer's experts."""

    def __init__(self, sizes: Sizes, kind: Kind, seed: int) -> None:
        self.sizes, self._kind = sizes, kind
        self._generator = torch.Generator(sizes.device).manual_seed(seed)
        d, rank = sizes.features, sizes.features // 8
        spectrum = torch.linspace(0, -3, rank, device=sizes.device).exp()
        self._directions = self._normal(rank, d) / rank**0.5
        self._own_directions = self._normal(TOPICS if kind.own else 0, rank, d) / rank**0.5
        self._channels = (0.5 * self._normal(d)).exp()
        large = torch.randperm(d, generator=self._generator, device=sizes.device)[: max(1, d * 6 // 1000)]
        self._channels[large] *= kind.outliers
        self._latent_scale = spectrum * (0.5 * self._normal(TOPICS, rank)).exp()
        self._latent_mean = spectrum * self._normal(TOPICS, rank)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            mixtures = torch.distributions.Dirichlet(torch.full((TOPICS,), 0.3)).sample((EXPERTS,))
        self._mixtures = mixtures.to(sizes.device)
        sample = torch.cat([self.inputs(expert, 256).float() for expert in range(EXPERTS)])
        self._channels /= sample.square().mean().sqrt()

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, device=self.sizes.device)

    def inputs(self, expert: int, tokens: int) -> Tensor:
        """(tokens, features) bfloat16, fresh ones at every call."""
        topic = torch.multinomial(self._mixtures[expert], tokens, replacement=True, generator=self._generator)
        rank = self._latent_scale.shape[1]
        latent = self._latent_mean[topic] + self._latent_scale[topic] * self._normal(tokens, rank)
        x = latent @ self._directions
        if self._kind.own:
            x *= (1 - self._kind.own) ** 0.5
            for number, directions in enumerate(self._own_directions):
                of_topic = topic == number
                x[of_topic] += self._kind.own**0.5 * (latent[of_topic] @ directions)
        x += 0.15 * self._normal(tokens, self.sizes.features)
        size = (6 / self._normal(tokens, 6).square().sum(-1, keepdim=True)).sqrt()
        return (x * self._channels * size).bfloat16()

    def weight(self, rows: int, columns: int) -> Tensor:
        """(rows, columns) float32 of bfloat16 values."""
        normal = self._normal(rows, columns)
        return (0.02 * (0.2 * self._normal(rows, 1)).exp() * normal * (1 + 0.1 * normal.square())).bfloat16().float()


@dataclass(frozen=True)
class Problem:
    """One matrix to quantise. weight (out, in) float32; hessian, pooled (in, in) float32: mean of x x^T of the expert
    and of its layer (None: there is no pool); test (n, in) bfloat16: held-out inputs."""

    weight: Tensor
    hessian: Tensor
    pooled: Tensor | None
    tokens: int
    test: Tensor

    def error(self, quantised: Tensor) -> float:
        """Relative error of the outputs."""
        wrong, right = 0.0, 0.0
        for x in self.test.float().split(1024):
            wrong += float((x @ (quantised - self.weight).T).double().square().sum())
            right += float((x @ self.weight.T).double().square().sum())
        return math.sqrt(wrong / right)


Method = Callable[[Problem], Tensor]
"""Quantised weight (out, in) float32 of a problem."""


def ours(options: Gptq) -> Method:
    def quantise(problem: Problem) -> Tensor:
        stats = InputStats(problem.hessian.clone()[None], None, (problem.tokens,))
        of_pool, to_diagonal = options.shrinkage
        if problem.pooled is None:
            stats = shrunk_to_diagonal(stats, to_diagonal)
        else:
            pooled = InputStats(problem.pooled[None], None, (EXPERTS * problem.tokens,))
            stats = shrunk(stats, pooled, of_pool)
        return options.quantizer(stats)(problem.weight[None], SCHEME).decode()[0]

    return quantise


def rounded(options: Rtn) -> Method:
    def quantise(problem: Problem) -> Tensor:
        stats = InputStats(problem.hessian[None], None, (problem.tokens,))
        return options.quantizer(stats)(problem.weight[None], SCHEME).decode()[0]

    return quantise


def of_peer(setting: Any, *, all_tokens: bool = False) -> Method:
    def quantise(problem: Problem) -> Tensor:
        if all_tokens:
            assert problem.pooled is not None
            return setting.quantise(problem.weight, problem.pooled, EXPERTS * problem.tokens)
        return setting.quantise(problem.weight, problem.hessian, problem.tokens)

    return quantise


OURS = {
    "quantkit": Gptq(),
    "quantkit, no shrinkage": Gptq(shrink=0, down_shrink=0),
    "quantkit, no polish": Gptq(polish=0),
    "quantkit, no shrinkage, no polish": Gptq(shrink=0, down_shrink=0, polish=0),
    "quantkit, unsigned scales": Gptq(signed=False),
    "quantkit, no shrinkage, damp .1": Gptq(shrink=0, down_shrink=0, damp_percent=0.1),
}
EXPLORED = {
    "quantkit, damp .02": Gptq(damp_percent=0.02),
    "quantkit, damp .05": Gptq(damp_percent=0.05),
    "quantkit, damp .1": Gptq(damp_percent=0.1),
    "quantkit, shrink 1": Gptq(shrink=1, down_shrink=0.3),
    "quantkit, shrink 10": Gptq(shrink=10, down_shrink=3),
    "quantkit, shrink 1000": Gptq(shrink=1000, down_shrink=1000),
    "quantkit, mse scales": Gptq(scale_search="mse"),
    "quantkit, grid 80": Gptq(grid=80),
    "quantkit, polish 1": Gptq(polish=1),
    "quantkit, polish 4": Gptq(polish=4),
    "quantkit, polish 8": Gptq(polish=8),
    "quantkit, storage order": Gptq(act_order="none"),
}


def methods(arguments: argparse.Namespace) -> tuple[dict[str, Method], dict[str, Method], dict[str, str]]:
    """What is compared, what only gate and up know (a pool), and what the peers are."""
    found: dict[str, Method] = {
        "round to nearest": rounded(Rtn(scale_search="range", signed=False)),
        "round to nearest, mse scales": rounded(Rtn(scale_search="mse", signed=False)),
    }
    pooled: dict[str, Method] = {}
    described: dict[str, str] = {}
    if arguments.peers:
        sys.path.insert(0, str(Path(__file__).parent / "peers"))
        from on_gpu import settings

        for name, setting in settings(batches=(1, 1)).items():
            found[name] = of_peer(setting)
            described[name] = f"{setting.peer} {setting.version}: {setting.setting}"
            if setting.peer == "llm-compressor" and "damp .1" in name:
                pooled[f"{name}, all tokens"] = of_peer(setting, all_tokens=True)
    found |= {name: ours(options) for name, options in {**OURS, **(EXPLORED if arguments.explore else {})}.items()}
    return found, pooled, described


def second_moments(x: Tensor) -> Tensor:
    """(in, in) float32: sum of x x^T."""
    sums = torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
    for part in x.split(4096):
        sums.addmm_(part.float().T, part.float())
    return sums


Errors = dict[str, dict[str, list[float]]]
"""Case -> method -> one for each expert and seed."""


def run_seed(sizes: Sizes, arguments: argparse.Namespace, kind: Kind, seed: int, errors: Errors) -> dict[str, str]:
    found, of_pool, described = methods(arguments)
    layer, counts = Layer(sizes, kind, seed), sorted(sizes.tokens(n) for n in arguments.tokens)
    gate = [layer.weight(sizes.out, sizes.features) for _ in range(arguments.experts)]
    up = [layer.weight(sizes.out, sizes.features) for _ in range(arguments.experts)]
    down = [layer.weight(sizes.features, sizes.out) for _ in range(arguments.experts)]
    held_out = [layer.inputs(expert, sizes.tokens(HELD_OUT)) for expert in range(arguments.experts)]

    def hidden(expert: int, x: Tensor) -> Tensor:
        gated = torch.nn.functional.silu(x @ gate[expert].bfloat16().T)
        return gated * (x @ up[expert].bfloat16().T)

    size = sizes.features
    sums = torch.zeros(arguments.experts, size, size, device=sizes.device)
    hidden_sums = torch.zeros(arguments.experts, sizes.out, sizes.out, device=sizes.device)
    pool = torch.zeros(size, size, device=sizes.device)
    seen = 0
    for count, at_v3 in zip(counts, sorted(arguments.tokens), strict=True):
        for expert in range(EXPERTS):
            x = layer.inputs(expert, count - seen)
            new = second_moments(x)
            pool += new
            if expert < arguments.experts:
                sums[expert] += new
                hidden_sums[expert] += second_moments(hidden(expert, x))
            del new
        seen = count
        for expert in range(arguments.experts):
            problem = Problem(gate[expert], sums[expert] / seen, pool / (seen * EXPERTS), seen, held_out[expert])
            solve(problem, found | of_pool, errors.setdefault(f"gate/up, {at_v3} tokens, {kind}", {}))
            test = hidden(expert, held_out[expert])
            problem = Problem(down[expert], hidden_sums[expert] / seen, None, seen, test)
            if arguments.down:
                solve(problem, found, errors.setdefault(f"down, {at_v3} tokens, {kind}", {}))
    return described


def solve(problem: Problem, compared: dict[str, Method], errors: dict[str, list[float]]) -> None:
    for name, method in compared.items():
        errors.setdefault(name, []).append(problem.error(method(problem)))


def summary(errors: dict[str, list[float]]) -> dict[str, Any]:
    """Means, and ratios to the best peer's setting and to the setting of the target, pair by pair."""
    means = {name: statistics.mean(values) for name, values in errors.items()}
    peers = [name for name in means if not name.startswith(("quantkit", "round to nearest"))]
    best = min(peers, key=means.__getitem__, default=None)
    rows: dict[str, Any] = {}
    for name, values in errors.items():
        rows[name] = {"error": round(means[name], 5), "se": round(_standard_error(values), 5)}
        for label, against in (("/ the target's setting", THE_SETTING), ("/ best peer", best)):
            if against in errors:
                ratios = [a / b for a, b in zip(values, errors[against], strict=True)]
                rows[name][label] = round(statistics.mean(ratios), 4)
                rows[name][f"{label}, se"] = round(_standard_error(ratios), 4)
    return {"best peer": best, "n": len(next(iter(errors.values()))), "rows": rows}


def _standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def machine(device: torch.device) -> dict[str, Any]:
    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name(0) if device.type == "cuda" else platform.processor() or "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": of("triton"),
    }


def show(case: str, found: dict[str, Any]) -> None:
    print(f"\n{case} (n = {found['n']}; best peer: {found['best peer']})")
    for name, row in found["rows"].items():
        text = f"{row['error']:.5f} +- {row['se']:.5f}"
        for label in ("/ the target's setting", "/ best peer"):
            if label in row:
                text += f"   {label} {row[label]:.4f} +- {row[f'{label}, se']:.4f}"
        print(f"  {name:48s} {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=V3_FEATURES, help="inputs of gate and up")
    parser.add_argument("--out", type=int, default=2048, help="outputs of gate and up")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 16384], help="of an expert, at 7168")
    parser.add_argument(
        "--inputs", type=Kind.of, nargs="+", default=[Kind(20, 0.5)], metavar="OUTLIERS:OWN", help="kinds of inputs"
    )
    parser.add_argument("--experts", type=int, default=3, help="of the 16, quantised")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--no-down", dest="down", action="store_false")
    parser.add_argument("--explore", action="store_true", help="other options of quantkit's too")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "held_out.json")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    sizes = Sizes(arguments.features, arguments.out, torch.device(arguments.device))
    errors: Errors = {}
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    for kind, seed in ((kind, seed) for kind in arguments.inputs for seed in seeds):
        described = run_seed(sizes, arguments, kind, seed, errors)
        result = {
            "what": __doc__.splitlines()[0],
            **machine(sizes.device),
            "features": sizes.features,
            "out": sizes.out,
            "tokens": {str(n): sizes.tokens(n) for n in arguments.tokens},
            "seeds": list(seeds),
            "experts": arguments.experts,
            "peers": described,
            "target: at most this share of the setting's error": {str(n): share for n, share in TARGETS.items()},
            "cases": {case: summary(found) for case, found in errors.items()},
            "errors": {
                case: {k: [round(v, 6) for v in vs] for k, vs in found.items()} for case, found in errors.items()
            },
        }
        arguments.results.parent.mkdir(exist_ok=True)
        arguments.results.write_text(json.dumps(result, indent=1) + "\n")
    for case, found in errors.items():
        show(case, summary(found))


if __name__ == "__main__":
    main()
