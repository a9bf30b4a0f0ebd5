"""Steering of one token, and of a few, as generation does it.

    python benchmarks/generation.py [--quick] [--device cuda]

`ours` reads the weights that are needed, `dense` is the same layer reading all of them, `plain` the
formula in the obvious way, `floor` the adapter's own matrix product, which nobody can avoid. The
second table measures where reading rows and columns one by one stops to pay: the constants in
`peft_fsrl/_sparse.py` lie on the side of the plain product. One negative entry in two.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
from common import (
    alternate,
    fits,
    make_case,
    options,
    plain_steer,
    ratio,
    report,
    show_ms,
    show_ratio,
    table,
)
from torch.nn import functional as F

from peft_fsrl import _sparse

SIZES = ((2304, 16384), (2304, 65536))
TOKENS = (1, 8)
DENSITIES = (0.001, 0.005, 0.02, 0.1)


def measure(found: argparse.Namespace) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Every size, number of tokens and density."""
    rows, figures = [], []
    for d_in, d_sae in ((16, 512),) if found.quick else SIZES:
        if not fits(f"{d_in} x {d_sae}", 7 * d_in * d_sae * 4 / 2**20):
            continue
        case = make_case(d_in, d_sae, max(TOKENS), found.device)
        case.layer.eval()
        for tokens in TOKENS:
            few = case._replace(x=case.x[:, :tokens])
            for density in DENSITIES:
                few.set_density(density)
                seconds = _time(few, found)
                over = ratio(seconds["ours"], seconds["floor"])
                gain = ratio(seconds["plain"], seconds["ours"])
                rows.append(
                    [
                        f"{d_in} x {d_sae}",
                        str(tokens),
                        f"{density:.1%}",
                        *(show_ms(seconds[name]) for name in ("floor", "ours", "dense", "plain")),
                        show_ratio(over),
                        show_ratio(gain),
                    ]
                )
                figures.append(
                    {
                        "d_in": d_in,
                        "d_sae": d_sae,
                        "tokens": tokens,
                        "density": density,
                        "seconds": seconds,
                        "over_floor": over,
                        "plain_over_ours": gain,
                    }
                )
        del case, few
    return rows, figures


def _time(case: Any, found: argparse.Namespace) -> dict[str, list[float]]:
    def dense() -> None:
        with patch("peft_fsrl.tuner.layer.can_select", lambda *_: False):
            case.layer(case.x)

    with torch.no_grad():
        return alternate(
            {
                "floor": lambda: F.linear(case.x, case.weight, case.bias),
                "ours": lambda: case.layer(case.x),
                "dense": dense,
                "plain": lambda: plain_steer(case, case.x),
            },
            found.repeats,
            found.device,
        )


def crossover(found: argparse.Namespace) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """How much of a matrix may be read one by one before reading all of it is faster."""
    d_in, d_sae = (16, 512) if found.quick else (2304, 16384)
    rows, figures = [], []
    W_dec = torch.randn(d_sae, d_in, device=found.device)
    W_enc = torch.randn(d_sae, d_in, device=found.device).T
    shares = (0.01, 0.03, 0.06, 0.125, 0.25, 0.5)
    for tokens in (1, 8) if found.quick else (1, 8, 32, 128):
        x = torch.randn(tokens, d_in, device=found.device)
        ratios: dict[str, list[dict[str, float]]] = {"rows": [], "columns": []}
        for share in shares:
            update = torch.randn(tokens, d_sae, device=found.device)
            update = torch.where(torch.rand_like(update) < share, update, 0.0)
            needed = (torch.rand(d_sae, device=found.device) < share).expand(tokens, -1)
            with (
                torch.no_grad(),
                patch.object(_sparse, "_TOKENS_PER_ROW", 1e-9),
                patch.object(_sparse, "_PASSES", 0),
                patch.object(_sparse, "_SMALLEST", 0),
            ):
                seconds = alternate(
                    {
                        "rows": lambda update=update: _sparse.sparse_product(update, W_dec),
                        "all rows": lambda update=update: update @ W_dec,
                        "columns": lambda x=x, needed=needed: _columns(x, needed, W_enc),
                        "all columns": lambda x=x: x @ W_enc,
                    },
                    found.repeats,
                    found.device,
                )
            for name in ratios:
                ratios[name].append(ratio(seconds[name], seconds[f"all {name}"]))
        for name, values in ratios.items():
            rows.append([name, str(tokens), *(f"{value['median']:.2f}" for value in values)])
            figures.append({"what": name, "tokens": tokens, "shares": shares, "ratios": values})
    header = ["read", "tokens", *(f"{share:.1%}" for share in shares)]
    return [header, *rows], figures


def _columns(x: torch.Tensor, needed: torch.Tensor, W_enc: torch.Tensor) -> torch.Tensor:
    found = x.new_zeros(len(x), W_enc.shape[1])
    for part in _sparse.columns_to_read(needed, W_enc) or ():
        found[:, part] = x @ W_enc.T.index_select(0, part).T
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and report."""
    found = options(__doc__, arguments)
    rows, figures = measure(found)
    (header, *shares), crossovers = crossover(found)
    columns = ["d_in x d_sae", "tokens", "density", "floor, ms", "ours, ms", "dense, ms"]
    columns += ["plain, ms", "ours / floor", "plain / ours"]
    tables = [
        table("Steering a few tokens (median, quartiles of the ratios)", columns, rows),
        table("Reading a share one by one: time as a ratio of reading all", header, shares),
    ]
    return report("generation", found, tables, [*figures, *crossovers])


if __name__ == "__main__":
    main()
