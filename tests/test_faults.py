"""The faults that a stream must survive: those of the shards, the index and the order that no other file tests.

Each is numbered as in the list of faults. Where each one is tested, by test or by the cases of `malformed.py`, which
go through the scanner and the tokenizers in test_malformed.py and through the training stream here:

 1 truncated inside a member        malformed: cut-inside-*; test_shards: test_a_cut_shard_gives_what_is_whole; here
 2 truncated between members        malformed: cut-between-*, no-end; here: test_no_cut_mixes_samples
 3 bit flip in a header             malformed: flip-*, size-*; test_shards: test_a_damaged_header_is_not_the_end
 4 bit flip in a text               test_a_flipped_bit_in_a_text_is_never_delivered
 5 300 random bit flips             test_300_flipped_bits, test_300_flipped_bits_of_an_index, test_an_index_*
 6 no bytes                         malformed: shard-zero-bytes, shard-short, only-an-end
 7 an error page                    malformed: shard-html
 8 a missing shard                  test_a_missing_shard_ends_the_run_before_it_begins; malformed: missing*;
                                    test_storage: test_a_shard_that_the_server_does_not_have_is_named
 9 replaced after indexing          test_a_shard_that_was_replaced_is_named_with_the_mend
10 renamed or reordered             test_renamed_shards_are_other_data; test_train: test_resume_refuses_*
11 a key twice, adjacent            malformed: key-twice-adjacent
12 a key twice, apart               malformed: key-again; test_shards: test_keys_that_come_again
13 members apart                    malformed: sorted-by-ending
14 a part twice                     malformed: part-twice*
15 the same keys in two shards      test_no_cut_mixes_samples
16 names that lead elsewhere        malformed: name-*, pax-*; test_shards: test_names_that_no_sample_has
17 pickles                          malformed: the members that are never opened; here: through the stream
18 pipes and shells                 malformed: file-*, pipe-*, name-shell; test_storage: test_a_scheme_that_*
19 a modality that is missing           test_a_kind_that_is_missing_learns_nothing; malformed: part-missing
20 to 32 text, pictures, sound      malformed (by their `fault`); test_tokenizers
33 a decoder that ends the program  test_stream: test_a_decoder_that_ends_*, test_a_run_that_was_killed_blames_nobody
34 too much that is bad             test_stream: test_a_source_with_too_much_bad_*, test_much_bad_in_a_part_*
35 permuted captions                `mmfm inspect --verify`
36 more workers than shards         test_more_workers_than_shards
37 an uneven end                    test_every_rank_takes_as_many_steps
38 a rank without samples             test_no_rank_is_without_samples, test_a_rank_whose_samples_are_all_lost_goes_on
39 fewer samples than a step takes    test_a_source_smaller_than_a_step_is_refused
40 weights of zero or next to it    test_weights_of_zero_and_next_to_it
41 another mixture on resume        test_stream: test_a_mixture_changed_on_resume_begins_a_new_phase
42 any number of workers            test_stream: test_workers_change_nothing
43 any prefetching                  test_what_was_read_ahead_does_not_count
44 any number of ranks              test_stream: test_ranks_may_change_between_resumes, test_every_rank_has_its_share_*
45 exactly once an epoch            test_mixture: test_weights_are_exact_*; here: test_every_sample_once_an_epoch
46 second and third resume, edges   test_resumes_around_the_edge_of_an_epoch
47 resume in constant time          test_opening_far_on_reads_no_more
48 what an augmentation hangs on    test_a_view_depends_on_seed_sample_and_epoch_alone
49 a worker that is killed          test_stream: test_a_killed_worker_*, test_an_exception_in_*, test_a_job_*
50 memory and open files            test_memory_and_open_files_stay_flat (slow)
51 to 56 servers and the cache      test_storage

`python tests/test_faults.py FOLDER` reads pickled cases and prints a JSON line each.
"""

import dataclasses
import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import malformed
import numpy as np
import pytest
import test_malformed
import torch
from conftest import dataset_of, samples, tiny
from test_stream import fitted, rows

from multimodal_fm.batch import Example, with_counts
from multimodal_fm.corpus import index, scan, shards, storage, tar
from multimodal_fm.errors import REASONS, UserError
from multimodal_fm.stream import mixture
from multimodal_fm.stream.crash_log import CrashLog
from multimodal_fm.stream.dataset import StepDataset, Task
from multimodal_fm.stream.loader import Loader
from multimodal_fm.stream.mixture import BLOCK, Mixture, Source, apportion
from multimodal_fm.stream.quarantine import refused_row
from multimodal_fm.stream.tasks import build_tasks
from multimodal_fm.train import loop
from multimodal_fm.train.config import build
from multimodal_fm.train.grad_cache import forward_backward
from multimodal_fm.train.train_step import TrainStep

ROW = {"source", "shard", "key", "part", "reason", "detail", "step"}


def source(path, **more) -> shards.Corpus:
    return shards.Corpus(shards.Config(str(path), **more), "all")


def everything(corpus) -> dict[str, dict[str, bytes]]:
    return {corpus.key(i): corpus.raw(i) for i in range(len(corpus))}


def text_config(folder, **changes) -> dict:
    """Plain data of a run over the text of `folder/*.tar`."""
    data = tiny(folder, run_dir=str(folder / "run"), log_samples=True, **changes)
    data["sources"] = {"all": {"shards": f"{folder}/*.tar"}}
    data["tasks"] = {
        "words": {"objectives": {"masked": {}}, "modalities": ["text"], "batch_size": 4, "sources": {"all": 1}}
    }
    return data


def text_steps(folder, batch_size=4, **changes):
    data = text_config(folder)
    data["tasks"]["words"]["batch_size"] = batch_size
    config, corpora = fitted(build(data))
    return StepDataset(build_tasks(config.tasks, corpora), config.model.tokenizers, 0, **changes)


def keys(step) -> list[str]:
    return [name for _, _, name in sorted(step.samples)]


# --- shards and samples ---


