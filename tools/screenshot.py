"""A picture of what a command says, for a page of docs/. Needs Chromium and Pillow.

What it says is read: ``peft-fsrl inspect ADAPTER | python tools/screenshot.py PICTURE COMMAND``.
"""

from __future__ import annotations

import argparse
import html
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

STYLE = "margin:0;padding:14px;background:#16181d;color:#d8dbe2;font:14px/19px monospace"


def main() -> None:
    """Read text from standard input, write a picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("command", help="shown above the output")
    parser.add_argument("--browser", default="chromium")
    args = parser.parse_args()
    text = f"$ {args.command}\n{sys.stdin.read().rstrip()}"
    lines = text.splitlines()
    # The widths of the font are those of Chromium's monospace: 8.43 px a character at 14 px.
    size = f"{round(8.43 * max(map(len, lines))) + 36},{19 * len(lines) + 28}"
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "page.html")
        body = f'<body style="margin:0"><pre style="{STYLE}">{html.escape(text)}</pre>'
        page.write_text(f'<meta charset="utf-8">{body}')
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={size}"]
        picture = f"--screenshot={args.picture.resolve()}"
        subprocess.run([args.browser, *options, picture, page.as_uri()], check=True)
    # A few shades of gray are enough, and a third of the size.
    Image.open(args.picture).quantize(16).save(args.picture, optimize=True)


if __name__ == "__main__":
    main()
