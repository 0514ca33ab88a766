"""The generate command: its text, from a prompt and a tokenizer, as a user meets it, and what it refuses."""

import io
import re
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from launching import MODEL, environment, error_lines, run_command
from test_bad_input import refused  # noqa: F401 - a fixture
from test_generate import made_anew
from test_model import MICRO
from tokenizer_files import trained_on_bytes

from longnet_hpc import LongNet, LongNetConfig, load_model
from longnet_hpc.checkpoint import Checkpoint, DataOrder, save_checkpoint
from longnet_hpc.config_file import to_table
from longnet_hpc.data import load_tokenizer, prepare
from longnet_hpc.data.tokenizer import BytesTokenizer
from longnet_hpc.generate import generate
from longnet_hpc.run import main


def test_bytes_become_text_as_soon_as_a_character_is_whole():
    text = "größe 日本 🙂"
    assert list(BytesTokenizer().decode(text.encode())) == list(text)
    assert list(BytesTokenizer().decode([*b"a\xf0\x9f", ord("b"), 300, 0xE6])) == ["a", "\ufffdb", "\ufffd", "\ufffd"]


def test_tokens_of_a_tokenizer_file_become_the_text_that_they_were(tmp_path):
    for words in bpe_tokenizers(tmp_path):
        tokenizer = load_tokenizer(words)
        text = "def naïve(größe): return '日本語 🙂' * größe\n" * 3
        ids = [int(token) for block in tokenizer.encode("text", [text.encode()]) for token in block]
        pieces = list(tokenizer.decode(ids))
        assert "".join(pieces) == text
        assert len(pieces) > 10
        assert not any("\ufffd" in piece for piece in pieces)


def test_tokens_that_make_no_character_become_a_sign_that_is_not_waited_for(tmp_path):
    tokenizer = load_tokenizer(next(bpe_tokenizers(tmp_path)))
    (emoji,) = tokenizer.encode("emoji", ["🙂".encode()])
    assert len(emoji) == 4
    assert list(tokenizer.decode(emoji[:3].tolist())) == ["\ufffd"]
    pieces = list(tokenizer.decode([int(emoji[0])] * 9))
    assert "".join(pieces) == "\ufffd" * 9
    assert len(pieces) > 1


def bpe_tokenizers(folder):
    """Write two tokenizer files: of bytes, and of words whose blanks belong to the next word."""
    tokenizers = pytest.importorskip("tokenizers")
    by_bytes = trained_on_bytes("def naïve(größe): return größe " * 9, 300)
    by_words = tokenizers.Tokenizer(tokenizers.models.BPE())
    by_words.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    by_words.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, show_progress=False)
    by_words.train_from_iterator(["def naïve(größe): return '日本語 🙂' * größe\n" * 9], trainer)
    for name, tokenizer in (("bytes.json", by_bytes), ("words.json", by_words)):
        tokenizer.save(str(folder / name))
        yield folder / name


def saved(folder, config):
    """Save a model with random weights as a checkpoint; return it and its file."""
    torch.manual_seed(0)
    model = LongNet(config)
    weights = {f"weight.{name}": parameter for name, parameter in model.named_parameters()}
    order = DataOrder(1000, "0", 100, 1, 0, False)
    return model, save_checkpoint(folder, Checkpoint(1, 1, order, to_table(config), weights))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A small model that has learned the text it was trained on by heart."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text("".join("def größe(x):\n    return x + 1\n" for _ in range(400)))
    corpus = prepare([folder / "text.txt"], folder / "corpus.h5")
    words = ("train", *MODEL, "--seq-len", "256", "--batch-size", "4", "--device", "cpu", "--steps", "150")
    options = ("--optimizer.learning-rate", "0.01", "--corpus", str(corpus), "--folder", str(folder / "run"))
    assert main([*words, *options]) == 0
    return folder / "run"