def test_a_flipped_bit_in_a_text_is_never_delivered(tmp_path):
    """4. One row `crc` for it each time that it would be read; without the text nothing of the sample is left."""
    shards.write(tmp_path / "a.tar", [{e: d for e, d in sample.items() if e != "json"} for sample in samples(8)])
    whole = source(tmp_path / "a.tar")
    stamp = os.stat(tmp_path / "a.tar")
    offset, _, _ = whole.indexes[0].spans(3)["txt"]
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[offset] ^= 32  # still a letter
    (tmp_path / "a.tar").write_bytes(data)
    os.utime(tmp_path / "a.tar", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    steps = text_steps(tmp_path, batch_size=8)
    step = steps[0]
    assert [(row["key"], row["part"], row["reason"]) for row in step.errors][:1] == [("sample0003", "text", "crc")]
    assert {row["key"] for row in step.errors} == {"sample0003"} and all(row.keys() == ROW for row in step.errors)
    assert "all/sample0003" not in keys(step) and len(keys(step)) == 8


def test_300_flipped_bits(tmp_path):
    """5. Each costs one sample its part, or is where nothing is delivered from; every other byte is as it was."""
    shards.write(tmp_path / "a.tar", samples(12))
    path = tmp_path / "a.tar"
    data, stamp = path.read_bytes(), os.stat(path)
    corpus = source(path)
    whole = everything(corpus)
    spans = [
        (corpus.key(i), e, start, start + n)
        for i in range(12)
        for e, (start, n, _) in corpus.indexes[0].spans(i).items()
    ]
    harmless = 0
    with open(path, "r+b") as file:
        for seed in range(300):
            place = random.Random(seed).randrange(len(data))
            file.seek(place)
            file.write(bytes([data[place] ^ 1 << seed % 8]))
            file.flush()
            os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
            hit = [(key, ending) for key, ending, start, end in spans if start <= place < end]
            found = []
            for i in range(12):
                members, failed = corpus.read(i)
                found += [(corpus.key(i), ending) for ending, error in failed if error.reason == "crc"]
                assert all(whole[corpus.key(i)][e] == members[e] for e in members)
                assert len(members) + len(failed) == len(whole[corpus.key(i)])
            assert found == hit and len(hit) <= 1
            harmless += not hit
            file.seek(place)
            file.write(data[place : place + 1])
            file.flush()
    assert 0 < harmless < 200


def test_300_flipped_bits_of_an_index(tmp_path):
    """5. It is made again, or refused, or a part is not delivered; nothing is delivered under another key."""
    shards.write(tmp_path / "a.tar", samples(12))
    whole = everything(source(tmp_path / "a.tar"))
    file = tmp_path / "a.tar.mmidx"
    data = file.read_bytes()
    for seed in range(300):
        place = random.Random(seed).randrange(len(data))
        file.write_bytes(data[:place] + bytes([data[place] ^ 1 << seed % 8]) + data[place + 1 :])
        try:
            corpus = source(tmp_path / "a.tar")
            found = everything(corpus)
        except UserError:
            file.write_bytes(data)
            continue
        for key, members in found.items():
            assert key in whole and all(whole[key].get(e) == own for e, own in members.items()), (seed, place, key)
        if len(found) == 12 and all(found[key].keys() == whole[key].keys() for key in found):
            assert corpus.samples_with({"txt"}) == range(12)


@pytest.mark.parametrize("change", [-1, -40, 1])
def test_an_index_of_another_length_is_made_again(tmp_path, change):
    """5."""
    shards.write(tmp_path / "a.tar", samples(3))
    whole = everything(source(tmp_path / "a.tar"))
    file = tmp_path / "a.tar.mmidx"
    data = file.read_bytes()
    file.write_bytes(data[:change] if change < 0 else data + b"x")
    assert everything(source(tmp_path / "a.tar")) == whole and file.read_bytes() == data


def test_an_index_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    """5. Whoever looks while it is written finds none."""
    monkeypatch.setenv("MMFM_CACHE", str(tmp_path / "cache"))
    shards.write(tmp_path / "a.tar", samples(3))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="its index cannot be written, .*No space left"):
        source(tmp_path / "a.tar")
    assert not list(tmp_path.rglob("*.tar.mmidx")) and not list(tmp_path.rglob("?" * 32 + ".mmidx"))


def test_a_shard_that_changes_while_it_is_indexed_is_refused(tmp_path, monkeypatch):
    """9."""
    path = tmp_path / "a.tar"
    shards.write(path, samples(3))
    real = index.hash_shard

    def meanwhile(shard, size):
        os.utime(path, (1, 1))
        return real(shard, size)

    monkeypatch.setattr(index, "hash_shard", meanwhile)
    with pytest.raises(UserError, match="a.tar: changes while it is read"):
        index.build(str(path))


def test_a_member_over_the_limit_of_bytes_is_not_read(tmp_path, monkeypatch):
    """32."""
    shards.write(tmp_path / "a.tar", samples(3))
    corpus, asked, real = source(tmp_path / "a.tar", max_bytes=2000), [], storage.read
    corpus.key(0)
    monkeypatch.setattr(storage, "read", lambda path, at, length: asked.append(length) or real(path, at, length))
    members, failed = corpus.read(0)
    assert [(ending, error.reason) for ending, error in failed] == [("flac", "byte-limit")] and "jpg" in members
    assert max(asked) <= 2000
    monkeypatch.setattr(scan, "MAX_MEMBER_BYTES", 2000)  # what an index can say
    made = index.build(str(tmp_path / "a.tar"))
    assert [(r.member, r.reason) for r in made.rejections] == [("flac", "byte-limit")] * 3


def test_a_substitute_takes_the_place_of_what_is_lost(tmp_path):
    """4. The order within the step is that of the places, whichever was read when."""
    made = [{"__key__": f"k{i}", "txt": b"\xff" if i % 2 else b"text"} for i in range(8)]
    shards.write(tmp_path / "a.tar", made)
    steps = text_steps(tmp_path, batch_size=8)
    found = steps._read_task(0, steps.mixtures[0].draws(0, 8), list(range(8)), 0, [], [])
    assert list(found) == list(range(8))


