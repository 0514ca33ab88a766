"""The README's Python, run as it stands, block after block, in a folder that has what it mentions."""

import pytest
import torch
import torchscale_oracle
from test_docs import ROOT, blocks
from test_generate_command import saved

from longnet_hpc import LongNetConfig

BLOCKS = blocks(ROOT / "README.md", "python")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run of a small model, and weights in the names of torchscale and of Prov-GigaPath."""
    saved(tmp_path / "runs/mine", LongNetConfig.preset("tiny"))
    sizes = {"encoder_embed_dim": 768, "encoder_ffn_embed_dim": 3072, "encoder_layers": 12}
    encoder = torchscale_oracle.state_dict({**sizes, "encoder_attention_heads": 12}, "encoder")
    torch.save(encoder, tmp_path / "encoder.pth")
    slide = {f"encoder.{name}": tensor for name, tensor in encoder.items()}
    slide |= {"patch_embed.proj.weight": torch.ones(768, 1536), "cls_token": torch.ones(1, 1, 768)}
    slide |= {name: torch.ones(768) for name in ("patch_embed.proj.bias", "norm.weight", "norm.bias")}
    torch.save(slide, tmp_path / "slide_encoder.pth")
    monkeypatch.chdir(tmp_path)


def test_blocks_run_one_after_the_other(folder, capsys):
    embeddings = torch.ones(1, 100, 768)
    names = {"embeddings": embeddings, "own_embeddings": embeddings, "comm": None}
    for number, block in enumerate(BLOCKS):
        with torch.no_grad():
            exec(compile(block, f"README.md, Python block {number + 1}", "exec"), names)
    assert names["out"].shape == (1, 8192, 8, 64)
    assert names["logits"].shape == (1, 8192, 256)
    assert len(capsys.readouterr().out.splitlines()) == 100
    assert names["slide"](torch.ones(1, 5, 1536), torch.ones(1, 5, 2))[:, 0].shape == (1, 768)
