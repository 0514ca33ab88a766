"""Tokens go on as if the model were run anew over all of them for every one; how they are drawn."""

import math

import pytest
import torch
from cases import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import micro_model, tokens
from test_stream import model_of

from longnet_hpc import LongNet, carry
from longnet_hpc import generate as generate_module
from longnet_hpc.errors import CheckpointError, ConfigError, ShapeError
from longnet_hpc.generate import generate, truncated

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def made(model, prompt, count, **options):
    return torch.stack(list(generate(model, prompt, count, **options)), 1)


def drawn(model, prompt, count, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return made(model, prompt, count, **{"temperature": 1.0, "generator": generator, **options})


@torch.no_grad()
def made_anew(model, prompt, count):
    for _ in range(count):
        prompt = torch.cat((prompt, model(prompt)[:, -1:].argmax(-1)), 1)
    return prompt[:, -count:]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    case=cases(max_seq=48),
    count=st.integers(1, 12),
    chunk_len=st.integers(1, 60),
    positions=st.sampled_from(["rotary", "xpos"]),
)
def test_tokens_are_those_of_a_model_run_anew_over_all_before(case, count, chunk_len, positions):
    model = model_of(case, torch.float64, positions=positions)
    prompt = tokens(case.seq, batch=case.batch, seed=case.seed)
    assert made(model, prompt, count, chunk_len=chunk_len).equal(made_anew(model, prompt, count))


def test_samples_are_continuations_of_the_same_prompt():
    model, prompt = micro_model(), tokens(30)
    alone = made_anew(model, prompt, 9)
    assert made(model, prompt, 9, samples=3).equal(alone.repeat_interleave(3, 0))
    several = drawn(model, prompt, 9, samples=50)
    assert several.shape == (100, 9)
    assert several.equal(drawn(model, prompt.repeat_interleave(50, 0), 9))
    assert len(several.unique(dim=0)) > 50


def test_a_seed_gives_the_same_tokens_whatever_the_chunks():
    model, prompt = micro_model(), tokens(50)
    one = drawn(model, prompt, 20, seed=1, chunk_len=7)
    assert one.equal(drawn(model, prompt, 20, seed=1, chunk_len=64))
    assert not one.equal(drawn(model, prompt, 20, seed=2, chunk_len=7))


def test_tokens_are_drawn_as_often_as_they_are_probable():
    model, prompt = micro_model(), tokens(40, batch=1)
    (first,) = drawn(model, prompt, 1, samples=20_000, temperature=0.5).T
    expected = (model(prompt)[0, -1] / 0.5).softmax(-1)
    frequency = first.bincount(minlength=17) / 20_000
    assert ((frequency - expected).abs() < 5 * (expected / 20_000).sqrt() + 1e-3).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-320}, {"temperature": 1e-6}])
def test_drawing_from_one_token_takes_the_most_probable(options, dtype):
    model, prompt = micro_model().to(dtype), tokens(30)
    model.norm.weight.data *= 100  # logits that a low temperature makes infinite
    assert drawn(model, prompt, 15, **options).equal(made_anew(model, prompt, 15))


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    logits=st.lists(st.integers(-4, 4), min_size=1, max_size=9),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.none() | st.floats(0.01, 1.0),
)
def test_tokens_that_are_kept_are_the_fewest_of_the_most_probable(logits, top_k, top_p):
    by_rank = sorted(range(len(logits)), key=lambda token: -logits[token])[:top_k]
    total = math.fsum(math.exp(logits[token]) for token in by_rank)
    expected, mass = set(), 0.0
    for token in by_rank:
        if top_p is not None and mass >= top_p - 1e-12 and top_p < 1.0:
            break
        expected.add(token)
        mass += math.exp(logits[token]) / total
    given_logits = torch.tensor([logits, logits], dtype=torch.float64)
    result = truncated(given_logits, top_k, top_p)
    for row in result:
        assert {token for token, value in enumerate(row.tolist()) if value > -math.inf} == expected
    assert result[result > -math.inf].equal(given_logits[result > -math.inf])


