import ast
import io
import itertools
import subprocess
import sys
import time
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args

import pytest
from launching import environment, run_python, slowness

from longnet_hpc import __version__, config
from longnet_hpc.command_line import parse
from longnet_hpc.config import OPTIMIZERS, EvalConfig, OptimizerConfig, PrepareConfig, TrainConfig
from longnet_hpc.config_file import from_table, read_toml, to_table, write_toml
from longnet_hpc.errors import CheckpointError, ConfigError
from longnet_hpc.model_config import PRESETS, LongNetConfig, PresetName


def config_file(path, text):
    (path / "given.toml").write_text(text)
    return str(path / "given.toml")


def parsed(*words):
    return parse(words, console=False)


@pytest.mark.parametrize(
    ("name", "layers", "embed_dim", "heads"),
    [("125m", 12, 768, 12), ("350m", 24, 1024, 16), ("760m", 24, 1536, 16), ("2.7b", 32, 2560, 32)],
)
def test_presets_are_those_of_the_paper(name, layers, embed_dim, heads):
    preset = LongNetConfig.preset(name)
    assert (preset.layers, preset.embed_dim, preset.heads, preset.ffn_ratio) == (layers, embed_dim, heads, 4)
    assert preset.segment_lengths == (2048, 4096, 8192, 16384, 32768)
    assert preset.dilation_rates == (1, 2, 4, 6, 12)


def test_preset_takes_changes_and_knows_its_names():
    assert LongNetConfig.preset("tiny", layers=7).layers == 7
    with pytest.raises(ConfigError, match=r"tiny, 125m, 350m, 760m, 2\.7b, got 'huge'"):
        LongNetConfig.preset("huge")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "heads must divide embed_dim, got 5"),
        ({"kv_heads": 5}, "kv_heads must divide heads, got 5"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"dropout": 1.0}, r"below 1, got 1\.0"),
        ({"dropout": float("nan")}, "below 1, got nan"),
        ({"rotary_base": 1.0}, r"rotary_base must be above 1 and finite, got 1\.0"),
        ({"rotary_base": float("inf")}, "rotary_base must be above 1 and finite, got inf"),
        ({"rotary_base": float("nan")}, "rotary_base must be above 1 and finite, got nan"),
        ({"segment_lengths": (0, 1, 2)}, "at least 1, got 0"),
        ({"dilation_rates": (1, 0, 2)}, "at least 1, got 0"),
        ({"dilation_rates": (1, 2)}, "pair up, got 3 and 2"),
        ({"positions": "sinusoid"}, "rotary, xpos or none, got 'sinusoid'"),
    ],
)
def test_model_that_cannot_be_is_refused(changes, message):
    changes = {"segment_lengths": (8, 16, 32), "dilation_rates": (1, 2, 4)} | changes
    with pytest.raises(ValueError, match=message):
        LongNetConfig(**changes)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (TrainConfig, {"steps": 0}),
        (TrainConfig, {"seed": -1}),
        (TrainConfig, {"stop_at": 0}),
        (OptimizerConfig, {"learning_rate": 0.0}),
        (OptimizerConfig, {"learning_rate": float("nan")}),
        (OptimizerConfig, {"learning_rate": float("inf")}),
        (OptimizerConfig, {"clip_norm": -1.0}),
        (OptimizerConfig, {"clip_norm": float("inf")}),
        (OptimizerConfig, {"weight_decay": -0.1}),
        (OptimizerConfig, {"weight_decay": float("inf")}),
        (OptimizerConfig, {"weight_decay": float("nan")}),
        (OptimizerConfig, {"beta1": float("nan")}),
        (OptimizerConfig, {"final_learning_rate": float("nan")}),
        (OptimizerConfig, {"beta2": 1.0}),
        (OptimizerConfig, {"final_learning_rate": 2.0}),
        (EvalConfig, {"batch_size": 0}),
        (PrepareConfig, {"chunk_tokens": 0}),
    ],
)
def test_values_outside_their_limits_are_named_with_the_limit(kind, changes):
    ((name, value),) = changes.items()
    with pytest.raises(ConfigError, match=f"{name} must be .*, got {value}"):
        kind(**changes)


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        TrainConfig(
            corpus=Path('a "strange" näme\\.h5'),
            model=LongNetConfig(kv_heads=4, dropout=0.25, tie_head=False),
            optimizer=OptimizerConfig(learning_rate=1e-5),
            shuffle=False,
        ),
        EvalConfig(checkpoint=Path("x"), max_batches=3),
        PrepareConfig(sources=("a", "b*"), overwrite=True),
    ],
)
def test_config_survives_its_file(tmp_path, config):
    write_toml(tmp_path / "c.toml", config, "written by a test")
    assert from_table(read_toml(tmp_path / "c.toml"), type(config)()) == config


