"""Other people's loaders behind `turns`, for loader.py: run by an interpreter that has them, imports nothing of ours.

python benchmarks/loader_peers.py openclip|energon|webdataset FOLDER WORKERS
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path

BATCH = 64
SIDE = 224
SHUFFLE = 1000  # samples, as OpenCLIP's buffer has at its start


def turns(batches, ahead: int, samples=lambda batch: BATCH) -> None:
    """Draw batches for each number of seconds that stdin names; print how many samples came and how long that took.

    ahead: how many batches may lie ready from before the turn: so many are drawn first and not counted.
    """
    for _ in range(ahead + 2):
        next(batches)
    print("ready", flush=True)
    for line in sys.stdin:
        for _ in range(ahead):
            next(batches)
        count, drawn, start, least = 0, 0, time.perf_counter(), float(line)
        while drawn < 4 or time.perf_counter() - start < least:
            count, drawn = count + samples(next(batches)), drawn + 1
        print(count, time.perf_counter() - start, flush=True)


def shards(folder: str) -> list[str]:
    return sorted(map(str, Path(folder).glob("*.tar")))


def transform():
    """OpenCLIP's own transform of training: a random crop of at least 0.9, bicubic, floats, normalized."""
    import open_clip

    return open_clip.image_transform(SIDE, is_train=True)


def tokenize():
    import open_clip

    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    return lambda text: tokenizer(text)[0]


def openclip(folder: str, workers: int):
    import open_clip
    from open_clip_train.data import get_wds_dataset
    from open_clip_train.params import parse_args

    urls = f"{folder}/{{0..{len(shards(folder)) - 1}}}.tar"
    given = ["--train-data", urls, "--train-num-samples", str(10**7), "--dataset-resampled"]
    args = parse_args([*given, "--batch-size", str(BATCH), "--workers", str(workers)])
    args.world_size, args.rank = 1, 0
    data = get_wds_dataset(args, transform(), is_train=True, tokenizer=open_clip.get_tokenizer("ViT-B-32"))
    return iter(data.dataloader)


def webdataset(folder: str, workers: int):
    import webdataset as wds

    text = tokenize()
    data = wds.DataPipeline(
        wds.ResampledShards(shards(folder)),
        wds.tarfile_to_samples(),
        wds.shuffle(SHUFFLE),
        wds.decode("pilrgb"),
        wds.to_tuple("jpg", "txt"),
        wds.map_tuple(transform(), text),
        wds.batched(BATCH),
    )
    return iter(wds.WebLoader(data, batch_size=None, num_workers=workers))


def energon(folder: str, workers: int):
    import subprocess

    import torch
    from megatron import energon as e

    prepared = Path(folder) / ".nv-meta"
    if not prepared.exists():
        fields = '{"image": "jpg", "caption": "txt"}'
        how = ["--split-ratio", "1,0,0", "--sample-type", "CaptioningSample", "--field-map", fields]
        command = [str(Path(sys.executable).parent / "energon"), "prepare", "--non-interactive", *how, folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    picture, text = transform(), tokenize()

    class Encoder(e.DefaultTaskEncoder):
        decoder = e.SampleDecoder(image_decode="pilrgb")

        @e.stateless
        def encode_sample(self, sample):
            return {"image": picture(sample.image), "text": text(sample.caption)}

        def batch(self, samples):
            return {name: torch.stack([sample[name] for sample in samples]) for name in ("image", "text")}

    data = e.get_train_dataset(
        folder,
        worker_config=e.WorkerConfig(rank=0, world_size=1, num_workers=workers),
        batch_size=BATCH,
        shuffle_buffer_size=SHUFFLE,
        max_samples_per_sequence=None,
        task_encoder=Encoder(),
    )
    return iter(e.get_loader(data))


if __name__ == "__main__":
    name, folder, workers = sys.argv[1:4]
    sys.argv = sys.argv[:1]
    stream = {"openclip": openclip, "webdataset": webdataset, "energon": energon}[name](folder, int(workers))
    turns(itertools.chain(stream), 2 * int(workers))
