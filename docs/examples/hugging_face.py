"""Give a Hugging Face decoder a longer context: dilated attention instead of its own, YaRN for its positions, training.

    python docs/examples/hugging_face.py                                          # a small Llama with random weights
    python docs/examples/hugging_face.py --model my_llama/ --factor 8 --text my_texts/*.txt --output my_longer_llama/

The first branch of the pattern is a segment as long as the context that the model knew, without dilation; the others
are longer and as much sparser, so that a token costs about the same at any length. Needs the extra `transformers`.
"""

import argparse
import inspect
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Trainer, TrainingArguments

from longnet_hpc import Pattern
from longnet_hpc.integrations.transformers import register


def small_llama(context):
    """Return a Llama over bytes with random weights, which knows a context of some tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def with_longer_context(model, factor, ratio):
    """Return the same weights in a model for a context ``factor`` times as long, with dilated attention."""
    config, context = model.config, model.config.max_position_embeddings
    theta = config.rope_parameters["rope_theta"]
    config.max_position_embeddings = factor * context
    config.rope_parameters = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": float(factor),
        "original_max_position_embeddings": context,
    }
    pattern = Pattern.geometric(factor * context, base=context, ratio=ratio)
    register(pattern.segment_lengths, pattern.dilation_rates)
    print(f"w = {list(pattern.segment_lengths)}, r = {list(pattern.dilation_rates)}")
    longer = AutoModelForCausalLM.from_config(config, dtype=model.dtype, attn_implementation="longnet")
    longer.load_state_dict(model.state_dict())
    return longer


def sequences(texts, tokenizer, length):
    """Return the tokens of all texts, cut into sequences of one length; bytes where there is no tokenizer."""
    if tokenizer is None:
        tokens = torch.tensor(list("\n".join(texts).encode()))
    else:
        tokens = torch.tensor([token for text in texts for token in tokenizer(text)["input_ids"]])
    return tokens[: len(tokens) // length * length].view(-1, length)


@torch.no_grad()
def loss_of_last_quarter(model, x):
    """Return the mean loss in nats a token over what only a long context leads up to."""
    labels = x.clone()
    labels[:, : 3 * x.shape[1] // 4] = -100
    return float(model.eval()(x.to(model.device), labels=labels.to(model.device)).loss)


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model of `transformers` with its tokenizer")
    parser.add_argument("--text", type=Path, nargs="+", help="files to train on (default: a module of Python)")
    parser.add_argument("--context", type=int, default=512, help="tokens that the small Llama knows (default: 512)")
    parser.add_argument("--factor", type=int, default=8, help="how many times as long the context becomes (default: 8)")
    parser.add_argument("--ratio", type=int, default=4, help="how much longer and sparser each branch is (default: 4)")
    parser.add_argument("--steps", type=int, default=20, help="training steps (default: 20)")
    parser.add_argument(
        "--learning-rate", type=float, help="of training (default: 1e-3 for the small Llama, 2e-5 for a model of yours)"
    )
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to generate (default: 64)")
    parser.add_argument("--output", type=Path, default=Path("runs/hugging_face"), help="folder of the longer model")
    options = parser.parse_args(words)

    tokenizer = AutoTokenizer.from_pretrained(options.model) if options.model else None
    model = AutoModelForCausalLM.from_pretrained(options.model) if options.model else small_llama(options.context)
    rope = getattr(model.config, "rope_parameters", None) or {}
    if (kind := rope.get("rope_type")) != "default":  # which YaRN would silently take the place of
        parser.error(f"the positions of {options.model} must have rope_type 'default', got {kind!r}")
    longer = with_longer_context(model, options.factor, options.ratio)
    texts = [path.read_text() for path in options.text or [Path(inspect.getsourcefile(argparse))]]
    length = longer.config.max_position_embeddings
    x = sequences(texts, tokenizer, length)
    if len(x) == 0:
        parser.error(f"--text must have at least one sequence of {length} tokens, {options.factor} times the context")
    learning_rate = options.learning_rate or (2e-5 if options.model else 1e-3)

    before = loss_of_last_quarter(longer, x[:1])
    arguments = TrainingArguments(
        str(options.output), max_steps=options.steps, per_device_train_batch_size=1, learning_rate=learning_rate,
        logging_steps=max(1, options.steps // 5), save_strategy="no", report_to=[], activation_checkpointing=True,
    )  # fmt: skip
    Trainer(longer, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in x]).train()
    after = loss_of_last_quarter(longer, x[:1])
    print(f"loss at the end of {x.shape[1]} tokens: {before:.3f} before, {after:.3f} after")

    longer.save_pretrained(options.output)  # once loaded, register() and attn_implementation="longnet" again
    prompt = x[:1, : -options.new_tokens].to(longer.device)
    new = longer.generate(prompt, max_new_tokens=options.new_tokens, do_sample=False)[0, prompt.shape[1] :].tolist()
    print(repr(tokenizer.decode(new) if tokenizer else bytes(new).decode(errors="replace")))


if __name__ == "__main__":
    main()
