"""Records as plain text for a terminal. Reads records and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple

from ..records import Interval
from ..training.coherence import VariantCoherence
from .ablation import Ablation
from .audit.audit import Audit
from .buckets import LengthBucket
from .checkup import Checkup
from .composition import Firing
from .concentration import QUANTILES, Concentration, Magnitudes
from .data import Curation, DataContrast
from .diff import AdapterDifference, FeatureDifference
from .evaluation import Evaluation, TaskScores
from .findings import Finding
from .generations import Continuation, Generation
from .harness import TaskFigure
from .inspection import Inspection, SteerableFeature
from .labels.judging import render_context
from .layout import WIDTH, clean_text, paragraph, shorten, table, title
from .preferences import PreferenceScores
from .summary import Summary
from .sweeps import SweepPoint
from .usage import FeatureUse, Usage
from .winrate import WinRate


def render_summary(summary: Summary, n_features: int = 10) -> str:
    """The summary of a run for a terminal, under 100 columns wide.

    Args:
        summary: from ``compute_summary``.
        n_features: how many of the most used features to list.
    """
    sections = [
        title(f"Held-out preference pairs ({summary.trained.n})"),
        render_scores(summary.base, summary.trained, summary.usage),
        title("Most steered features (answer tokens)"),
        render_usage(summary.usage, n_features),
    ]
    if summary.ablations:
        sections += [
            title("With the steering of some features zeroed"),
            render_ablations(summary.base, summary.trained, summary.ablations),
        ]
    if summary.generations:
        sections += [title("Samples, same seed"), render_generations(summary.generations)]
    return "\n".join(sections) + "\n"


def render_scores(base: PreferenceScores, trained: PreferenceScores, usage: Usage) -> str:
    """Base against trained: SimPO loss, accuracy, margin, and what the steering costs."""
    rows = [
        ["base", f"{base.loss:.3f}", f"{base.accuracy:.1%}", f"{base.margin:+.2f}", "0"],
        [
            "trained",
            f"{trained.loss:.3f}",
            f"{trained.accuracy:.1%}",
            f"{trained.margin:+.2f}",
            f"{usage.l0:.1f}",
        ],
    ]
    return table(["", "SimPO loss", "accuracy", "margin", "steered features per token"], rows)


def render_usage(usage: Usage, n_features: int) -> str:
    """The features with the most steering mass and what each detects."""
    rows = [
        [
            str(use.feature),
            shorten(use.label or "-", 40),
            "promoted" if use.mean_steering > 0 else "suppressed",
            f"{use.frequency:.1%}",
            f"{use.mean_abs_steering:.4f}",
            f"{use.mean_abs_steering / usage.l1:.1%}",
        ]
        for use in usage.features[:n_features]
    ]
    headers = ["feature", "detects", "mostly", "tokens", "mean |v|", "share of ||v||_1"]
    return table(headers, rows)


def render_ablations(
    base: PreferenceScores, trained: PreferenceScores, ablations: Sequence[Ablation]
) -> str:
    """Loss and accuracy with each category zeroed, against random features.

    The last two columns are the mean rise without as many random features, and without random
    features of the same steering mass (in brackets the share of it that they reach, where they do
    not reach it).
    """
    gain = base.loss - trained.loss
    rows = [["nothing", "", f"{trained.loss:.3f}", f"{trained.accuracy:.1%}", *[""] * 5]]
    for ablation in ablations:
        rise = ablation.rise
        rows.append(
            [
                shorten(ablation.name, 24),
                str(len(ablation.features)),
                f"{ablation.scores.loss:.3f}",
                f"{ablation.scores.accuracy:.1%}",
                f"{rise.value:+.3f}",
                f"{rise.low:+z.2f} to {rise.high:+z.2f}",
                f"{rise.value / gain:z.0%}" if gain > 0 else "-",
                _mean_rise(ablation.same_count, trained),
                _mean_rise(ablation.same_mass, trained) + _shortfall(ablation),
            ]
        )
    headers = ["features zeroed", "n", "loss", "accuracy", "rise", "95 %", "of gain"]
    return table([*headers, "n random", "same mass"], rows)


def render_variants(
    variants: Mapping[str, Sequence[SweepPoint]], limits: Sequence[float] = (1, 2, 4, 8, 16)
) -> str:
    """Lowest held-out loss of each variant with no more than so many features per token.

    Args:
        variants: runs by the name of their variant, for example from ``by_penalty``.
        limits: numbers of features per token.
    """
    rows = []
    for limit in limits:
        cells = []
        for points in variants.values():
            found = [
                (point.loss, point.l0)
                for point in points
                if point.loss is not None and point.l0 is not None and point.l0 <= limit
            ]
            cells.append("{:.3f} (l0 {:.2f})".format(*min(found)) if found else "-")
        rows.append([f"{limit:g}", *cells])
    return table(["l0 at most", *variants], rows)


def render_concentration(found: Concentration) -> str:
    """Gini coefficient, and what the most steered features are."""
    names = [each.category for each in found.top[0].categories] if found.top else []
    rows = []
    for top in found.top:
        cells = [f"{each.n} ({each.mass:.1%})" for each in top.categories]
        if len(names) == 2:
            cells.append(f"{top.ratio(*names):.2f}")
        rows.append([f"{top.share:.1%}", str(top.n), f"{top.mass:.1%}", *cells])
    ratio = [clean_text(f"{names[0]} : {names[1]}")] if len(names) == 2 else []
    headers = ["top", "features", "of steering", *map(clean_text, names), *ratio]
    heading = (
        f"Gini coefficient {found.gini:.3f} over {found.d_sae:,} features, "
        f"{found.gini_steered:.3f} over the {found.n_steered:,} that are steered."
    )
    return f"{heading}\n\n{table(headers, rows)}"


def render_magnitudes(found: Sequence[Magnitudes]) -> str:
    """How strongly each category is steered where it is, one category a line."""
    rows = [
        [
            shorten(each.category, 24),
            f"{each.n:,}",
            f"{each.promoted:.1%}",
            f"{each.mean:.3g}",
            *(f"{value:.3g}" for value in each.quantiles or [math.nan] * len(QUANTILES)),
        ]
        for each in found
    ]
    headers = ["category", "steered", "promoted", "mean |v|"]
    return table([*headers, *(f"{quantile:.0%}" for quantile in QUANTILES)], rows)


def render_firing(found: Sequence[Firing]) -> str:
    """How many features of each category are active at a token, before steering and after."""
    rows = [
        [
            shorten(each.category, 24),
            str(each.n_features),
            f"{each.base.value:.3f}",
            f"{each.trained.value:.3f}",
            f"{each.change.value:+.3f}",
            f"{each.change.low:+.3f} to {each.change.high:+.3f}",
            f"{each.base_share:.1%}",
            f"{each.trained_share:.1%}",
        ]
        for each in found
    ]
    headers = ["category", "features", "base", "trained", "change", "95 %"]
    return table([*headers, "share, base", "trained"], rows)


def _mean_rise(draws: Sequence[PreferenceScores], trained: PreferenceScores) -> str:
    if not draws:
        return "-"
    return f"{sum(draw.loss for draw in draws) / len(draws) - trained.loss:+.3f}"


def _shortfall(ablation: Ablation) -> str:
    reached = max(ablation.random_masses, default=0.0)
    short = ablation.same_mass and reached < 0.9 * ablation.mass
    return f" ({reached / ablation.mass:.0%})" if short else ""


def render_generations(generations: Sequence[Generation]) -> str:
    """Each prompt, and under it what every variant said, with the number of tokens."""
    names = [answer.name for generation in generations for answer in generation.continuations]
    width = max(map(len, ["prompt", *names]))
    blocks = []
    for generation in generations:
        lines = [paragraph(f"{'prompt':{width}}       ", generation.prompt)]
        for answer in generation.continuations:
            lines.append(paragraph(f"{answer.name:{width}} {answer.n_tokens:4d}  ", answer.text))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def render_steered_tokens(
    answer: Continuation, labels: Mapping[int, str] | None = None, n_features: int = 3
) -> str:
    """One line per token of an answer: its text and the features that steered it most.

    Args:
        answer: from ``compare_generations``.
        labels: what features detect, where known.
        n_features: how many features to show per token.
    """
    rows = []
    for token in answer.tokens:
        named = [
            f"{each.feature}{_in_brackets((labels or {}).get(each.feature))} {each.value:+.3f}"
            for each in token.steered[:n_features]
        ]
        hidden = token.n_steered - len(named)
        rows.append(
            [repr(token.text), ", ".join(named) + (f" and {hidden} more" if hidden else "")]
        )
    width = max((len(text) for text, _ in rows), default=0)
    return "\n".join(f"{text:{width}}  {features}".rstrip() for text, features in rows)


def render_coherence(variants: Sequence[VariantCoherence]) -> str:
    """Figures of each variant's sampled answers, one variant a line."""
    rows = [
        [
            each.name,
            str(each.coherence.n),
            f"{each.coherence.perplexity:.2f}",
            f"{each.coherence.repetition:.1%}",
            f"{each.coherence.distinct_1:.3f}",
            f"{each.coherence.distinct_2:.3f}",
            f"{each.coherence.mean_length:.1f}",
            f"{each.coherence.ended:.1%}",
        ]
        for each in variants
    ]
    headers = ["", "answers", "perplexity", "repetition", "distinct-1", "distinct-2"]
    return table([*headers, "tokens", "ended"], rows)


