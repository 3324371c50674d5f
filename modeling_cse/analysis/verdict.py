# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Whether experts are worth it, by rules that are written down, from intervals and nothing else."""

from dataclasses import dataclass, field

from .gains import LEAST_SEQUENCES, Gain


# A gain in perplexity under one per cent is not worth another kind of model.
WORTH = 0.99


@dataclass(frozen=True)
class Clarity:
    """A measure of how far a cluster lies from all others: its name in tables, in sentences, what its values mean, and
    from where on a cluster is clear."""

    name: str
    phrase: str
    meaning: str
    clear: float


# By how a model routes. Below the threshold the text may be one cloud that k-means has cut somewhere.
CLARITY = {
    # Of the clearest cluster with an expert. States of a quickstart run (one seed, k of 2, 4 and 6): that of a rare
    # domain had 0.32 to 0.37, the clearest of all on the general text alone 0.15 to 0.24.
    "states": Clarity(
        "silhouette",
        "a silhouette of",
        "Silhouette of mean states: 1 stands far apart, 0 is a cloud cut somewhere",
        0.28,
    ),
    # Silhouettes of texts do not tell the two apart, separation does: figures in docs/evidence/longtail-trials.md.
    "evidence": Clarity(
        "separation",
        "a separation in nats a token of",
        "Separation: what the cluster's own token frequencies, counted in the training sample, save over those of all "
        f"text, in nats a token of its held-out sequences ({LEAST_SEQUENCES} or more of them); 0 is a cloud cut "
        "somewhere, and documents with passages on both sides raise it",
        0.2,
    ),
}
# Share of tokens that must find the cluster of their sequence beyond the first few.
FOUND = 0.6


def rules(kind: str) -> str:
    """The rules of `judge` in words, for clusters of a kind, a key of `CLARITY`."""
    clarity = CLARITY[kind]
    return (
        f"Rules. Clusters are clear if one with an expert has {clarity.phrase} {clarity.clear} or more, {FOUND:.0%} "
        "of the held-out tokens find the cluster of their sequence, and some held-out sequence belongs to an expert, "
        "with every seed. "
        'Of the 95 % intervals of the ratio: "yes" if the long tail lies below 1 and the common text does not lie '
        f'above 1; "hardly" if so, but the gain is under {1 - WORTH:.0%}; "mixed" if the long tail gains and the '
        f'common text loses; "no" if the long tail lies above 1, or above {WORTH} and the common text does not gain, '
        'or holds 1 where the common text loses; else "cannot tell". Without clear clusters "yes" and "mixed" become '
        '"cannot tell" (parameters alone may gain), all others "no"; but where the long tail has too little held-out '
        'text for an interval and for the clarity of any of its clusters, the answer is "cannot tell".'
    )


@dataclass(frozen=True)
class Verdict:
    """`answer`: "yes", "hardly", "mixed", "no" or "cannot tell"; `reasons`: one sentence each; `advice`: what would
    tell more."""

    answer: str
    reasons: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)


def judge(
    tail: Gain | None, common: Gain | None, clearest: float | None, agreement: float | None, seeds: int, kind: str
) -> Verdict:
    """
    The verdict on a corpus (`rules` in words).

    Args:
        tail: gain on held-out sequences whose cluster owns an expert; None if there are none.
        common: gain on all others; None if there are none.
        clearest: clarity of the clearest cluster with an expert, in the measure of `kind`; None where there is none.
        agreement: share of the held-out tokens that find the cluster of their sequence.
        seeds: trainings behind the gains.
        kind: of the clusters, a key of `CLARITY`.
    """
    unclear = _unclear(tail, clearest, agreement, seeds, CLARITY[kind])
    reasons = [f"No clear clusters: {unclear}."] if unclear else []
    for name, gain in (("The long tail (text with an expert)", tail), ("The common text", common)):
        if gain is not None:
            reasons.append(f"{name}: {_in_words(gain, seeds)}.")
    answer = "no" if tail is None else _answer(tail, common)
    unmeasured = tail is not None and tail.low is None and clearest is None
    if unclear:
        answer = "cannot tell" if unmeasured or answer in ("yes", "mixed") else "no"
    return Verdict(answer, reasons, _advice(answer, tail, seeds))


def _unclear(
    tail: Gain | None, clearest: float | None, agreement: float | None, seeds: int, clarity: Clarity
) -> str | None:
    if clearest is None:
        return "no cluster with an expert has text enough to measure it on"
    if clearest < clarity.clear:
        return f"the clearest with an expert has {clarity.phrase} {clearest:.2f}, under {clarity.clear}"
    if agreement is not None and agreement < FOUND:
        return f"{agreement:.0%} of the tokens find the cluster of their sequence, under {FOUND:.0%}"
    if tail is not None and tail.seeds < seeds:
        return f"{tail.seeds} of {seeds} trainings have held-out sequences that belong to a cluster with an expert"
    return "no held-out sequence belongs to a cluster with an expert" if tail is None else None


def _answer(tail: Gain, common: Gain | None) -> str:
    if tail.low is None:
        return "cannot tell"
    loses = common is not None and common.worse
    if tail.better:
        return "mixed" if loses else "yes" if tail.ratio <= WORTH else "hardly"
    gains = common is not None and common.better
    if tail.worse or loses or (tail.low > WORTH and not gains):
        return "no"
    return "cannot tell"


def _in_words(gain: Gain, seeds: int) -> str:
    ratio = f"ratio {gain.ratio:.3f}"
    some = f" ({gain.seeds} of {seeds} seeds)" if gain.seeds < seeds else ""
    if gain.low is None:
        few = f", of too few sequences ({gain.sequences}) for an interval" if seeds == 1 else some
        return ratio + few
    found = "a gain" if gain.better else "a loss" if gain.worse else "no difference beyond the interval"
    return f"{ratio}, interval {gain.low:.3f} to {gain.high:.3f}{some}: {found}"


def _advice(answer: str, tail: Gain | None, seeds: int) -> list[str]:
    if answer == "no" or tail is None:
        return [
            "This answer is for this size and these tokens. If you know of rare domains in the text, try more tokens "
            "(--steps) or a larger model (--size 7m)."
        ]
    advice = []
    if tail.low is None and seeds == 1:
        advice.append("Hold out more text of rare domains (--validation).")
    if seeds == 1:
        advice.append(
            "Train again with other seeds (--seeds 3 or 5; what is done is kept): the interval of one seed does not "
            "hold the noise of training."
        )
    elif answer == "cannot tell":
        advice.append(f"More seeds than {seeds} make the interval narrower.")
    if answer in ("cannot tell", "hardly", "mixed"):
        advice.append(
            "Train on more tokens (--steps, more text), or train a larger model (--size 7m): clusters and experts "
            "need tokens."
        )
    return advice
