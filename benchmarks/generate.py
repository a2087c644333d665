"""Is decoding with a cache right, and how much faster is it? Greedy, against reading all tokens anew at each one.

python benchmarks/generate.py --threads 2                    # a CPU: 512 tokens of a model of configs/base.yaml's size
python benchmarks/generate.py --tokens 256 --width 512 --depth 8 --batch 8
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from common import device, seconds

from multimodal_fm import generate
from multimodal_fm.backbone import Config as BackboneConfig
from multimodal_fm.batch import Sample, count_targets
from multimodal_fm.decoding.settings import Settings
from multimodal_fm.model import Model, ModelConfig, autocast
from multimodal_fm.objectives import causal
from multimodal_fm.tokenizers import text
from multimodal_fm.tokens import make_sequence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 512), ("width", 256), ("depth", 6), ("heads", 4), ("batch", 1), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, objective = build(given)
    prompts = [[0, *range(2, 3 + i)] for i in range(given.batch)]  # of different lengths
    cached(model, objective, prompts, 8)  # warms up
    quick, made = timed(cached, model, objective, prompts, given.tokens)
    slow, right = timed(uncached, model, objective, prompts, given.tokens)
    about = {**vars(given), "device": str(device()), "torch": torch.__version__, "equal": made == right}
    rates = {"cached": given.tokens * given.batch / quick, "uncached": given.tokens * given.batch / slow}
    print(json.dumps({**about, "tokens_per_second": rates, "times_faster": slow / quick}))
    if made != right:
        raise SystemExit("cached and uncached differ")


def timed(call, *given) -> tuple[float, list]:
    """The seconds that a call takes, and what it returns."""
    results = []
    took = seconds(lambda: results.append(call(*given)))
    return took, results[0]


def build(given) -> tuple[Model, causal.Objective]:
    """A random model of text with a vocabulary of 4096, and an objective that predicts it."""
    torch.manual_seed(0)
    tokenizer = text.Tokenizer(text.Config(vocab_size=4096, max_tokens=given.tokens + given.batch + 2))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokenizer.fit([{"txt": b"a red square"}], Path(folder) / "text")
        known = text.load_merges(tokenizer.file).n_vocab + 2  # it is kept in memory
    backbone = BackboneConfig(width=given.width, depth=given.depth, num_heads=given.heads)
    model = Model(ModelConfig(tokenizers={"text": tokenizer}, backbone=backbone)).to(device()).eval()
    objective = causal.Objective(causal.Config(), model, ["text"]).to(device()).eval()
    torch.nn.init.normal_(objective.predictors["text"].logits.weight, std=0.3)
    torch.nn.init.constant_(objective.predictors["text"].logits.bias[known:], -torch.inf)  # ids that spell nothing
    return model, objective


def cached(model: Model, objective, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    fit = generate.Fit("benchmark", objective, parallel=False)
    given = [generate.Prompt({}, ids) for ids in prompts]
    settings = Settings(temperature=0, max_new_tokens=tokens, min_new_tokens=tokens)
    return [own[0].ids for own in generate.write_prompts(model, fit, "text", given, 1, settings)]


@torch.no_grad()
def uncached(model: Model, objective, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    made = [list(ids) for ids in prompts]
    positions = model.tokenizers["text"].generation().positions
    for _ in range(tokens):
        sequences = [make_sequence(torch.tensor(ids), positions[: len(ids)]) for ids in made]
        examples = [objective.arrange(objective.config, Sample({"text": sequence})) for sequence in sequences]
        batch = model.collate({"b": list(enumerate(examples))}, {"b": count_targets(examples, ["text"])})
        with autocast(model.device, model.device.type == "cuda"):
            output = model(batch)
            last = output.first_rows() + torch.tensor([len(ids) - 1 for ids in made], device=model.device)
            logits = objective.predictors["text"].logits(output.tokens.content.index_select(0, last)).float()
        logits[:, :2] = -torch.inf
        for ids, token in zip(made, logits.argmax(1).tolist(), strict=True):
            ids.append(token)
    return made


if __name__ == "__main__":
    main()
