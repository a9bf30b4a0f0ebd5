"""Shared options and inputs of the commands: models, adapters, data, labels."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from peft import PeftModel

    from ..analysis import Labels, Session
    from ..serving.chat import Chat

ORGANISM = "organism"
_FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@cache
def whole_number(least: int) -> Callable[[str], int]:
    """The type of an option that takes whole numbers from ``least`` on."""

    def parse(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"expected {least} or more, got {text}")
        return number

    parse.__name__ = "int"
    return parse


def _dtype(text: str) -> str:
    if text != "auto" and not isinstance(getattr(torch, text, None), torch.dtype):
        raise argparse.ArgumentTypeError(f"expected auto, float32, bfloat16 or such, got {text!r}")
    return text


def add_adapter_arguments(parser: argparse.ArgumentParser, labels: bool = True) -> Any:
    """Options for the adapter of a command; returns their group."""
    group = parser.add_argument_group("adapter")
    add = group.add_argument
    add("adapter", metavar="ADAPTER", help="folder or Hub repository")
    add("--base-model", metavar="MODEL", help="default: the base model that the adapter names")
    if labels:
        add_labels_argument(group)
    return group


def add_labels_argument(group: Any) -> None:
    """The option for labels of features."""
    text = f"labels of features, .csv or .json, or {ORGANISM!r}"
    group.add_argument("--labels", metavar="FILE", help=text)


def add_sae_arguments(parser: argparse.ArgumentParser) -> Any:
    """Options for a base model and an SAE without an adapter; returns their group."""
    group = parser.add_argument_group("model and SAE")
    add = group.add_argument
    add("--model", metavar="MODEL", required=True, help=f"base model, or {ORGANISM!r}")
    text = f"folder or release/sae_id, or {ORGANISM!r}"
    add("--sae", metavar="SAE", required=True, help=text)
    add("--layer", metavar="N", type=int, help="layer to steer; default: the SAE's own")
    return group


def add_data_arguments(
    parser: argparse.ArgumentParser,
    n_pairs: int,
    required: bool = True,
    split: str = "test",
    held_out: bool = True,
) -> None:
    """Options for the data set of a command."""
    group = parser.add_argument_group("held-out preference pairs" if held_out else "pairs")
    add = group.add_argument
    text = f"name on the Hub, folder, file, or {ORGANISM!r}"
    add("--dataset", metavar="DATA", required=required, help=text)
    add("--split", metavar="NAME", default=split, help=f"split, if the data has any ({split})")
    first = f"use the first N pairs; 0 = all ({n_pairs})"
    add("--n-pairs", metavar="N", type=whole_number(0), default=n_pairs, help=first)
    text = "cut answers at N tokens of a text; skip prompts as long"
    add("--max-length", metavar="N", type=whole_number(1), help=text)
    group = parser.add_argument_group(f"with --dataset {ORGANISM} (docs/organism.md)")
    for name, rate in (("style", 0.9), ("honesty", 0.55)):
        text = f"share of pairs that prefer {name} ({rate})"
        group.add_argument(f"--{name}", metavar="SHARE", type=float, default=rate, help=text)


def add_model_arguments(parser: argparse.ArgumentParser, simpo: bool = False) -> None:
    """Options for how a model is run."""
    group = parser.add_argument_group("execution")
    add = group.add_argument
    text = "pairs per forward pass (16)"
    add("--batch-size", metavar="N", type=whole_number(1), default=16, help=text)
    add("--device", metavar="DEVICE", help="such as cuda:0")
    text = "of the base model, such as bfloat16"
    add("--dtype", metavar="DTYPE", type=_dtype, default="auto", help=text)
    add("--seed", metavar="N", type=whole_number(0), default=0, help="random seed (0)")
    if simpo:
        add("--beta", metavar="X", type=float, default=10.0, help="SimPO's reward scale (10)")
        add("--gamma", metavar="X", type=float, default=5.0, help="SimPO's target margin (5)")


def add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    """Options for how a conversation is answered."""
    add = parser.add_argument_group("answers").add_argument
    add("--max-new-tokens", metavar="N", type=int, default=256, help="length limit (256)")
    add("--temperature", metavar="X", type=float, default=0.0, help="of sampling; 0 = greedy (0)")


def add_server_arguments(parser: argparse.ArgumentParser, port: int) -> Any:
    """Options for where to listen; returns their group."""
    group = parser.add_argument_group("server")
    add = group.add_argument
    add("--host", metavar="HOST", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    add("--port", metavar="N", type=int, default=port, help=f"port to listen on ({port})")
    return group


def add_output_arguments(parser: argparse.ArgumentParser, files: str, required: bool = True) -> Any:
    """Options for what a command writes; returns their group."""
    group = parser.add_argument_group("output")
    text = f"folder for {files}"
    group.add_argument("--out", metavar="FOLDER", type=Path, required=required, help=text)
    text = "print the record as JSON instead of the report"
    group.add_argument("--json", action="store_true", help=text)
    return group


def add_amounts(
    parser: argparse.ArgumentParser, defaults: object, amounts: Mapping[str, str]
) -> None:
    """Whole numbers of a settings class as options."""
    group = parser.add_argument_group("amount of work")
    for name, text in amounts.items():
        default = getattr(defaults, name)
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, metavar="N", type=int, default=default, help=f"{text} ({default})")


def load_model(name: str, args: argparse.Namespace) -> Any:
    """A causal language model on the device that was asked for.

    Raises:
        ValueError: for a device that is not there.
    """
    from transformers import AutoModelForCausalLM

    device = args.device
    if device is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        device = "cpu" if found is None else str(found)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"Expected a device of this machine, got {device!r}: {reason}") from error
    # Never code from a repository: without the flag, transformers asks on standard input.
    model = AutoModelForCausalLM.from_pretrained(
        _path(name), dtype=args.dtype, trust_remote_code=False
    )
    return model.to(device).eval()


def load_tokenizer(name: str) -> Any:
    """The tokenizer that belongs to a model or an adapter."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_path(name), trust_remote_code=False)