def test_fields_of_one_call_are_not_saved():
    table = to_table(TrainConfig(folder=Path("x"), stop_at=3, resume=Path("y"), config=Path("z")))
    assert not {"folder", "stop_at", "resume", "config"} & table.keys()


def test_optional_fields_default_to_none_because_toml_has_no_word_for_it():
    for kind in (TrainConfig, LongNetConfig, EvalConfig, PrepareConfig):
        for field in fields(kind):
            if "None" in str(field.type):
                assert field.default is None, field.name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 3", "config key stepz does not exist, did you mean steps?"),
        ("[model]\nlayrs = 3", "config key model.layrs does not exist, did you mean model.layers?"),
        ("[modell]\nlayers = 3", "config key modell does not exist, did you mean model?"),
        ("folder = 'x'", "config key folder does not exist"),
        ("steps = 3.0", "config key steps must be an integer, got 3.0"),
        ("steps = '3'", "config key steps must be an integer, got '3'"),
        ("steps = true", "config key steps must be an integer, got True"),
        ("shuffle = 1", "config key shuffle must be true or false, got 1"),
        ("corpus = 3", "config key corpus must be a path, got 3"),
        ('corpus = "a\\u0000b"', "config key corpus must be a path, got 'a\\x00b'"),
        ("preset = ['tiny']", "config key preset must be one of tiny, 125m, 350m, 760m, 2.7b, got ['tiny']"),
        ("preset = 'huge'", "config key preset must be one of tiny, 125m, 350m, 760m, 2.7b, got 'huge'"),
        ("geometric = [16]", "config key geometric must be a list of 2, each an integer, got [16]"),
        ("model = 3", "config key model must be a table, got 3"),
        ("device = 'tpu'", "config key device must be one of auto, cpu, cuda, got 'tpu'"),
        ("[optimizer]\nbeta1 = nan", "config key optimizer.beta1 must be a finite number, got nan"),
        ("[model]\nsegment_lengths = 3", "config key model.segment_lengths must be a list, each an integer, got 3"),
        ("[model]\nsegment_lengths = [1.5]", "config key model.segment_lengths must be an integer, got 1.5"),
        ("[model]\nheads = 3", "heads must divide embed_dim, got 3"),
        ("steps == 3", "is not TOML"),
    ],
)
def test_config_file_that_is_wrong_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        parsed("train", "--config", config_file(tmp_path, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_config_file_that_is_missing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read config file .*absent.toml"):
        parsed("train", f"--config={tmp_path / 'absent.toml'}")


def test_preset_file_and_command_line_override_each_other_in_this_order(tmp_path):
    file = config_file(tmp_path, "preset = '350m'\nsteps = 7\nseq_len = 99\n[model]\nlayers = 3\nheads = 8")
    command, config = parsed("train", "--config", file, "--steps", "8", "--model.layers", "5")
    assert command == "train"
    assert (config.steps, config.seq_len) == (8, 99)
    assert (config.model.layers, config.model.heads, config.model.embed_dim) == (5, 8, 1024)
    _, config = parsed("train", "--config", file, "--preset", "125m", "--model.layers", "5")
    assert config.model == LongNetConfig.preset("125m", layers=5)
    assert config.seq_len == 99


@pytest.mark.parametrize("name", PRESETS)
def test_larger_presets_take_smaller_steps_unless_told_otherwise(tmp_path, name):
    rates = {"tiny": 3e-3, "125m": 6e-4, "350m": 3e-4, "760m": 2.5e-4, "2.7b": 1.6e-4}
    _, config = parsed("--preset", name)
    assert config.optimizer == OPTIMIZERS[name]
    assert config.optimizer.learning_rate == rates[name]
    assert config.optimizer.warmup_steps == (10 if name == "tiny" else 750)
    file = config_file(tmp_path, f"preset = '{name}'\n[optimizer]\nwarmup_steps = 5")
    _, config = parsed("--config", file)
    assert (config.optimizer.learning_rate, config.optimizer.warmup_steps) == (rates[name], 5)
    _, config = parsed("--config", file, "--optimizer.learning-rate", "0.5")
    assert (config.optimizer.learning_rate, config.optimizer.warmup_steps) == (0.5, 5)


def test_geometric_pattern_reaches_the_sequence_wherever_its_length_is_set(tmp_path):
    _, config = parsed("--geometric", "1024", "4", "--seq-len", "100000")
    assert config.model.segment_lengths == (1024, 4096, 16384, 65536, 262144)
    assert config.model.dilation_rates == (1, 4, 16, 64, 256)
    write_toml(tmp_path / "c.toml", config, "saved")
    saved = read_toml(tmp_path / "c.toml")
    assert saved["model"]["segment_lengths"] == [1024, 4096, 16384, 65536, 262144]
    _, again = parsed("--config", str(tmp_path / "c.toml"), "--seq-len", "4097")
    assert again.model.segment_lengths == (1024, 4096, 16384)
    with pytest.raises(ConfigError, match="at least 2|ratio >= 2"):
        parsed("--geometric", "1024", "1")
    _, preset = parsed("--config", str(tmp_path / "c.toml"), "--preset", "125m")
    assert preset.model.segment_lengths == LongNetConfig().segment_lengths
    lists = ("--model.segment-lengths", "64", "--model.dilation-rates", "1")
    for words in (("--geometric", "1024", "4"), ("--config", str(tmp_path / "c.toml"))):
        with pytest.raises(ConfigError, match="--model.dilation-rates has no say; give one of both"):
            parsed(*words, *lists)
    _, listed = parsed("--config", str(tmp_path / "c.toml"), "--geometric", "None", *lists)
    assert listed.model.segment_lengths == (64,)


def test_saved_config_can_be_passed_back(tmp_path):
    _, config = parsed("--preset", "760m", "--model.dropout", "0.1", "--optimizer.learning-rate", "1e-4")
    write_toml(tmp_path / "c.toml", config, "saved")
    _, again = parsed("--config", str(tmp_path / "c.toml"))
    assert to_table(again) == to_table(config)


def test_words_choose_the_command():
    assert parsed()[0] == "main"
    command, config = parsed("prepare", "a.txt", "b", "-", "--output", "c.h5")
    assert (command, config.sources, config.output) == ("prepare", ("a.txt", "b", "-"), Path("c.h5"))
    assert isinstance(parsed("eval", "--checkpoint", "x")[1], EvalConfig)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("trian",), "command 'trian' does not exist"),
        (("train", "trian"), "train takes options only, got 'trian'"),
        (("train", "--stepz", "3"), "--stepz"),
        (("train", "--steps", "x"), "--steps"),
        (("--geometric", "1024"), "geometric"),
        (("train", "--preset", "huge"), "preset must be one of tiny, 125m, 350m, 760m, 2.7b, got 'huge'"),
        (("--model.heads", "3"), "heads must divide embed_dim, got 3"),
        (("--model.segment-lengths", "8", "--model.dilation-rates", "1", "2"), "pair up, got 1 and 2"),
        (("--model.segment-lengths", "0", "--model.dilation-rates", "1"), "at least 1, got 0"),
        (("eval", "--device", "tpu"), "tpu"),
    ],
)
def test_words_that_are_wrong_are_refused_in_one_line(words, message):
    with pytest.raises(ConfigError) as caught:
        parsed(*words)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not set("│╭╯─") & set(str(caught.value))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "--steps", "0"), "steps must be at least 1, got 0"),
        (("prepare", "--chunk-tokens", "0"), "chunk_tokens must be at least 1, got 0"),
        (("eval", "--batch-size", "0"), "batch_size must be at least 1, got 0"),
        (("--optimizer.weight-decay", "inf"), "optimizer: weight_decay must be at least 0 and finite, got inf"),
    ],
)
def test_refusal_names_the_option_and_no_class(words, message):
    with pytest.raises(ConfigError) as caught:
        parsed(*words)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("train", "r1"), "; did you mean --resume r1?"),
        (("eval", "r1"), "; did you mean --checkpoint r1?"),
        (("r1",), "; did you mean train --resume r1 or eval --checkpoint r1?"),
    ],
)
def test_folder_given_as_a_word_is_told_its_option(tmp_path, monkeypatch, words, hint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        parsed(*words)
    assert "did you mean" not in str(caught.value)
    (tmp_path / "r1").mkdir()
    with pytest.raises(ConfigError) as caught:
        parsed(*words)
    assert str(caught.value).endswith(hint)


def test_refusal_on_a_terminal_has_no_colours(monkeypatch):
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stdout", Terminal())
    with pytest.raises(ConfigError) as caught:
        parse(("train", "--model.heads", "3"), console=True)
    assert str(caught.value) == "model: heads must divide embed_dim, got 3 heads for width 128"


def test_resumption_of_no_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.toml"):
        parsed("train", "--resume", str(tmp_path))


@pytest.mark.parametrize("command", [(), ("prepare",), ("train",), ("eval",)])
def test_help_explains_every_field(command, capsys):
    with pytest.raises(SystemExit) as ended:
        parse([*command, "--help"], console=True)
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    kind = {(): TrainConfig, ("prepare",): PrepareConfig, ("train",): TrainConfig, ("eval",): EvalConfig}[command]
    names = [f.name for f in fields(kind) if not is_dataclass(f.default)]
    names += [f"model.{f.name}" for f in fields(LongNetConfig)] if kind is TrainConfig else []
    for name in names:
        assert name.replace("_", "-") in shown.replace("SOURCES", "sources"), name


def test_help_of_a_field_is_one_line_that_the_terminal_wraps():
    """Tyro keeps the line breaks of a field's docstring."""
    classes = [node for node in ast.parse(Path(config.__file__).read_text()).body if isinstance(node, ast.ClassDef)]
    explained = [
        after.value.value
        for kind in classes
        for before, after in itertools.pairwise(kind.body)
        if isinstance(before, ast.AnnAssign) and isinstance(after, ast.Expr)
    ]
    assert len(explained) > 50
    assert [text for text in explained if "\n" in text] == []


def test_help_that_nobody_reads_to_its_end_is_no_error(tmp_path):
    words = f"{sys.executable} -m longnet_hpc train --help | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", words], env=environment(), capture_output=True, text=True, timeout=180)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("help_first", [True, False])
