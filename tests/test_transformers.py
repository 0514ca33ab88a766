"""Dilated attention in the decoders of `transformers`: the real package, small random weights, no downloads."""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

import torch
from hugging_face import (
    FAMILIES,
    WITHOUT_WINDOWS,
    assert_same,
    loss_and_gradients,
    model_of,
    register_oracle,
    tokens,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache, Trainer, TrainingArguments

from longnet_hpc.errors import BackendError, ConfigError, PatternError, ShapeError
from longnet_hpc.integrations.transformers import attention, own_slice, register
from longnet_hpc.integrations.transformers.windows import window_attention

DILATED = [8, 40, 11], [1, 4, 3]


def its_own(family):
    """Return the name of attention of the library itself that the family takes."""
    return "eager" if family.startswith("gemma2") else "sdpa"


@pytest.mark.parametrize("family", FAMILIES)
def test_one_segment_without_dilation_is_the_models_own_attention(family):
    x = tokens(2, 40)
    model = model_of(family, its_own(family))
    wanted = loss_and_gradients(model, input_ids=x, labels=x)
    register([40], [1])
    model.set_attn_implementation("longnet")
    assert_same(loss_and_gradients(model, input_ids=x, labels=x), wanted)


@pytest.mark.parametrize("family", WITHOUT_WINDOWS)
def test_dilated_attention_is_that_of_the_definition(family):
    x = tokens(2, 37)
    register(*DILATED)
    register_oracle(*DILATED)
    model = model_of(family)
    got = loss_and_gradients(model, input_ids=x, labels=x)
    model.set_attn_implementation("oracle")
    wanted = loss_and_gradients(model, input_ids=x, labels=x)
    assert_same(got, wanted)
    model.set_attn_implementation(its_own(family))
    assert (model(x).logits - wanted[1]).abs().max() > 0.01  # the pattern matters


def test_registering_again_gives_models_the_new_pattern_and_names_keep_theirs_apart():
    x = tokens(1, 30)
    register([5], [1])
    register([30], [1], name="wide")
    model = model_of("llama").eval()
    narrow = model(x).logits
    model.set_attn_implementation("wide")
    wide = model(x).logits
    assert not torch.allclose(narrow, wide)
    model.set_attn_implementation("longnet")
    register([30], [1])
    assert torch.equal(model(x).logits, wide)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_is_that_without(family, beams):
    register(*DILATED)
    model = model_of(family).eval()
    how = {"max_new_tokens": 30, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    prompts = tokens(2, 13)
    with_cache = model.generate(prompts, use_cache=True, **how)
    without = model.generate(prompts, use_cache=False, **how)
    assert with_cache.shape == (2, 43)
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(family):
    register(*DILATED)
    model, x = model_of(family).eval(), tokens(2, 45)
    with torch.no_grad():
        whole = model(x).logits
        cache = DynamicCache(config=model.config)
        parts = [model(piece, cache=cache).logits for piece in x.split([11, 1, 17, 2, 14], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_padding_on_the_right_changes_no_token_before_it():
    register(*DILATED)
    model, x = model_of("llama").eval(), tokens(2, 30)
    mask = torch.ones_like(x)
    mask[1, 17:] = 0
    padded = model(x.masked_fill(mask == 0, 0), attention_mask=mask).logits
    torch.testing.assert_close(padded[0], model(x[:1]).logits[0])
    torch.testing.assert_close(padded[1, :17], model(x[1:, :17]).logits[0])


def test_autocast_and_bfloat16_weights_compute_in_half_precision(monkeypatch):
    register(*DILATED)
    attend, dtypes = attention.agreed_attention, set()

    def attend_and_note(q, k, v, *others, **named):
        dtypes.update(x.dtype for x in (q, k, v))
        return attend(q, k, v, *others, **named)

    monkeypatch.setattr(attention, "agreed_attention", attend_and_note)
    model, x = model_of("qwen3").eval(), tokens(1, 40)
    wanted = model(x).logits
    assert dtypes == {torch.float32}
    dtypes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).logits.float(), wanted, atol=0.5, rtol=0.1)
    assert dtypes == {torch.bfloat16}
    half = model.to(torch.bfloat16)(x).logits
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), wanted, atol=0.5, rtol=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_takes_the_same_steps_as_with_the_models_own_attention(tmp_path, checkpointing):
    x = tokens(12, 32)
    register([32], [1])
    histories = []
    for implementation in ("sdpa", "longnet"):
        model = model_of("llama", implementation)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
            save_strategy="no", report_to=[], use_cpu=True, activation_checkpointing=checkpointing, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in x])
        trainer.train()
        histories.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert len(histories[1]) == 3
    assert histories[1] == pytest.approx(histories[0], abs=2e-4)  # as it rounds them
    assert histories[1][-1] < histories[1][0]


