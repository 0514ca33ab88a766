"""LongNet as a model of `transformers`: the real package, small random weights, no downloads."""

import importlib
import re
import sys

import pytest

pytest.importorskip("transformers")

import torch
from hugging_face import assert_same, loss_and_gradients, tokens
from launching import ROOT
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache, Trainer, TrainingArguments

from longnet_hpc import LongNet, LongNetConfig, load_model
from longnet_hpc.errors import CheckpointError, ConfigError, ShapeError
from longnet_hpc.generate import generate
from longnet_hpc.integrations.transformers import LongNetForCausalLM, LongNetPretrainedConfig, own_slice
from longnet_hpc.positions import longest_xpos

SIZES = {
    "vocab_size": 61, "layers": 2, "embed_dim": 32, "heads": 4, "kv_heads": 2,
    "segment_lengths": [8, 40], "dilation_rates": [1, 3],
}  # fmt: skip


def model_of(**changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LongNetPretrainedConfig(**{**SIZES, **changes})).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_config_goes_to_longnet_and_back(tied):
    config = LongNetPretrainedConfig(**SIZES, tie_word_embeddings=tied, positions="xpos", dropout=0.5)
    ours = config.to_longnet()
    assert ours == LongNetConfig(
        **{**SIZES, "segment_lengths": (8, 40), "dilation_rates": (1, 3)}, tie_head=tied, positions="xpos", dropout=0.5
    )
    assert LongNetPretrainedConfig.from_longnet(ours).to_longnet() == ours
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 2, 4)


@pytest.mark.parametrize(
    "changes", [{"heads": 5}, {"positions": "absolute"}, {"dilation_rates": [1]}, {"dropout": 1.0}]
)
def test_config_that_cannot_be_is_an_error(changes):
    with pytest.raises(ValueError, match="heads|positions|pair up|dropout"):
        LongNetPretrainedConfig(**{**SIZES, **changes})


def test_logits_and_loss_are_those_of_longnet():
    model, x = model_of(), tokens(2, 50)
    labels = x.masked_fill(x < 20, -100)
    answer = model(x, labels=labels)
    assert torch.equal(answer.logits, model.longnet(x))
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    mean = model.longnet.loss(x, following) / (following != -100).sum()
    torch.testing.assert_close(answer.loss, mean.float())
    assert torch.equal(model(x, logits_to_keep=3).logits, answer.logits[:, -3:])
    assert torch.equal(model(x, return_dict=False)[0], answer.logits)


