import pytest
import torch

from longnet_hpc import LongNet, LongNetConfig, dropout
from longnet_hpc.checkpoint import find_checkpoint, load_checkpoint
from longnet_hpc.comm.launch import start
from longnet_hpc.config import EvalConfig, TrainConfig
from longnet_hpc.data import Corpus, prepare
from longnet_hpc.dropout import position_dropout
from longnet_hpc.evaluate import evaluate
from longnet_hpc.optimizer import load_weights
from longnet_hpc.train import train
from longnet_hpc.trainer import Trainer

MASK = (1 << 64) - 1


def splitmix64(z):
    """Return the finaliser of splitmix64, from its published constants, in Python's integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def kept(*shape, probability=0.3, seed=1, site=2, start=0):
    return position_dropout(torch.ones(shape), probability, seed=seed, site=site, start=start) != 0


def test_hash_equals_splitmix64_in_python_integers():
    numbers = [0, 1, 2**63, MASK, 0x0123456789ABCDEF, 0xFEDCBA9876543210]
    z = torch.tensor([n - 2**64 if n >= 2**63 else n for n in numbers])
    assert [n & MASK for n in dropout._mix_(z).tolist()] == [splitmix64(n) for n in numbers]


@pytest.mark.parametrize("start", [0, 10**9, 2**40])
def test_slices_together_equal_the_whole(start):
    whole = kept(3, 50, 16, start=start)
    slices = [kept(3, b - a, 16, start=start + a) for a, b in ((0, 7), (7, 7), (7, 30), (30, 50))]
    assert torch.equal(torch.cat(slices, dim=1), whole)


def test_pieces_of_the_computation_do_not_change_the_mask(monkeypatch):
    whole = kept(2, 33, 8)
    monkeypatch.setattr(dropout, "_PIECE_ELEMENTS", 2 * 8 * 5)
    assert torch.equal(kept(2, 33, 8), whole)


@pytest.mark.parametrize("probability", [0.01, 0.3, 0.9])
def test_rate_and_scale_are_those_of_the_probability(probability):
    x = torch.full((2, 512, 256), 3.0)
    out = position_dropout(x, probability, seed=7, site=0, start=0)
    rate = (out == 0).double()
    deviation = (probability * (1 - probability)) ** 0.5
    assert rate.mean().item() == pytest.approx(probability, abs=5 * deviation / x.numel() ** 0.5)
    assert rate.mean(dim=(0, 1)).sub(probability).abs().max() < 6 * deviation / 1024**0.5
    assert rate.mean(dim=(0, 2)).sub(probability).abs().max() < 6 * deviation / 512**0.5
    scaled = (torch.tensor(3.0) * (1.0 / (1.0 - probability))).item()
    assert set(out.unique().tolist()) == {0.0, scaled}


@pytest.mark.parametrize("change", [{"seed": 2}, {"seed": -1}, {"seed": 1 + 2**64 - 2}, {"site": 3}, {"start": 1}])
def test_masks_elsewhere_are_independent(change):
    ours, other = kept(2, 512, 128, probability=0.5), kept(2, 512, 128, probability=0.5, **change)
    assert (ours == other).double().mean().item() == pytest.approx(0.5, abs=0.01)


def test_sequences_of_a_batch_and_neighbouring_positions_are_independent():
    mask = kept(2, 512, 128, probability=0.5)
    assert (mask[0] == mask[1]).double().mean().item() == pytest.approx(0.5, abs=0.01)
    assert (mask[:, 1:] == mask[:, :-1]).double().mean().item() == pytest.approx(0.5, abs=0.01)
    assert (mask[..., 1:] == mask[..., :-1]).double().mean().item() == pytest.approx(0.5, abs=0.01)


def test_gradient_has_the_same_mask_and_no_probability_changes_nothing():
    x = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    out = position_dropout(x, 0.4, seed=1, site=1, start=5)
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad * x, out)
    assert position_dropout(x, 0.0, seed=1, site=1, start=5) is x


SETTINGS = {
    "model": LongNetConfig(layers=1, embed_dim=16, heads=2, segment_lengths=(16,), dilation_rates=(1,), dropout=0.5),
    "seq_len": 16,
    "device": "cpu",
}


@pytest.fixture
def corpus_path(tmp_path):
    (tmp_path / "text").write_text("some words " * 20)
    return prepare([tmp_path / "text"], tmp_path / "corpus.h5")


def test_every_batch_of_every_step_has_masks_of_its_own(corpus_path, monkeypatch):
    seeds = []
    loss = LongNet.loss

    def watched(model, *arguments, dropout_seed):
        seeds.append(dropout_seed)
        return loss(model, *arguments, dropout_seed=dropout_seed)

    monkeypatch.setattr(LongNet, "loss", watched)
    with Corpus(corpus_path) as corpus:
        trainer = Trainer(TrainConfig(**SETTINGS, accumulation=2), start(device="cpu"), corpus)
        for _ in range(3):
            trainer.step()
        trainer.close()
    assert len(set(seeds)) == 6


def test_evaluation_has_no_dropout(corpus_path, tmp_path):
    launch = start(device="cpu")
    train(TrainConfig(**SETTINGS, steps=1, folder=tmp_path / "run"), launch, corpus_path)
    found = evaluate(EvalConfig(max_batches=2, device="cpu"), launch, tmp_path / "run", corpus_path).results["loss"]
    with Corpus(corpus_path) as corpus:
        tokens = torch.from_numpy(corpus.read(0, 33).astype("int64"))
    model = LongNet(SETTINGS["model"])
    load_weights(model, load_checkpoint(find_checkpoint(tmp_path / "run")).tensors)
    logits = model.eval()(tokens[:-1].view(2, 16))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1:])
    assert found == pytest.approx(expected.item(), rel=1e-5)