def test_command_goes_on_with_a_prompt(run_folder, capsys):
    text = "def größe(x):\n    return x + 1\n"
    expected = f"öße(x):\n    return x + 1\n{text}d"
    count = len(expected.encode())
    words = ["generate", "--checkpoint", str(run_folder), "--device", "cpu", "--max-new-tokens", str(count)]
    assert main([*words, "--prompt", f"{text}def gr"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{expected}\n"
    last = shown.err.splitlines()[-1]
    assert re.fullmatch(rf"{count} new tokens, [\d,]+\.\d tokens/s; prefill of 39 in \d+\.\d{{3}} s", last)


def test_checkpoint_goes_on_in_python(run_folder):
    text = "def größe(x):\n    return x + 1\n"
    prompt = torch.tensor([list(text.encode())])
    steps = generate(load_model(run_folder), prompt, prompt.shape[1])
    assert bytes(int(tokens) for tokens in steps).decode() == text


def test_prompt_may_come_from_a_file_or_from_standard_input(run_folder, tmp_path, monkeypatch, capsys):
    text = "def größe(x):\n    return x + 1\n" * 40
    (tmp_path / "prompt.txt").write_text(text)
    words = ["generate", "--checkpoint", str(run_folder), "--device", "cpu", "--max-new-tokens", "20"]
    shown = []
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    for source in (("--prompt", text), ("--prompt-file", str(tmp_path / "prompt.txt")), ("--prompt-file", "-")):
        assert main([*words, *source, "--chunk-len", "100"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown == [shown[0]] * 3
    assert len(shown[0].encode()) >= 20


def test_several_samples_come_one_after_the_other_and_depend_on_the_seed(run_folder, capsys):
    words = ["generate", "--checkpoint", str(run_folder), "--device", "cpu", "--max-new-tokens", "30", "--prompt", "d"]
    options = ("--samples", "3", "--temperature", "2.0", "--top-k", "40", "--top-p", "0.99")
    shown = []
    for more in (("--seed", "5"), ("--seed", "5", "--chunk-len", "1"), ("--seed", "6")):
        assert main([*words, *options, *more]) == 0
        shown.append(capsys.readouterr())
    assert shown[0].out == shown[1].out != shown[2].out
    first, second, third = re.fullmatch(
        r"--- 1 of 3\n(.*)\n--- 2 of 3\n(.*)\n--- 3 of 3\n(.*)\n", shown[0].out, re.DOTALL
    ).groups()
    assert len({first, second, third}) == 3
    assert shown[0].err.splitlines()[-1].startswith("90 new tokens, ")


def test_text_is_shown_as_it_is_made(run_folder, monkeypatch):
    class Terminal(io.StringIO):
        def flush(self):
            shown.append(self.getvalue())

    shown = []
    monkeypatch.setattr(sys, "stdout", Terminal())
    words = ["generate", "--checkpoint", str(run_folder), "--device", "cpu", "--max-new-tokens", "20", "--prompt", "de"]
    assert main(words) == 0
    assert len(set(shown)) > 15
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown))


def test_reader_of_the_text_may_have_enough_before_its_end(run_folder):
    words = ("generate", "--checkpoint", run_folder, "--device", "cpu", "--max-new-tokens", 10**6, "--prompt", "def ")
    command = [sys.executable, "-m", "longnet_hpc", *map(str, words)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert len(process.stdout.read(10)) == 10  # long before the text is whole
        process.stdout.close()
        assert process.wait(60) == 0
        assert b"Traceback" not in process.stderr.read()


def test_model_of_a_tokenizer_takes_its_file_or_corpus(tmp_path, capsys):
    tokenizer_file = next(bpe_tokenizers(tmp_path))
    (tmp_path / "text.txt").write_text("some text")
    corpus = prepare([tmp_path / "text.txt"], tmp_path / "corpus.h5", tokenizer=tokenizer_file)
    tokenizer = load_tokenizer(tokenizer_file)
    config = LongNetConfig(**{**vars(MICRO), "vocab_size": tokenizer.vocab_size})
    model, checkpoint = saved(tmp_path, config)
    (ids,) = tokenizer.encode("prompt", [b"def na"])
    expected = "".join(tokenizer.decode(made_anew(model, torch.tensor([ids.tolist()]), 12)[0].tolist()))
    words = ["generate", "--checkpoint", str(checkpoint), "--device", "cpu", "--max-new-tokens", "12"]
    for file in (tokenizer_file, corpus):
        assert main([*words, "--prompt", "def na", "--tokenizer", str(file)]) == 0
        assert capsys.readouterr().out == f"{expected}\n"


def test_values_that_the_command_refuses(refused, tmp_path):  # noqa: F811
    _, checkpoint = saved(tmp_path, LongNetConfig(**{**vars(MICRO), "vocab_size": 256}))
    words = ("generate", "--checkpoint", checkpoint, "--device", "cpu")
    prompt = ("--prompt", "x")
    for option, value, message in (
        ("--temperature", "-1", "temperature must be at least 0 and finite, got -1.0"),
        ("--top-k", "0", "top_k must be at least 1, got 0"),
        ("--top-p", "1.5", "top_p must be above 0 and at most 1, got 1.5"),
        ("--max-new-tokens", "0", "max_new_tokens must be at least 1, got 0"),
        ("--top-k", "5", "top_k and top_p choose what is drawn: give a temperature above 0, too"),
        ("--compile", "on", "compile must be auto or off: tokens one by one are not compiled"),
        ("--seed", "-1", f"seed must be 0 to {2**63 - 1}, got -1"),
        ("--tokenizer", "absent.json", "tokenizer must be 'bytes' or a JSON file, got 'absent.json'"),
    ):
        assert message in refused(*words, *prompt, option, value)
    assert refused("generate", *prompt).endswith(
        "generate needs --checkpoint: a checkpoint file or the folder of a run"
    )
    assert "neither a checkpoint nor" in refused("generate", *prompt, "--checkpoint", tmp_path / "absent")
    assert refused(*words).endswith("generate needs --prompt or --prompt-file, got neither")
    assert refused(*words, *prompt, "--prompt-file", "x").endswith("--prompt or --prompt-file, got both")
    assert refused(*words, "--prompt", "").endswith("prompt must have at least 1 token, got none")
    assert "absent.txt" in refused(*words, "--prompt-file", tmp_path / "absent.txt")
    assert "did you mean --checkpoint" in refused("generate", checkpoint)


def test_tokenizer_that_does_not_fit_the_model_is_refused(refused, tmp_path):  # noqa: F811
    _, checkpoint = saved(tmp_path, MICRO)
    words = ("generate", "--checkpoint", checkpoint, "--device", "cpu", "--prompt", "x")
    assert "model knows 17 token values, not the 256 of bytes: give --tokenizer" in refused(*words)
    line = refused(*words, "--tokenizer", "bytes")
    assert line.endswith("tokenizer bytes has 256 token values, outside the vocabulary of the model (vocab_size 17)")


def test_several_ranks_are_told_to_be_one(run_folder):
    done = run_command("generate", "--checkpoint", run_folder, "--prompt", "x", ranks=2)
    (line,) = error_lines(done)
    assert line == "error: generate runs on one rank, got 2; start it without mpirun or srun -n"
