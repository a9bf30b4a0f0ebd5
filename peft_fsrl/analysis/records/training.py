"""Runs, and what is known before them."""

from __future__ import annotations

from dataclasses import dataclass

from ...records import Record


@dataclass(frozen=True)
class FeatureEffect(Record):
    """What a little constant steering of one feature does to the loss.

    Attributes:
        feature: index in the SAE.
        slope: derivative of the loss with respect to ``v`` of this feature at every token, at zero:
            negative where promoting it lowers the loss.
        error: standard error of the slope, over pairs.
    """

    feature: int
    slope: float
    error: float


@dataclass(frozen=True)
class LayerEffect(Record):
    """First-order effect of steering at one layer on the preference loss, before any training.

    Both figures say how fast the loss falls per unit of ``||v||_1`` at every token, so both can be
    compared with ``l1_coeff``: one that is larger leaves nothing to be gained to first order. An
    adapter can do more than the first, which steers every token alike, and less than the second,
    which steers each token of each answer as suits it best.

    Attributes:
        layer: the steered layer.
        constant: with the best single feature, the same at every token.
        per_token: with the best feature at each token.
        n_pairs: preference pairs measured.
        features: the features with the largest slopes, largest first.
    """

    layer: int
    constant: float
    per_token: float
    n_pairs: int
    features: tuple[FeatureEffect, ...]


@dataclass(frozen=True)
class SweepPoint(Record):
    """One run of a sweep, a row of its table. Figures are None for a run that failed.

    Attributes:
        stage: the part of the sweep that it belongs to.
        name: of the run, and of its folder.
        layer: the steered layer.
        seed: of data, order and start.
        l1_coeff: weight of the L1 penalty.
        l0_coeff: weight of the L0 penalty.
        loss: held-out preference loss.
        accuracy: held-out preference accuracy.
        l0: steered features per held-out token.
        l1: norm of the steering vector per held-out token.
        perplexity: of sampled answers under the base model; see ``Coherence``.
        perplexity_unsteered: of the base model's own answers.
        repetition: see ``Coherence``.
        distinct_2: see ``Coherence``.
        seconds: wall time.
        command: what was run.
    """

    stage: str
    name: str
    layer: int
    seed: int
    l1_coeff: float
    l0_coeff: float
    loss: float | None
    accuracy: float | None
    l0: float | None
    l1: float | None
    perplexity: float | None
    perplexity_unsteered: float | None
    repetition: float | None
    distinct_2: float | None
    seconds: float | None
    command: str

    @property
    def finished(self) -> bool:
        """Whether the run has its figures."""
        return self.loss is not None


@dataclass(frozen=True)
class Curve(Record):
    """One logged quantity over a training run, at the steps where it was logged."""

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class TrainingCurves(Record):
    """What a trainer logged (figure 3): preference losses, l0, margins and what else there is."""

    curves: tuple[Curve, ...]

    def curve(self, name: str) -> Curve:
        """One curve.

        Raises:
            KeyError: if it was not logged.
        """
        return {curve.name: curve for curve in self.curves}[name]
