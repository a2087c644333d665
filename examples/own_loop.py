"""Train with a loop of your own over the batches of `multimodal_fm.stream`. Some seconds.

The stream gives what a run of the same configuration would read at each step. Model and objectives are plain modules,
so that the optimizer, the schedule, the precision and what is frozen are yours.

    python examples/own_loop.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import torch
import toy_corpus

import multimodal_fm as mmfm
from multimodal_fm import objectives
from multimodal_fm.batch import find_pairs
from multimodal_fm.model import Model
from multimodal_fm.train import config


def main(folder: Path) -> None:
    toy_corpus.write(folder, "train-0.tar", 128)
    overrides = [f"sources.squares.shards={folder}/train-*.tar", f"run_dir={folder}/run"]
    run = config.load(Path(__file__).with_name("squares.yaml"), overrides)

    torch.manual_seed(0)
    model = Model(run.model)
    heads = objectives.build(  # named task/objective
        {name: task.objectives for name, task in run.tasks.items()},
        {name: task.modalities for name, task in run.tasks.items()},
        model,
    )
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=3e-3)

    for step, microbatches in enumerate(mmfm.stream(run)):
        (batch,) = microbatches  # `microbatches: 1`
        output = model(batch)  # one call reads the sequences of all tasks
        words, _ = heads["words/masked"].loss(output, batch.tasks["words"])
        pairs = batch.tasks["pairs"]  # the contrastive objective compares the sequences of a whole step
        features = heads["pairs/contrastive"].features(output, pairs)
        together, figures = heads["pairs/contrastive"].compare(features, find_pairs(pairs.table, model.modalities))
        optimizer.zero_grad()
        (0.2 * words + together).backward()
        optimizer.step()
        if step % 10 == 0:
            accuracy = figures["text_image_accuracy"]
            print(f"step {step + 1}: words {words:.2f}, pairs {together:.2f}, text to image {accuracy:.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