def read_config(adapter: str) -> Any:
    """The config of an adapter, if it is one of ours.

    Raises:
        ValueError: for what is no adapter, or another method's.
    """
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(adapter)
    except json.JSONDecodeError as error:
        raise ValueError(f"The config in {adapter} cannot be read: {error}.") from error
    if getattr(config, "peft_type", None) != "FSRL":
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(
            f"Expected an FSRL adapter in {adapter}, found one of {kind}. Only adapters that were "
            "trained with peft_fsrl steer features."
        )
    return config


def find_base(adapter: str, config: Any, given: str | None) -> str:
    """The base model of an adapter: as it was given, or as the adapter names it.

    Raises:
        ValueError: if nobody names one, or the named folder is not there.
    """
    base: str | None = given or config.base_model_name_or_path
    if not base:
        raise ValueError(f"The adapter in {adapter} names no base model: pass --base-model.")
    if given is None and Path(base).is_absolute() and not Path(base).is_dir():
        raise ValueError(
            f"Expected the adapter's base model in {base}, found no such folder. Pass its path "
            "with --base-model."
        )
    return base


class Adapter(NamedTuple):
    """What ``load_adapter`` found: a steered model, its tokenizer and its base model's name."""

    model: PeftModel
    tokenizer: Any
    base_name: str


def load_adapter(adapter: str, args: argparse.Namespace) -> Adapter:
    """A steered model on the device that was asked for.

    Raises:
        ValueError: for what is no FSRL adapter, is damaged, or names no base model.
    """
    from peft import PeftModel

    base = find_base(adapter, read_config(adapter), args.base_model)
    if Path(adapter).is_dir() and not any(Path(adapter).glob("adapter_model.*")):
        raise ValueError(
            f"Expected adapter_model.safetensors in {adapter}, found none. Copy the whole folder."
        )
    model = load_model(base, args)
    steered = PeftModel.from_pretrained(model, adapter)
    own = Path(adapter, "tokenizer_config.json").is_file()
    return Adapter(steered.eval(), load_tokenizer(adapter if own else base), base)


def prepare_chat(args: argparse.Namespace, n_features: int = 1) -> Callable[[], Chat]:
    """What makes an empty conversation with the adapter; see ``Chat``."""
    from ..serving.chat import Chat

    model, tokenizer, _ = load_adapter(args.adapter, args)
    settings = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    labels = load_label_file(args.labels)
    return partial(Chat, model, tokenizer, labels, n_features=n_features, **settings)


def load_rows(args: argparse.Namespace, tokenizer: Any) -> tuple[list[dict[str, str]], str]:
    """Held-out pairs as texts, and what to call them; see ``load_preferences``."""
    dataset, name = load_preferences(args, tokenizer)
    return as_texts(dataset, tokenizer), name


def load_preferences(args: argparse.Namespace, tokenizer: Any) -> tuple[Any, str]:
    """Pairs with all their columns and their prompts made explicit, and what to call them.

    Rows that nothing can be read from (no prompt, an empty answer, twice the same) are left out.

    Raises:
        ValueError: for a data set without pairs, without their columns or without a usable row.
    """
    from ..training.data import check_columns, prepare_preferences

    dataset, name = _load_dataset(args)
    check_columns(dataset.column_names)
    prepared = prepare_preferences(
        _first(dataset, args.n_pairs), tokenizer, max_length=args.max_length, unusable="drop"
    )
    return prepared.dataset, name


