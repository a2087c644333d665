"""Scores of predictions by kind of task, as figures with intervals and chance.

Pure functions of arrays and texts. Where a score is a function of sums over samples it is written as one, so that a
bootstrap draw costs a row of a product of matrices; the tests hold each to scikit-learn, torchmetrics, SciPy or
sacrebleu. `clusters` (N,) are drawn together by the bootstrap; without them each sample is drawn by itself.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..errors import UserError
from .metrics import bootstrap, bootstrap_rows, estimate

BINS = 15  # of confidence, for the calibration error
COVERAGE = 0.8  # the share of samples that a selective classifier answers


def classification(probabilities, labels, classes: Sequence[str], clusters=None) -> dict[str, dict]:
    """Probabilities (N, C) against the numbers of the right classes (N,).

    `accuracy`; `macro_f1`, over the classes that occur or are predicted; `mcc` where there are two classes; `ece`, the
    expected calibration error (Guo et al. 2017, arXiv:1706.04599); `selective_accuracy@80`, that of the surest 80 %,
    and `aurc`, the area under the curve of risk over coverage, 0 at best (Geifman and El-Yaniv 2017, arXiv:1705.08500).
    Chance is to always say the commonest class. Raises UserError for shapes that do not fit, or a label of no class.
    """
    probabilities, labels = np.asarray(probabilities, dtype=float), np.asarray(labels, dtype=int)
    count, number = len(labels), len(classes)
    if probabilities.shape != (count, number) or not count:
        raise UserError(f"probabilities are {probabilities.shape}, not {(count, number)}: one for each label and class")
    if labels.min() < 0 or labels.max() >= number:
        raise UserError(
            f"a label is {labels.min() if labels.min() < 0 else labels.max()}, but there are {number} classes"
        )
    clusters = np.arange(count) if clusters is None else np.asarray(clusters)
    predicted, confidence = probabilities.argmax(1), probabilities.max(1)
    right = (predicted == labels).astype(float)
    commonest = np.bincount(labels).max() / count
    true, said = np.eye(number)[labels], np.eye(number)[predicted]
    counts = np.concatenate([true * said, true, said], 1)
    figures = {
        "accuracy": estimate(right, clusters, float(commonest)),
        "macro_f1": bootstrap(
            counts, macro_f1, clusters, 2 * commonest / (1 + commonest) / (true.any(0)).sum(), biased=True
        ),
    }
    if number == 2:
        figures["mcc"] = bootstrap(counts, _mcc, clusters, 0.0)
    bins = np.eye(BINS)[np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)]
    gaps = np.concatenate([bins * (confidence - right)[:, None], np.ones((count, 1))], 1)
    figures["ece"] = bootstrap(
        gaps, lambda sums: np.abs(sums[:, :-1]).sum(1) / sums[:, -1], clusters, None, biased=True
    )
    order = np.argsort(-confidence, kind="stable")
    surest = right[order]

    def selective(times: np.ndarray) -> np.ndarray:
        taken = np.cumsum(times[:, order], 1)
        limit = COVERAGE * taken[:, -1:]
        inside = np.clip(times[:, order] - np.maximum(taken - limit, 0), 0, None)
        return (inside @ surest) / inside.sum(1)

    def area(times: np.ndarray) -> np.ndarray:
        times = times[:, order]
        risk = np.cumsum(times * (1 - surest), 1) / np.maximum(np.cumsum(times, 1), 1)
        return (risk * times).sum(1) / times.sum(1)

    figures["selective_accuracy@80"] = bootstrap_rows(selective, clusters, commonest)
    figures["aurc"] = bootstrap_rows(area, clusters, 1 - commonest)
    return figures


def macro_f1(sums: np.ndarray) -> np.ndarray:
    """The mean over classes of 2 tp / (true + said), from sums (B, 3 C) of tp, true and said; classes without any of
    them do not count."""
    hits, true, said = np.split(sums, 3, axis=1)
    there = true + said > 0
    with np.errstate(invalid="ignore"):
        return (2 * hits / np.where(there, true + said, 1)).sum(1) / there.sum(1)


def micro_f1(sums: np.ndarray) -> np.ndarray:
    """2 tp / (true + said) over all classes; 0 where there is nothing to be found and nothing was."""
    hits, true, said = (part.sum(1) for part in np.split(sums, 3, axis=1))
    return 2 * hits / np.where(true + said > 0, true + said, 1)


def _mcc(sums: np.ndarray) -> np.ndarray:
    """Matthews' correlation of two classes; 0 where one of them is never there or never said."""
    tn, tp, *_ = sums.T
    (true_0, true_1), (said_0, said_1) = sums[:, 2:4].T, sums[:, 4:6].T
    product = np.sqrt(true_0 * true_1 * said_0 * said_1)
    return (tp * tn - (true_1 - tp) * (true_0 - tn)) / np.where(product > 0, product, 1)


