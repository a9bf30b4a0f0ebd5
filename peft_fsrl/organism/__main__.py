"""`python -m peft_fsrl.organism --out DIR`: builds an organism."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence

from peft_fsrl.organism.build import SIZES, build


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds, then writes the figures to standard output.

    Returns:
        The exit status: 2 for a wrong request, 130 if interrupted.
    """
    parser = argparse.ArgumentParser(prog="python -m peft_fsrl.organism", description=__doc__)
    parser.add_argument("--out", required=True, help="directory of the build")
    parser.add_argument("--seed", type=int, default=0, help="fixes facts, texts and weights")
    parser.add_argument("--size", choices=sorted(SIZES), default="default")
    parser.add_argument("--force", action="store_true", help="rebuild a finished build")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        path = build(options.out, options.size, options.seed, options.force)
    except (ValueError, FileExistsError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: nothing was left behind, run again to start over\n")
        return 130
    figures = json.loads((path / "figures.json").read_text())
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