def test_weights_are_drawn_as_those_of_longnet():
    model = model_of(tie_word_embeddings=False, embed_dim=128)
    ours = LongNet(model.longnet.config)
    for (name, drawn), (_, expected) in zip(model.longnet.named_parameters(), ours.named_parameters(), strict=True):
        torch.testing.assert_close(drawn.std(), expected.std(), atol=0.001, rtol=0.05, msg=name)
        torch.testing.assert_close(drawn.mean(), expected.mean(), atol=0.05, rtol=0.05, msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_is_loaded_by_the_auto_classes(tmp_path, tied):
    model, x = model_of(tie_word_embeddings=tied), tokens(1, 30)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is LongNetForCausalLM
    assert AutoConfig.from_pretrained(tmp_path).to_longnet() == model.longnet.config
    assert (loaded.longnet.head.weight is loaded.longnet.embedding.weight) == tied
    assert torch.equal(loaded(x).logits, model(x).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.longnet.blocks[0].q_proj.weight.dtype == torch.bfloat16
    torch.testing.assert_close(half(x).logits, model(x).logits, atol=0.2, rtol=0.1)


def test_checkpoints_go_both_ways(tmp_path):
    model, x = model_of(), tokens(1, 30)
    path = model.save_checkpoint(tmp_path)
    for place in (path, tmp_path, str(tmp_path)):
        assert torch.equal(LongNetForCausalLM.from_checkpoint(place)(x).logits, model(x).logits)
    assert torch.equal(load_model(tmp_path)(x), model(x).logits)
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        LongNetForCausalLM.from_checkpoint(tmp_path / "nothing")


@pytest.mark.parametrize("positions", ["rotary", "xpos"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_is_that_without_and_that_of_ours(positions, beams):
    model, prompts = model_of(positions=positions), tokens(2, 13)
    how = {"max_new_tokens": 40, "do_sample": False, "num_beams": beams}
    made = model.generate(prompts, **how)
    assert made.shape == (2, 53)
    assert torch.equal(made, model.generate(prompts, use_cache=False, **how))
    if beams == 1:
        assert torch.equal(made[:, 13:], torch.stack(list(generate(model.longnet, prompts, 40)), dim=1))


@pytest.mark.parametrize("positions", ["rotary", "xpos"])
def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(positions):
    model, x, cache = model_of(positions=positions), tokens(2, 45), DynamicCache()
    with torch.no_grad():
        parts = [model(piece, cache=cache).logits for piece in x.split([11, 1, 17, 2, 14], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(x).logits, atol=1e-5, rtol=1e-5)


def test_the_former_name_of_the_cache_is_taken_and_warned_of():
    model, x, cache = model_of(), tokens(1, 30), DynamicCache()
    with torch.no_grad():
        model(x[:, :20], cache=cache)
        with pytest.warns(FutureWarning, match="Use `cache`"):
            last = model(x[:, 20:], past_key_values=cache, output_attentions=False, head_mask=None).logits
        torch.testing.assert_close(last, model(x).logits[:, 20:], atol=1e-5, rtol=1e-5)


def test_xpos_with_a_cache_reaches_as_far_as_the_dtype_of_autocast_lets_it():
    model = model_of(positions="xpos", layers=1)
    x = tokens(1, longest_xpos(torch.float16) + 1)
    with torch.no_grad():
        model(x)
        with torch.autocast("cpu", torch.float16), pytest.raises(ConfigError, match="reaches 2266 tokens, got 2267"):
            model(x)


def test_padding_on_the_right_changes_no_token_before_it():
    model, x = model_of(), tokens(2, 30)
    mask = torch.ones_like(x)
    mask[1, 17:] = 0
    padded = model(x.masked_fill(mask == 0, 0), attention_mask=mask).logits
    torch.testing.assert_close(padded[1, :17], model(x[1:, :17]).logits[0])


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("padding on the left", lambda m, x: m(x, attention_mask=torch.arange(10).expand(2, -1))),
        ("position_ids", lambda m, x: m(x, position_ids=torch.arange(1, 11)[None])),
        ("output_attentions", lambda m, x: m(x, output_attentions=True)),
        ("inputs_embeds", lambda m, x: m(x, inputs_embeds=torch.ones(2, 10, 32))),
        ("inputs_embedding is not", lambda m, x: m(x, inputs_embedding=0)),
        ("cu_seq_lens_q is not", lambda m, x: m(x, cu_seq_lens_q=torch.tensor([0, 5, 10]))),
        ("position_ids", lambda m, x: m(x, position_ids=torch.arange(9)[None])),
        ("shift_labels must be shaped", lambda m, x: m(x, labels=x, shift_labels=x[:, 1:])),
        ("DynamicCache", lambda m, x: m(x, cache=StaticCache(config=m.config, max_cache_len=20))),
    ],
)
def test_what_longnet_cannot_honour_is_an_error(words, call):
    with pytest.raises(ConfigError, match=words):
        call(model_of(), tokens(2, 10))


def test_tokens_outside_the_vocabulary_are_an_error_until_it_grows():
    model = model_of()
    x = torch.full((1, 5), 61)
    with pytest.raises(ShapeError, match="outside the vocabulary of 61"):
        model(x)
    model.resize_token_embeddings(64)
    assert model(x).logits.shape == (1, 5, 64)
    assert model.longnet.head.weight is model.longnet.embedding.weight


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.1}])
def test_trainer_lowers_the_loss(tmp_path, changes):
    x = tokens(4, 32)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, activation_checkpointing=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model_of(**changes), arguments, train_dataset=[{"input_ids": row, "labels": row} for row in x])
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 3
    assert losses[-1] < losses[0] - 0.1


def test_checkpointed_activations_give_the_same_gradients_and_one_rank_owns_all():
    x = tokens(2, 40)
    model = model_of().train()
    wanted = loss_and_gradients(model, input_ids=x, labels=x)
    model.activation_checkpointing_enable()
    assert_same(loss_and_gradients(model, **own_slice(x, None, labels=x)), wanted, 1e-6)
    assert model.longnet.activation_checkpointing


def test_transformers_that_is_too_old_is_said_in_one_line(monkeypatch):
    name = "longnet_hpc.integrations.transformers"
    (oldest,) = set(re.findall("transformers>=([0-9.]*)", (ROOT / "setup.py").read_text()))
    monkeypatch.setattr("transformers.__version__", "5.17.0")
    monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=f"needs transformers {oldest} or later, found 5.17.0: pip install"):
        importlib.import_module(name)
