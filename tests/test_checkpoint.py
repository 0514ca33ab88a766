import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from longnet_hpc import LongNet, LongNetConfig
from longnet_hpc.checkpoint import (
    FORMAT,
    FORMAT_VERSION,
    Checkpoint,
    DataOrder,
    clean_up,
    commit_checkpoint,
    discard_checkpoint,
    find_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    load_latest,
    remove_old,
    save_checkpoint,
    write_checkpoint,
)
from longnet_hpc.checkpoint_shards import Shard
from longnet_hpc.config import OptimizerConfig
from longnet_hpc.config_file import to_table
from longnet_hpc.errors import CheckpointError
from longnet_hpc.files import check_writable, naming_errors, replace_file
from longnet_hpc.load import load_model
from longnet_hpc.optimizer import Optimizer, load_weights

MODEL = LongNetConfig(layers=1, embed_dim=8, heads=2, segment_lengths=(4,), dilation_rates=(1,))
ORDER = DataOrder(corpus_tokens=1000, corpus_hash="0123", seq_len=16, batch_size=2, seed=3, shuffle=True)


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
    return save_checkpoint(folder, Checkpoint(step, 7, ORDER, to_table(MODEL), optimizer.state()))


def test_checkpoint_brings_back_weights_and_moments_so_that_the_next_step_is_the_same(tmp_path):
    model, optimizer = trained()
    loaded = load_checkpoint(saved(tmp_path, optimizer=optimizer))
    assert (loaded.step, loaded.batch_index, loaded.order, loaded.model_config) == (2, 7, ORDER, MODEL)
    other = LongNet(loaded.model_config)
    other_optimizer = Optimizer(other, OptimizerConfig())
    other_optimizer.load_state(loaded.tensors, loaded.step)
    gradient = torch.randn(model.parameter_count)
    optimizer.step(gradient.clone(), 0.01)
    other_optimizer.step(gradient.clone(), 0.01)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(other.named_parameters())[name]), name


def save_in_shards(folder, optimizer, step=2, cuts=(100, 200), saves=("one save",) * 3, names=None):
    """Write a checkpoint in three shards, each with its part of every moment, as three ranks would; not yet committed.

    Real shards are parts of the vector of all parameters; how the parts of one parameter are cut makes no difference.
    """
    for index, save in enumerate(saves):
        tensors = optimizer.weights() if index == 0 else {}
        for name, moment in optimizer.moments().items():
            parts = moment.reshape(-1).tensor_split(cuts)
            if len(parts[index]) and (names is None or name in names):
                tensors |= {name: parts[index]}
        write_checkpoint(folder, Checkpoint(step, 7, ORDER, to_table(MODEL), tensors), Shard(index, len(saves), save))


def test_checkpoint_in_shards_is_read_as_if_it_were_in_one_file(tmp_path):
    _, optimizer = trained()
    whole = load_checkpoint(saved(tmp_path / "whole", optimizer=optimizer))
    save_in_shards(tmp_path, optimizer)
    loaded = load_checkpoint(commit_checkpoint(tmp_path, 2))
    assert (loaded.step, loaded.batch_index, loaded.order) == (2, 7, ORDER)
    assert loaded.digest == whole.digest
    weights = load_checkpoint(find_checkpoint(tmp_path), weights_only=True).tensors
    assert weights.keys() == optimizer.weights().keys()
    assert load_checkpoint(find_checkpoint(tmp_path / "whole"), weights_only=True).tensors.keys() == weights.keys()