def test_a_compiled_model_computes_the_same_and_says_what_it_needs():
    register(*DILATED)
    model, x = model_of("llama", num_hidden_layers=1), tokens(1, 40)
    wanted = loss_and_gradients(model, input_ids=x, labels=x)
    compiled = torch.compile(model, backend="aot_eager")
    got = compiled(x, attention_mask=torch.ones_like(x), labels=x, use_cache=False)
    torch.testing.assert_close(got.loss.detach(), wanted[0])
    model.zero_grad()
    got.loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[2][name], msg=name)
    with pytest.raises(ConfigError, match="attention_mask of ones"):
        compiled(x, use_cache=False)


def refused(words, call, *, family="llama", **changes):
    """Fail unless a call with a model raises ConfigError with these words."""
    register(*DILATED)
    model = model_of(family, **changes)
    with pytest.raises(ConfigError, match=words):
        call(model)


X = tokens(2, 20)


def left_padded():
    mask = torch.ones_like(X)
    mask[0, :3] = 0
    return mask


def cached(model, kind):
    cache = kind(config=model.config, max_cache_len=64) if kind is StaticCache else kind(config=model.config)
    return model(X, cache=cache)


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("padding on the left", lambda m: m(X, attention_mask=left_padded())),
        ("before others", lambda m: m.eval().generate(X, attention_mask=left_padded().flip(1), max_new_tokens=2)),
        ("attention mask of one's own", lambda m: m(X, attention_mask=torch.zeros(2, 1, 20, 20))),
        ("packed", lambda m: m(X, position_ids=torch.arange(20).remainder(10)[None], use_cache=False)),
        ("packed", lambda m: m(X, position_ids=torch.arange(20).remainder(10)[None])),
        ("packed", lambda m: m(X, position_ids=torch.tensor([[*range(18), 0, 1]]), attention_mask=torch.ones_like(X))),
        ("packed", lambda m: m(X, position_ids=torch.stack((torch.arange(20), torch.arange(20).remainder(18))))),
        ("packed", lambda m: m(X, cu_seq_lens_q=torch.tensor([0, 10, 20]))),
        ("output_attentions", lambda m: m(X, output_attentions=True)),
        ("DynamicCache", lambda m: cached(m, StaticCache)),
        ("DynamicCache", lambda m: m.generate(X, max_new_tokens=2, cache_implementation="static")),
    ],
)
def test_what_dilated_attention_cannot_honour_is_an_error(words, call):
    refused(words, call)


def test_a_cache_that_forgets_what_is_before_a_window_is_an_error_where_layers_have_none():
    refused("DynamicCache", lambda model: model.generate(X, max_new_tokens=2), sliding_window=6)


def test_positions_that_stay_at_zero_after_the_end_of_a_sequence_are_padding():
    register(*DILATED)
    model, mask = model_of("llama"), torch.ones_like(X)
    mask[0, 15:] = 0
    padded = model(X, attention_mask=mask, position_ids=(mask.cumsum(1) - 1) * mask).logits
    torch.testing.assert_close(padded[0, :15], model(X).logits[0, :15])


def test_values_that_are_not_as_wide_as_keys_are_an_error():
    from transformers import DeepseekV3Config

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
    register(*DILATED)
    config = DeepseekV3Config(**sizes, **ranks, num_key_value_heads=4, vocab_size=61, first_k_dense_replace=1)
    with pytest.raises(ConfigError, match="DeepseekV3Attention they are 12 and 16 wide"):
        AutoModelForCausalLM.from_config(config, attn_implementation="longnet")(X)


def test_a_model_all_of_whose_layers_have_a_window_is_warned_of_once(caplog):
    register(*DILATED)
    for family, changes in (("gemma3", {}), ("mistral", {"sliding_window": 7}), ("mistral", {"sliding_window": 7})):
        model_of(family, **changes)(X)
    (line,) = (record.getMessage() for record in caplog.records if record.name == "longnet_hpc")
    assert line.startswith("all layers of this mistral have a sliding window of 7 tokens")


def test_dropout_of_attention_weights_is_an_error_in_training_alone():
    refused("dropout", lambda model: model.train()(X), attention_dropout=0.1)
    model_of("llama", attention_dropout=0.1).eval()(X)


def test_softcapping_is_an_error():
    refused("softcapping", lambda model: model(X), family="gemma2", attn_logit_softcapping=50.0)