@pytest.fixture
def streams(monkeypatch):
    """Collect the streams that are made."""
    collected = []

    def stream(*words, **options):
        collected.append(made_stream(*words, **options))
        return collected[-1]

    made_stream = generate_module.SequenceStream
    monkeypatch.setattr(generate_module, "SequenceStream", stream)
    return collected


def test_neither_memory_nor_rows_seen_grow_with_the_prompt(streams, monkeypatch):
    seen = []

    def counted(backend, q, k, v, pairs, total, **options):
        seen.append(sum(kept.rows * kept.heads for _, kept in pairs))
        attend(backend, q, k, v, pairs, total, **options)

    attend = carry.attend
    monkeypatch.setattr(carry, "attend", counted)
    model = micro_model(segment_lengths=(8, 64), dilation_rates=(1, 3))
    figures = []
    for prompt_len in (100, 64 * 100):
        steps = generate(model, tokens(prompt_len), 200, chunk_len=32)
        next(steps)
        by_token = []
        for _ in steps:
            by_token.append(sum(seen))
            seen.clear()
        bytes_kept = [sum(rows.nbytes for rows in its.rows.values()) for its in streams[-1].carries]
        figures.append((bytes_kept, max(by_token[1:])))
    assert figures[0] == figures[1]
    # Keys and values of each branch's segment, 2 sequences, 4 heads of 4 features, 8 bytes each.
    assert figures[0][0] == [(8 + 22) * 2 * 2 * 16 * 8] * 2
    assert figures[0][1] <= 2 * 4 * (8 + 22)


def test_only_the_last_hidden_state_of_the_prompt_becomes_logits_and_none_has_a_graph(monkeypatch):
    model, shapes = micro_model(), []
    logits = LongNet.logits

    def watched(self, hidden):
        assert not hidden.requires_grad
        shapes.append(tuple(hidden.shape))
        return logits(self, hidden)

    monkeypatch.setattr(LongNet, "logits", watched)
    made(model, tokens(40), 3, chunk_len=8)
    assert shapes == [(2, 16)] * 3


def test_nothing_of_training_takes_part():
    model, prompt = micro_model(dropout=0.5).train(), tokens(20)
    result = made(model, prompt, 5)
    assert result.equal(made_anew(model.eval(), prompt, 5))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_tokens_may_be_of_any_integer_dtype(dtype):
    model, prompt = micro_model(), tokens(20)
    assert made(model, prompt.to(dtype), 5).equal(made(model, prompt, 5))


@needs_cuda
def test_on_a_gpu_tokens_are_those_of_the_cpu():
    model, prompt = micro_model().float(), tokens(50)
    expected = made(model, prompt, 10)
    assert made(model.cuda(), prompt, 10, samples=2).cpu().equal(expected.repeat_interleave(2, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be at least 0 and finite, got -0.1"),
        ({"temperature": math.nan}, "temperature must be at least 0 and finite, got nan"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"temperature": 0.0, "top_k": 5}, "top_k and top_p choose what is drawn: give a temperature above 0, too"),
        ({"temperature": 0.0, "top_p": 0.9}, "top_k and top_p choose what is drawn: give a temperature above 0, too"),
        ({"chunk_len": 0}, "chunk_len must be at least 1, got 0"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"prompt": torch.zeros(1, 0, dtype=torch.long)}, "prompt must have at least 1 token, got none"),
    ],
)
def test_values_outside_their_limits_are_refused_at_once(options, message):
    with pytest.raises(ConfigError) as caught:
        generate(micro_model(), **{"prompt": tokens(5), "max_new_tokens": 3, **options})
    assert str(caught.value) == message


def test_tensors_that_are_no_prompt_and_models_that_are_no_use_are_refused():
    with pytest.raises(ShapeError, match=r"prompt must be \(batch, seq\), got \(5,\)"):
        generate(micro_model(), tokens(5)[0], 3)
    with pytest.raises(ShapeError, match="token 17 is outside the vocabulary of 17"):
        next(generate(micro_model(), torch.full((1, 3), 17), 3))
    model = micro_model()
    model.norm.weight.data.fill_(math.nan)
    for temperature in (0.0, 1.0):
        with pytest.raises(CheckpointError, match="not finite"):
            next(generate(model, tokens(5), 3, temperature=temperature))