def test_a_missing_shard_ends_the_run_before_it_begins(mmfm, tmp_path, write_config, corpus):
    """8. A list of which one is gone; a pattern that finds fewer than before is other data (10)."""
    here = {"all": {"shards": [f"{corpus}/train-0.tar", f"{tmp_path}/gone-7.tar"]}}
    done = mmfm("pretrain", write_config(sources=here))
    assert done.returncode == 2 and "gone-7.tar" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_shard_that_goes_away_while_it_is_read_is_named(tmp_path):
    """8."""
    shards.write(tmp_path / "a.tar", samples(4))
    corpus = source(tmp_path / "a.tar")
    (tmp_path / "a.tar").unlink()
    storage.reopen_files()
    members, failed = corpus.read(0)
    assert not members and {error.reason for _, error in failed} == {"read"}


@pytest.mark.parametrize("how", ["other bytes", "other size", "shorter"])
def test_a_shard_that_was_replaced_is_named_with_the_mend(tmp_path, how):
    """9."""
    path = tmp_path / "a.tar"
    shards.write(path, samples(8))
    source(path)
    data = path.read_bytes()
    if how == "other bytes":
        path.write_bytes(data[:600] + bytes([data[600] ^ 1]) + data[601:])
        os.utime(path, (1, 1))
    elif how == "other size":
        shards.write(path, samples(9))
    else:
        path.write_bytes(data[:-512])
    with pytest.raises(UserError, match=r"a.tar: is not the file that .* `mmfm inspect --rebuild"):
        source(path)
    index.build(str(path))
    assert len(source(path)) in (8, 9)


def test_the_same_shard_put_there_again_is_the_same(tmp_path):
    """9. A copy has another time, and the same bytes."""
    path = tmp_path / "a.tar"
    shards.write(path, samples(4))
    before = source(path).fingerprint()
    os.utime(path, (1, 1))
    assert source(path).fingerprint() == before


@pytest.mark.parametrize("how", ["renamed", "reordered", "fewer"])
def test_renamed_shards_are_other_data(tmp_path, how):
    """10. The pattern is the same, the config too; --allow-data-change goes on."""
    for i in range(2):
        shards.write(tmp_path / f"a-{i}.tar", samples(8, 8 * i))
    data = text_config(tmp_path, steps=2, save_every=2)
    loop.pretrain(build(data))

    def rename(old, new):
        for ending in ("", ".mmidx"):
            (tmp_path / f"{old}.tar{ending}").rename(tmp_path / f"{new}.tar{ending}")

    if how == "renamed":
        rename("a-1", "a-2")
    elif how == "fewer":
        rename("a-1", "../gone")
    else:
        rename("a-0", "a-2"), rename("a-1", "a-0"), rename("a-2", "a-1")
    config = build({**data, "steps": 4})
    with pytest.raises(UserError, match="the shards of all have changed since.*--allow-data-change"):
        loop.pretrain(config, resume=True)
    assert loop.pretrain(config, resume=True, allow_data_change=True).name == "step-00000004"


def test_no_cut_mixes_samples(tmp_path):
    """1, 2, 15. The same keys in two shards, the first cut anywhere: nobody gets a part from the other one."""
    for name in ("a", "b"):
        made = [{"__key__": f"k{i}", "txt": f"{name}{i} text", "cls": f"{name}{i}"} for i in range(3)]
        shards.write(tmp_path / f"{name}.tar", made)
    data = (tmp_path / "a.tar").read_bytes()
    index.build(str(tmp_path / "b.tar"))
    ends = [start + n for i in range(3) for start, n, _ in index.build(str(tmp_path / "a.tar")).spans(i).values()]
    for cut in sorted({c for block in range(512, len(data), 512) for c in (block - 1, block, block + 5)}):
        (tmp_path / "a.tar").write_bytes(data[:cut])
        first = index.build(str(tmp_path / "a.tar"))
        corpus = source(tmp_path / "*.tar")
        assert first.rejections or cut > len(data) - 10_240 + 511
        parts = 0
        for sample in range(len(corpus)):
            name, key = Path(corpus.shard(sample)).stem, corpus.key(sample)
            own = {"txt": f"{name}{key[1:]} text".encode(), "cls": f"{name}{key[1:]}".encode()}
            members, failed = corpus.read(sample)
            assert not failed and members.items() <= own.items()
            parts += len(members)
            assert name == "a" or len(members) == 2
        assert parts == 6 + sum(end <= cut for end in ends)


def test_a_shard_of_lying_headers_is_looked_through_once(tmp_path):
    """3. 4,000 sound headers, each of which claims more than the file has."""
    block = malformed.header(b"a.txt", size_field=b"00077777777\0")
    data, asked = block * 4000 + malformed.END, []

    def read(offset, length):
        asked.append(len(data[offset : offset + length]))
        return data[offset : offset + length]

    assert len(list(tar.walk(read, len(data)))) == 4000
    assert sum(asked) < 50 * len(data)


def test_a_checksum_of_signed_bytes_is_right_too(tmp_path):
    """3. Some old writers summed signed characters, which shows where a name is not ASCII."""
    block = malformed.header("\u00e9t\u00e9.txt".encode(), 4)
    total = sum(block[:148]) + 8 * 32 + sum(block[156:])
    old = block[:148] + b"%06o\0 " % (total - 256 * sum(byte > 127 for byte in block)) + block[156:]
    for head, name in ((old, "\u00e9t\u00e9"), (old[:300] + b"x" + old[301:], "")):
        (tmp_path / "a.tar").write_bytes(head + malformed.padded(b"text") + malformed.END)
        made = index.build(str(tmp_path / "a.tar"))
        assert [made.key(i) for i in range(len(made))] == ([name] if name else []) and bool(made.rejections) == (
            not name
        )


BROKEN = [b"17 path=hurt.txtX", b"0 path=hurt.txt\n", b"3 path=hurt.txt\n", b"99 path=hurt.txt", b"16 path:hurt.txt\n"]


@pytest.mark.parametrize("record", [*BROKEN, b"+17 path=hurt.txt\n"])
def test_a_damaged_pax_record_names_nothing(record):
    """3, 16. No end of line, a length of nothing, too short, too long, no value, no number."""
    data = malformed.member("PaxHeaders/note", record, b"x") + malformed.member("x.txt", b"text") + malformed.END
    [fault] = tar.walk(lambda offset, length: data[offset : offset + length], len(data))
    assert (fault.offset, fault.detail) == (0, "a pax header that cannot be read")


