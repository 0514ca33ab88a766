"""From blocks of bytes to blocks of tokens."""

from __future__ import annotations

import codecs
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longnet_hpc.errors import ConfigError
from longnet_hpc.words import one_line

__all__ = ["BytesTokenizer", "JsonTokenizer", "Tokenizer", "load_tokenizer"]

BYTES = "bytes"
"""Name of the tokenizer that takes bytes for tokens."""

MAX_TOKENIZER_BYTES = 1 << 26
"""Largest file of a tokenizer, and largest one that travels in a corpus."""

TEXT_BLOCK_CHARACTERS = 1 << 18
"""Largest piece of text that is tokenized at once; bounds memory."""

_UNKNOWN = "\ufffd"
_MOST_TOKENS_OF_A_CHARACTER = 4
"""Most tokens that can hold a part of one character each: UTF-8 has up to 4 bytes."""


@dataclass(frozen=True)
class Tokenizer(ABC):
    """What turns text into tokens, as recorded in a corpus file."""

    name: str
    """``bytes``, or the name of the tokenizer's file."""
    vocab_size: int
    """Number of token values."""
    json: str
    """Content of the tokenizer's file, with which the corpus travels; empty for bytes."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest unsigned integer that holds every token, little-endian."""
        return np.dtype(np.min_scalar_type(self.vocab_size - 1)).newbyteorder("<")

    @abstractmethod
    def encode(self, name: str, blocks: Iterable[bytes]) -> Iterator[NDArray[Any]]:
        """Iterate over the tokens of one document, block by block.

        Parameters
        ----------
        name : str
            Name of the document, for warnings.
        blocks : iterable of bytes
            Its content. How it is cut does not change the tokens.

        Returns
        -------
        iterator of ndarray
            Tokens of type `dtype`, in order. Nothing is added before, between or after documents.
        """

    @abstractmethod
    def decode(self, tokens: Iterable[int]) -> Iterator[str]:
        """Iterate over the text of tokens, in pieces of whole characters, each as soon as its last token is there.

        What is no text becomes U+FFFD.
        """


@dataclass(frozen=True)
class BytesTokenizer(Tokenizer):
    """Each byte is a token."""

    name: str = BYTES
    vocab_size: int = 256
    json: str = ""

    def encode(self, name: str, blocks: Iterable[bytes]) -> Iterator[NDArray[Any]]:  # noqa: D102
        return (np.frombuffer(block, dtype=np.uint8) for block in blocks)

    def decode(self, tokens: Iterable[int]) -> Iterator[str]:  # noqa: D102
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            # A model may know more tokens than there are bytes; 255 is in no UTF-8, so it becomes U+FFFD, too.
            if text := decoder.decode(bytes([min(token, 255)])):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text


@dataclass(frozen=True)
class JsonTokenizer(Tokenizer):
    """A tokenizer of the Hugging Face ``tokenizers`` package.

    Text is UTF-8; a byte that is not becomes U+FFFD, with a warning that names the document. Text is tokenized in
    blocks that end with a line where there is one within `TEXT_BLOCK_CHARACTERS`, so tokens may differ from those of
    the whole document where two blocks meet. No special tokens are added, and truncation and padding are off.
    """

    @cached_property
    def _encoder(self) -> Any:
        encoder = _parsed(self.name, self.json)
        encoder.no_truncation()
        encoder.no_padding()
        return encoder

    def encode(self, name: str, blocks: Iterable[bytes]) -> Iterator[NDArray[Any]]:  # noqa: D102
        for text in _lines_together(_decoded(name, blocks)):
            yield np.array(self._encoder.encode(text, add_special_tokens=False).ids, dtype=self.dtype)

    def decode(self, tokens: Iterable[int]) -> Iterator[str]:  # noqa: D102
        # A token's text may depend on the one before (a blank at the start of a word), so each piece is decoded behind
        # the piece before it, and not from the beginning of the text again.
        before: list[int] = []
        pending: list[int] = []
        for token in tokens:
            pending.append(token)
            text = self._text_behind(before, pending)
            if text.endswith(_UNKNOWN) and len(pending) < _MOST_TOKENS_OF_A_CHARACTER:
                continue
            before, pending = pending, []
            if text:
                yield text
        if pending:
            yield self._text_behind(before, pending)

    def _text_behind(self, before: list[int], tokens: list[int]) -> str:
        def decoded(ids: list[int]) -> str:
            return str(self._encoder.decode(ids, skip_special_tokens=False))

        return decoded(before + tokens)[len(decoded(before)) :]


def load_tokenizer(tokenizer: str | os.PathLike[str]) -> Tokenizer:
    """Return the tokenizer that a user named.

    Parameters
    ----------
    tokenizer : str or path
        ``bytes``, or a JSON file of the Hugging Face ``tokenizers`` package.

    Raises
    ------
    ConfigError
        If there is no such file, it is not a tokenizer, or the package is not installed.
    """
    if tokenizer == BYTES:
        return BytesTokenizer()
    path = Path(tokenizer)
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_TOKENIZER_BYTES + 1)
        json = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"tokenizer must be 'bytes' or a JSON file, got {str(tokenizer)!r}: {error}") from error
    if len(content) > MAX_TOKENIZER_BYTES:
        raise ConfigError(f"tokenizer {path} is longer than {MAX_TOKENIZER_BYTES} bytes")
    vocabulary = _parsed(str(path), json).get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise ConfigError(f"tokenizer {path} has an empty vocabulary; needs at least 1 token")
    return JsonTokenizer(path.name, max(vocabulary.values()) + 1, json)


def _parsed(name: str, json: str) -> Any:
    """Return the package's tokenizer of a file's content."""
    package = _tokenizers()
    try:
        return package.Tokenizer.from_str(json)
    except Exception as error:  # the package raises Exception itself
        raise ConfigError(f"{name} is not a tokenizer of the tokenizers package: {one_line(str(error))}") from error


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError("a tokenizer file needs the tokenizers package; try: pip install tokenizers") from error
    return tokenizers


def _decoded(name: str, blocks: Iterable[bytes]) -> Iterator[str]:
    """Decode UTF-8, characters cut by blocks included."""
    make_decoder = codecs.getincrementaldecoder("utf-8")
    decoder = make_decoder("strict")
    for block in chain(blocks, [b""]):
        pending, _ = decoder.getstate()
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            warnings.warn(f"{name}: bytes that are not UTF-8 become U+FFFD: {error.reason}", stacklevel=2)
            decoder = make_decoder("replace")
            text = decoder.decode(pending + block, final=not block)
        yield text


def _lines_together(texts: Iterable[str]) -> Iterator[str]:
    """Cut text anew, into the longest pieces of whole lines that `TEXT_BLOCK_CHARACTERS` allow."""
    pending = ""
    for text in texts:
        pending += text
        start = 0
        while len(pending) - start > TEXT_BLOCK_CHARACTERS:
            limit = start + TEXT_BLOCK_CHARACTERS
            stop = pending.rfind("\n", start, limit) + 1 or limit
            yield pending[start:stop]
            start = stop
        pending = pending[start:]
    if pending:
        yield pending
