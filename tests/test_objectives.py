import itertools

import pytest
import torch
import torch.nn.functional as F

from multimodal_fm.batch import Example, Sample, collate, count_targets
from multimodal_fm.config import build
from multimodal_fm.model import Model
from multimodal_fm.objectives import causal, contrastive, masked
from multimodal_fm.tokens import join, sequence_of

KINDS = ["text", "image", "audio"]


def part(modality: str, n: int):
    position = torch.zeros(n, 3)
    position[:, 0] = torch.arange(n)
    content = {
        "text": lambda: torch.randint(2, 300, (n,)),
        "image": lambda: torch.randint(0, 255, (n, 192), dtype=torch.uint8),
        "audio": lambda: torch.randn(n, 256),
    }[modality]()
    return sequence_of(content, position, KINDS.index(modality))


def item(group=0, **lengths):
    return Sample({modality: part(modality, n) for modality, n in lengths.items()}, group)


def model(tasks, **changes) -> Model:
    torch.manual_seed(0)
    for task in tasks.values():
        task |= {"modalities": KINDS, "batch_size": 2, "sources": {"all": 1}}
    return Model(
        build(
            {
                "sources": {"all": {"shards": "none"}},
                "tasks": tasks,
                "tokenizers": {
                    "text": {"vocab_size": 300},
                    "image": {"patch": 8},
                    "audio": {"patch_frames": 8, "n_mels": 32, "patch_mels": 32},
                },
                "model": {"width": 48, "depth": 2, "heads": 2},
                "embedding": 16,
                **changes,
            }
        )
    )


def batch_of(name, arranged, **more):
    return collate({name: list(enumerate(arranged))}, KINDS, {name: count_targets(arranged, KINDS)}, **more)


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("modality", KINDS)
def test_replace_hides_the_share_it_says(modality):
    config = masked.Config(share=0.4)
    one = item(**{modality: 100})
    made = masked.arrange(config, one, draw())
    assert len(made.targets[0]) == 40 and len(made.seen[0]) == 100
    rows = made.at[0]
    assert torch.equal(made.targets[0].content, one.parts[modality].content[rows])
    covered = made.hidden[0].sum()
    assert 20 < covered <= 40 and made.hidden[0][rows].sum() == covered
    changed = (made.seen[0].content != one.parts[modality].content).flatten(1 if made.seen[0].content.ndim > 1 else 0)
    changed = changed.any(1) if changed.ndim > 1 else changed
    assert set(changed.nonzero()[:, 0].tolist()) <= set(rows.tolist()), "only targets tokens are replaced"
    again, other = masked.arrange(config, one, draw()), masked.arrange(config, one, draw(1))
    assert torch.equal(again.at[0], rows) and not torch.equal(other.at[0], rows)


def test_drop_keeps_hidden_tokens_out():
    one = item(image=64)
    made = masked.arrange(masked.Config(hide="drop", share={"image": 0.75}), one, draw())
    assert len(made.seen[0]) == 16 and len(made.targets[0]) == 48 and (made.at[0] == -1).all()
    places = {tuple(p) for t in (made.seen[0], made.targets[0]) for p in t.position.tolist()}
    assert len(places) == 64


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.99])
def test_at_least_one_token_stays(n, share):
    for hide in ("replace", "drop"):
        made = masked.arrange(masked.Config(hide=hide, share=share), item(text=n), draw())
        targets = len(made.targets[0])
        assert targets == (0 if share == 0 or n == 1 else max(1, min(round(share * n), n - 1)))


def test_causal_answers_from_the_row_before():
    made = causal.arrange(causal.Config(), item(text=6, image=4))
    assert made.seen[0].order.tolist() == list(range(6)) and made.at[0].tolist() == [0, 1, 2, 3, 4]
    assert made.at[1].tolist() == [6, 7, 8] and made.seen[1].sequence.tolist() == [1] * 4


def test_captioning_reads_the_picture_and_guesses_the_text():
    made = causal.arrange(causal.Config(fuse=True, prefix=["image"]), item(image=4, text=3))
    assert made.seen[0].order.tolist() == [0] * 4 and made.seen[1].order.tolist() == [1, 2, 3]
    assert len(made.targets[0]) == 0 and made.at[1].tolist() == [3, 4, 5]
    assert made.seen[1].position[0, 0] > made.seen[0].position[:, 0].max()


