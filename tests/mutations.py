"""Seeded damage to bytes, to text, and to HDF5 metadata behind its checksums."""

import re
import struct

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
