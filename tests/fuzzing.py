"""Kinds of files, damaged by a seed, and the child that reads them: ``python fuzzing.py FORMAT FOLDER FIRST COUNT``.

Number ``index`` of a format is always the same damage, so that a failure can be made again by its number alone. The
child writes a line of JSON a file, and dies of the signal where a file makes it crash or hang.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

import xxhash
from mutations import mutate_bytes, mutate_encoded, mutate_sealed, mutate_text

from longnet_hpc.errors import LongNetError

SECONDS = 10
"""Time to read a file, after which the child is ended by SIGALRM."""

MOST_MEMORY = 1 << 30
"""Bytes that reading may take beyond what the child has before, as address space."""

LONGEST_MESSAGE = 1000
"""Letters of an error."""


# Each format: what makes number `index`, and what reads it and returns what must not change (None: anything goes).


class Corpora:
    """HDF5 corpora of bytes."""

    def __init__(self, path):
        self.path, self.content = path, path.read_bytes()
        self.places = [at for at, byte in enumerate(self.content) if byte]
        self.ranges = json.loads(path.with_suffix(".ranges").read_text())

    def mutated(self, rng):
        if rng.random() < 0.5:
            return mutate_sealed(rng, self.content, self.ranges)
        return mutate_bytes(rng, self.content, self.places)

    def read(self, path):
        from longnet_hpc.data import Corpus

        with Corpus(path) as corpus:
            assert corpus.num_tokens == len(corpus.read(0, corpus.num_tokens))
            with contextlib.suppress(LongNetError):  # no tokens, and without a checksum: read, but not compared
                _ = corpus.document_offsets
                for index in range(min(corpus.num_documents, 10)):
                    corpus.document_name(index)
            return corpus.read(0, corpus.num_tokens).tobytes()


class Checkpoints:
    """Safetensors files of `save_checkpoint`."""

    def __init__(self, path):
        self.path, self.content = path, path.read_bytes()

    def mutated(self, rng):
        how = rng.randrange(4)
        if how < 2:
            return mutate_bytes(rng, self.content, None if how else range(12_000))
        size = int.from_bytes(self.content[:8], "little")
        header, data = self.content[8 : 8 + size].decode(), self.content[8 + size :]
        if how == 2:
            header = mutate_text(rng, header)
        else:  # a description that was written by who means harm
            table = json.loads(header)
            about = mutate_text(rng, table["__metadata__"]["longnet_hpc"])
            if rng.random() < 0.5:
                about = self._foreign(rng, json.loads(table["__metadata__"]["longnet_hpc"]))
            encoded = about.encode("utf-8", "surrogatepass")
            table["__metadata__"] = {"longnet_hpc": about, "checksum": xxhash.xxh3_64_hexdigest(encoded)}
            header = json.dumps(table)
        encoded = header.encode("utf-8", "surrogatepass")
        return len(encoded).to_bytes(8, "little") + encoded + data

    @staticmethod
    def _foreign(rng, about):
        table, key = about, rng.choice(sorted(about))
        if isinstance(about[key], dict) and rng.random() < 0.7:
            table, key = about[key], rng.choice(sorted(about[key]))
        if rng.random() < 0.2:
            del table[key]
        else:
            others = (None, -1, 0, 1 << 70, 1.5, "x", [], {}, [1], {"a": 1}, True, "\x1b\n", [[[]]], "f" * 9999)
            table[key] = rng.choice(others)
        return json.dumps(about)

    def read(self, path):
        from longnet_hpc.checkpoint import load_checkpoint

        found = load_checkpoint(path)
        _ = found.model_config.parameter_count
        found.order.facts()
        assert found.step >= 0
        assert found.batch_index >= 0
        return {name: _digest(tensor) for name, tensor in sorted(found.tensors.items())}


def _digest(tensor):
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(tensor.numpy().tobytes()).hexdigest()}"


class Text:
    """What has no checksums, so that it may say something else."""

    def __init__(self, path):
        self.path, self.content = path, path.read_bytes()

    def mutated(self, rng):
        return mutate_encoded(rng, self.content)


class Configs(Text):
    """Config files of the train command."""

    def read(self, path):
        from longnet_hpc.command_line import parse
        from longnet_hpc.config_file import from_table, read_toml, to_table, write_toml

        _, config = parse(["train", "--config", str(path)], console=False)
        again = path.with_suffix(".again")
        write_toml(again, config, "as it was understood")
        assert to_table(from_table(read_toml(again), config)) == to_table(config)


class Machines(Text):
    """Machine files."""

    def read(self, path):
        from longnet_hpc.scaling.machine import load_machine

        assert load_machine(str(path)).name is not None


class Records(Text):
    """Files of records."""

    def read(self, path):
        from longnet_hpc.record import check_record, read_records

        for record in read_records(path):
            json.dumps(record, allow_nan=False)
            with contextlib.suppress(LongNetError):
                check_record(record)


class Metrics(Text):
    """The lines of a run."""

    def read(self, path):
        from longnet_hpc.record import read_metrics

        for line in read_metrics(path, 100):
            assert line["step"] <= 100
            json.dumps(line, allow_nan=False)


class Reports(Text):
    """Records, as the report finds them."""

    def read(self, path):
        from longnet_hpc.scaling.report_data import load

        load([str(path)])


class Tokenizers(Text):
    """Files of the tokenizers package."""

    def read(self, path):
        import warnings

        from longnet_hpc.data import load_tokenizer

        tokenizer = load_tokenizer(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parts = tokenizer.encode("text", [b"a few words, na\xc3\xafve\n"])
            tokens = [int(token) for part in parts for token in part]
        assert all(token < tokenizer.vocab_size for token in tokens)
        assert isinstance("".join(tokenizer.decode(tokens)), str)


FORMATS = {
    "corpus": Corpora,
    "checkpoint": Checkpoints,
    "config": Configs,
    "machine": Machines,
    "records": Records,
    "metrics": Metrics,
    "report": Reports,
    "tokenizer": Tokenizers,
}


def damaged(kind, index):
    """Return number ``index`` of a format."""
    return kind.mutated(random.Random(f"{type(kind).__name__} {index}"))


def outcome(kind, path, original):
    """Read a file; return refused, same or other, or say what is wrong."""
    try:
        found = kind.read(path)
    except (LongNetError, OSError) as error:
        told = str(error)
        if not told.isprintable():
            return f"FAILED: message is not one line: {told[:300]!r}"
        fits = 0 < len(told) <= LONGEST_MESSAGE
        return "refused" if fits else f"FAILED: message of {len(told)} letters: {told[:200]!r}"
    except BaseException:  # a panic of Rust is no Exception  # noqa: BLE001
        return f"FAILED: {traceback.format_exc()[-1500:]}"
    if original is None:
        return "other"
    return "same" if found == original else "FAILED: something else was read, without an error"


def address_space():
    """Return the bytes that this process has, as the limit counts them."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def resident_peak():
    """Return the most bytes of memory that this process has had."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024


def main(name, folder, first, count):
    """Read damaged files, and write an outcome a line."""
    folder = Path(folder)
    kind = FORMATS[name](folder / name)
    original = kind.read(kind.path)
    kind.read(kind.path)  # all that is loaded late is now there
    limit = address_space() + MOST_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before = resident_peak()
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # warnings, and what libraries say of their own
    path = folder / f"damaged-{name}-{first}"
    for index in range(first, first + count):
        path.write_bytes(damaged(kind, index))
        print(json.dumps({"index": index}), flush=True)
        begin = time.perf_counter()
        signal.alarm(SECONDS)
        said = outcome(kind, path, original)
        signal.alarm(0)
        peak = resident_peak() - before
        seconds = time.perf_counter() - begin
        print(json.dumps({"index": index, "outcome": said, "seconds": seconds, "peak_bytes": peak}), flush=True)
    path.unlink()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
