"""Build an organism on disk: tokenizer, language model, SAE, feature labels and their figures.

python tools/organism/build.py --out DIR
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from detection import detect_attributes
from dictionary import (
    DictionarySettings,
    activations,
    measure_dictionary,
    train_dictionary,
)
from entropy import attribute_floors
from language_model import (
    LanguageModelSettings,
    batches,
    build_model,
    measure_language_model,
    rescale_residual,
    train_language_model,
)
from peft_fsrl.organism.lexicon import ATTRIBUTES
from peft_fsrl.organism.organism import FORMAT, MANIFEST, FeatureDetection, missing_parts
from peft_fsrl.organism.world import World
from tokenizer import build_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Size:
    """Everything that a build's figures depend on, besides its seed."""

    world: dict[str, Any] = field(default_factory=dict)
    language_model: LanguageModelSettings = field(default_factory=LanguageModelSettings)
    dictionary: DictionarySettings = field(default_factory=DictionarySettings)
    answers: int = 2000
    # The order of floating-point sums depends on how many threads share them.
    threads: int = 2


SIZES = {
    "default": Size(),
    "tiny": Size(
        world={"topics": 2, "entities": 4, "lines": 3},
        language_model=LanguageModelSettings(
            hidden_size=32,
            intermediate_size=64,
            layers=2,
            heads=2,
            steps=200,
            batch_size=32,
            quiz_steps=10,
        ),
        dictionary=DictionarySettings(layer=1, d_sae=64, k=8.0, samples=200_000, batch_size=512),
        answers=200,
        threads=1,
    ),
}


def build(
    out_dir: str | os.PathLike[str], size: str = "default", seed: int = 0, force: bool = False
) -> Path:
    """Build an organism in ``out_dir``, or finds it already built.

    Everything is written to a directory beside ``out_dir`` and moved there at the end, so an
    interrupted build leaves nothing that looks finished. Same machine, same versions, same seed:
    same figures; the caller's torch seed and thread count are left as they were.

    Args:
        out_dir: where it shall stand.
        size: a key of ``SIZES``: "default", or "tiny" for tests.
        seed: fixes the facts of the world, the texts and all initial weights.
        force: rebuild even if a finished build stands there.

    Returns:
        The directory.

    Raises:
        ValueError: if ``size`` is unknown, or another finished build stands there.
        FileExistsError: if ``out_dir`` holds files that are no organism's.
    """
    if size not in SIZES:
        raise ValueError(f"expected a size among {sorted(SIZES)}, got {size!r}")
    out = Path(out_dir).resolve()
    if not force and _find(out, size, seed):
        return out
    if out.exists() and any(out.iterdir()) and not (out / MANIFEST).exists():
        raise FileExistsError(
            f"{out} holds files but no {MANIFEST}: expected an empty directory or an organism; "
            "choose another directory"
        )
    working = out.with_name(f".{out.name}.building")
    if working.exists():
        logger.warning("%s: an interrupted build was found and is started again", out)
        shutil.rmtree(working)
    working.mkdir(parents=True)
    try:
        with _reproducible(seed, SIZES[size].threads):
            _build_parts(working, size, seed)
        _replace(working, out)
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise
    return out


def _find(out: Path, size: str, seed: int) -> bool:
    """Whether the wanted build stands at ``out``; another one there is an error."""
    if not (out / MANIFEST).is_file():
        return False
    manifest = json.loads((out / MANIFEST).read_text())
    wanted = {"format": FORMAT, "size": size, "seed": seed}
    found = {name: manifest.get(name) for name in wanted}
    if missing := missing_parts(out):
        logger.warning("%s: build lacks %s and is made again", out, ", ".join(missing))
        return False
    if found != wanted:
        raise ValueError(
            f"{out} holds an organism with {found}, expected {wanted}; "
            "choose another directory or force a rebuild"
        )
    logger.info("%s: found finished, size %s, seed %d", out, size, seed)
    return True


def _replace(working: Path, out: Path) -> None:
    """Moves a finished build into place; what stood there goes only after it is out of the way."""
    old = out.with_name(f".{out.name}.old")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(out, old)
    os.replace(working, out)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _reproducible(seed: int, threads: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _build_parts(path: Path, size: str, seed: int) -> None:
    import torch
    from sae_lens import SAE

    settings = SIZES[size]
    world = World(seed=seed, **settings.world)
    started = time.monotonic()
    build_tokenizer(world).save_pretrained(path)
    model = build_model(world, settings.language_model)
    train_language_model(model, world, settings.language_model, seed)
    layer = settings.dictionary.layer
    rescale_residual(model, *next(batches(world, f"scale-{seed}", 64)), layer)
    model.save_pretrained(path)
    trained = time.monotonic()
    logger.info("language model trained in %.0f s", trained - started)
    model_name = f"peft_fsrl/organism-{size}"
    # So that the SAE depends on the model and the seed, not on how the model was trained.
    torch.manual_seed(seed)
    train_dictionary(model, world, settings.dictionary, seed, path / "sae", model_name)
    fitted = time.monotonic()
    logger.info("SAE trained in %.0f s", fitted - trained)
    sae: Any = SAE.load_from_disk(path / "sae")
    held_out = activations(model, world, layer, f"sae-heldout-{seed}", 2048)
    labels = detect_attributes(sae, model, world, layer, seed, settings.answers)
    figures = {
        "language_model": measure_language_model(model, world, seed),
        "decision_entropy": attribute_floors(world),
        "sae": measure_dictionary(sae, itertools.islice(held_out, 32)),
        "detection": summarize(labels),
        "seconds": {
            "language_model": trained - started,
            "sae": fitted - trained,
            "total": time.monotonic() - started,
        },
        "made_with": _made_with(),
    }
    _write_json(path / "feature_labels.json", [asdict(label) for label in labels])
    _write_json(path / "figures.json", figures)
    manifest = {
        "format": FORMAT,
        "size": size,
        "seed": seed,
        "layer": layer,
        "attributes": ATTRIBUTES,
        "world": world.settings(),
        "language_model": asdict(settings.language_model),
        "sae": asdict(settings.dictionary),
    }
    _write_json(path / MANIFEST, manifest)


def summarize(labels: list[FeatureDetection]) -> dict[str, dict[str, float]]:
    """Per attribute: the best single feature's AUROC and how many features carry its label."""
    summary = {}
    for name in labels[0].auroc:
        best = max(labels, key=lambda label: abs(label.auroc[name] - 0.5))
        summary[name] = {
            "best_auroc": best.auroc[name],
            "best_feature": best.index,
            "features": sum(label.label == name for label in labels),
        }
    return summary


def _made_with() -> dict[str, str]:
    names = ("torch", "transformers", "tokenizers", "sae-lens")
    found = {name: version(name) for name in names}
    return {**found, "python": platform.python_version(), "machine": platform.machine()}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(_rounded(content), indent=1) + "\n")


def _rounded(content: Any) -> Any:
    """Floats at six significant digits: the rest is noise that would swell the shipped files."""
    if isinstance(content, float):
        return float(f"{content:.6g}")
    if isinstance(content, dict):
        return {key: _rounded(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_rounded(value) for value in content]
    return content


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds, then writes the figures to standard output.

    Returns:
        The exit status: 2 for a wrong request, 130 if interrupted.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
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
