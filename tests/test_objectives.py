"""The objectives: what they hide, what they predict from what, and their losses against the formulas."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from multimodal_fm import config
from multimodal_fm.backbone import Config as BackboneConfig
from multimodal_fm.batch import Example, Sample, collate, count_targets, find_pairs
from multimodal_fm.model import Model, ModelConfig
from multimodal_fm.objectives import OBJECTIVES, causal, contrastive, masked
from multimodal_fm.tokens import join, make_sequence

MODALITIES = ["text", "image", "audio"]
DECODER = BackboneConfig(width=32, depth=1, num_heads=2)


def tokens(modality: str, n: int):
    position = torch.zeros(n, 3)
    position[:, 0] = torch.arange(n)
    content = {
        "text": lambda: torch.randint(2, 300, (n,)),
        "image": lambda: torch.randint(0, 255, (n, 192), dtype=torch.uint8),
        "audio": lambda: torch.randn(n, 256),
    }[modality]()
    return make_sequence(content, position, MODALITIES.index(modality))


def make_sample(group=0, **lengths):
    return Sample({modality: tokens(modality, n) for modality, n in lengths.items()}, group)


def make_model(**backbone) -> Model:
    torch.manual_seed(0)
    tokenizers = {
        "text": {"vocab_size": 300},
        "image": {"patch": 8},
        "audio": {"patch_frames": 8, "n_mels": 32, "patch_mels": 32},
    }
    backbone = {"width": 48, "depth": 2, "num_heads": 2, **backbone}
    heads = {"retrieval": {"embed_dim": 16}}
    return Model(config.build(ModelConfig, {"tokenizers": tokenizers, "backbone": backbone, "heads": heads}))


def make(name: str, backbone: dict | None = None, **settings):
    """A model and an objective beside it."""
    cls, model = config.plugin_class(OBJECTIVES, name), make_model(**backbone or {})
    return model, cls(cls.Config(**settings), model, MODALITIES)


def make_batch(examples, objective=None, **more):
    """A microbatch of one task, `task`; the objective's plan travels with it."""
    plan = {"task": functools.partial(objective.plan, objective.config)} if objective else None
    counts = {"task": count_targets(examples, MODALITIES)}
    return collate({"task": list(enumerate(examples))}, MODALITIES, counts, plan, **more)


def score(model, objective, batch):
    return objective.loss(model(batch), batch.tasks["task"])


def compare(model, objective, samples):
    """Features, the table of their sequences, the loss and its figures, of samples in one step."""
    batch = make_batch([objective.arrange(objective.config, sample) for sample in samples])
    targets = batch.tasks["task"]
    features = objective.features(model(batch), targets)
    return features, targets.table, *objective.compare(features, find_pairs(targets.table, MODALITIES))


def named(figures) -> set[str]:
    """The figures' names, without those that say how the features lie."""
    return figures.keys() - {"feature_std", "effective_rank", "scale", "largest_logit"}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("modality", MODALITIES)
def test_replace_hides_the_ratio_it_says(modality):
    settings, sample = masked.Config(mask_ratio=0.4), make_sample(**{modality: 100})
    example = masked.Objective.arrange(settings, sample, seeded())
    assert len(example.targets[0]) == 40 and len(example.inputs[0]) == 100
    rows, content = example.rows[0], sample.tokens[modality].content
    assert torch.equal(example.targets[0].content, content[rows])
    hidden = example.hidden[0].sum()
    assert 20 < hidden <= 40 and example.hidden[0][rows].sum() == hidden
    changed = (example.inputs[0].content != content).reshape(100, -1).any(1)
    assert set(changed.nonzero()[:, 0].tolist()) <= set(rows.tolist()), "only target tokens are replaced"
    again, other = (masked.Objective.arrange(settings, sample, seeded(seed)) for seed in (0, 1))
    assert torch.equal(again.rows[0], rows) and not torch.equal(other.rows[0], rows)