def test_attention_sinks_are_an_error():
    from transformers import GptOssConfig

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = GptOssConfig(**sizes, num_key_value_heads=2, head_dim=8, vocab_size=61, num_local_experts=2)
    register(*DILATED)
    with pytest.raises(ConfigError, match="sinks"):
        AutoModelForCausalLM.from_config(config, attn_implementation="longnet")(X)


def test_chunked_attention_is_an_error():
    from transformers import Llama4TextConfig

    sizes = {"hidden_size": 32, "intermediate_size": 32, "intermediate_size_mlp": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2}
    config = Llama4TextConfig(**sizes, **heads, vocab_size=61, attention_chunk_size=8, pad_token_id=0)
    register(*DILATED)
    with pytest.raises(ConfigError, match="chunks"):
        AutoModelForCausalLM.from_config(config, attn_implementation="longnet")(X)


def test_an_encoder_is_an_error():
    from transformers import BertConfig, BertModel

    register(*DILATED)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    with pytest.raises(ConfigError, match="neither causal"):
        BertModel._from_config(BertConfig(**sizes, vocab_size=61), attn_implementation="longnet")(X)


def test_gradient_through_a_cache_is_an_error():
    register(*DILATED)
    model, cache = model_of("llama"), DynamicCache()
    model(X, cache=cache)
    with pytest.raises(ShapeError, match=r"no gradient.*torch\.no_grad\(\)"):
        model(X, cache=cache)


def test_values_of_register_are_checked():
    with pytest.raises(PatternError):
        register([8, 16], [1])
    with pytest.raises(BackendError, match="nothing"):
        register(backend="nothing")


def test_one_rank_owns_all_of_a_batch():
    x = tokens(2, 24)
    register(*DILATED)
    model = model_of("llama")
    labels = x.clone()
    labels[:, 5:9] = -100
    wanted = loss_and_gradients(model, input_ids=x, labels=labels)
    assert_same(loss_and_gradients(model, **own_slice(x, None, labels=labels)), wanted, 1e-6)
    with pytest.raises(ShapeError, match="at least one token"):
        own_slice(x, None, labels=torch.full_like(x, -100))


def test_example_gives_a_model_a_longer_context(tmp_path, capsys):
    example = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "examples" / "hugging_face.py"))
    words = ["--context", "32", "--factor", "16", "--steps", "3", "--new-tokens", "5", "--output", str(tmp_path)]
    example["main"](words)
    shown = capsys.readouterr().out
    assert "w = [32, 128, 512], r = [1, 4, 16]" in shown
    before, after = map(float, re.search(r"end of 512 tokens: ([\d.]+) before, ([\d.]+) after", shown).groups())
    assert after < before
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="longnet")
    assert model.config.max_position_embeddings == 512


def test_example_says_in_one_line_what_it_cannot_do(tmp_path, capsys):
    example = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "examples" / "hugging_face.py"))
    text = tmp_path / "short.txt"
    text.write_text("short")
    with pytest.raises(SystemExit):
        example["main"](["--context", "32", "--text", str(text), "--output", str(tmp_path)])
    assert "at least one sequence of 256 tokens" in capsys.readouterr().err
    model_of("llama, yarn", "sdpa").save_pretrained(tmp_path / "yarn")
    example["main"].__globals__["AutoTokenizer"] = SimpleNamespace(from_pretrained=lambda folder: None)
    with pytest.raises(SystemExit):
        example["main"](["--model", str(tmp_path / "yarn"), "--output", str(tmp_path)])
    assert "must have rope_type 'default', got 'yarn'" in capsys.readouterr().err


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 23), st.integers(0, 25), st.integers(1, 9), st.sampled_from([(4, 2), (3, 1), (2, 2)]))
def test_attention_within_a_window_is_that_of_a_mask(new, past, window, heads):
    torch.manual_seed(new + past)
    past = min(past, 20)
    q = torch.randn(2, heads[0], new, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, heads[1], past + new, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    out = window_attention(q, k, v, window, 0.7)
    distance = (torch.arange(new) + past)[:, None] - torch.arange(past + new)
    scores = (q @ k.repeat_interleave(heads[0] // heads[1], 1).mT * 0.7).masked_fill(
        (distance < 0) | (distance >= window), -torch.inf
    )
    wanted = scores.softmax(-1) @ v.repeat_interleave(heads[0] // heads[1], 1)
    torch.testing.assert_close(out, wanted)
    dout = torch.randn_like(wanted)
    for got, expected in zip(
        torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(wanted, (q, k, v), dout), strict=True
    ):
        torch.testing.assert_close(got, expected)
