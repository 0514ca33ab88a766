"""Seeded damage to files, and the child that reads damaged ones: ``python fuzzing.py FORMAT FOLDER FIRST COUNT``.

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
import struct
import sys
import time
import traceback
from pathlib import Path

import xxhash

from longnet_hpc.errors import LongNetError

SECONDS = 10
"""Time to read a file, after which the child is ended by SIGALRM."""

MOST_MEMORY = 1 << 30
"""Bytes that reading may take beyond what the child has before, as address space."""

LONGEST_MESSAGE = 1000
"""Letters of an error."""

EXTREMES = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
NONSENSE = (
    *("0", "-1", "1.5", "1e999", "-1e-999", f"{1 << 64}", "9" * 400, "9" * 5000, "-" + "9" * 30, "0x" + "f" * 6000),
    *("NaN", "-Infinity", "Infinity", "nan", "inf", "null", "true", "false", "1979-05-27", "07:32:00", "[]", "{}"),
    *('""', "''", '"x"', '"\\u001b[2J"', '"\\ud800"', "[[]]", '[1, "a"]', '{"a": 1}', "{a = 1}", "[1]"),
    '"' + "x" * 20_000 + '"',
)
DEPTHS = (3, 100, 1000, 2000, 100_000)
CONTROL = (*'\x00\x01\x7f\r\n\t\x0b\u2028\x85\ufeff\u202e\ud800"\\', "\x1b[2J")
_VALUE = re.compile(r'"(?:[^"\\\n]|\\.)*"|-?\d[\d.eE+_-]*|\btrue\b|\bfalse\b|\bnull\b')


def mutate_bytes(rng, content, places=None):
    """Damage bytes in one to three ways, at some of ``places`` if there are any."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if changed:
            at = rng.choice(places) % len(changed) if places and rng.random() < 0.7 else rng.randrange(len(changed))
            rng.choice(_DAMAGES)(rng, changed, at)
    return bytes(changed)


def _flip(rng, changed, at):
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[min(len(changed) - 1, at + rng.randrange(8))] ^= 1 << rng.randrange(8)


def _overwrite(rng, changed, at):
    size = min(len(changed) - at, rng.choice((1, 2, 4, 16, 64, 512)))
    changed[at : at + size] = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))


def _truncate(rng, changed, at):
    del changed[at:]


def _remove(rng, changed, at):
    del changed[at : at + rng.choice((1, 4, 8, 100))]


def _insert(rng, changed, at):
    changed[at:at] = rng.choice((bytes, rng.randbytes))(rng.choice((1, 4, 8, 100, 4096)))


def _duplicate(rng, changed, at):
    block = changed[at : at + rng.choice((1, 8, 64, 1024))]
    to = rng.randrange(len(changed))
    changed[to : to + rng.choice((0, len(block)))] = block


def _extreme_length(rng, changed, at):
    at -= rng.choice((0, at % 8))
    kind = rng.choice(("<Q", "<Q", "<I", "<H"))
    size, length = struct.calcsize(kind), len(changed)
    number = rng.choice((*EXTREMES, length, length - 1, length + 1)) % (1 << 8 * size)
    if length >= size:
        struct.pack_into(kind, changed, max(0, min(at, length - size)), number)


_DAMAGES = (*(_flip, _overwrite, _extreme_length) * 2, _truncate, _remove, _insert, _duplicate)