def test_the_model_cannot_see_what_it_guesses():
    """Changing a hidden token's content changes no prediction; changing a seen one does."""
    for settings in ({"objective": "masked", "keep": 0.0, "swap": 0.0, "share": 0.5},
                     {"objective": "masked", "hide": "drop", "share": 0.5,
                      "decoder": {"width": 32, "depth": 1, "heads": 2}}):  # fmt: skip
        net = model({"it": settings})
        config = net.objectives["it"].config
        one = item(text=12)
        made = masked.arrange(config, one, draw())
        gone = made.targets[0].position[:, 0].long().tolist()

        def answers(content, net=net, config=config, one=one):
            changed = Sample({"text": one.parts["text"].replace(content=content)})
            batch = batch_of("it", [masked.arrange(config, changed, draw())])
            output, targets = net(batch), batch.tasks["it"]
            if config.hide == "drop":
                return net.objectives["it"]._decode(output, targets)["text"]
            return output.tokens.content.index_select(0, targets.at["text"])

        base = answers(one.parts["text"].content)
        hidden = one.parts["text"].content.clone()
        hidden[gone[0]] = (hidden[gone[0]] + 1) % 300
        torch.testing.assert_close(answers(hidden), base, rtol=0, atol=0)
        seen = one.parts["text"].content.clone()
        rest = next(i for i in range(12) if i not in gone)
        seen[rest] = (seen[rest] + 1) % 300
        assert (answers(seen) - base).abs().max() > 1e-4


def test_a_causal_model_does_not_see_ahead():
    net = model({"it": {"objective": "causal"}})
    one = item(text=10)

    def outputs(content):
        batch = batch_of(
            "it", [causal.arrange(causal.Config(), Sample({"text": one.parts["text"].replace(content=content)}))]
        )
        return net(batch).tokens.content

    base, content = outputs(one.parts["text"].content), one.parts["text"].content.clone()
    content[6] = (content[6] + 1) % 300
    moved = (outputs(content) - base).abs().amax(1)
    assert (moved[:6] == 0).all() and (moved[6:] > 1e-6).all()


def test_a_batch_equals_its_items_alone():
    """Every sample's loss in a batch of all sorts is the sample's own: nothing leaks between sequences."""
    net = model({"it": {"objective": "causal"}})
    made = [
        causal.arrange(causal.Config(), item(text=5, image=4)),
        causal.arrange(causal.Config(), item(audio=7, text=9)),
        causal.arrange(causal.Config(fuse=True), item(image=4, text=3)),
    ]
    together = batch_of("it", made, round_to=16)
    scores = {k: net.objectives["it"].score(net(together), together.tasks["it"], k) for k in KINDS}
    alone = {modality: [] for modality in KINDS}
    for one in made:
        batch = batch_of("it", [one])
        for modality in batch.tasks["it"].tokens:
            alone[modality].append(net.objectives["it"].score(net(batch), batch.tasks["it"], modality))
    for modality in KINDS:
        torch.testing.assert_close(scores[modality], torch.cat(alone[modality]), rtol=0, atol=1e-5)


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


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 0.4, 2.0)])
def test_info_nce_is_the_formula_and_leaves_equal_groups_out(weights):
    pairs = dict(zip(("text_image", "text_audio", "image_audio"), weights))
    net = model({"it": {"objective": "contrastive", "pairs": pairs}})
    samples = [
        item(1, text=3, image=4),
        item(2, text=4, audio=5),
        item(1, text=3, image=4, audio=2),
        item(3, text=2, image=5),
        item(2, audio=3),
        item(4, image=2, audio=4),
    ]
    batch = batch_of("it", [contrastive.arrange(contrastive.Config(), i) for i in samples])
    targets, objective = batch.tasks["it"], net.objectives["it"]
    features = objective.features(net(batch), targets)
    assert torch.allclose(features.norm(dim=-1), torch.ones(len(features)))
    loss, report = objective.compare(features, targets)
    rows = list(zip(targets.modality.tolist(), targets.sample.tolist(), targets.group.tolist()))
    torch.testing.assert_close(loss, reference_info_nce(features, rows, objective.log_scale.exp(), weights))
    assert {"text_image_accuracy", "text_audio_accuracy", "image_audio_accuracy"} == report.keys()


