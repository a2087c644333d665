"""The contrastive losses tile by tile, against the plain formula over the whole table."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from test_objectives import MODALITIES, make, seeded

from multimodal_fm.batch import SequenceTable, find_pairs
from multimodal_fm.losses import pairwise
from multimodal_fm.objectives import contrastive

SETTINGS = {
    "infonce": {},
    "hard": {"hard_negatives": 3.0},
    "weights": {"pairs": {"text_image": 0.3, "audio_image": 2.0}},
    "views": {"views": 2},
    "hard views": {"views": 2, "hard_negatives": 2.0},
    "sigmoid": {"loss": "sigmoid"},
    "sigmoid views": {"loss": "sigmoid", "views": 2},
}


def make_table(views: int, count: int = 23) -> SequenceTable:
    """Samples of one to three modalities, some of equal groups, some with one view only, out of order."""
    rows, generator = [], seeded(3)
    for sample in range(count):
        has = [m for m in range(3) if torch.rand((), generator=generator) < 0.7] or [sample % 3]
        for view, modality in itertools.product(range(views), has):
            if view == 0 or sample % 5:
                rows.append((modality, 7 * sample, sample % 17))
    order = torch.randperm(len(rows), generator=generator).tolist()
    return SequenceTable(*torch.tensor([rows[i] for i in order]).T)


def dense_loss(objective, features, table) -> torch.Tensor:
    """The formula over whole tables, from the table of sequences alone."""
    losses, weights, seen = [], [], {}
    views = []
    for modality, sample in zip(table.modality.tolist(), table.sample.tolist()):
        views.append(seen.get((modality, sample), 0))
        seen[modality, sample] = views[-1] + 1
    view = torch.tensor(views)
    for a, b in itertools.combinations_with_replacement(range(3), 2):
        left, right = ((table.modality == m).nonzero()[:, 0] for m in (a, b))
        same = table.sample[left][:, None] == table.sample[right]
        if a == b and not view[left].any():
            continue
        if a == b:
            count = same.sum(1, keepdim=True)
            positive = same & ((view[left][:, None] + 1) % count == view[right]) & (count > 1)
        else:
            positive = same & (view[left][:, None] == view[right])
        if min(positive.shape) < 2 or not positive.any():
            continue
        ignored = (table.group[left][:, None] == table.group[right]) & ~positive
        logits = features[left] @ features[right].T * objective.log_scale.exp()
        weights.append(objective.pair_weights[f"{MODALITIES[a]}_{MODALITIES[b]}"])
        losses.append(weights[-1] * dense_pair(objective, logits, positive, ignored))
    return torch.stack(losses).sum() / sum(weights)


def dense_pair(objective, logits, positive, ignored) -> torch.Tensor:
    if objective.bias is not None:
        each = -F.logsigmoid((positive.double() * 2 - 1) * (logits + objective.bias))
        return each.masked_fill(ignored, 0.0).sum() / positive.sum()
    both = []
    for side, right, left_out in ((logits, positive, ignored), (logits.T, positive.T, ignored.T)):
        negative = ~right & ~left_out
        strength = objective.config.hard_negatives * side.detach() / objective.log_scale.detach().exp()
        weight = strength.exp() * negative
        weight = weight / (weight.sum(1, keepdim=True) / negative.sum(1, keepdim=True)).clamp(min=1e-300)
        below = (weight * side.exp()).sum(1)
        own = (side * right).sum(1)[right.any(1)]
        both.append((torch.logaddexp(own, below[right.any(1)].log()) - own).mean())
    return sum(both) / 2


def gradients(loss, objective, features) -> list[torch.Tensor]:
    weights = [features, objective.log_scale, *([] if objective.bias is None else [objective.bias])]
    return list(torch.autograd.grad(loss, weights))


def setting(name, count=23):
    _, objective = make("contrastive", scale=9.0, **SETTINGS[name])
    table = make_table(SETTINGS[name].get("views", 1), count)
    features = F.normalize(torch.randn(len(table), 16, generator=seeded()).double(), dim=-1)
    return objective.double(), table, features.requires_grad_()


@pytest.mark.parametrize("tile", [(5, 7), (512, 2048)], ids=["many tiles", "one tile"])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_loss_and_gradients_are_those_of_the_whole_table(name, tile, monkeypatch):
    monkeypatch.setitem(pairwise.TILE, "cpu", tile)
    objective, table, features = setting(name)
    loss, figures = objective.compare(features, find_pairs(table, MODALITIES))
    expected = dense_loss(objective, features, table)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    ours, theirs = gradients(loss, objective, features), gradients(expected, objective, features)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    assert all(0 <= float(v) <= 1 for k, v in figures.items() if k.endswith("accuracy"))


@pytest.mark.parametrize("name", ["hard views", "sigmoid views", "weights"])
def test_the_parts_of_several_ranks_add_up(name, monkeypatch):
    """Losses, gradients and figures of ranges of the rows, one of them empty, are those of all rows in sum."""
    monkeypatch.setitem(pairwise.TILE, "cpu", (4, 6))
    objective, table, features = setting(name)
    pairs, bounds = find_pairs(table, MODALITIES), [0, 1, 1, 11, 30, len(table)]
    whole, figures = objective.compare(features, pairs)
    expected = gradients(whole, objective, features)
    parts = [objective.compare(features, pairs, range(a, b)) for a, b in itertools.pairwise(bounds)]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    of_parts = [gradients(loss, objective, features) for loss, _ in parts]
    for total, one in zip(map(sum, zip(*of_parts, strict=True)), expected, strict=True):
        torch.testing.assert_close(total, one, rtol=1e-9, atol=1e-12)
    for key, figure in figures.items():
        combine = max if key in objective.maxima else sum
        torch.testing.assert_close(combine(own[key] for _, own in parts), figure)


def test_pairs_of_a_step_hold_no_table():
    table = make_table(2, 400)
    for pair in find_pairs(table, MODALITIES).values():
        assert sum(t.numel() for both in (pair.rows, pair.groups, pair.columns) for t in both) <= 6 * len(table)


def test_what_is_not_finite_stays_so():
    """A loss that is not finite is seen, so that the step is left out."""
    for name in ("infonce", "hard", "sigmoid"):
        objective, table, features = setting(name)
        with torch.no_grad():
            features[int((table.modality == 0).nonzero()[0, 0])] = torch.nan
        loss, _ = objective.compare(features, find_pairs(table, MODALITIES))
        assert not torch.isfinite(loss)


def test_vectors_far_apart_stay_finite():
    """At the highest scale, where the exponential of a logit is no float32 any more."""
    _, objective = make("contrastive", scale=contrastive.MAX_SCALE)
    table = SequenceTable(torch.tensor([0, 1] * 4), torch.arange(4).repeat_interleave(2), torch.arange(8) // 2)
    features = torch.zeros(8, 16)
    features[:, 0] = torch.tensor([1.0, -1.0] * 4)
    loss, _ = objective.compare(features.requires_grad_(), find_pairs(table, MODALITIES))
    loss.backward()
    assert abs(float(loss.detach()) - torch.tensor(4.0).log()) < 1e-4
    assert torch.isfinite(features.grad).all() and torch.isfinite(objective.log_scale.grad)