def test_drop_keeps_hidden_tokens_out():
    settings = masked.Config(hide="drop", mask_ratio={"image": 0.75})
    example = masked.Objective.arrange(settings, make_sample(image=64), seeded())
    assert len(example.inputs[0]) == 16 and len(example.targets[0]) == 48 and (example.rows[0] == -1).all()
    positions = {tuple(p) for t in (example.inputs[0], example.targets[0]) for p in t.position.tolist()}
    assert len(positions) == 64


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.99])
def test_at_least_one_token_stays(n, ratio):
    for hide in ("replace", "drop"):
        settings = masked.Config(hide=hide, mask_ratio=ratio)
        targets = len(masked.Objective.arrange(settings, make_sample(text=n), seeded()).targets[0])
        assert targets == (0 if ratio == 0 or n == 1 else max(1, min(round(ratio * n), n - 1)))


def test_causal_answers_from_the_row_before():
    example = causal.Objective.arrange(causal.Config(), make_sample(text=6, image=4))
    assert example.inputs[0].order.tolist() == list(range(6)) and example.rows[0].tolist() == [0, 1, 2, 3, 4]
    assert example.rows[1].tolist() == [6, 7, 8] and example.inputs[1].sequence.tolist() == [1] * 4


def test_captioning_reads_the_image_and_predicts_the_text():
    settings = causal.Config(fuse=True, prefix=["image"])
    example = causal.Objective.arrange(settings, make_sample(image=4, text=3))
    image, text = example.inputs
    assert image.order.tolist() == [0] * 4 and text.order.tolist() == [1, 2, 3]
    assert len(example.targets[0]) == 0 and example.rows[1].tolist() == [3, 4, 5]
    assert text.position[0, 0] > image.position[:, 0].max()


@pytest.mark.parametrize("settings", [{"keep_ratio": 0.0, "random_ratio": 0.0}, {"hide": "drop", "decoder": DECODER}])
def test_the_model_cannot_see_what_it_predicts(settings):
    """Changing a hidden token's content changes no prediction; changing a visible one does."""
    model, objective = make("masked", mask_ratio=0.5, **settings)
    sample = make_sample(text=12)
    content = sample.tokens["text"].content
    hidden = objective.arrange(objective.config, sample, seeded()).targets[0].position[:, 0].long().tolist()

    def answers(content):
        changed = Sample({"text": sample.tokens["text"].replace(content=content)})
        batch = make_batch([objective.arrange(objective.config, changed, seeded())], objective)
        output, targets = model(batch), batch.tasks["task"]
        if objective.config.hide == "drop":
            return objective.decode(output, targets)["text"]
        return output.tokens.content.index_select(0, targets.rows["text"])

    def change(row):
        changed = content.clone()
        changed[row] = (changed[row] + 1) % 300
        return changed

    before, visible = answers(content), next(i for i in range(12) if i not in hidden)
    torch.testing.assert_close(answers(change(hidden[0])), before, rtol=0, atol=0)
    assert (answers(change(visible)) - before).abs().max() > 1e-4


def test_a_causal_model_does_not_see_ahead():
    model, sample = make_model(), make_sample(text=10)

    def outputs(content):
        changed = Sample({"text": sample.tokens["text"].replace(content=content)})
        return model(make_batch([causal.Objective.arrange(causal.Config(), changed)])).tokens.content

    content = sample.tokens["text"].content
    changed = content.clone()
    changed[6] = (changed[6] + 1) % 300
    moved = (outputs(changed) - outputs(content)).abs().amax(1)
    assert (moved[:6] == 0).all() and (moved[6:] > 1e-6).all()


def test_a_batch_equals_its_samples_alone():
    """Every sample's loss in a batch of all sorts is the sample's own: nothing leaks between sequences."""
    model, objective = make("causal")
    examples = [
        causal.Objective.arrange(causal.Config(), make_sample(text=5, image=4)),
        causal.Objective.arrange(causal.Config(), make_sample(audio=7, text=9)),
        causal.Objective.arrange(causal.Config(fuse=True), make_sample(image=4, text=3)),
    ]
    batch = make_batch(examples, round_to=16)
    together = {m: objective.score(model(batch), batch.tasks["task"], m) for m in MODALITIES}
    alone = {modality: [] for modality in MODALITIES}
    for example in examples:
        batch = make_batch([example])
        for modality in batch.tasks["task"].tokens:
            alone[modality].append(objective.score(model(batch), batch.tasks["task"], modality))
    for modality in MODALITIES:
        torch.testing.assert_close(together[modality], torch.cat(alone[modality]), rtol=0, atol=1e-5)


