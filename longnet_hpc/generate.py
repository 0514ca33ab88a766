"""Generation: a sequence goes on token by token, on the state that `SequenceStream` carries.

The prompt goes through the stream in chunks, and each new token is a chunk of its own: time and memory for a token
depend on the segments that are open, and not on how much came before them.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from longnet_hpc.checkpoint import find_checkpoint, load_checkpoint
from longnet_hpc.comm.launch import Launch
from longnet_hpc.compute import Compute
from longnet_hpc.config import GenerateConfig
from longnet_hpc.data import Corpus, load_tokenizer
from longnet_hpc.data.sources import find_units
from longnet_hpc.data.tokenizer import BytesTokenizer, Tokenizer
from longnet_hpc.errors import CheckpointError, ConfigError, ShapeError
from longnet_hpc.model import LongNet
from longnet_hpc.model_config import LongNetConfig
from longnet_hpc.optimizer import load_weights
from longnet_hpc.stream import SequenceStream

__all__ = ["Generation", "generate", "truncated", "write_text"]


def generate(
    model: LongNet,
    prompt: torch.Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    samples: int = 1,
    generator: torch.Generator | None = None,
    chunk_len: int = 8192,
    backend: str = "auto",
) -> Iterator[torch.Tensor]:
    """Return an iterator over the tokens that follow a prompt, each as soon as it is made.

    Parameters
    ----------
    model : LongNet
        Put into evaluation mode; computes where its weights lie, under the caller's autocast.
    prompt : torch.Tensor
        ``(batch, prompt_len)``, an integer dtype, on any device; at least one token.
    max_new_tokens : int
        Tokens to make for each sequence.
    temperature : float
        Divisor of the logits before a token is drawn; 0 takes the most probable token.
    top_k : int, optional
        Draw from this many tokens, the most probable ones.
    top_p : float, optional
        Draw from the fewest tokens whose probabilities, after the temperature and among `top_k`, sum up to this.
    samples : int
        Continuations of each sequence, which read the prompt once.
    generator : torch.Generator, optional
        What draws, on the device of the model; torch's own by default.
    chunk_len : int
        Tokens of the prompt that are computed at once. Has no influence on the result but by rounding.
    backend : str
        Name of the attention backend.

    Returns
    -------
    iterator of torch.Tensor
        ``max_new_tokens`` times ``(batch * samples,)``, int64, on the device of the model; the samples of one sequence
        are neighbours.

    Raises
    ------
    ConfigError
        If a value is outside its limits, or the prompt is empty.
    ShapeError
        If the prompt is not two-dimensional; while iterating, if its tokens are not integers within the vocabulary.
    CheckpointError
        While iterating, if the model gives logits that are not finite.
    """
    config = GenerateConfig(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, samples=samples,
        chunk_len=chunk_len, backend=backend,
    )  # fmt: skip
    if prompt.dim() != 2:
        raise ShapeError(f"prompt must be (batch, seq), got {tuple(prompt.shape)}")
    if prompt.shape[1] == 0:
        raise ConfigError("prompt must have at least 1 token, got none")
    return _generate(model.eval(), prompt, config, generator)


def _generate(
    model: LongNet, prompt: torch.Tensor, config: GenerateConfig, generator: torch.Generator | None
) -> Iterator[torch.Tensor]:
    device, prompt_len = model.embedding.weight.device, prompt.shape[1]
    seq_len = prompt_len + config.max_new_tokens
    layers = model.config.layers
    stream = SequenceStream(model.config.pattern, seq_len, layers=layers, backend=config.backend, device=device)
    for start in range(0, prompt_len, config.chunk_len):
        last = _go_on(model, stream, prompt[:, start : start + config.chunk_len].to(device))
    for carry in stream.carries:
        carry.rows = {index: _repeated(rows, config.samples, dim=2) for index, rows in carry.rows.items()}
    last = _repeated(last, config.samples, dim=0)
    for remaining in reversed(range(config.max_new_tokens)):
        tokens = _choose(model, last, config, generator)
        yield tokens
        if remaining:
            last = _go_on(model, stream, tokens.unsqueeze(1))


@torch.no_grad()
def _go_on(model: LongNet, stream: SequenceStream, tokens: torch.Tensor) -> torch.Tensor:
    """Compute the next chunk ``(batch, chunk)`` of a sequence; return its last hidden state ``(batch, embed_dim)``."""
    with stream.next_chunk(tokens.shape[1]) as plan:
        return model.hidden(tokens, plan)[:, -1].clone()  # the others are no longer needed


def _repeated(x: torch.Tensor, times: int, dim: int) -> torch.Tensor:
    return x if times == 1 else x.repeat_interleave(times, dim)


@torch.no_grad()
def _choose(
    model: LongNet, hidden: torch.Tensor, config: GenerateConfig, generator: torch.Generator | None
) -> torch.Tensor:
    """Return the tokens ``(batch,)`` that follow hidden states ``(batch, embed_dim)``."""
    logits = model.logits(hidden)
    if not torch.isfinite(logits).all():
        raise CheckpointError("model is of no use: its logits are not finite")
    if config.temperature == 0.0:
        return logits.argmax(-1)
    temperature = max(config.temperature, torch.finfo(logits.dtype).tiny)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the largest is 0, however low the temperature
    weights = truncated(logits, config.top_k, config.top_p).softmax(-1)
    return torch.multinomial(weights, 1, generator=generator).squeeze(1)


def truncated(logits: torch.Tensor, top_k: int | None = None, top_p: float | None = None) -> torch.Tensor:
    """Return logits with those that are not to be drawn at -inf.

    Parameters
    ----------
    logits : torch.Tensor
        ``(..., vocab_size)``.
    top_k : int, optional
        Keep at most this many; of equal ones the first.
    top_p : float, optional
        Keep the fewest of these whose probabilities, after ``top_k``, sum up to at least this; always one.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered[..., top_k:] = -torch.inf
    if top_p is not None and top_p < 1.0:
        probabilities = ordered.softmax(-1)
        if torch.are_deterministic_algorithms_enabled():
            probabilities = probabilities.cpu()  # a GPU adds up in no fixed order
        before = (probabilities.cumsum(-1) - probabilities).to(logits.device)
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