def test_checkpoint_in_shards_counts_only_when_the_last_of_its_files_is_there(tmp_path):
    _, optimizer = trained()
    saved(tmp_path, step=1, optimizer=optimizer)
    save_in_shards(tmp_path, optimizer)
    assert find_checkpoint(tmp_path).name == "step-00000001.safetensors"
    clean_up(tmp_path)  # as a job does that goes on after this one was killed
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001.safetensors"]
    save_in_shards(tmp_path, optimizer)
    commit_checkpoint(tmp_path, 2)
    clean_up(tmp_path)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1 + 1 + 3
    assert load_latest(tmp_path, pytest.fail).step == 2
    discard_checkpoint(tmp_path, 2)  # it counts, whatever became of another attempt at it
    assert load_latest(tmp_path, pytest.fail).step == 2
    saved(tmp_path, step=3, optimizer=optimizer)
    remove_old(tmp_path, keep=1, step=3)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003.safetensors"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"saves": ("one save", "another", "one save")}, "shard-00002-of-00003.safetensors is of another one"),
        ({"names": ("exp_avg.norm.nothing",)}, None),
        ({"cuts": (3, 3, 5)}, "its shards do not fit together"),
    ],
)
def test_shards_that_do_not_belong_together_are_refused(tmp_path, changes, said):
    _, optimizer = trained()
    save_in_shards(tmp_path, optimizer, **changes)
    path = commit_checkpoint(tmp_path, 2)
    if said is not None:
        with pytest.raises(CheckpointError, match=said):
            load_checkpoint(path)
    else:  # moments are missing from all of them
        with pytest.raises(CheckpointError, match=r"exp_avg.* is missing there"):
            optimizer.load_state(load_checkpoint(path).tensors, 2)


def test_model_is_loaded_even_where_shards_of_the_optimizer_state_are_lost(tmp_path):
    model, optimizer = trained()
    save_in_shards(tmp_path, optimizer)
    path = commit_checkpoint(tmp_path, 2)
    Shard(1, 3, "one save").path(path).unlink()
    with pytest.raises(CheckpointError, match="shard-00002-of-00003"):
        load_checkpoint(path)
    loaded = load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_shard_is_told_from_a_checkpoint_and_leads_to_it(tmp_path):
    save_in_shards(tmp_path, trained()[1])
    path = Shard(1, 3, "one save").path(commit_checkpoint(tmp_path, 2))
    for weights_only in (False, True):
        with pytest.raises(CheckpointError, match=f"{path} is a shard of a checkpoint; give step-00000002.safetensors"):
            load_checkpoint(path, weights_only=weights_only)