def test_a_member_whose_extended_header_lies_about_its_size_is_not_delivered():
    """3, 16. Its real name is lost with that header; the members after it are delivered."""
    data = malformed.header(b"PaxHeaders/x", 1 << 30, b"x") + malformed.padded(b"17 path=real.txt\n")
    data += malformed.member("x.txt", b"text") + malformed.member("y.txt", b"text") + malformed.END
    found = list(tar.walk(lambda offset, length: data[offset : offset + length], len(data)))
    assert [one.detail for one in found if isinstance(one, tar.Fault)] == ["ends inside a header"]
    assert [one.name for one in found if isinstance(one, tar.Member)] == ["y.txt"]


@pytest.mark.parametrize("modality", [b"1", b"2", b"3", b"4", b"5", b"6"])
def test_no_content_follows_what_is_no_file(modality):
    """16. Old writers give a link the size of what it leads to."""
    data = (
        malformed.header(b"link.txt", 700, modality) + malformed.member("x.txt", b"text") + malformed.END + bytes(2048)
    )
    found = list(tar.walk(lambda offset, length: data[offset : offset + length], len(data)))
    assert [one.name for one in found if isinstance(one, tar.Member)] == ["x.txt"]
    assert [one.reason for one in found if isinstance(one, tar.Fault)] == ["name"] * (modality != b"5")


@pytest.mark.parametrize("first", [b"\x81", b"\xff", b"\xc0"])
def test_a_size_in_base_256_is_a_small_positive_number(first):
    """3. What stands in the first byte's other bits is not dropped."""
    data = malformed.header(b"x.txt", size_field=first + (4).to_bytes(11, "big"))
    data += malformed.padded(b"text") + malformed.END
    found = list(tar.walk(lambda offset, length: data[offset : offset + length], len(data)))
    assert [one.detail.split(":")[0] for one in found if isinstance(one, tar.Fault)] == ["a size that no member has"]
    assert not any(isinstance(one, tar.Member) for one in found)


def test_a_line_of_any_length_is_read_by_stretches(tmp_path, monkeypatch):
    """21. Lines that end anywhere in a stretch, and one over many of them."""
    monkeypatch.setattr(scan, "READ_BYTES", 64)
    lines = [b'{"text": "%s"}' % (b"x" * n) for n in (0, 5, 40, 51, 52, 53, 700, 3)] + [b"", b" " * 200, b"[]"]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (tmp_path / "b.jsonl").write_bytes(b"\n".join(lines))
    wanted = {str(i): {"json": line} for i, line in enumerate(lines) if line.strip()}
    assert everything(source(tmp_path / "a.jsonl")) == everything(source(tmp_path / "b.jsonl")) == wanted
    longest = []
    real = storage.read
    monkeypatch.setattr(storage, "read", lambda path, at, length: longest.append(length) or real(path, at, length))
    monkeypatch.setattr(scan, "MAX_MEMBER_BYTES", 600)
    made = index.build(str(tmp_path / "a.jsonl"))
    assert (
        max(longest) <= 64 and [(r.key, r.reason) for r in made.rejections] == [("6", "byte-limit")] and len(made) == 8
    )


def test_more_endings_than_an_index_counts_are_refused_by_name(tmp_path, monkeypatch):
    """16. `x.000001.jpg`: every member has an ending of its own."""
    monkeypatch.setattr(index, "MAX_EXTENSIONS", 3)
    made = [{"__key__": f"a{i}", f"{i:06d}.jpg": b"1", "txt": b"text"} for i in range(6)]
    shards.write(tmp_path / "a.tar", made)
    corpus = source(tmp_path / "a.tar")
    assert [sorted(own) for own in everything(corpus).values()] == [["000000.jpg", "txt"], ["000001.jpg", "txt"]] + [
        ["txt"]
    ] * 4
    assert [(r.key, r.reason) for r in corpus.rejections] == [(f"a{i}", "name") for i in range(2, 6)]
    makeups = [("a",), ("b",), ("c",), ("a", "b"), ("a", "c"), ("b",)]
    shards.write(
        tmp_path / "b.tar", [{"__key__": f"a{i}", **dict.fromkeys(own, b"1")} for i, own in enumerate(makeups)]
    )
    corpus = source(tmp_path / "b.tar")
    assert list(everything(corpus)) == ["a0", "a1", "a2", "a5"]
    assert [(r.key, r.reason) for r in corpus.rejections] == [("a3", "name"), ("a4", "name")]


def test_a_sample_of_a_very_long_name_is_blamed_too(tmp_path):
    """33."""
    names = [("folder/" * 130 + "\u00e9" * n) for n in (40, 41)]
    shards.write(tmp_path / "a.tar", [{"__key__": name, "txt": "text"} for name in names])
    corpus = source(tmp_path / "a.tar")
    for _ in range(2):
        CrashLog(tmp_path / "reading-0", 2).begin(corpus, 1)
        (tmp_path / "reading-0.fault").write_text("Fatal Python error: Aborted")
        log = CrashLog(tmp_path / "reading-0", 2)
        (tmp_path / "reading-0.fault").unlink()
    assert log.excludes(corpus, 1) and not log.excludes(corpus, 0)


def test_a_kind_that_is_missing_learns_nothing(tmp_path):
    """19. No sound in it: the loss is finite, whatever only sound uses has a gradient of exactly 0."""
    for name, without in (("none", ("flac",)), ("all", ())):
        made = samples(12)
        for sample in made:
            for ending in without:
                del sample[ending]
        shards.write(tmp_path / f"{name}.tar", made)
    grown = {}
    for name in ("none", "all"):
        data = tiny(tmp_path, run_dir=str(tmp_path / name))
        data["sources"] = {"all": {"shards": f"{tmp_path}/{name}.tar", "group": "color"}}
        config, corpora = fitted(build(data))
        corpus = corpora["all"]
        assert (
            len(corpus.samples_with({"flac"})) == (0 if name == "none" else 12)
            and len(corpus.samples_with({"jpg"})) == 12
        )
        step = dataset_of(config, corpora)[0]
        trained = TrainStep(config, torch.device("cpu"))
        batches = [with_counts(b, step.counts) for b in step.batches]
        report = forward_backward(trained.model, trained.objectives, trained.weights, batches)
        assert np.isfinite(float(report["loss"])) and not step.errors
        parts = sum(head["samples"] for head in (one.head for one in corpus.indexes))
        assert parts == 12
        grown[name] = {n: float(p.grad.abs().sum()) for n, p in trained.trained.named_parameters() if "audio" in n}
    assert grown["none"] and set(grown["none"].values()) == {0.0}
    assert max(grown["all"].values()) > 0


