"""Training into a file system that becomes full: one line, and the last good checkpoint stays."""

import json
import subprocess

import pytest
from launching import MODEL, error_lines, run_command

from longnet_hpc import LongNet, LongNetConfig
from longnet_hpc.checkpoint import load_latest
from longnet_hpc.data import prepare

SMALL = LongNetConfig(layers=2, embed_dim=32, heads=4, segment_lengths=(48, 256), dilation_rates=(1, 4))


@pytest.fixture
def small_disk(tmp_path):
    """Make a file system that two checkpoints fit into, but not three."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = int(2.6 * 12 * LongNet(SMALL).parameter_count)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip("may not mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("sharded", [False, True])
def test_full_disk_ends_a_training_with_one_line_and_keeps_the_last_good_checkpoint(tmp_path, small_disk, sharded):
    text, corpus, folder = tmp_path / "text.txt", tmp_path / "corpus.h5", small_disk / "run"
    text.write_text("".join(f"def f{n}(x):\n    return x - {n}\n" for n in range(1000)))
    prepare([text], corpus)
    shards = "--shard-optimizer" if sharded else "--no-shard-optimizer"
    steps = ("--seq-len", "512", "--steps", "8", "--save-every", "2", "--device", "cpu")
    done = run_command("train", *MODEL, *steps, shards, "--folder", folder, "--corpus", corpus, ranks=2)
    path = folder / "checkpoints" / "step-00000006.safetensors"
    assert error_lines(done) == [f"error: cannot write checkpoint {path}: No space left on device"]
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert {name[:13] for name in names} == {"step-00000002", "step-00000004"}
    assert load_latest(folder, pytest.fail).step == 4
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    done = run_command("train", "--resume", folder, ranks=2)
    assert done.returncode == 0, done.stderr
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))
