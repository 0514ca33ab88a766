import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from longnet_hpc import LongNet, LongNetConfig, checkpoint
from longnet_hpc.checkpoint import Checkpoint, find_checkpoint, load_checkpoint, remove_old, save_checkpoint
from longnet_hpc.config import OptimizerConfig
from longnet_hpc.config_file import to_table
from longnet_hpc.errors import CheckpointError
from longnet_hpc.files import replace_file
from longnet_hpc.optimizer import Optimizer, load_weights

MODEL = LongNetConfig(layers=1, embed_dim=8, heads=2, segment_lengths=(4,), dilation_rates=(1,))


def trained(config=MODEL, seed=0):
    """Return a model and its optimizer after two steps of random gradients."""
    torch.manual_seed(seed)
    model = LongNet(config)
    optimizer = Optimizer(model, OptimizerConfig())
    for _ in range(2):
        optimizer.step(torch.randn(model.parameter_count), 0.01)
    return model, optimizer


def saved(folder, step=2, optimizer=None):
    optimizer = optimizer or trained()[1]
    return save_checkpoint(folder, Checkpoint(step, 7, 16, to_table(MODEL), optimizer.state()))


def test_checkpoint_brings_back_weights_and_moments_so_that_the_next_step_is_the_same(tmp_path):
    model, optimizer = trained()
    loaded = load_checkpoint(saved(tmp_path, optimizer=optimizer))
    assert (loaded.step, loaded.batch_index, loaded.seq_len, loaded.model_config) == (2, 7, 16, MODEL)
    other = LongNet(loaded.model_config)
    other_optimizer = Optimizer(other, OptimizerConfig())
    other_optimizer.load_state(loaded.tensors, loaded.step)
    gradient = torch.randn(model.parameter_count)
    optimizer.step(gradient.clone(), 0.01)
    other_optimizer.step(gradient.clone(), 0.01)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(other.named_parameters())[name]), name


def test_weights_alone_can_be_loaded(tmp_path):
    model, optimizer = trained()
    other = LongNet(MODEL)
    load_weights(other, load_checkpoint(saved(tmp_path, optimizer=optimizer)).tensors)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_latest_checkpoint_is_found_by_its_step_and_old_ones_go(tmp_path):
    for step in (9, 100_000_000, 20):
        saved(tmp_path, step)
    (tmp_path / "checkpoints" / "step-latest.safetensors").touch()
    assert find_checkpoint(tmp_path).name == "step-100000000.safetensors"
    assert find_checkpoint(tmp_path / "checkpoints" / "step-00000009.safetensors").name == "step-00000009.safetensors"
    remove_old(tmp_path, keep=2)
    left = {path.name for path in (tmp_path / "checkpoints").glob("step-0*")}
    assert left == {"step-00000020.safetensors"}


def test_writing_that_fails_leaves_the_old_file_and_no_part(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(partial):
        partial.write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        replace_file(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def test_final_name_appears_only_after_the_flush(tmp_path, monkeypatch):
    flushed = []

    def watch(descriptor):
        flushed.append((tmp_path / "checkpoints" / "step-00000002.safetensors").exists())

    monkeypatch.setattr("os.fsync", watch)
    saved(tmp_path)
    assert flushed == [False, True]  # the file before it is renamed, then its folder


def test_checkpoint_in_an_unwritable_place_is_an_os_error(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(OSError, match="checkpoints"):
        saved(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_checkpoint_is_refused(tmp_path, kept):
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="cannot read checkpoint .*step-00000002"):
        load_checkpoint(path)


def test_checkpoint_with_a_flipped_bit_is_refused(tmp_path):
    path = saved(tmp_path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged: the checksum of .* does not fit"):
        load_checkpoint(path)


def test_checkpoint_that_lost_a_tensor_is_refused(tmp_path):
    path = saved(tmp_path)
    tensors = load_file(path)
    with checkpoint.safe_open(path, "pt") as file:
        about = file.metadata()
    tensors.popitem()
    save_file(tensors, path, about)
    with pytest.raises(CheckpointError, match="is damaged: tensors are missing"):
        load_checkpoint(path)


@pytest.mark.parametrize("about", [None, {"longnet_hpc": json.dumps({"format": "longnet_hpc checkpoint"})}])
def test_foreign_or_wrong_version_safetensors_is_refused(tmp_path, about):
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign", about)
    with pytest.raises(CheckpointError, match="is no checkpoint of format version 1"):
        load_checkpoint(tmp_path / "foreign")


def test_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="neither a checkpoint nor the folder of a run"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="cannot read checkpoint"):
        load_checkpoint(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("changes", [{"embed_dim": 16}, {"layers": 2}, {"tie_head": False}, {"ffn_ratio": 2}])
def test_checkpoint_of_another_model_is_refused_before_anything_changes(tmp_path, changes):
    loaded = load_checkpoint(saved(tmp_path))
    other, optimizer = trained(LongNetConfig(**to_table(MODEL) | changes))
    before = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    for load in (lambda: optimizer.load_state(loaded.tensors, 2), lambda: load_weights(other, loaded.tensors)):
        with pytest.raises(CheckpointError, match="is of another model: .* is .* there, .* here"):
            load()
    assert all(torch.equal(before[name], tensor) for name, tensor in optimizer.state().items())


def test_checkpoint_with_a_model_that_cannot_be_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, Checkpoint(1, 1, 16, {"heads": 5, "embed_dim": 8}, {"weight.a": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match="a model that cannot be: heads must divide embed_dim"):
        _ = load_checkpoint(path).model_config