def render_evaluation(found: Evaluation) -> str:
    """An adapter beside its base model: tasks, preference pairs, win rate."""
    lines = [paragraph("", f"{found.adapter}, on {found.base_model}")]
    if found.tasks:
        lines += ["", "lm-evaluation-harness (± standard error)", render_tasks(found.tasks)]
    if found.preferences is not None:
        both = found.preferences
        lines += [
            "",
            paragraph("", f"{both.base.n} held-out pairs of {both.dataset} [95 % interval]"),
        ]
        for name, scores in (("base", both.base), ("trained", both.trained)):
            lines.append(
                f"{name:8} SimPO loss {scores.loss:.3f}, accuracy {scores.accuracy:.1%}, "
                f"margin {scores.margin:+.2f}"
            )
        lines += ["", render_buckets(both.buckets)]
    if found.win_rate is not None:
        lines += ["", render_win_rate(found.win_rate)]
    return "\n".join(lines) + "\n"


def render_tasks(tasks: Sequence[TaskScores]) -> str:
    """The harness's figures of base and trained model side by side, with its standard errors."""
    found: dict[tuple[str, str], dict[str, TaskFigure]] = {}
    for scores in tasks:
        for figure in scores.figures:
            found.setdefault((figure.task, figure.metric), {})[scores.model] = figure
    rows = []
    for (task, metric), models in found.items():
        figures = [models.get(name) for name in ("base", "trained")]
        known = [figure for figure in figures if figure is not None]
        counts = {str(figure.n) for figure in known if figure.n is not None}
        arrow = {True: " (up)", False: " (down)", None: ""}[known[0].higher_is_better]
        change = f"{known[1].value - known[0].value:+.4f}" if len(known) == 2 else "-"
        columns = [_with_error(figure) for figure in figures]
        rows.append([f"{task}: {metric}{arrow}", "/".join(sorted(counts)), *columns, change])
    return table(["task: metric", "n", "base", "trained", "change"], rows)