# --- loader and mixture ---


def test_more_workers_than_shards(tmp_path):
    """36. One shard, four workers on each of two ranks: an epoch is every sample once."""
    shards.write(tmp_path / "a.tar", samples(24))
    seen = Counter()
    for rank in range(2):
        steps = text_steps(tmp_path, batch_size=8, microbatches=2, rank=rank, ranks=2)
        for step in Loader(steps, 0, 3, 4):
            seen.update(keys(step))
    assert len(seen) == 24 and set(seen.values()) == {1}


def test_every_rank_takes_as_many_steps(tmp_path):
    """37. 13 samples, 8 a step, four ranks: the next epoch begins within a step; all take as many steps."""
    shards.write(tmp_path / "a.tar", samples(13))
    seen, taken = Counter(), set()
    for rank in range(4):
        steps = [text_steps(tmp_path, batch_size=8, microbatches=4, rank=rank, ranks=4)[step] for step in range(5)]
        taken.add(tuple(len(step.batches) for step in steps))
        for step in steps:
            seen.update(keys(step))
    assert taken == {(1,) * 5}
    assert sum(seen.values()) == 40 and max(seen.values()) - min(seen.values()) <= 1


def test_no_rank_is_without_samples(tmp_path):
    """38."""
    shards.write(tmp_path / "a.tar", samples(13))
    with pytest.raises(UserError, match="microbatches=4.*2 samples"):
        text_steps(tmp_path, batch_size=2, microbatches=4)
    for rank in range(4):
        steps = text_steps(tmp_path, batch_size=4, microbatches=4, rank=rank, ranks=4)
        assert all(len(steps[step].batches) == 1 and len(steps[step].samples) == 1 for step in range(9))


def test_a_rank_whose_samples_are_all_lost_goes_on(tmp_path, corpus):
    """38. It has no batch in that step, and its gradients are zero; see `test_parallel` for the others beside it."""
    config, corpora = fitted(build(tiny(corpus, run_dir=str(tmp_path / "run"))))
    trained = TrainStep(config, torch.device("cpu"))
    model, weights = trained.model, trained.weights
    report = forward_backward(model, trained.objectives, weights, [])
    assert float(report["loss"]) == 0.0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_source_smaller_than_a_step_is_refused(tmp_path):
    """39. A step would hold a sample twice. Of a mixture what counts is the source's share of a step."""
    for name, count in (("a", 3), ("b", 40)):
        shards.write(tmp_path / f"{name}.tar", samples(count))
    data = text_config(tmp_path)
    data["sources"] = {n: {"shards": f"{tmp_path}/{n}.tar"} for n in "ab"}

    def steps(**changes):
        data["tasks"]["words"] |= {"batch_size": 8, **changes}
        return dataset_of(*fitted(build(data)))

    wanted = "task words: with batch_size=8 a step reads {} samples of source a, of which the task can use 3: lower"
    with pytest.raises(UserError, match=wanted.format(8)):
        steps(sources={"a": 1})
    with pytest.raises(UserError, match=wanted.format(5) + ".*weight"):
        steps(sources={"a": {"0": 0, "5": 1}, "b": 0.7})
    assert len(keys(steps(sources={"a": 3, "b": 5})[0])) == 8
    with pytest.raises(UserError, match=wanted.format(8)):
        steps(sources={"a": 1}, weigh_by="token")
    config = build(data)
    [task] = build_tasks(config.tasks, {"a": source(tmp_path / "a.tar")})
    task = dataclasses.replace(task, by="")  # what a step reads is not known before the tokenizers can count
    assert StepDataset([task], config.model.tokenizers, 0)


def test_weights_of_zero_and_next_to_it():
    """40. Zero is never read; however small another is, a block holds one."""
    weights = [1.0, 0.0, 1e-12, 3.0]
    shares = apportion(weights)
    assert shares[1] == 0 and shares[2] == 1 and sum(shares) == BLOCK
    mixture = Mixture(0, [Source(str(i), 5000) for i in range(4)], [(0, weights)])
    counts = np.bincount(mixture.draws(0, 10 * BLOCK).source, minlength=4)
    assert counts.tolist() == [10 * share for share in shares]


@pytest.mark.parametrize("workers", [1, 3])
def test_what_was_read_ahead_does_not_count(tmp_path, workers):
    """43. A loader that is left in the middle, with steps read that nobody took; the next one goes on there."""
    shards.write(tmp_path / "a.tar", samples(10))
    steps = text_steps(tmp_path)
    wanted = [keys(steps[step]) for step in range(9)]
    found, at = [], 0
    for take in (1, 3, 5):
        loader = Loader(steps, at, 9, workers)
        for _, step in zip(range(take), loader):
            found.append(keys(step))
        loader.close()
        at += take
    assert found == wanted and not multiprocessing.active_children()


@pytest.mark.parametrize("error", [OSError(11, "Resource temporarily unavailable"), RuntimeError("no threads left")])
@pytest.mark.parametrize("when", ["at the start", "later"])
def test_workers_that_cannot_be_started_are_said(tmp_path, monkeypatch, error, when):
    """A user may have no processes, memory or open files left, at the start or when a dead worker is replaced."""
    shards.write(tmp_path / "a.tar", samples(10))
    steps = text_steps(tmp_path)
    real, started = os.fork, []

    def fork():
        if len(started) == (1 if when == "at the start" else 2):
            raise error
        started.append(real())
        return started[-1]

    others = set(multiprocessing.active_children())
    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(UserError, match=r"worker processes cannot be started: (Res|no).*; use fewer workers, or 0"):
        for _ in Loader(steps, 0, 100, 2):  # more than can have been read before the kill
            os.kill(started[0], signal.SIGKILL)
    assert set(multiprocessing.active_children()) == others  # the first one, which ignores interrupts, was ended


