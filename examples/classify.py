"""Put a linear classifier on `model.features` and train both. Some seconds.

    python examples/classify.py RUN SHARDS

RUN: a run folder, as examples/pretrain_and_search.py leaves it in FOLDER/run. SHARDS: images with a JSON field `color`,
as FOLDER/train-0.tar. Without them it makes its own.
"""

import io
import json
import sys
import tempfile
from pathlib import Path

import pretrain_and_search
import torch
from PIL import Image

import multimodal_fm as mmfm


def main(run: str, shards: str) -> None:
    rows = list(mmfm.samples(shards))  # dicts of bytes: __key__, jpg, txt, json, ...
    images = [Image.open(io.BytesIO(row["jpg"])) for row in rows]
    colors = [json.loads(row["json"])["color"] for row in rows]
    names = sorted(set(colors))
    labels = torch.tensor([names.index(color) for color in colors])

    model = mmfm.load(run)
    classifier = torch.nn.Linear(model.width, len(names))
    optimizer = torch.optim.AdamW(
        [{"params": model.parameters(), "lr": 1e-4}, {"params": classifier.parameters(), "lr": 1e-2}]
    )
    held_out = torch.arange(len(rows)) % 4 == 0
    train, test = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
    for epoch in range(5):
        for part in train[torch.randperm(len(train))].split(16):
            features = model.features(image=[images[number] for number in part])["image"]  # (B, D), with gradients
            loss = torch.nn.functional.cross_entropy(classifier(features), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            scores = classifier(model.features(image=[images[number] for number in test])["image"])
        print(f"epoch {epoch + 1}: accuracy {(scores.argmax(1) == labels[test]).float().mean():.2f}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        folder = tempfile.mkdtemp()
        pretrain_and_search.main(Path(folder))
        sys.argv[1:] = [f"{folder}/run", f"{folder}/train-0.tar"]
    main(*sys.argv[1:3])
