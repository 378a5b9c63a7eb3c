"""The blocks of ImageBind: stems that make tokens, a pre-norm transformer, heads. They know no preset.

Attribute names are those of the published weights, which is why some containers have steps that do nothing.

Source: ImageBind (arXiv:2305.05665), appendix B, and its released checkpoint. Initial values as released: Xavier
for the transformer, OpenCLIP's for class tokens and positions.
Differs: stochastic depth drops whole samples (the release drops token positions, for its batch is the second
axis); attention is PyTorch's fused kernel; clips and still images go through one 2-D convolution.
Shapes: B batch, T tokens, C trunk width, E output width, H W pixels, F frames.
"""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anygen.errors import MediaError

TRUNK_EPS = 1e-6
"""Of every norm in trunks and heads; the stems' norms have PyTorch's own."""


class Attention(nn.Module):
    """Self-attention with the parameter layout of `nn.MultiheadAttention`.

    `add_bias_kv` appends one learned key and value, the same for every sample, to those of the tokens.
    """

    def __init__(self, width: int, heads: int, *, add_bias_kv: bool) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * width, width)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = _linear(width, width)
        self.bias_k = nn.Parameter(nn.init.xavier_normal_(torch.empty(1, 1, width))) if add_bias_kv else None
        self.bias_v = nn.Parameter(nn.init.xavier_normal_(torch.empty(1, 1, width))) if add_bias_kv else None

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """float[B, T, C] -> float[B, T, C]."""
        query, key, value = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        if self.bias_k is not None and self.bias_v is not None:
            key = torch.cat([key, self.bias_k.to(key.dtype).expand(len(x), -1, -1)], dim=1)
            value = torch.cat([value, self.bias_v.to(value.dtype).expand(len(x), -1, -1)], dim=1)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, T or T + 1, C / heads]
            for part in (query, key, value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm attention and a GELU layer of four times the width, each on a residual path."""

    def __init__(self, width: int, heads: int, *, add_bias_kv: bool, drop_path: float) -> None:
        super().__init__()
        self.rate = drop_path
        self.attn = Attention(width, heads, add_bias_kv=add_bias_kv)
        self.norm_1 = nn.LayerNorm(width, eps=TRUNK_EPS)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=_linear(width, 4 * width), act=nn.GELU(), fc2=_linear(4 * width, width))
        )
        self.norm_2 = nn.LayerNorm(width, eps=TRUNK_EPS)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """float[B, T, C] -> float[B, T, C]."""
        x = x + self._dropped(self.attn(self.norm_1(x), causal))
        return x + self._dropped(self.mlp(self.norm_2(x)))

    def _dropped(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return branch
        kept = branch.new_empty(len(branch), 1, 1).bernoulli_(1 - self.rate)
        return branch * kept / (1 - self.rate)


class Transformer(nn.Module):
    """`blocks` blocks; the probability of dropping one rises evenly from 0 to `drop_path` with the depth."""

    def __init__(
        self,
        width: int,
        blocks: int,
        heads: int,
        *,
        pre_norm: bool,
        add_bias_kv: bool,
        drop_path: float,
        causal: bool,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.pre_transformer_layer = nn.Sequential(*[nn.LayerNorm(width, eps=TRUNK_EPS)] * pre_norm)
        self.blocks = nn.ModuleList(
            Block(width, heads, add_bias_kv=add_bias_kv, drop_path=drop_path * depth / max(blocks - 1, 1))
            for depth in range(blocks)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """float[B, T, C] -> float[B, T, C], the residual stream behind the last block."""
        tokens = self.pre_transformer_layer(tokens)
        for block in self.blocks:
            tokens = block(tokens, self.causal)
        return tokens


class Tubelets(nn.Conv3d):
    """Cuts clips of exactly F frames into patches that span all F; a still image counts as F equal frames."""

    def __init__(self, width: int, frames: int, patch: int) -> None:
        kernel = (frames, patch, patch)
        super().__init__(3, width, kernel_size=kernel, stride=kernel, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """float[B, 3, H, W] or float[B, 3, F, H, W] -> float[B, C, H / patch, W / patch]."""
        still = input.ndim == 4
        # equal frames: sum the kernel over time, at half the work; others: frames are channels of a 2-D kernel
        kernel = self.weight.sum(2) if still else self.weight.flatten(1, 2)
        return F.conv2d(input if still else input.flatten(1, 2), kernel, stride=self.stride[1:])


class Stem(nn.Module):
    """A projection to patches, flattened to tokens, with a norm or without."""

    def __init__(self, proj: nn.Module, norm_layer: nn.LayerNorm | None) -> None:
        super().__init__()
        self.proj = proj
        self.norm_layer = norm_layer

    def forward(self, x: Tensor) -> Tensor:
        """Whatever `proj` takes -> float[B, T, C]."""
        x = self.proj(x)
        tokens = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
        return tokens if self.norm_layer is None else self.norm_layer(tokens)


class PatchTokens(nn.Module):
    """A class token and one token a patch, each with its learned position: vision, audio, depth and thermal.

    Args:
        stem_name: the published name of the stem, `rgbt_stem` or `depth_stem`.
        shapes: the shapes without batch axis that are taken.
        drop: the share of patches that is left out in training.
    """

    def __init__(
        self,
        stem: Stem,
        stem_name: str,
        *,
        width: int,
        patches: int,
        shapes: tuple[tuple[int, ...], ...],
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.stem_name, self.shapes = stem_name, shapes
        self.dropped = int(drop * patches)
        self.add_module(stem_name, stem)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.pos_embedding_helper = nn.ParameterDict(
            {"pos_embed": nn.Parameter(torch.randn(1, 1 + patches, width) * width**-0.5)}
        )

    def resize(self, side: int, shapes: tuple[tuple[int, ...], ...]) -> None:
        """Takes square pictures of side x side patches from now on; positions are interpolated, bicubically."""
        old = self.pos_embedding_helper["pos_embed"]
        count, width = old.shape[1] - 1, old.shape[2]
        self.shapes, self.dropped = shapes, self.dropped * side * side // count
        if side * side == count:
            return
        grid = old.detach()[:, 1:].unflatten(1, (math.isqrt(count), -1)).permute(0, 3, 1, 2)  # [1, C, h, w]
        grid = F.interpolate(grid.float(), size=(side, side), mode="bicubic", align_corners=False).to(old.dtype)
        places = torch.cat([old.detach()[:, :1], grid.permute(0, 2, 3, 1).reshape(1, -1, width)], dim=1)
        self.pos_embedding_helper["pos_embed"] = nn.Parameter(places, requires_grad=old.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """float[B, *shape] -> float[B, 1 + patches, C]; in training without those that are dropped.

        Raises:
            MediaError: the input has none of the shapes; names them.
        """
        _check_shape(x, self.shapes)
        tokens = self.get_submodule(self.stem_name)(x)
        tokens = _with_class(tokens, self.cls_token) + self.pos_embedding_helper["pos_embed"]
        if not self.training or not self.dropped:
            return tokens
        order = torch.rand(tokens.shape[0], tokens.shape[1] - 1, device=tokens.device).argsort(1)
        kept = 1 + order[:, self.dropped :, None].expand(-1, -1, tokens.shape[2])
        return torch.cat([tokens[:, :1], tokens.gather(1, kept)], dim=1)


class MotionTokens(nn.Module):
    """A class token and one token for every `kernel` steps of all channels: IMU."""

    def __init__(self, width: int, *, channels: int, steps: int, kernel: int) -> None:
        super().__init__()
        self.kernel, self.shapes = kernel, ((channels, steps),)
        self.imu_stem = Stem(nn.Linear(channels * kernel, width, bias=False), nn.LayerNorm(width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + steps // kernel, width) * 0.01)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """float[B, channels, steps] -> float[B, 1 + steps // kernel, C].

        Raises:
            MediaError: the input has another shape.
        """
        _check_shape(x, self.shapes)
        windows = x.unfold(-1, self.kernel, self.kernel)  # [B, channels, windows, kernel]
        tokens = self.imu_stem(windows.transpose(1, 2).flatten(2))
        return _with_class(tokens, self.cls_token) + self.pos_embed


class WordTokens(nn.Module):
    """Embedded token ids with learned positions.

    The buffer `mask` is part of the published weights; attention is causal with or without it.
    """

    mask: Tensor

    def __init__(self, width: int, *, vocab_size: int, context_length: int) -> None:
        super().__init__()
        self.context_length = context_length
        self.token_embedding = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, context_length, width) * 0.01)
        self.register_buffer("mask", torch.full((context_length, context_length), -math.inf).triu(1))

    def forward(self, ids: Tensor) -> Tensor:
        """long[B, T], T at most the context length -> float[B, T, C].

        Raises:
            MediaError: T is larger.
        """
        if ids.ndim != 2 or ids.shape[1] > self.context_length:
            raise MediaError(f"text takes long[B, at most {self.context_length}], got {list(ids.shape)}")
        return self.token_embedding(ids) + self.pos_embed[:, : ids.shape[1]]


class Head(nn.Sequential):
    """A norm, steps that select or drop, a projection; the last has no bias."""

    def __init__(self, width: int, out_dim: int, *between: nn.Module) -> None:
        super().__init__(nn.LayerNorm(width, eps=TRUNK_EPS), *between, nn.Linear(width, out_dim, bias=False))

    def norm(self, tokens: Tensor) -> Tensor:
        """float[B, T, C] -> float[B, T, C]."""
        return self[0](tokens)

    def project(self, token: Tensor) -> Tensor:
        """float[B, C], normed -> float[B, E], of length 1, computed in float32."""
        for step in list(self)[1:]:  # a slice would be a Head again
            token = step(token)
        return F.normalize(token.float(), dim=-1)


class LogitScale(nn.Module):
    """A temperature, learned or fixed, kept as its logarithm and never above 100."""

    log_logit_scale: Tensor

    def __init__(self, scale: float, *, learned: bool) -> None:
        super().__init__()
        log_scale = torch.tensor(math.log(scale))
        if learned:
            self.log_logit_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_logit_scale", log_scale)

    def forward(self, x: Tensor) -> Tensor:
        """float[B, E] -> float[B, E]."""
        return self.log_logit_scale.exp().clamp(max=100) * x


def _linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _with_class(tokens: Tensor, cls_token: Tensor) -> Tensor:
    return torch.cat([cls_token.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1)


def _check_shape(x: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    if tuple(x.shape[1:]) not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise MediaError(
            f"this ImageBind trunk takes samples of shape {wanted}, got {list(x.shape[1:])} "
            "(5 and 6 axes are read as [batch, clips, *sample])"
        )