def test_a_pair_that_there_is_not_is_named():
    with pytest.raises(ValueError, match="audio_text; there are text_image, text_audio, image_audio"):
        model({"it": {"objective": "contrastive", "pairs": {"audio_text": 2}}})


def test_the_sigmoid_loss_is_the_formula():
    net = model({"it": {"objective": "contrastive", "loss": "sigmoid"}})
    samples = [item(g, text=3, image=4) for g in (1, 2, 1)]
    batch = batch_of("it", [contrastive.arrange(contrastive.Config(), i) for i in samples])
    targets, objective = batch.tasks["it"], net.objectives["it"]
    features = objective.features(net(batch), targets)
    loss, _ = objective.compare(features, targets)
    total = 0.0
    text, image = features[targets.modality == 0], features[targets.modality == 1]
    for i in range(3):
        for j in range(3):
            if i == j or samples[i].group != samples[j].group:
                sign = 1 if i == j else -1
                total += -F.logsigmoid(sign * (objective.log_scale.exp() * (text[i] @ image[j]) + objective.bias))
    torch.testing.assert_close(loss, total / 3)


def test_items_that_lack_a_part_give_fewer_pairs():
    net = model({"it": {"objective": "contrastive"}})
    for samples in ([item(1, text=3)], [item(1, text=3), item(2, text=2)], [item(1, text=2), item(2, image=2)]):
        batch = batch_of("it", [contrastive.arrange(contrastive.Config(), i) for i in samples])
        loss, report = net.objectives["it"].compare(
            net.objectives["it"].features(net(batch), batch.tasks["it"]), batch.tasks["it"]
        )
        assert float(loss.detach()) == 0.0 and not report
        loss.backward()


@pytest.mark.parametrize("experts", [False, True])
def test_untouched_parameters_get_no_gradient_and_touched_ones_do(experts):
    net = model({"it": {"objective": "masked"}}, model={"width": 48, "depth": 2, "heads": 2, "experts": experts})
    batch = batch_of("it", [masked.arrange(masked.Config(), item(text=9), draw())])
    net.objectives["it"].loss(net(batch), batch.tasks["it"])[0].backward()
    assert net.embedders["text"].weight.grad.abs().sum() > 0
    assert net.embedders["image"].project.weight.grad is None
    if experts:
        text, image, _ = net.backbone.blocks[0].feed_forward
        assert text.project_in.weight.grad.abs().sum() > 0 and image.project_in.weight.grad.abs().sum() == 0


def test_filler_changes_nothing():
    net = model({"it": {"objective": "masked"}})
    made = [masked.arrange(masked.Config(), item(text=9, image=6), draw())]
    losses = []
    for round_to in (1, 64):
        batch = batch_of("it", made, round_to=round_to)
        assert len(batch.tokens) % round_to == 0
        losses.append(net.objectives["it"].loss(net(batch), batch.tasks["it"])[0])
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("width, heads", [(128, 2), (1024, 16)])
def test_the_start_is_stable_at_any_width(width, heads):
    net = model({"it": {"objective": "causal"}}, model={"width": width, "depth": 6, "heads": heads})
    batch = batch_of("it", [causal.arrange(causal.Config(), item(text=30, image=20, audio=10))])
    tokens = batch.tokens
    output = net(batch)
    assert 0.5 < output.tokens.content.std() < 2
    loss, report = net.objectives["it"].loss(output, batch.tasks["it"])
    assert 5 < report["text"] < 7 and 0.5 < report["image"] < 2 and 0.5 < report["audio"] < 2
    loss.backward()
    first, last = (net.backbone.blocks[i].attention.project_in.weight.grad.norm() for i in (0, -1))
    assert 0.02 < first / last < 50 and len(tokens) == 60


def test_a_piece_of_two_sequences_is_refused():
    two = join([sequence_of(torch.arange(3), torch.zeros(3, 3)), sequence_of(torch.arange(2), torch.zeros(2, 3))])
    with pytest.raises(ValueError, match="one sequence"):
        collate({"a": [(0, Example([two], [None]))]}, KINDS, {"a": {}})