def test_bad_input_is_one_line_from_any_worker(tmp_path):
    """An index that is damaged after the start is met by a worker, whose traceback nobody wants to see."""
    shards.write(tmp_path / "a.tar", samples(10))
    text_steps(tmp_path)
    file = tmp_path / "a.tar.mmidx"
    data = bytearray(file.read_bytes())
    data[-3] ^= 255
    file.write_bytes(data)
    for workers in (0, 1):
        with pytest.raises(UserError) as raised:
            list(Loader(text_steps(tmp_path), 0, 5, workers))
        assert "is damaged" in str(raised.value) and "\n" not in str(raised.value)


def test_a_source_that_has_nothing_for_a_task_is_refused(tmp_path):
    """19, 38. The line says what the source offers."""
    pictures = [{"__key__": f"a{i}", "jpg": one["jpg"]} for i, one in enumerate(samples(4))]
    shards.write(tmp_path / "a.tar", pictures)
    config, corpora = build(text_config(tmp_path)), {"all": source(tmp_path / "a.tar")}
    [task] = build_tasks(config.tasks, corpora)
    refused = r"task words: no sample of source all has {}: {}; the source offers image \(4 samples\): change"
    with pytest.raises(UserError, match=refused.format("any of", "text")):
        StepDataset([task], config.model.tokenizers, 0)
    task = dataclasses.replace(task, modalities=["text", "image", "audio"], min_modalities=2)
    with pytest.raises(UserError, match=refused.format("2 of", "text, image, audio")):
        StepDataset([task], config.model.tokenizers, 0)
    shards.write(tmp_path / "b.tar", [*pictures, *samples(5)])
    task = dataclasses.replace(task, corpora=[source(tmp_path / "b.tar")])
    assert StepDataset([task], config.model.tokenizers, 0).usable[0][0].tolist() == [4, 5, 6, 7, 8]
    task = dataclasses.replace(task, min_modalities=1)
    assert StepDataset([task], config.model.tokenizers, 0).usable[0][0] == range(9)


def test_what_scores_another_reading_needs_samples_to_compare(tmp_path):
    """Pictures alone teach the masked objective; a contrastive one beside it would train at a loss of 0."""
    shards.write(tmp_path / "a.tar", [{"__key__": sample["__key__"], "jpg": sample["jpg"]} for sample in samples(9)])
    data = text_config(tmp_path)
    both = {"masked": {"hide": "drop", "mask_ratio": {"image": 0.5}}, "contrastive": {}}
    data["tasks"] = {
        "pairs": {"objectives": both, "modalities": ["text", "image"], "batch_size": 4, "sources": ["all"]}
    }
    config = build(data)
    corpora = {"all": shards.Corpus(config.sources["all"], "all")}
    with pytest.raises(UserError, match="no sample of all has 2 of: text, image, which contrastive compares"):
        dataset_of(config, corpora, fitted=False)


def test_every_sample_once_an_epoch(tmp_path):
    """45. At 50 random positions of two sources each."""
    for name, count in (("a", 37), ("b", 5)):
        shards.write(tmp_path / f"{name}.tar", samples(count))
    data = text_config(tmp_path)
    data["sources"] = {n: {"shards": f"{tmp_path}/{n}.tar"} for n in "ab"}
    data["tasks"]["words"]["sources"] = {"a": 0.6, "b": 0.4}
    config, corpora = fitted(build(data))
    mixture = dataset_of(config, corpora).mixtures[0]
    draws = mixture.draws(0, 3000)
    for stop in np.random.default_rng(0).integers(1, 3000, 50).tolist():
        for which, size in enumerate((37, 5)):
            visits = np.bincount(draws.sample[:stop][draws.source[:stop] == which], minlength=size)
            assert visits.max() - visits.min() <= 1


def test_resumes_around_the_edge_of_an_epoch(tmp_path):
    """46. 12 samples, 4 a step, so that an epoch ends with the third: stopped after the second, third and fourth."""
    shards.write(tmp_path / "a.tar", samples(12))
    optim = {"lr": 3e-3, "warmup_steps": 2, "decay_fraction": 0.0}  # a rate that does not hang on the number of steps
    data = text_config(tmp_path, save_every=100, optim=optim)
    loop.pretrain(build({**data, "steps": 8, "run_dir": str(tmp_path / "whole")}))
    for number, stop in enumerate((2, 3, 4, 8)):
        loop.pretrain(build({**data, "steps": stop}), resume=bool(number))
    assert rows(tmp_path / "run", "samples.jsonl") == rows(tmp_path / "whole", "samples.jsonl")
    own = ("seconds", "tokens_per_second", "data_wait", "optimizer_share", "memory_gb")
    for one, other in zip(rows(tmp_path / "run"), rows(tmp_path / "whole"), strict=True):
        assert {k: v for k, v in one.items() if k not in own} == {k: v for k, v in other.items() if k not in own}
    first = [name for row in rows(tmp_path / "run", "samples.jsonl")[:3] for name in row["samples"]]
    assert len(set(first)) == 12