def reference_info_nce(features, rows, scale, weights=(1.0, 1.0, 1.0)):
    """The formula, sample by sample and in the plainest way; rows: (modality, sample, group) of each feature."""
    losses = []
    for a, b in itertools.combinations(range(3), 2):
        both = []
        for query_modality, answer_modality in ((a, b), (b, a)):
            each = []
            for i, (modality, number, group) in enumerate(rows):
                right = [j for j, r in enumerate(rows) if r[0] == answer_modality and r[1] == number]
                if modality != query_modality or not right:
                    continue
                logits, target = [], None
                for j, (other_modality, other, other_group) in enumerate(rows):
                    if other_modality == answer_modality and (other == number or other_group != group):
                        target = len(logits) if other == number else target
                        logits.append(scale * (features[i] @ features[j]))
                each.append(-torch.log_softmax(torch.stack(logits), 0)[target])
            both.append(torch.stack(each).mean())
        losses.append((both[0] + both[1]) / 2)
    weights = torch.tensor(weights)
    return (torch.stack(losses) * weights).sum() / weights.sum()


@pytest.mark.parametrize(
    "pairs, weights",
    [
        ({}, (1.0, 1.0, 1.0)),
        ({"text_audio": 0.4, "image_audio": 2.0}, (1.0, 0.4, 2.0)),
        ({"audio_text": 0.4, "audio_image": 2.0}, (1.0, 0.4, 2.0)),  # either way round
    ],
)
def test_info_nce_is_the_formula_and_leaves_equal_groups_out(pairs, weights):
    model, objective = make("contrastive", pairs=pairs)
    samples = [
        make_sample(1, text=3, image=4),
        make_sample(2, text=4, audio=5),
        make_sample(1, text=3, image=4, audio=2),
        make_sample(3, text=2, image=5),
        make_sample(2, audio=3),
        make_sample(4, image=2, audio=4),
    ]
    features, table, loss, figures = compare(model, objective, samples)
    assert torch.allclose(features.norm(dim=-1), torch.ones(len(features)))
    rows = list(zip(table.modality.tolist(), table.sample.tolist(), table.group.tolist()))
    torch.testing.assert_close(loss, reference_info_nce(features, rows, objective.log_scale.exp(), weights))
    assert {"text_image_accuracy", "text_audio_accuracy", "image_audio_accuracy"} == named(figures)


def test_a_pair_that_there_is_not_is_named():
    problems = dict(contrastive.Objective.problems(contrastive.Config(pairs={"text_video": 2}), MODALITIES))
    assert problems == {"pairs": "names text_video; there are text_image, text_audio, image_audio"}


def test_the_sigmoid_loss_is_the_formula():
    model, objective = make("contrastive", loss="sigmoid")
    groups = [1, 2, 1]
    features, table, loss, _ = compare(model, objective, [make_sample(g, text=3, image=4) for g in groups])
    text, image, total = features[table.modality == 0], features[table.modality == 1], 0.0
    for i, j in itertools.product(range(3), range(3)):
        if i == j or groups[i] != groups[j]:
            sign = 1 if i == j else -1
            total += -F.logsigmoid(sign * (objective.log_scale.exp() * (text[i] @ image[j]) + objective.bias))
    torch.testing.assert_close(loss, total / 3)


@pytest.mark.parametrize(
    "lengths", [[{"text": 3}], [{"text": 3}, {"text": 2}], [{"text": 2}, {"image": 2}]], ids=["one", "text", "no pair"]
)
def test_samples_without_a_pair_cost_nothing(lengths):
    samples = [make_sample(number, **own) for number, own in enumerate(lengths)]
    *_, loss, figures = compare(*make("contrastive"), samples)
    assert float(loss.detach()) == 0.0 and not figures
    loss.backward()


