"""``python -m peft_fsrl`` and the console script ``peft-fsrl``."""

from __future__ import annotations

from .cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
