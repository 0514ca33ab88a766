"""Models of `transformers` whose sequences are shared by several ranks."""

import pytest

pytest.importorskip("transformers")

import torch
from hugging_face import VOCAB, loss_and_gradients, model_of, tokens
from parallel_case import assert_all_close
from transformers import DynamicCache

from longnet_hpc.comm import all_reduce_sum
from longnet_hpc.errors import ConfigError, PartitionError, ShapeError
from longnet_hpc.integrations.transformers import LongNetForCausalLM, LongNetPretrainedConfig, own_slice, register

pytestmark = pytest.mark.mpi(min_size=2)

PATTERN = [8, 64, 27], [1, 4, 3]


@pytest.mark.parametrize("family", ["llama", "llama, yarn", "qwen3", "gemma"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_of_ranks_add_up_to_those_of_one_process(comm, family, checkpointing):
    x = tokens(2, 71)
    labels = x.masked_fill(x < 20, -100)
    register(*PATTERN)
    model = model_of(family)
    loss, logits, gradients = loss_and_gradients(model, input_ids=x, labels=labels)
    register(*PATTERN, comm=comm)
    if checkpointing:
        model.activation_checkpointing_enable()
        model.train()
    own = own_slice(x, comm, labels=labels)
    its_loss, its_logits, its_gradients = loss_and_gradients(model, **own)
    start = int(own["position_ids"][0, 0])
    pairs = [(its_logits, logits[:, start : start + its_logits.shape[1]]), (all_reduce_sum(comm, its_loss), loss)]
    for name, gradient in gradients.items():
        scale = gradient.abs().max()
        pairs.append((all_reduce_sum(comm, its_gradients[name]) / scale, gradient / scale))
    assert_all_close(comm, pairs, 1e-5)


def refused(comm, words, spoil, kind=ConfigError, family="llama"):
    """Fail unless all ranks raise, where the last rank alone passes something else."""
    register(*PATTERN, comm=comm)
    model, own = model_of(family), own_slice(tokens(1, 40), comm)
    if comm.rank == comm.size - 1:
        spoil(own)
    with pytest.raises(kind, match=words):
        model(**own)


@pytest.mark.parametrize(
    ("words", "spoil"),
    [
        ("attention_mask", lambda own: own.update(attention_mask=torch.zeros_like(own["input_ids"]))),
        ("mask of one's own", lambda own: own.update(attention_mask=torch.zeros(1, 1, 20, 20))),
        ("packed", lambda own: own["position_ids"][:, 5:].add_(3)),
        (r"begin at 0, but its slice at \d\d", lambda own: own.update(position_ids=None)),
        ("output_attentions", lambda own: own.update(output_attentions=True)),
    ],
)
def test_fault_on_one_rank_is_an_error_on_all(comm, words, spoil):
    refused(comm, words, spoil)


def test_fewer_sequences_on_one_rank_are_an_error_on_all(comm):
    refused(comm, "batch", lambda own: own.update(input_ids=own["input_ids"].repeat(2, 1)), ShapeError)


def test_sliding_windows_run_on_one_rank_only(comm):
    refused(comm, "sliding window", lambda own: None, family="gemma3")


def test_a_cache_with_earlier_tokens_is_an_error(comm):
    register(*PATTERN, comm=comm)
    model, own = model_of("llama"), own_slice(tokens(1, 40), comm)
    cache = model(own["input_ids"], position_ids=own["position_ids"], use_cache=True).cache
    with pytest.raises(ConfigError, match="use_cache=False"):
        model(own["input_ids"][:, :1], cache=cache)


def test_fewer_tokens_than_ranks_are_an_error(comm):
    with pytest.raises(PartitionError, match="cannot be cut"):
        own_slice(tokens(1, comm.size - 1), comm)


def longnet():
    torch.manual_seed(0)
    pattern = {"segment_lengths": PATTERN[0], "dilation_rates": PATTERN[1]}
    sizes = {"vocab_size": VOCAB, "layers": 2, "embed_dim": 32, "heads": 4, "kv_heads": 2}
    return LongNetForCausalLM(LongNetPretrainedConfig(**sizes, **pattern))


def test_loss_and_gradients_of_longnet_with_a_plan_add_up_to_those_of_one_process(comm):
    x = tokens(2, 71)
    labels = x.masked_fill(x < 20, -100)
    model = longnet()
    loss, logits, gradients = loss_and_gradients(model, input_ids=x, labels=labels)
    own = own_slice(x, comm, labels=labels, pattern=model.longnet.config.pattern)
    its_loss, its_logits, its_gradients = loss_and_gradients(model, **own)
    start = own["plan"].start
    pairs = [(its_logits, logits[:, start : start + its_logits.shape[1]]), (all_reduce_sum(comm, its_loss), loss)]
    for name, gradient in gradients.items():
        scale = gradient.abs().max()
        pairs.append((all_reduce_sum(comm, its_gradients[name]) / scale, gradient / scale))
    assert_all_close(comm, pairs, 1e-5)


@pytest.mark.parametrize(
    ("words", "spoil"),
    [
        ("output_attentions", lambda own: own.update(output_attentions=True)),
        ("padding on the left", lambda own: own.update(attention_mask=torch.arange(own["input_ids"].shape[1])[None])),
        ("no cache", lambda own: own.update(cache=DynamicCache())),
        ("position_ids", lambda own: own["position_ids"][:, 5:].add_(3)),
        ("labels", lambda own: own.update(labels=own["labels"][:, 1:])),
        ("outside the vocabulary", lambda own: own["input_ids"].add_(VOCAB)),
    ],
)
def test_fault_on_one_rank_of_a_plan_is_an_error_on_all(comm, words, spoil):
    model, x = longnet(), tokens(1, 40)
    own = own_slice(x, comm, labels=x, pattern=model.longnet.config.pattern)
    if comm.rank == comm.size - 1:
        spoil(own)
    with pytest.raises((ConfigError, ShapeError), match=words):
        model(**own)