def test_old_checkpoint_that_cannot_be_removed_does_not_keep_the_others(tmp_path):
    (tmp_path / "checkpoints" / "step-00000001.safetensors").mkdir(parents=True)
    for step in (2, 4):
        saved(tmp_path, step)
    with pytest.raises(OSError, match="cannot remove old checkpoint .*step-00000001.safetensors: "):
        remove_old(tmp_path, keep=1, step=4)
    assert sorted(path.name[:13] for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000004"]


def test_checkpoint_in_one_file_is_still_of_the_version_that_earlier_programs_read(tmp_path):
    with safe_open(saved(tmp_path), "pt") as file:
        assert json.loads(file.metadata()["longnet_hpc"])["format_version"] == 3


def test_old_checkpoints_go_even_where_a_later_one_is_damaged(tmp_path):
    for step in (2, 4, 6):
        saved(tmp_path, step)
    find_checkpoint(tmp_path).write_bytes(b"damaged")
    told = []
    assert load_latest(tmp_path, told.append).step == 4
    assert len(told) == 1
    saved(tmp_path, 5)
    remove_old(tmp_path, keep=1, step=5)
    assert load_latest(tmp_path, told.append).step == 5


def test_weights_alone_can_be_loaded(tmp_path):
    model, optimizer = trained()
    other = LongNet(MODEL)
    load_weights(other, load_checkpoint(saved(tmp_path, optimizer=optimizer)).tensors)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_latest_checkpoint_is_found_by_its_step_and_old_ones_go(tmp_path):
    for step in (9, 100_000_000, 20_000_000):
        saved(tmp_path, step)
    (tmp_path / "checkpoints" / "step-latest.safetensors").touch()
    assert find_checkpoint(tmp_path).name == "step-100000000.safetensors"
    assert find_checkpoint(tmp_path / "checkpoints" / "step-00000009.safetensors").name == "step-00000009.safetensors"
    remove_old(tmp_path, keep=2, step=200_000_000)
    left = {path.name for path in (tmp_path / "checkpoints").glob("step-?0*")}
    assert left == {"step-20000000.safetensors", "step-100000000.safetensors"}
    remove_old(tmp_path, keep=1, step=200_000_000)
    assert find_checkpoint(tmp_path).name == "step-100000000.safetensors"


def test_run_without_a_checkpoint_has_no_latest_one(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_mode_of_a_checkpoint_follows_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        path = saved(tmp_path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


def test_file_of_a_killed_writer_is_replaced_with_the_mode_of_a_new_one(tmp_path):
    left = tmp_path / ".file.partial"
    left.touch(mode=0o600)
    replace_file(tmp_path / "file", lambda partial: partial.write_text("new"))
    (tmp_path / "other").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert not left.exists()


def test_writable_folder_is_checked_without_a_trace(tmp_path):
    (tmp_path / "old").mkdir()
    for folder in (tmp_path / "old", tmp_path / "new" / "deep", tmp_path / "old" / "new"):
        check_writable(folder)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "old"]


@pytest.mark.parametrize("name", ["file/deep", "file", "new/" + "long" * 100])
def test_unwritable_folder_is_noticed_without_a_trace(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write here: [A-Z]"), naming_errors("cannot write here"):
        check_writable(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "file"]


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


def test_checkpoint_with_a_damaged_description_is_refused(tmp_path):
    path = saved(tmp_path)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for position in range(8, header, 7):
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            load_checkpoint(path)


@pytest.mark.parametrize("text", ["[]", "3", "null", json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION})])
def test_checkpoint_with_a_foreign_description_is_refused(tmp_path, text):
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign", {"longnet_hpc": text})
    with pytest.raises(CheckpointError, match="is no checkpoint of|is damaged"):
        load_checkpoint(tmp_path / "foreign")


def test_checkpoint_that_lost_a_tensor_is_refused(tmp_path):
    path = saved(tmp_path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        about = file.metadata()
    tensors.popitem()
    save_file(tensors, path, about)
    with pytest.raises(CheckpointError, match="is damaged: tensors are missing"):
        load_checkpoint(path)


@pytest.mark.parametrize("about", [None, {"longnet_hpc": json.dumps({"format": "longnet_hpc checkpoint"})}])
def test_foreign_or_wrong_version_safetensors_is_refused(tmp_path, about):
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign", about)
    with pytest.raises(CheckpointError, match="is no checkpoint of format version 3"):
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
    path = save_checkpoint(
        tmp_path, Checkpoint(1, 1, ORDER, {"heads": 5, "embed_dim": 8}, {"weight.a": torch.zeros(1)})
    )
    with pytest.raises(CheckpointError, match="a model that cannot be: heads must divide embed_dim"):
        _ = load_checkpoint(path).model_config


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that takes no files, even from root")
def test_folder_that_exists_and_takes_no_files_is_noticed():
    with pytest.raises(OSError, match="/proc"):
        check_writable(Path("/proc"))


def test_training_goes_on_only_with_the_same_model_and_the_same_batches(tmp_path):
    loaded = load_checkpoint(saved(tmp_path))
    loaded.check_fits(MODEL, ORDER)
    with pytest.raises(CheckpointError, match="of another model: its layers is 1, not 2 as configured"):
        loaded.check_fits(replace(MODEL, layers=2), ORDER)


@pytest.mark.parametrize(
    "changes",
    [
        {"corpus_tokens": 1001},
        {"corpus_hash": "4567"},
        {"seq_len": 32},
        {"batch_size": 1},
        {"seed": 4},
        {"shuffle": False},
    ],
)
def test_training_on_other_batches_is_refused_by_name(tmp_path, changes):
    ((name, value),) = changes.items()
    with pytest.raises(CheckpointError, match=f"other batches: its {name} is .*, not {value} as configured"):
        load_checkpoint(saved(tmp_path)).check_fits(MODEL, replace(ORDER, **changes))
