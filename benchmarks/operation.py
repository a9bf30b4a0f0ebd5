"""One training step of the steering operation: time, peak memory, bytes kept for the backward.

    python benchmarks/operation.py [--quick] [--device cuda]

Three columns: `ours` is the layer as a model has it, `plain` the formula in the obvious way
(encode, linear, threshold, relu, two decodes, norms in passes of their own), `floor` the matrix
products alone: three forward (adapter, encoder, decoder), two backward (decoder transposed,
weight). The step takes the gradient of a random projection of the output and of the L1 penalty.
Also draws how time grows with tokens and with features, both axes logarithmic.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import (
    Case,
    alternate,
    fits,
    kept_for_backward,
    make_case,
    options,
    peak_memory,
    plain_steer,
    ratio,
    report,
    show_ms,
    show_ratio,
    table,
)
from torch import Tensor

SIZES = ((512, 512, 8192), (256, 1024, 16384), (128, 2304, 16384), (32, 2304, 65536))
DENSITIES = (0.001, 0.01, 0.1)
GROWTH = {"tokens": (32, 64, 128, 256, 512, 1024), "d_sae": (1024, 2048, 4096, 8192, 16384, 32768)}
GROWTH_AT = {"d_in": 512, "d_sae": 8192, "tokens": 128}
FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "performance_growth.png"


def steps(case: Case) -> dict[str, Callable[[], None]]:
    """A training step by each of the three."""
    g = torch.randn_like(case.x)
    events: list[Any] = []
    case.layer.statistics_observers[:] = [events.append]

    def step(forward: Callable[[], tuple[Tensor, Tensor]]) -> None:
        for parameter in case.parameters:
            parameter.grad = None
        output, l1 = forward()
        ((output * g).sum() + 0.1 * l1.mean()).backward()

    def ours() -> tuple[Tensor, Tensor]:
        events.clear()
        return case.layer(case.x), events[0].l1

    def plain() -> tuple[Tensor, Tensor]:
        output, _, l1, _ = plain_steer(case, case.x)
        return output, l1

    x, flat_g = case.x[0], g[0]
    v = torch.randn(x.shape[0], case.sae.cfg.d_sae, device=x.device)

    def floor() -> None:
        with torch.no_grad():
            _ = x @ case.weight.T, x @ case.sae.W_enc, v @ case.sae.W_dec
            _ = flat_g @ case.sae.W_dec.T, v.T @ x

    return {"ours": lambda: step(ours), "plain": lambda: step(plain), "floor": floor}


def kept(case: Case) -> dict[str, float]:
    """MiB kept for the backward pass, the input among them."""
    frozen = case.layer.fsrl_sae["default"].module
    weights = (*frozen.parameters(), *case.sae.parameters())
    result = {}
    events: list[Any] = []
    case.layer.statistics_observers[:] = [events.append]
    with kept_for_backward(case.layer, *weights) as ours:
        output = case.layer(case.x)
        _ = output.sum() + events[0].l1.mean()
    with kept_for_backward(case.layer, *weights) as plain:
        output, _, l1, _ = plain_steer(case, case.x)
        _ = output.sum() + l1.mean()
    result["ours"], result["plain"] = ours[0], plain[0]
    return result


def measure_sizes(found: argparse.Namespace) -> tuple[list[list[Any]], list[dict[str, Any]]]:
    """Every size at every density."""
    rows, figures = [], []
    for tokens, d_in, d_sae in ((5, 16, 64),) if found.quick else SIZES:
        # Weights: an SAE, its frozen copy, adapter and gradient; and what plain keeps.
        needed = (6 * d_in * d_sae + 16 * tokens * d_sae) * 4 / 2**20
        if not fits(f"{tokens} tokens, {d_in} x {d_sae}", needed):
            continue
        case = make_case(d_in, d_sae, tokens, found.device)
        for density in DENSITIES:
            case.set_density(density)
            cases = steps(case)
            seconds = alternate(cases, found.repeats, found.device)
            peak = {}
            for name in ("ours", "plain"):
                for parameter in case.parameters:
                    parameter.grad = None
                peak[name] = peak_memory(cases[name], found.device)
            memory = kept(case)
            over = ratio(seconds["ours"], seconds["floor"])
            speed = ratio(seconds["plain"], seconds["ours"])
            rows.append(
                [
                    f"{tokens} x {d_in} x {d_sae}",
                    f"{density:.1%}",
                    *(show_ms(seconds[name]) for name in ("floor", "ours", "plain")),
                    show_ratio(over),
                    show_ratio(speed),
                    f"{peak['ours']:.0f} / {peak['plain']:.0f}",
                    f"{memory['ours']:.1f} / {memory['plain']:.1f}",
                    f"{memory['ours'] / memory['plain']:.3f}",
                ]
            )
            figures.append(
                {
                    "tokens": tokens,
                    "d_in": d_in,
                    "d_sae": d_sae,
                    "density": density,
                    "seconds": seconds,
                    "over_floor": over,
                    "plain_over_ours": speed,
                    "peak_mib": peak,
                    "kept_mib": memory,
                }
            )
        del case
    return rows, figures


def measure_growth(found: argparse.Namespace) -> list[dict[str, Any]]:
    """Time against tokens, and against features."""
    figures = []
    for name, values in GROWTH.items():
        for value in values[:3] if found.quick else values:
            at = {"d_in": 16, "d_sae": 64, "tokens": 4} if found.quick else GROWTH_AT
            at = {**at, name: value // 16 if found.quick else value}
            case = make_case(at["d_in"], at["d_sae"], at["tokens"], found.device)
            case.set_density(0.01)
            seconds = alternate(steps(case), found.repeats, found.device)
            medians = {key: statistics.median(times) for key, times in seconds.items()}
            figures.append({"against": name, "value": at[name], "seconds": medians})
    return figures


def slope(figures: Sequence[dict[str, Any]], against: str, name: str) -> float:
    """Exponent of the power law through the points, by least squares of logarithms."""
    points = [
        (math.log(figure["value"]), math.log(figure["seconds"][name]))
        for figure in figures
        if figure["against"] == against
    ]
    xs, ys = zip(*points, strict=True)
    return statistics.linear_regression(xs, ys).slope


def draw_growth(figures: Sequence[dict[str, Any]], path: Path) -> None:
    """The log-log plot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    for axis, (against, fixed) in zip(
        axes,
        (("tokens", "d_in 512, d_sae 8192"), ("d_sae", "d_in 512, 128 tokens")),
        strict=True,
    ):
        found = [each for each in figures if each["against"] == against]
        values = [each["value"] for each in found]
        for name, marker in (("plain", "s"), ("ours", "o"), ("floor", "^")):
            times = [each["seconds"][name] * 1e3 for each in found]
            label = f"{name}, slope {slope(figures, against, name):.2f}"
            axis.loglog(values, times, marker=marker, label=label)
        first = found[0]["seconds"]["floor"] * 1e3
        line = [first * value / values[0] for value in values]
        axis.loglog(values, line, color="grey", linestyle=":", label="linear")
        axis.set_xlabel(f"{against} ({fixed})")
        axis.grid(True, which="both", alpha=0.2)
        axis.legend()
    axes[0].set_ylabel("training step, ms")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, draw, report."""
    found = options(__doc__, arguments)
    rows, figures = measure_sizes(found)
    growth = measure_growth(found)
    draw_growth(growth, found.out / FIGURE.name if found.quick else FIGURE)
    header = ["tokens x d_in x d_sae", "density", "floor, ms", "ours, ms", "plain, ms"]
    header += ["ours / floor", "plain / ours", "peak MiB, ours / plain"]
    header += ["kept MiB, ours / plain", "of it"]
    slopes = [
        [name, *(f"{slope(growth, against, name):.2f}" for against in GROWTH)]
        for name in ("floor", "ours", "plain")
    ]
    tables = [
        table("Training step of the operation (median, quartiles of the ratios)", header, rows),
        table("Growth: exponent of time", ["", *GROWTH], slopes),
    ]
    return report("operation", found, tables, [*figures, *growth])


if __name__ == "__main__":
    main()