def mutate_text(rng, text):
    """Damage TOML or JSON in one to three ways: lines, values, nesting, letters."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        text = rng.choice(_TEXT_DAMAGES)(rng, text)
    return text


def _change_lines(rng, text):
    lines = text.splitlines(keepends=True)
    if lines:
        first, second = rng.randrange(len(lines)), rng.randrange(len(lines))
        how = rng.randrange(4)
        if how == 0:
            del lines[first]
        elif how == 1:
            lines.insert(second, lines[first])
        elif how == 2:
            lines[first], lines[second] = lines[second], lines[first]
        else:
            lines[first] = lines[first][: rng.randrange(len(lines[first]) + 1)]
    return "".join(lines)


def _swap_value(rng, text):
    values = list(_VALUE.finditer(text))
    if not values:
        return text
    value = rng.choice(values)
    new = rng.choice(NONSENSE) if rng.random() < 0.8 else rng.choice(values)[0]
    return text[: value.start()] + new + text[value.end() :]


def _nest(rng, text):
    depth = rng.choice(DEPTHS)
    pairs = (("[", "]"), ("[", ""), ('{"a":', "}"), ("{a = ", "}"), ("a.", "a = 1\n"), ("[a", "]"))
    opening, closing = rng.choice(pairs)
    values = list(_VALUE.finditer(text))
    at = rng.choice(values).start() if values else 0
    return text[:at] + opening * depth + closing * depth + text[at:]


def _put_letter(rng, text):
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice(CONTROL) + text[at + rng.randrange(2) :]


def _put_name(rng, text):
    names = list(re.finditer(r'\w+(?=(?:"\s*:| =))', text))
    if not names:
        return text
    name = rng.choice(names)
    others = ("", "x", '"a\\nb"', '"\\u001b"', "__class__", "a.b", '"' + "k" * 5000 + '"', rng.choice(names)[0])
    return text[: name.start()] + rng.choice(others) + text[name.end() :]


_TEXT_DAMAGES = (_change_lines, _swap_value, _swap_value, _swap_value, _nest, _put_letter, _put_name)


def mutate_encoded(rng, content):
    """Damage a file of text, by its text or, one time in four, by its bytes."""
    if rng.random() < 0.25:
        return mutate_bytes(rng, content)
    return mutate_text(rng, content.decode()).encode("utf-8", "surrogatepass")


# HDF5: its metadata carry checksums (Jenkins's lookup3), so that chance alone never gets behind them. Who means harm
# computes them anew, and so does half of the damage here.


def lookup3(content):
    """Return the checksum that HDF5 gives to metadata."""

    def turned(value, by):
        return (value << by | value >> 32 - by) & 0xFFFFFFFF

    whole = 0xFFFFFFFF
    a = b = c = 0xDEADBEEF + len(content) & whole
    blocks = max(0, (len(content) - 1) // 12)
    for first in range(0, blocks * 12, 12):
        words = struct.unpack_from("<III", content, first)
        a, b, c = a + words[0] & whole, b + words[1] & whole, c + words[2] & whole
        a, c = (a - c & whole) ^ turned(c, 4), c + b & whole
        b, a = (b - a & whole) ^ turned(a, 6), a + c & whole
        c, b = (c - b & whole) ^ turned(b, 8), b + a & whole
        a, c = (a - c & whole) ^ turned(c, 16), c + b & whole
        b, a = (b - a & whole) ^ turned(a, 19), a + c & whole
        c, b = (c - b & whole) ^ turned(b, 4), b + a & whole
    if not content:
        return c
    words = struct.unpack("<III", content[blocks * 12 :].ljust(12, b"\0"))
    a, b, c = a + words[0] & whole, b + words[1] & whole, c + words[2] & whole
    c = (c ^ b) - turned(b, 14) & whole
    a = (a ^ c) - turned(c, 11) & whole
    b = (b ^ a) - turned(a, 25) & whole
    c = (c ^ b) - turned(b, 16) & whole
    a = (a ^ c) - turned(c, 4) & whole
    b = (b ^ a) - turned(a, 14) & whole
    return (c ^ b) - turned(b, 24) & whole


_SIGNATURES = re.compile(rb"\x89HDF\r\n\x1a\n|OHDR|OCHK|FRHP|FHDB|FHIB|BTHD|BTLF|BTIN|EAHD|EAIB|EASB|EADB|FAHD|FADB")


def sealed_ranges(content):
    """Return (start, stop) of the metadata of an HDF5 file that a checksum follows."""
    found = []
    for match in _SIGNATURES.finditer(content):
        start = match.start()
        for stop in range(start + 8, min(start + 3000, len(content) - 4)):
            # The checksum is followed by what begins at a multiple of 8, or by zeros, and is no zero itself.
            if content[stop : stop + 4] != b"\0\0\0\0" and lookup3(content[start:stop]) == _word(content, stop):
                found.append((start, stop))
                break
    return found


def _word(content, at):
    return int.from_bytes(content[at : at + 4], "little")


def mutate_sealed(rng, content, ranges):
    """Damage metadata of an HDF5 file and give it the checksum that fits."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2))):
        start, stop = rng.choice(ranges)
        part = changed[start:stop]
        for _ in range(rng.choice((1, 1, 2, 4))):
            rng.choice((_flip, _overwrite, _extreme_length, _swap_pieces))(rng, part, 4 + rng.randrange(len(part) - 4))
        changed[start:stop] = part[: stop - start]
        changed[stop : stop + 4] = struct.pack("<I", lookup3(bytes(changed[start:stop])))
    return bytes(changed)


def _swap_pieces(rng, changed, at):
    size = rng.choice((1, 2, 8))
    to = rng.randrange(len(changed) - size)
    changed[at : at + size] = changed[to : to + len(changed[at : at + size])]


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