def test_help_shows_the_defaults_of_the_preset(capsys, help_first):
    with pytest.raises(SystemExit) as ended:
        parse(["--help", "--preset", "125m"] if help_first else ["train", "--preset", "125m", "-h"], console=True)
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "default: 768" in shown
    assert "default: 0.0006" in shown
    assert "default: 128)" not in shown


def test_version_is_told_by_every_way_in(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--version"], console=True)
    assert not ended.value.code
    assert capsys.readouterr().out == f"longnet_hpc {__version__}\n"
    done = run_python("-m", "longnet_hpc", "--version")
    assert (done.returncode, done.stdout) == (0, f"longnet_hpc {__version__}\n")


def test_help_needs_neither_torch_nor_mpi_and_is_quick():
    code = (
        "import sys, longnet_hpc.run\n"
        "try: longnet_hpc.run.main(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "print('LOADED', sorted({'torch', 'mpi4py', 'h5py', 'matplotlib'} & set(sys.modules)))"
    )
    started = time.monotonic()
    done = run_python("-c", code, timeout=120)
    assert time.monotonic() - started < 3 * slowness()
    assert "LOADED []" in done.stdout, done.stderr


def test_presets_fit_their_annotation():
    assert set(PRESETS) == set(OPTIMIZERS) == set(get_args(PresetName))