def test_opening_far_on_reads_no_more(tmp_path, monkeypatch):
    """47. Counted: bytes, rows of the index, blocks laid out, at 0 and after ten million samples."""
    for i in range(20):
        made = [{"__key__": f"{i}-{j}", "txt": f"text {j}"} for j in range(50)]
        shards.write(tmp_path / f"a-{i:02d}.tar", made)
    text_steps(tmp_path)  # the indexes are made
    counts: Counter = Counter()

    def counting(owner, name, much):
        real = getattr(owner, name)

        def counted(*arguments):
            counts[name] += much(*arguments)
            return real(*arguments)

        monkeypatch.setattr(owner, name, counted)

    counting(storage, "read", lambda path, offset, length: length)
    counting(index.Index, "spans", lambda *_: 1)
    counting(index.Index, "key", lambda *_: 1)
    counting(Mixture, "_lay_out_block", lambda *_: 1)
    monkeypatch.setattr(mixture, "permute", _counted_permute(counts))
    found = []
    for start in (0, 10_000_000 // 4):
        steps = text_steps(tmp_path)
        counts.clear()
        for step in range(start, start + 4):
            steps[step]
        found.append(dict(counts))
    assert found[0].keys() == found[1].keys() == {"read", "spans", "key", "_lay_out_block", "permute"}
    for name in found[0]:
        assert found[1][name] <= found[0][name] * 2 + 64 and found[0][name] < 20_000, found
    assert found[0]["spans"] == found[1]["spans"] == 16


def _counted_permute(counts):
    from multimodal_fm.stream.mixture import permute

    def counted(places, size, key):
        counts["permute"] += len(places)
        return permute(places, size, key)

    return counted


def recorded(steps: StepDataset, which: range) -> dict[tuple[str, int], list]:
    """The parts of every sample as an objective gets them, by name and how often it came before."""
    got = []

    def record(sample, generator):
        got.append((sample.tokens, torch.randint(2**31, (2,), generator=generator)))
        return Example([part for part in sample.tokens.values()], [None] * len(sample.tokens), group=sample.group)

    steps.tasks = [dataclasses.replace(task, arrange=record) for task in steps.tasks]
    found, times = {}, Counter()
    for number in which:
        got.clear()
        step = steps[number]
        for (_, _, name), parts in zip(step.samples, got, strict=True):
            found[name, times[name]] = parts
            times[name] += 1
    return found


def same(one, other) -> bool:
    parts = zip(one[0].items(), other[0].items(), strict=True)
    return torch.equal(one[1], other[1]) and all(
        a == b and torch.equal(s.content, t.content) for (a, s), (b, t) in parts
    )


def test_a_view_depends_on_seed_sample_and_epoch_alone(tmp_path):
    """48. Not on the step, the place in it, the microbatch, the rank or what other sources there are."""
    shards.write(tmp_path / "a.tar", samples(8))
    shards.write(tmp_path / "b.tar", samples(9, 50))
    data = tiny(tmp_path, run_dir=str(tmp_path / "run"))
    data["sources"] = {n: {"shards": f"{tmp_path}/{n}.tar", "group": "color"} for n in "ab"}
    task = {
        "objectives": {"contrastive": {}},
        "modalities": ["text", "image", "audio"],
        "batch_size": 4,
        "sources": {"a": 1},
    }
    data["tasks"] = {"pairs": task}
    config, corpora = fitted(build(data))
    alone = recorded(
        StepDataset(build_tasks(config.tasks, corpora), config.model.tokenizers, 0), range(4)
    )  # two epochs
    task |= {"batch_size": 12, "sources": {"a": 0.3, "b": 0.7}}
    both, corpora = fitted(build(data))
    found = {}
    for rank in range(2):
        steps = StepDataset(build_tasks(both.tasks, corpora), config.model.tokenizers, 0, 4, rank=rank, ranks=2)
        mine = recorded(steps, range(4))
        found |= {k: v for k, v in mine.items() if k not in found}
    first = {name for name, turn in found if name.startswith("a/")}
    assert len(first) >= 6
    for name in first:
        assert same(found[name, 0], alone[name, 0])
    assert sum(same(alone[name, 0], alone[name, 1]) for name in {name for name, _ in alone}) == 0
    other = recorded(StepDataset(build_tasks(config.tasks, corpora), config.model.tokenizers, 1), range(2))
    assert not any(same(alone[name], other[name]) for name in other)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_and_open_files_stay_flat(tmp_path):
    """50. 50,000 steps; in the first 10,000 caches fill."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("there is no /proc")
    for i in range(40):
        shards.write(tmp_path / f"a-{i:02d}.tar", [{"__key__": f"{i}-{j}", "txt": f"text {j}"} for j in range(50)])
    steps = text_steps(tmp_path, batch_size=2)
    seen = []
    for number, _ in enumerate(Loader(steps, 0, 50_001, 2)):
        if number % 10_000 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen.append((pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir("/proc/self/fd"))))
    (first, files), (last, files_then) = seen[1], seen[-1]
    assert (last - first) / 4 < 1 and files_then <= files, seen


# --- every malformed file through the training stream, in a process of its own ---

SECONDS = 10
MORE_MEMORY = 1024  # MB above what the process had before the first case
FIXED = {"image": {"min_crop_scale": 1.0, "hflip": 0.0}}  # views that do not hang on chance
COMBINED = {
    "archives": ("cut-", "flip-", "size-", "header-", "two-", "rubbish", "no-end", "key-", "part-", "sorted"),
    "names": ("name-", "pax-", "gnu-", "pickle", "archive-", "directories", "file-"),
    "pictures": ("jpeg", "png", "gif", "tiff", "webp", "image", "bmp", "picture"),
    "sounds": ("wav", "flac", "ogg", "mp3", "audio", "text", "lines", "plain"),
}

LARGE = ("plain-long-line", "lines-5-MB")  # of which each has already gone through the stream; learning merges is slow


def plugins_at(folder: Path) -> dict:
    plugins = test_malformed.tokenizers(folder)
    image = plugins["image"]
    plugins["image"] = image.replace(**FIXED["image"])
    return plugins


def stream_over(path: str, plugins: dict) -> StepDataset | None:
    """One step of it is an epoch. None where no sample has text, picture or sound."""
    corpus = shards.Corpus(shards.Config([path]), "all")
    task = Task("all", 1, list(plugins), [corpus], [(0, [1.0])], None)
    try:
        steps = StepDataset([task], plugins, 0)
    except UserError as error:
        assert "no sample of source all has any of" in str(error)
        return None
    steps.tasks = [dataclasses.replace(task, batch_size=len(steps.usable[0][0]))]
    return steps


def complaints(case: malformed.Case, plugins: dict, sound: dict) -> list[str]:
    """What a training stream makes of a case and should not."""
    steps = stream_over(case.path, plugins)
    if steps is None:
        return [] if not any(k in case.healthy for k in sound) else ["no sample can be used"]
    corpus, lost, got = steps.tasks[0].corpora[0], [], {}
    real = steps._read_task

    def read(number, draws, own, step, losses, names):
        found = real(number, draws, own, step, losses, names)
        lost.extend(losses)
        return found

    steps._read_task = read
    for (name, _), (parts, _) in recorded(steps, range(1)).items():
        got.setdefault(name.removeprefix("all/"), parts)
    refused = [refused_row("all", row) for row in corpus.rejections]
    wrong = [f"a row {row}" for row in lost + refused if row.keys() != ROW or row["reason"] not in REASONS]
    wrong += [f"a row of another shard: {row}" for row in lost + refused if row["shard"] != case.path]
    told = [(row["key"], row["part"], row["reason"]) for row in refused]
    told += list(dict.fromkeys((row["key"], row["part"], row["reason"]) for row in lost))
    wrong += test_malformed.compare_refused(case, told)
    for key, parts in sound.items():
        if key not in case.healthy or case.healthy[key].keys() != malformed.sound_sample(key).keys():
            continue
        if key not in got or got[key].keys() != parts.keys():
            wrong.append(f"of {key} only {list(got.get(key, []))} delivered")
        elif not all(torch.equal(got[key][modality].content, parts[modality].content) for modality in parts):
            wrong.append(f"{key} is changed")
    for key, outcome in case.outcome.items():
        usable = {e for e in case.healthy.get(key, {}) if any(e in p.extensions for p in plugins.values())}
        if (outcome == "skip" and key in got) or (outcome in ("ok", "partial") and usable and key not in got):
            wrong.append(f"{key[:80]}: {outcome}, but {'' if key in got else 'not '}delivered")
    return wrong


def sound_parts(folder: Path, plugins: dict) -> dict:
    """The parts of the sound samples, each from a shard in which nothing is damaged."""
    every = (*malformed.BEFORE, *malformed.AFTER)
    shards.write(folder / "undamaged.tar", [{"__key__": key, **malformed.sound_sample(key)} for key in every])
    got = recorded(stream_over(str(folder / "undamaged.tar"), plugins), range(1))
    return {name.removeprefix("all/"): parts for (name, _), (parts, _) in got.items()}


def trained(name: str, cases: list, folder: Path) -> list[str]:
    """What is wrong with a short run over these cases as one source."""
    run = folder / f"run-{name}"
    data = tiny(folder, run_dir=str(run), steps=3, save_every=3, max_bad_fraction=1.0, microbatches=2, log_samples=True)
    data["sources"] = {"all": {"shards": [case.path for case in cases]}}
    data["tasks"] = {n: data["tasks"][n] | {"batch_size": 40} for n in ("looks", "pairs")}
    loop.pretrain(build(data))
    wrong = []
    for row in (found := rows(run, "quarantine.jsonl")):
        if row.keys() != ROW or row["reason"] not in REASONS or row["source"] != "all":
            wrong.append(f"a row {row}")
    if not found:
        wrong.append("nothing in quarantine.jsonl")
    for row in rows(run):
        if row["skipped"] or not np.isfinite(row["loss"]):
            wrong.append(f"step {row['step']}: {row['loss']}")
    if [len(row["samples"]) for row in rows(run, "samples.jsonl")] != [80] * 3:
        wrong.append("steps of another number of samples")
    return wrong


def examine(folder: Path):
    """Prints a JSON line for each of `folder/cases.pickle`: its name, its complaints, seconds and MB."""
    torch.set_num_threads(1)
    mixture.STRETCH = 16  # of corpora of a few samples, which would go round a hundred times in a longer one
    plugins = plugins_at(folder)
    cases = pickle.loads((folder / "cases.pickle").read_bytes())
    sound = sound_parts(folder, plugins)
    todo = {case.name: lambda case=case: complaints(case, plugins, sound) for case in cases if case.opens}
    for name, starts in COMBINED.items():
        chosen = [case for case in cases if case.opens and case.name.startswith(starts) and case.name not in LARGE]
        todo[f"run: {name}"] = lambda name=name, chosen=chosen: trained(name, chosen, folder)
    at_first = test_malformed.used()
    signal.signal(signal.SIGALRM, test_malformed.ring)
    for name, job in todo.items():
        start = time.monotonic()
        signal.alarm(SECONDS if not name.startswith("run") else 60)
        try:
            wrong = job()
        except test_malformed.TooLong:
            wrong = ["too long"]
        except Exception as error:
            wrong = [f"{type(error).__name__}: {error}"[:300]]
        signal.alarm(0)
        if test_malformed.used() - at_first > MORE_MEMORY:
            wrong.append(f"{test_malformed.used() - at_first} MB more")
        row = {"name": name, "wrong": wrong, "seconds": round(time.monotonic() - start, 2)}
        print(json.dumps(row | {"grown": test_malformed.used() - at_first}), flush=True)


def test_every_malformed_file_through_the_training_stream(tmp_path):
    """Must show 6. No crash, no hang, memory bounded, nothing written elsewhere, every row whole, neighbours alike."""
    (tmp_path / "cases").mkdir()
    (tmp_path / "elsewhere").mkdir()
    cases = malformed.make(tmp_path / "cases")
    (tmp_path / "cases" / "cases.pickle").write_bytes(pickle.dumps(cases))
    root = Path(__file__).parents[1]
    cache = str(tmp_path / "cases" / "cache")
    environment = {**os.environ, "PYTHONPATH": str(root), "MMFM_CACHE": cache, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, tmp_path / "cases"],
        cwd=tmp_path / "elsewhere",
        env=environment,
        capture_output=True,
        text=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(found) == sum(case.opens for case in cases) + len(COMBINED) > 200
    print(*sorted((row["seconds"], row["grown"], row["name"]) for row in found)[-12:], sep="\n")
    assert not (wrong := {row["name"]: row["wrong"] for row in found if row["wrong"]}), json.dumps(wrong, indent=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cases", "elsewhere"]
    assert not list((tmp_path / "elsewhere").iterdir())
    assert not list(tmp_path.rglob(malformed.SENTINEL)) and not list(tmp_path.rglob(f"*{malformed.ESCAPE}*"))
    assert not list(tmp_path.parent.glob(f"*{malformed.ESCAPE}*")) and not list(
        Path("/tmp").glob(f"{malformed.ESCAPE}*")
    )


if __name__ == "__main__":
    examine(Path(sys.argv[1]))