def multi_label(
    probabilities, labels, classes: Sequence[str], clusters=None, threshold: float = 0.5
) -> dict[str, dict]:
    """Probabilities (N, C) against which classes each sample has (N, C), of which a class is said at the threshold.

    `map`, the mean over the classes of the average precision (classes that no sample has do not count), `micro_f1` and
    `macro_f1`. Chance is a random order, and to say every class of every sample. Raises UserError.
    """
    probabilities, labels = np.asarray(probabilities, dtype=float), np.asarray(labels).astype(float)
    if probabilities.shape != labels.shape or labels.shape != (len(labels), len(classes)) or not labels.any():
        raise UserError(f"probabilities {probabilities.shape} and labels {labels.shape} do not fit, or no label is set")
    clusters = np.arange(len(labels)) if clusters is None else np.asarray(clusters)
    said = (probabilities >= threshold).astype(float)
    counts, share = np.concatenate([labels * said, labels, said], 1), labels.mean(0)
    precisions = [_average_precision(probabilities[:, c], labels[:, c]) for c in np.flatnonzero(labels.any(0))]

    def mean_average_precision(times: np.ndarray) -> np.ndarray:
        values = np.stack([precision(times) for precision in precisions], 1)
        there = np.isfinite(values)
        return np.where(there, values, 0).sum(1) / there.sum(1)

    everything = np.concatenate([labels.sum(0), labels.sum(0), np.full(len(classes), len(labels))])[None]
    return {
        "map": bootstrap_rows(mean_average_precision, clusters, share[share > 0].mean()),
        "micro_f1": bootstrap(counts, micro_f1, clusters, micro_f1(everything)[0]),
        "macro_f1": bootstrap(counts, macro_f1, clusters, macro_f1(everything)[0]),
    }


def _average_precision(scores: np.ndarray, labels: np.ndarray):
    """A function from how often each sample is drawn (B, N) to the average precision of each draw; equal scores share
    one threshold, as in scikit-learn."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)

    def of_draws(times: np.ndarray) -> np.ndarray:
        times = times[:, order]
        hits, taken = np.cumsum(times * labels[order], 1)[:, ends], np.cumsum(times, 1)[:, ends]
        new = np.diff(hits, axis=1, prepend=0)
        with np.errstate(invalid="ignore"):
            return (new * hits / np.maximum(taken, 1)).sum(1) / hits[:, -1]

    return of_draws


def tagging(predicted: Sequence[Sequence[str]], tags: Sequence[Sequence[str]], clusters=None) -> dict[str, dict]:
    """The tags of the words of N sentences.

    `token_accuracy`; and where all tags are O, B-TYPE or I-TYPE, `entity_f1`, over whole entities of the right type as
    conlleval (CoNLL-2000) counts them, else `macro_f1` over the tags. Chance is to always say the commonest tag. Raises
    UserError where a sentence has other numbers of words and tags.
    """
    for number, (one, other) in enumerate(zip(predicted, tags, strict=True)):
        if len(one) != len(other):
            raise UserError(f"sentence {number}: {len(one)} predicted tags for {len(other)} words")
    clusters = np.arange(len(tags)) if clusters is None else np.asarray(clusters)
    counts = Counter(tag for own in tags for tag in own)
    commonest, often = counts.most_common(1)[0]
    right = np.array([[sum(a == b for a, b in zip(p, t)), len(t)] for p, t in zip(predicted, tags)], dtype=float)
    share = often / counts.total()
    figures = {"token_accuracy": bootstrap(right, lambda sums: sums[:, 0] / sums[:, 1], clusters, share)}
    if all(re.fullmatch("O|[BI]-.*", tag) for tag in counts):
        pairs = [(entities(p), entities(t)) for p, t in zip(predicted, tags)]
        sizes = np.array([[len(p & t), len(t), len(p)] for p, t in pairs], dtype=float)
        constant = [(entities([commonest] * len(t)), entities(t)) for t in tags]
        guess = np.array([[len(p & t), len(t), len(p)] for p, t in constant], dtype=float).sum(0, keepdims=True)
        return figures | {"entity_f1": bootstrap(sizes, micro_f1, clusters, micro_f1(guess)[0])}
    known = sorted(counts.keys() | {tag for own in predicted for tag in own})
    number = {tag: place for place, tag in enumerate(known)}
    rows = np.zeros((len(tags), 3, len(known)))
    for row, own, said in zip(rows, tags, predicted):
        for tag, guess in zip(own, said):
            row[0, number[tag]] += tag == guess
            row[1, number[tag]] += 1
            row[2, number[guess]] += 1
    chance = 2 * share / (1 + share) / len(counts)
    return figures | {"macro_f1": bootstrap(rows.reshape(len(tags), -1), macro_f1, clusters, chance)}


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Type, start and end (exclusive) of each entity; an I-TYPE that goes on with nothing of its type begins one."""
    found, begun, own = set(), 0, ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        if own and (prefix != "I" or kind != own):
            found.add((own, begun, place))
            own = ""
        if prefix != "O" and not own:
            begun, own = place, kind
    return found