def test_the_temperature_leaves_its_bound_again():
    """At its upper bound the scale still has a gradient, and a step downwards lowers it."""
    model, objective = make("contrastive", scale=contrastive.MAX_SCALE)
    samples = [make_sample(number, text=3, image=4) for number in range(4)]
    _, table, *_ = compare(model, objective, samples)
    optimizer = torch.optim.SGD([objective.log_scale], lr=1.0)
    unit = F.normalize(torch.randn(4, 16, generator=seeded()), dim=-1)
    matched, crossed = (torch.empty(8, 16) for _ in range(2))
    matched[table.modality == 0], matched[table.modality == 1] = unit, unit
    crossed[table.modality == 0], crossed[table.modality == 1] = unit, unit.flip(0)
    with torch.no_grad():
        objective.log_scale += 0.5  # as a step upwards would
    objective.after_update()
    assert objective.log_scale.exp().item() == pytest.approx(contrastive.MAX_SCALE)
    for features, falls in ((matched, False), (crossed, True)):
        optimizer.zero_grad()
        objective.compare(features, find_pairs(table, MODALITIES))[0].backward()
        optimizer.step()
        objective.after_update()
        scale = objective.log_scale.item()
        assert (scale < math.log(contrastive.MAX_SCALE) - 0.1) is falls and math.isfinite(scale)


@pytest.mark.parametrize("experts", [False, True])
def test_untouched_parameters_get_no_gradient_and_touched_ones_do(experts):
    model, objective = make("masked", {"experts": experts})
    batch = make_batch([objective.arrange(objective.config, make_sample(text=9), seeded())])
    score(model, objective, batch)[0].backward()
    assert model.embedders["text"].weight.grad.abs().sum() > 0
    assert model.embedders["image"].project.weight.grad is None
    if experts:
        experts = model.backbone.blocks[0].feed_forward
        assert experts["text"].project_in.weight.grad.abs().sum() > 0
        assert experts["image"].project_in.weight.grad.abs().sum() == 0


def test_filler_changes_nothing():
    model, objective = make("masked")
    examples, losses = [objective.arrange(objective.config, make_sample(text=9, image=6), seeded())], []
    for round_to in (1, 64):
        batch = make_batch(examples, round_to=round_to)
        assert len(batch.tokens) % round_to == 0
        losses.append(score(model, objective, batch)[0])
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("width, num_heads", [(128, 2), (1024, 16)])
def test_the_start_is_stable_at_any_width(width, num_heads):
    model, objective = make("causal", {"width": width, "depth": 6, "num_heads": num_heads})
    batch = make_batch([objective.arrange(objective.config, make_sample(text=30, image=20, audio=10))])
    output = model(batch)
    assert 0.5 < output.tokens.content.std() < 2 and len(batch.tokens) == 60
    loss, figures = objective.loss(output, batch.tasks["task"])
    assert 5 < figures["text"] < 7 and 0.5 < figures["image"] < 2 and 0.5 < figures["audio"] < 2
    loss.backward()
    first, last = (model.backbone.blocks[i].attention.project_in.weight.grad.norm() for i in (0, -1))
    assert 0.02 < first / last < 50


def test_a_piece_of_two_sequences_is_refused():
    two = join([make_sequence(torch.arange(3), torch.zeros(3, 3)), make_sequence(torch.arange(2), torch.zeros(2, 3))])
    with pytest.raises(ValueError, match="one sequence"):
        collate({"task": [(0, Example([two], [None]))]}, MODALITIES, {"task": {}})


@pytest.mark.parametrize("name", ["masked", "causal"])
def test_predictors_are_built_for_what_the_task_reads_only(name):
    """The modalities that no target comes from cost no parameters."""
    cls, model = config.plugin_class(OBJECTIVES, name), make_model()
    assert list(cls(cls.Config(), model, ["audio"]).predictors) == ["audio"]


def two_views(objective, group=0, **lengths):
    first, second = make_sample(group, **lengths), make_sample(group, **lengths)
    return objective.arrange(objective.config, Sample(first.tokens, group, views=(second.tokens,)), seeded(group))


