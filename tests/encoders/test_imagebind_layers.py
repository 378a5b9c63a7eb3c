"""ImageBind's blocks alone."""

import pytest
import torch
from torch import nn

from anygen.encoders.imagebind_layers import Attention, Block, PatchTokens, Stem, Transformer, Tubelets


@pytest.mark.parametrize(("add_bias_kv", "causal"), [(False, False), (False, True), (True, False)])
def test_attention_equals_pytorch_s_module_with_its_state_dict(add_bias_kv: bool, causal: bool) -> None:
    torch.manual_seed(0)
    reference = nn.MultiheadAttention(12, 3, add_bias_kv=add_bias_kv, batch_first=True)
    nn.init.normal_(reference.in_proj_bias)
    ours = Attention(12, 3, add_bias_kv=add_bias_kv)
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(2, 5, 12)
    mask = torch.full((5, 5), -torch.inf).triu(1) if causal else None
    expected, _ = reference(x, x, x, need_weights=False, attn_mask=mask)
    torch.testing.assert_close(ours(x, causal), expected)


def test_tubelets_equal_a_3d_convolution() -> None:
    torch.manual_seed(0)
    tubelets = Tubelets(width=6, frames=2, patch=4)
    clip, still = torch.randn(2, 3, 2, 8, 12), torch.randn(2, 3, 8, 12)
    convolved = nn.Conv3d.forward(tubelets, clip)
    torch.testing.assert_close(tubelets(clip), convolved[:, :, 0])
    repeated = nn.Conv3d.forward(tubelets, still[:, :, None].repeat(1, 1, 2, 1, 1))
    torch.testing.assert_close(tubelets(still), repeated[:, :, 0])


def test_training_drops_whole_branches_and_scales_the_others() -> None:
    torch.manual_seed(0)
    block = Block(8, 2, add_bias_kv=False, drop_path=0.5).train()
    nn.init.zeros_(block.mlp.fc2.weight)  # type: ignore[union-attr]  # leaves the attention branch alone
    x = torch.randn(64, 3, 8)
    added = block(x, False) - x
    kept = added.flatten(1).any(1)
    assert 16 < kept.sum() < 48
    branch = block.attn(block.norm_1(x), False)
    torch.testing.assert_close(added[kept], 2 * branch[kept])
    torch.testing.assert_close(block.eval()(x, False) - x, branch)


def test_dropping_rises_evenly_with_the_depth() -> None:
    trunk = Transformer(8, 3, 2, pre_norm=False, add_bias_kv=False, drop_path=0.4, causal=False)
    assert [block.rate for block in trunk.blocks] == [0.0, 0.2, 0.4]


def test_training_drops_patches_but_never_the_class_token() -> None:
    torch.manual_seed(0)
    stem = Stem(nn.Conv2d(1, 4, 2, stride=2, bias=False), None)
    tokens = PatchTokens(stem, "rgbt_stem", width=4, patches=16, shapes=((1, 8, 8),), drop=0.5)
    x = torch.randn(32, 1, 8, 8)
    whole, part = tokens.eval()(x), tokens.train()(x)
    assert whole.shape == (32, 17, 4) and part.shape == (32, 9, 4)
    assert torch.equal(part[:, 0], whole[:, 0])
    kept = (part[:, 1:, None] == whole[:, None, 1:]).all(-1)  # [B, 8, 16]
    assert bool((kept.sum(2) == 1).all()) and int(kept.sum(1).max()) == 1  # each another patch at its own place
    assert len({tuple(row.tolist()) for row in kept.any(1)}) > 24