def spans(
    predicted: Sequence[str | None], answers: Sequence[str | Sequence[str] | None], clusters=None
) -> dict[str, dict]:
    """Answers found in N texts against the right ones, None where there is no answer; of several the nearest counts.

    `exact_match` and `f1` over words after SQuAD 2's normalization (Rajpurkar et al. 2018, arXiv:1806.03822), where a
    question without an answer is right if none is given; beside them, where the questions are mixed, `has_answer/f1`
    and `no_answer/accuracy`. Chance is to always say that there is no answer.
    """
    clusters = np.arange(len(answers)) if clusters is None else np.asarray(clusters)
    exact, overlap, empty = [], [], []
    for said, right in zip(predicted, answers, strict=True):
        right = [] if right is None else [right] if isinstance(right, str) else right
        wanted = [words for words in map(normalize_answer, right) if words] or [[]]
        words = normalize_answer(said or "")
        exact.append(max(words == one for one in wanted))
        overlap.append(max(_overlap(words, one) for one in wanted))
        empty.append(wanted == [[]])
    exact, overlap, empty = np.array(exact, dtype=float), np.array(overlap, dtype=float), np.array(empty)
    chance = float(empty.mean())
    figures = {"exact_match": estimate(exact, clusters, chance), "f1": estimate(overlap, clusters, chance)}
    if 0 < chance < 1:
        figures["has_answer/f1"] = estimate(overlap[~empty], clusters[~empty], 0.0)
        figures["no_answer/accuracy"] = estimate(exact[empty], clusters[empty], 1.0)
    return figures


def normalize_answer(text: str) -> list[str]:
    """Its words in lower case, without punctuation and English articles, as SQuAD's own script does."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _overlap(said: list[str], right: list[str]) -> float:
    if not said or not right:
        return float(said == right)
    return 2 * (Counter(said) & Counter(right)).total() / (len(said) + len(right))


def regression(predicted, values, clusters=None) -> dict[str, dict]:
    """Numbers (N,) against the right ones (N,).

    `pearson` and `spearman` (of the ranks), whose chance is 0; `mae` (chance: to always say the median) and `r2`
    (chance: the mean). Raises UserError where they are not finite.
    """
    from scipy.stats import rankdata

    predicted, values = np.asarray(predicted, dtype=float), np.asarray(values, dtype=float)
    if predicted.shape != values.shape or not (np.isfinite(predicted).all() and np.isfinite(values).all()):
        raise UserError("predictions and values are not as many, or not all of them are finite numbers")
    clusters = np.arange(len(values)) if clusters is None else np.asarray(clusters)
    mean = values.mean()
    errors = np.stack([(predicted - values) ** 2, values - mean, (values - mean) ** 2, np.ones(len(values))], 1)

    def r2(sums: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return 1 - sums[:, 0] / (sums[:, 2] - sums[:, 1] ** 2 / sums[:, 3])

    return {
        "pearson": bootstrap(_moments(predicted, values), _correlation, clusters, 0.0),
        "spearman": bootstrap(_moments(rankdata(predicted), rankdata(values)), _correlation, clusters, 0.0),
        "mae": estimate(np.abs(predicted - values), clusters, float(np.abs(values - np.median(values)).mean())),
        "r2": bootstrap(errors, r2, clusters, 0.0),
    }


def _moments(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x - x.mean(), y - y.mean()
    return np.stack([x, y, x * x, y * y, x * y, np.ones(len(x))], 1)


def _correlation(sums: np.ndarray) -> np.ndarray:
    """Pearson's; not a number where one side is constant."""
    x, y, xx, yy, xy, count = sums.T
    with np.errstate(invalid="ignore", divide="ignore"):
        variances = np.clip(xx - x * x / count, 0, None) * np.clip(yy - y * y / count, 0, None)
        return (xy - x * y / count) / np.sqrt(variances)


def captions(predicted: Sequence[str], references: Sequence[Sequence[str]], clusters=None) -> dict[str, dict]:
    """N texts against one or several right ones each, by sacrebleu (Post 2018): `bleu` of the corpus (0 to 100) and
    `chrf`, the mean over the texts. Chance is what the same texts get against the references of others.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    bleu, chrf = BLEU(effective_order=True), CHRF()
    clusters = np.arange(len(predicted)) if clusters is None else np.asarray(clusters)

    def score(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        found = [bleu.sentence_score(text, list(own)) for text, own in zip(texts, references, strict=True)]
        counts = np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in found], dtype=float)
        return counts, np.array([chrf.sentence_score(text, list(own)).score for text, own in zip(texts, references)])

    def corpus_bleu(sums: np.ndarray) -> np.ndarray:
        rows = sums.round().astype(int).tolist()
        half = (len(rows[0]) - 2) // 2
        return np.array(
            [BLEU.compute_bleu(row[:half], row[half:-2], row[-2], row[-1], smooth_method="exp").score for row in rows]
        )

    (counts, sentences), (by_chance, others) = score(predicted), score([*predicted[1:], *predicted[:1]])
    return {
        "bleu": bootstrap(counts, corpus_bleu, clusters, corpus_bleu(by_chance.sum(0, keepdims=True))[0]),
        "chrf": estimate(sentences, clusters, float(others.mean())),
    }