@dataclass(frozen=True)
class Generation:
    """What the making of texts took."""

    prompt_tokens: int
    """Tokens of the prompt."""
    prefill_seconds: float
    """Seconds until the first token of each text was there."""
    new_tokens: int
    """Tokens of all texts."""
    later_tokens: int
    """Those of them that came after the first of each text."""
    seconds: float
    """Seconds that these took."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all texts a second, without the prefill; not a number where there is one token a text."""
        return self.later_tokens / self.seconds if self.later_tokens else math.nan


def write_text(config: GenerateConfig, launch: Launch, write: Callable[[str], object]) -> Generation:
    """Go on with a prompt by a checkpoint, as configured.

    Parameters
    ----------
    config : GenerateConfig
        Checkpoint, prompt, and how to go on.
    launch : Launch
        This process, the only one.
    write : callable
        Takes the text piece by piece: the first sample as it is made, then the others.

    Returns
    -------
    Generation
        What it took.

    Raises
    ------
    LongNetError or OSError
        If there are several ranks, or checkpoint, tokenizer, prompt and config do not fit together.
    """
    if launch.size > 1:
        raise ConfigError(f"generate runs on one rank, got {launch.size}; start it without mpirun or srun -n")
    if config.checkpoint is None:
        raise ConfigError("generate needs --checkpoint: a checkpoint file or the folder of a run")
    if (config.prompt is None) == (config.prompt_file is None):
        raise ConfigError(
            f"generate needs --prompt or --prompt-file, got {'both' if config.prompt_file else 'neither'}"
        )
    checkpoint = load_checkpoint(find_checkpoint(config.checkpoint), weights_only=True)
    tokenizer = _tokenizer_of(config, checkpoint.model_config)
    prompt = _prompt_of(config, tokenizer)
    seq_len = prompt.shape[1] + config.max_new_tokens
    compute = Compute(config, launch, checkpoint.model_config, seq_len)
    model = LongNet(checkpoint.model_config)
    load_weights(model, checkpoint.tensors)
    model = model.to(compute.device)

    steps: list[list[int]] = []
    times = [time.perf_counter()]

    def first_sample() -> Iterator[int]:
        made = generate(
            model,
            prompt,
            config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            samples=config.samples,
            generator=torch.Generator(compute.device).manual_seed(config.seed),
            chunk_len=config.chunk_len,
            backend=config.backend,
        )
        with compute.autocast():
            for tokens in made:
                steps.append(tokens.tolist())
                times.append(time.perf_counter())
                yield steps[-1][0]

    for sample in range(config.samples):
        if config.samples > 1:
            write(f"--- {sample + 1} of {config.samples}\n")
        for text in tokenizer.decode(first_sample() if sample == 0 else (tokens[sample] for tokens in steps)):
            write(text)
        write("\n")
    return Generation(
        prompt_tokens=prompt.shape[1],
        prefill_seconds=times[1] - times[0],
        new_tokens=config.samples * len(steps),
        later_tokens=config.samples * (len(steps) - 1),
        seconds=times[-1] - times[1],
    )


def _tokenizer_of(config: GenerateConfig, model: LongNetConfig) -> Tokenizer:
    """Return the tokenizer that a user named, or bytes where the model may have been trained on these."""
    if config.tokenizer is None:
        if model.vocab_size != BytesTokenizer().vocab_size:
            raise ConfigError(
                f"model knows {model.vocab_size} token values, not the 256 of bytes: "
                "give --tokenizer, the JSON file or corpus that it was trained with"
            )
        return BytesTokenizer()
    if Path(config.tokenizer).suffix == ".h5":
        with Corpus(Path(config.tokenizer)) as corpus:
            tokenizer = corpus.tokenizer
    else:
        tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"tokenizer {config.tokenizer} has {tokenizer.vocab_size} token values, outside the vocabulary of the "
            f"model (vocab_size {model.vocab_size})"
        )
    return tokenizer


def _prompt_of(config: GenerateConfig, tokenizer: Tokenizer) -> torch.Tensor:
    """Return the tokens of the prompt, ``(1, prompt_len)``; read block by block, so that only these are held."""
    if config.prompt is not None:
        blocks = tokenizer.encode("prompt", [os.fsencode(config.prompt)])
    else:
        assert config.prompt_file is not None
        documents = chain.from_iterable(unit.documents() for unit in find_units([config.prompt_file]))
        blocks = chain.from_iterable(tokenizer.encode(name, content) for name, content in documents)
    tokens = np.concatenate([np.empty(0, tokenizer.dtype), *blocks])
    # Torch has no other unsigned integers to compute with than bytes.
    return torch.from_numpy(tokens if tokens.dtype == np.uint8 else tokens.astype(np.int32)).unsqueeze(0)