def render_buckets(buckets: Sequence[LengthBucket]) -> str:
    """Accuracy and margin by answer length, of the base model and the trained one."""
    rows = [
        [
            f"{each.shortest:g} to {each.longest:g}",
            str(each.n),
            _share(each.base_accuracy),
            _share(each.accuracy),
            f"{each.base_margin.value:+.2f}",
            f"{each.margin.value:+.2f} [{each.margin.low:+.2f}, {each.margin.high:+.2f}]",
        ]
        for each in buckets
    ]
    headers = ["tokens", "pairs", "base accuracy", "accuracy", "base margin", "margin"]
    return table(headers, rows)


def render_win_rate(found: WinRate) -> str:
    """A win rate and what it rests on, in one sentence."""
    return clean_text(
        f"{found.judge} prefers {found.model} to {found.opponent} in {_share(found.win_rate)} of "
        f"{found.n} prompts ({found.wins} wins, {found.ties} ties, {found.losses} losses; the same "
        f"verdict in both orders in {found.consistency:.0%}; {found.unreadable} answers unreadable)"
    )


def _with_error(figure: TaskFigure | None) -> str:
    if figure is None:
        return "-"
    return f"{figure.value:.4f}" + ("" if figure.stderr is None else f" ± {figure.stderr:.4f}")


def _share(interval: Interval) -> str:
    return f"{interval.value:.1%} [{interval.low:.1%}, {interval.high:.1%}]"


def _in_brackets(text: str | None) -> str:
    return f" ({shorten(text, 40)})" if text else ""