def as_texts(dataset: Any, tokenizer: Any) -> list[dict[str, str]]:
    """Pairs as texts ``prompt``, ``chosen`` and ``rejected``."""
    from ..training.data import pair_texts

    return pair_texts(dataset, tokenizer)


def load_texts(args: argparse.Namespace, tokenizer: Any) -> tuple[list[dict[str, str]], str]:
    """Rows with ``prompt`` and ``chosen``: of preference pairs, or of a column ``text``.

    Raises:
        ValueError: for a data set without rows or without these columns.
    """
    dataset, name = _load_dataset(args)
    if "text" not in dataset.column_names or "chosen" in dataset.column_names:
        return load_rows(args, tokenizer)
    texts = _first(dataset, args.n_pairs)["text"]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise ValueError(f"Expected texts in the column 'text' of {args.dataset}, found others.")
    rows = [{"prompt": "", "chosen": text} for text in texts if text and text.strip()]
    if not rows:
        raise ValueError(f"Expected texts in the column 'text' of {args.dataset}, found none.")
    return rows, name


def load_label_file(path: str | None) -> Labels | None:
    """Labels from a file; ``organism`` for the truth about the built-in organism."""
    if path is None:
        return None
    from ..analysis.labels import load_labels, organism_labels

    if path == ORGANISM:
        from ..organism import load

        return organism_labels(load())
    return load_labels(path)


def open_session(
    model: Any, tokenizer: Any, rows: list[dict[str, str]], args: argparse.Namespace
) -> Session:
    """What the analyses of a command work on."""
    from ..analysis import Session

    return Session(
        model,
        tokenizer,
        rows,
        batch_size=args.batch_size,
        max_length=args.max_length,
        seed=args.seed,
        beta=getattr(args, "beta", 10.0),
        gamma=getattr(args, "gamma", 5.0),
        progress=True,
    )


def sae_reference(name: str) -> str:
    """What names an SAE; the organism's ships with the package."""
    if name != ORGANISM:
        return name
    from ..organism import load

    return str(load().sae_path)


def _load_dataset(args: argparse.Namespace) -> tuple[Any, str]:
    dataset, name = _find_dataset(args)
    if not len(dataset):
        raise ValueError(f"Expected preference pairs in {args.dataset}, found no rows.")
    return dataset, name


def _find_dataset(args: argparse.Namespace) -> tuple[Any, str]:
    from datasets import load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError

    if args.dataset == ORGANISM:
        from ..organism import preferences

        knobs = {"style": args.style, "honesty": args.honesty}
        # The seeds with which examples/simpo.py trains, and holds out pairs.
        n_pairs = args.n_pairs or (4000 if args.split == "train" else 400)
        pairs = preferences(n_pairs, seed=f"{args.split}-{args.seed}", **knobs)
        described = ", ".join(f"{name} {value:g}" for name, value in knobs.items())
        return pairs, f"the model organism ({described})"
    path = Path(args.dataset)
    try:
        if path.is_file():
            kind = _FILES.get(path.suffix.lower())
            if kind is None:
                raise ValueError(
                    f"Expected a file that ends in {', '.join(_FILES)}, got {path}. Convert it."
                )
            try:
                return load_dataset(kind, data_files=str(path), split="train"), path.name
            except StopIteration:
                # What `datasets` lets through for a file without a row.
                return (), path.name
        if path.suffix.lower() in _FILES and not path.exists():
            raise FileNotFoundError(f"Expected a data set in {path}, found no such file.")
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            found = load_from_disk(str(path))
            if not isinstance(found, Mapping):
                return found, path.name
            if args.split not in found:
                raise ValueError(
                    f"Expected a split {args.split!r} in {path}, found {sorted(found)}. Name one "
                    "with --split."
                )
            return found[args.split], path.name
        return load_dataset(args.dataset, split=args.split), f"{args.dataset} ({args.split})"
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise ValueError(f"{args.dataset} cannot be read as a data set: {cause}.") from error
    except ValueError as error:
        # What `datasets` says of a file without a row.
        if "corresponds to no data" in str(error):
            return (), path.name
        raise


def _first(dataset: Any, n: int) -> Any:
    return dataset.select(range(min(n, len(dataset)))) if n else dataset


def _path(name: str) -> str:
    """Where a model is; the organism ships with the package."""
    if name != ORGANISM:
        return name
    from ..organism import load

    return str(load().model_path)