def test_views_of_one_modality_are_nt_xent():
    """Against the formula of SimCLR over all 2 N views, in float64; equal groups are left out."""
    model, objective = make("contrastive", views=2)
    examples = [two_views(objective, group, image=4) for group in (0, 1, 2, 1)]
    table = make_batch(examples).tasks["task"].table
    features = F.normalize(torch.randn(8, 16, generator=seeded()).double(), dim=-1)
    loss, figures = objective.double().compare(features, find_pairs(table, MODALITIES))
    samples, groups, scale, total = table.sample.tolist(), table.group.tolist(), objective.log_scale.exp(), 0.0
    assert samples == [0, 0, 1, 1, 2, 2, 3, 3] and named(figures) == {"image_image_accuracy"}
    for i in range(8):
        [own] = [j for j in range(8) if samples[j] == samples[i] and j != i]
        others = [j for j in range(8) if groups[j] != groups[i]]
        logits = scale * features[[own, *others]] @ features[i]
        total += (torch.logsumexp(logits, 0) - logits[0]) / 8
    assert float(loss.detach()) == pytest.approx(float(total.detach()), abs=1e-9)


def test_views_of_two_modalities_meet_within_and_across():
    """A view finds its own sample's of the other modality, in the same view; its other view is left out there."""
    _, objective = make("contrastive", views=2, pairs={"text_text": 0.5})
    examples = [two_views(objective, number, text=3, image=4) for number in range(3)]
    table = make_batch(examples).tasks["task"].table
    pairs = find_pairs(table, MODALITIES)
    assert list(pairs) == ["text_text", "text_image", "image_image"]
    across, within = pairs["text_image"], pairs["image_image"]
    assert [columns.tolist() for columns in across.columns] == [[0, 1, 2, 3, 4, 5]] * 2
    assert [columns.tolist() for columns in within.columns] == [[1, 0, 3, 2, 5, 4]] * 2
    assert all(torch.equal(pair.groups[0], pair.groups[1]) for pair in pairs.values())
    assert across.groups[0].tolist() == [0, 0, 1, 1, 2, 2]
    features = F.normalize(torch.randn(12, 16, generator=seeded()).double(), dim=-1)
    each = [float(objective.double().compare(features, {name: pair})[0].detach()) for name, pair in pairs.items()]
    loss = float(objective.compare(features, pairs)[0].detach())
    assert loss == pytest.approx((0.5 * each[0] + each[1] + each[2]) / 2.5, abs=1e-9)


def test_left_out_tokens_make_views_of_a_text_differ():
    settings = contrastive.Config(views=2, drop_ratio={"text": 0.25})
    text = make_sample(text=20, image=6).tokens
    example = contrastive.Objective.arrange(settings, Sample(text, views=(text,)), seeded())
    assert [len(piece) for piece in example.inputs] == [15, 6, 15, 6]
    first, second = example.inputs[0], example.inputs[2]
    assert not torch.equal(first.position, second.position) and (first.position[1:, 0] > first.position[:-1, 0]).all()


@pytest.mark.parametrize("strength", [0.0, 5.0])
def test_hard_negatives_weigh_by_their_cosine_and_one_in_mean(strength):
    model, objective = make("contrastive", hard_negatives=strength)
    groups = [0, 1, 1, 2, 3]
    features, table, loss, _ = compare(model, objective, [make_sample(g, text=3, image=4) for g in groups])
    [pair] = find_pairs(table, MODALITIES).values()
    left, right = features[pair.rows[0]].double(), features[pair.rows[1]].double()
    cosines, scale, total = (left @ right.T).detach(), objective.log_scale.double().exp().item(), 0.0
    for side in (cosines, cosines.T):
        for i in range(5):
            negatives = [j for j in range(5) if groups[j] != groups[i]]
            weights = torch.tensor([math.exp(strength * side[i, j]) for j in negatives])
            weights = weights / weights.mean()
            below = sum(w * math.exp(scale * side[i, j]) for w, j in zip(weights.tolist(), negatives))
            own = math.exp(scale * side[i, i])
            total -= math.log(own / (own + below)) / 10
    assert loss.item() == pytest.approx(total, rel=1e-5)