def render_audit(audit: Audit, n_features: int = 8) -> str:
    """The verdict of an audit and the figures behind it, for a terminal.

    Args:
        audit: the evidence; the page has all of it.
        n_features: how many of the most steered features to list.
    """
    info = audit.info
    place = f" at {info.hook_name}" if info.hook_name else ""
    beside = next((each.value for each in info.settings if each.name == "modules_to_save"), None)
    lines = [
        paragraph(
            "",
            f"{info.adapter}: {info.n_parameters:,} trained parameters{place} of "
            f"{info.base_model or 'its base model'}"
            + (f", and {beside} trained whole" if beside else "")
            + f", on {audit.n_pairs:,} held-out pairs of {audit.dataset}.",
        ),
        "",
        render_findings(audit.findings),
    ]
    if audit.usages:
        usage = audit.usages[0]
        lines += [
            title(f"Held-out preference pairs ({audit.n_pairs})"),
            render_scores(audit.base, audit.trained, usage),
            title("Most steered features (answer tokens)"),
            render_usage(usage, n_features),
        ]
    if audit.ablations:
        lines += [
            title("With the steering of some features zeroed"),
            render_ablations(audit.base, audit.trained, audit.ablations),
        ]
    return "\n".join(lines) + "\n"


def render_checkup(checkup: Checkup) -> str:
    """The figures of a checkup, the place that was asked about first, and what they say."""
    rows = [
        [
            ("> " if fit.intended else "  ") + fit.hook,
            fit.model,
            f"{fit.fvu:.1%}",
            f"{fit.l0:.1f}",
            f"{fit.dead:.1%}",
            f"{fit.n_tokens:,}",
        ]
        for fit in checkup.fits
    ]
    headers = ["  place", "model", "unexplained", "active per token", "never active", "tokens"]
    heading = paragraph("", f"The SAE {checkup.sae} on {checkup.dataset}")
    return f"{heading}\n\n{table(headers, rows)}\n\n{render_findings(checkup.findings)}\n"


def render_contrast(contrast: DataContrast, n_features: int = 15) -> str:
    """What a preference set prefers: categories, features, examples.

    Args:
        contrast: from ``compute_contrast``.
        n_features: how many features to list.
    """
    categories = [
        [
            shorten(each.category, 24),
            str(each.n_features),
            str(each.n_tested),
            str(each.n_separating),
            "-" if each.share is None else _share(each.share),
            _share(each.accuracy),
        ]
        for each in contrast.categories
    ]
    features = [
        [
            str(each.feature),
            shorten(each.label or "-", 22),
            "{:+.3f} [{:+.3f}, {:+.3f}]".format(*astuple(each.difference)[:3]),
            f"{each.effect:+.2f}",
            f"{each.auroc.value:.2f}",
            f"{each.q:.0e}" if each.q > 1e-99 else "<1e-99",
            f"{each.pull.value:+.3f}",
            f"{each.pull_per_token:.2f}",
        ]
        for each in contrast.features[:n_features]
    ]
    opening = (
        f"{contrast.n_pairs:,} pairs of {contrast.dataset}, {contrast.n_topics} "
        f"{'topics' if contrast.n_topics > 1 else 'topic'}. The chosen answer is the longer one in "
        f"{_share(contrast.longer)}."
    )
    if not contrast.length_controlled:
        opening += " Length is not controlled: it varies too little to be told from preference."
    lines = [
        paragraph("", opening),
        title(f"Features that separate: {contrast.n_separating} of {contrast.n_tested} tested"),
        table(
            ["category", "features", "tested", "separate", "of the contrast", "prefers the chosen"],
            categories,
        ),
        title("Most clearly separating features"),
        table(
            [
                "feature",
                "detects",
                "chosen - rejected",
                "effect",
                "AUROC",
                "q",
                "pull",
                "per token",
            ],
            features,
        ),
    ]
    for examples in contrast.examples:
        lines.append(title(f"Feature {examples.feature}"))
        for name, contexts in (("chosen", examples.chosen), ("rejected", examples.rejected)):
            lines += [f"{name:8}  {shorten(render_context(c), WIDTH - 10)}" for c in contexts]
    return "\n".join(lines) + "\n"


def render_curation(curation: Curation) -> str:
    """What a curated copy leaves of a preference, in a few sentences."""
    done = {"drop": "dropped", "relabel": "flipped"}[curation.action]
    named = ", ".join(map(str, curation.features[:10]))
    more = len(curation.features) - 10
    return paragraph(
        "",
        f"The features {named}{f' and {more} more' if more > 0 else ''} prefer the chosen answer "
        f"in {curation.agree:,} of {curation.n_pairs:,} pairs and the rejected one in "
        f"{curation.disagree:,}; in {curation.alone:,} the others do not support the chosen one. "
        f"{len(curation.rows):,} pairs are {done}. The features then prefer the chosen answer in "
        f"{_share(curation.after)} of the pairs instead of {_share(curation.before)}, the others "
        f"in {_share(curation.rest_after)} instead of {_share(curation.rest_before)}.",
    )


