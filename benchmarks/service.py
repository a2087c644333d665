"""How long does `mmfm serve` take to answer? A number of clients ask for texts, each after its last answer.

The service is a process of its own over the index that `benchmarks/search.py --work FOLDER` has left there, with a
model of random weights (width 256, 6 blocks, a text of 8 words) whose vectors have as many dimensions as that index.
The clients are processes on the same machine.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
TEXT = "red green blue square circle over a the field thunder rain picture sound of with two three"
WORDS = TEXT.split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", required=True, help="the folder of benchmarks/search.py")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--out", default=str(HERE / "results"))
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    mine, other = context.Pipe()
    server = context.Process(target=serve, args=(other, given.work), daemon=True)
    server.start()
    try:
        port, pid, items = mine.recv()
        drive(context, port, 2, 3.0)  # warm
        alone = drive(context, port, 1, given.seconds / 4)
        many = drive(context, port, given.clients, given.seconds)
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        gib = {key: int(status[key].split()[0]) / 2**20 for key in ("VmHWM", "RssAnon")}
        searches = metrics(port)
    finally:
        server.kill()
        server.join()
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    about = {"items": items, "clients": given.clients, "cores": cores, "load": load}
    data = {"about": about, "one": alone, "many": many, "memory_gib": gib, "batches": searches}
    write(Path(given.out), data)


def serve(connection, work: str) -> None:
    """The service, until it is killed."""
    import torch

    from multimodal_fm.config import build
    from multimodal_fm.model import Model, ModelConfig
    from multimodal_fm.search.collection import model_hash
    from multimodal_fm.search.index import LocalIndex
    from multimodal_fm.serve.limits import Limits
    from multimodal_fm.serve.server import Settings, create_app
    from multimodal_fm.serve.start import listen, make_server
    from multimodal_fm.tokenizers import image, text

    index = LocalIndex(Path(work) / "ours")
    torch.manual_seed(0)
    folder = tempfile.mkdtemp()
    words = text.Tokenizer(text.Config(vocab_size=400, max_tokens=64))
    words = words.fit([TEXT], Path(folder) / "tokenizer")
    config = build(ModelConfig, {"backbone": {"width": 256, "depth": 6, "num_heads": 4},
                                 "heads": {"retrieval": {"embed_dim": index.dim}}})  # fmt: skip
    config.tokenizers = {"text": words, "image": image.Tokenizer(image.Config())}
    limits, model = Limits(rate=1e6, burst=10**6), Model(config).eval()
    index.model = model_hash(model)  # its vectors are made up; they count as this model's
    app = create_app(index, model, Settings(limits, map_file=Path(folder) / "map.json"))
    with listen("127.0.0.1", 0) as listening:
        connection.send((listening.getsockname()[1], os.getpid(), len(index)))
        make_server(app, limits).run(sockets=[listening])


def drive(context, port: int, clients: int, seconds: float) -> dict:
    """Milliseconds of answers, and answers a second."""
    with context.Pool(clients) as pool:
        taken = pool.starmap(ask, [(port, seconds, number) for number in range(clients)], chunksize=1)
    flat = sorted(one for own in taken for one in own)
    return {"answers": len(flat), "answers_per_second": len(flat) / seconds, "p50_ms": statistics.median(flat),
            "p99_ms": flat[min(len(flat) - 1, int(0.99 * len(flat)))]}  # fmt: skip


def ask(port: int, seconds: float, seed: int) -> list[float]:
    """One client: milliseconds of each of its answers."""
    draw, taken = random.Random(seed), []
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        body = json.dumps({"parts": [{"text": " ".join(draw.choices(WORDS, k=8))}], "top": 10})
        began = time.perf_counter()
        connection.request("POST", "/search", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        found = json.loads(answer.read())
        assert answer.status == 200 and found["results"], found
        taken.append(1000 * (time.perf_counter() - began))
    return taken


def metrics(port: int) -> dict[str, float]:
    """What the service has counted of its batches: sums and counts of Prometheus."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs
            if name.endswith(("_sum", "_count")) and "batch" in name}  # fmt: skip


def write(out: Path, data: dict) -> None:
    from common import markdown

    rows = [["clients", "answers/s", "p50 ms", "p99 ms"]]
    for clients, one in ((1, data["one"]), (data["about"]["clients"], data["many"])):
        rows.append([str(clients), f"{one['answers_per_second']:.1f}", f"{one['p50_ms']:.0f}", f"{one['p99_ms']:.0f}"])
    about = data["about"]
    text = (f"# The service: {about['items']:,} items, {about['cores']} cores, load {about['load']:.0f}\n\n{__doc__}\n"
            f"{markdown(rows)}\n\nMemory of its process: {data['memory_gib']['VmHWM']:.2f} GiB at the most, mapped "
            f"files too; {data['memory_gib']['RssAnon']:.2f} GiB of its own.\n")  # fmt: skip
    (out / "service.json").write_text(json.dumps(data, indent=1) + "\n")
    (out / "service.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
