"""How fast one rank gets verified tokens from the page cache: prints one JSON record.

    python bench/reader.py --out bench/records/reader.jsonl

A corpus of random bytes is prepared, in one file and in four shards. The headline ``bytes_per_second`` is what training
gets: the tensors of `SequenceReader`, in its first epoch, which compares the checksums; nothing is read ahead, which
would hide the time. Beside it stand the second epoch, batches as stored, and `Corpus.read` in large slices, at first
touch and again. Every byte is compared with the source.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from longnet_hpc.data import Corpus, SequenceReader, prepare
from longnet_hpc.data.tokenizer import BytesTokenizer
from longnet_hpc.data.writer import Shard, ShardWriter, join_shards
from longnet_hpc.record import append_record, make_record, where

SLICE_BYTES = 1 << 26
SHARDS = 4
SEQ_LEN, BATCH_SIZE = 1 << 17, 8


def write_sharded(source, path):
    tokenizer, shards = BytesTokenizer(), []
    for number, part in enumerate(np.array_split(source, SHARDS)):
        name = f"{path.name}.shard-{number}"
        with ShardWriter(path.parent / name, tokenizer, 1 << 20) as writer:
            writer.add_document(name, [part])
            writer.close()
        shards.append(Shard(name, writer.num_tokens, part.size, 1))
    join_shards(path, shards, [path.parent / shard.name for shard in shards], tokenizer)
    return path


def seconds_to_read(corpus, source):
    """Time the reading alone; the comparison with the source runs beside it."""
    seconds = 0.0
    for start in range(0, source.size, SLICE_BYTES):
        stop = min(start + SLICE_BYTES, source.size)
        begin = time.perf_counter()
        tokens = corpus.read(start, stop)
        seconds += time.perf_counter() - begin
        if not np.array_equal(tokens, source[start:stop]):
            sys.exit(f"tokens [{start}, {stop}) of {corpus.path} are not those of the source")
    return seconds


def seconds_for_batches(corpus, source, as_stored):
    """Time one epoch of batches, as stored or as pairs of tensors, scaled to the size of the source."""
    options = {"seq_len": SEQ_LEN, "batch_size": BATCH_SIZE, "slice_of": range(SEQ_LEN), "seed": 0, "shuffle": False}
    with SequenceReader(corpus, **options, prefetch=False) as reader:
        seconds, checked = 0.0, 0
        for batch in range(reader.batches_per_epoch):
            begin = time.perf_counter()
            inputs = reader.window(batch)[:, :-1] if as_stored else next(reader)[0]
            seconds += time.perf_counter() - begin
            stop = checked + BATCH_SIZE * SEQ_LEN
            if not np.array_equal(np.asarray(inputs).flatten(), source[checked:stop]):
                sys.exit(f"batch at token {checked} is not that of the source")
            checked = stop
    return seconds * source.size / checked


def measure(path, source, repeats):
    """Rates in bytes of text per second, the median over ``repeats`` after one round of warm-up."""
    seconds = {"first_epoch": [], "second_epoch": [], "batches_as_stored": [], "first_read": [], "second_read": []}
    for _ in range(repeats + 1):
        with Corpus(path) as corpus:  # verifies each chunk once
            seconds["first_epoch"].append(seconds_for_batches(corpus, source, as_stored=False))
            seconds["second_epoch"].append(seconds_for_batches(corpus, source, as_stored=False))
            seconds["batches_as_stored"].append(seconds_for_batches(corpus, source, as_stored=True))
        with Corpus(path) as corpus:
            seconds["first_read"].append(seconds_to_read(corpus, source))
            seconds["second_read"].append(seconds_to_read(corpus, source))
    return {f"{name}_bytes_per_second": source.size / statistics.median(times[1:]) for name, times in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=1 << 29, help="size of the corpus, in bytes")
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds after one of warm-up")
    parser.add_argument("--folder", default=None, help="where the corpus is made; default: temporary")
    parser.add_argument("--out", type=Path, help="file that the record is appended to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = np.random.default_rng(0).integers(0, 256, options.bytes, dtype=np.uint8)
        text = Path(folder, "source")
        source.tofile(text)
        begin = time.perf_counter()
        single = prepare([text], Path(folder, "single.h5"))
        prepared = time.perf_counter() - begin
        rates = {
            "single_file": measure(single, source, options.repeats),
            "sharded": measure(write_sharded(source, Path(folder, "sharded.h5")), source, options.repeats),
        }
    record = make_record(
        "reader",
        config={
            "bytes": options.bytes,
            "folder": options.folder,
            "slice_bytes": SLICE_BYTES,
            "shards": SHARDS,
            "seq_len": SEQ_LEN,
            "batch_size": BATCH_SIZE,
        },
        results={
            "bytes": options.bytes,
            "bytes_per_second": min(rate["first_epoch_bytes_per_second"] for rate in rates.values()),
            "prepare_bytes_per_second": options.bytes / prepared,
            **rates,
        },
        place=where(),
        check=("every token compared with the source", True),
        warmup=1,
        repeats=options.repeats,
        statistic="median",
    )
    print(json.dumps(record))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        append_record(options.out, record)


if __name__ == "__main__":
    main()