def render_difference(difference: AdapterDifference, n_features: int = 30) -> str:
    """Two adapters beside each other, the features first on which they differ most.

    Args:
        difference: from ``compute_difference``.
        n_features: how many features to list.
    """
    known = difference.correlation
    lines = [
        paragraph("A  ", f"{difference.first}: {difference.first_l0:.2f} features per token"),
        paragraph("B  ", f"{difference.second}: {difference.second_l0:.2f} features per token"),
        "",
        paragraph(
            "",
            f"Over {difference.n_tokens:,} answer tokens of {difference.dataset}. Both steer "
            f"{difference.overlap:.0%} of the features that either does; rank correlation of their "
            "mean v " + ("unknown." if known is None else f"{known:+.2f}."),
        ),
        "",
        table(
            ["feature", "detects", "mean v, A", "B", "difference", "tokens, A", "B", "cosine"],
            [_row(each) for each in difference.features[:n_features]],
        ),
    ]
    return "\n".join(lines) + "\n"


def render_inspection(found: Inspection, n_features: int = 10) -> str:
    """What an adapter can do, the features first that reach farthest, and what sets rare ones off.

    Args:
        found: from ``compute_inspection``.
        n_features: how many features to list in each table.
    """
    info = found.info
    bound = "unknown" if found.ratio_bound is None else f"{found.ratio_bound:.0%}"
    lines = [
        paragraph(
            "",
            f"{info.adapter}: {found.n_features:,} features of {info.sae} can be steered; "
            f"{found.n_seen:,} are, {found.l0:.1f} per token, at {found.n_tokens:,} tokens of "
            f"{found.source}.",
        ),
        "",
        render_findings(found.findings),
        title("||x' - x|| / ||x||"),
        table(
            [
                "mean at ordinary tokens",
                "largest",
                "at any x of that norm",
                "cannot exceed",
            ],
            [
                [
                    f"{found.ratio_mean:.1%}",
                    f"{found.ratio_max:.0%}",
                    f"{found.ratio_worst:.0%}",
                    bound,
                ]
            ],
        ),
        "",
        table(
            ["moved most by", "||x' - x|| / ||x||"],
            [
                [
                    shorten(repr("".join(each.tokens)), 60)
                    + (" (searched)" if each.searched else " (ordinary)"),
                    f"{each.total:.0%}",
                ]
                for each in found.loudest
            ],
        ),
        title("Features that reach farthest"),
        table(
            ["feature", "detects", "reach", "seen", "tokens", "margin", "listens to", "promotes"],
            [_reaching(each) for each in found.features[:n_features]],
        ),
    ]
    set_off = sorted(
        ((each, each.trigger) for each in found.features if each.trigger is not None),
        key=lambda pair: -pair[1].strength,
    )
    if set_off:
        rows = [
            [
                str(each.feature),
                shorten(each.label or "-", 20),
                f"{trigger.strength:.1%}",
                f"{trigger.steering:+.2f}",
                f"{each.frequency:.2%}",
                shorten(repr("".join(trigger.tokens)), 44),
            ]
            for each, trigger in set_off[:n_features]
        ]
        headers = ["feature", "detects", "moves", "v", "tokens", "set off by"]
        lines += [title("What sets rarely steered features off"), table(headers, rows)]
    return "\n".join(lines) + "\n"


def _reaching(each: SteerableFeature) -> list[str]:
    return [
        str(each.feature),
        shorten(each.label or "-", 20),
        f"{each.reach:.0%}",
        f"{each.seen:.0%}",
        f"{each.frequency:.1%}",
        f"{each.margin:+.1f}",
        ", ".join(str(other.feature) for other in each.listens),
        shorten(" ".join(map(repr, each.promoted[:2])), 24),
    ]


def render_findings(findings: Sequence[Finding]) -> str:
    """Verdict, question and answer, one under another."""
    blocks = [
        f"{finding.verdict:<8}{clean_text(finding.question)}\n{paragraph(' ' * 8, finding.answer)}"
        for finding in findings
    ]
    return "\n\n".join(blocks)


def _row(each: FeatureDifference) -> list[str]:
    means = [use.mean_steering if use else 0.0 for use in (each.first, each.second)]
    return [
        str(each.feature),
        shorten(each.label or "-", 24),
        f"{means[0]:+.4f}",
        f"{means[1]:+.4f}",
        f"{means[1] - means[0]:+.4f}",
        _frequency(each.first),
        _frequency(each.second),
        "-" if each.cosine is None else f"{each.cosine:+.2f}",
    ]


def _frequency(use: FeatureUse | None) -> str:
    return f"{use.frequency:.1%}" if use else "-"
