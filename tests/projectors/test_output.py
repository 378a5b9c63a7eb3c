import pytest
import torch
from torch import nn

from anygen.errors import ConfigError
from anygen.features import ConditionSpec
from anygen.projectors.output import (
    MLPOutputProjector,
    MLPOutputProjectorConfig,
    TextFcLayer,
    TextFcLayerConfig,
)

IMAGE = ConditionSpec(shapes={"prompt_embeds": (7, 10)})
SOUND = ConditionSpec(shapes={"generated_prompt_embeds": (2, 6), "prompt_embeds": (3, 10), "pooled": (5,)})
SMALL = TextFcLayerConfig(width=16, heads=2, ffn=24, encoder_layers=2, decoder_layers=2)


def text_fc(spec: ConditionSpec = IMAGE, config: TextFcLayerConfig = SMALL) -> TextFcLayer:
    torch.manual_seed(0)
    return TextFcLayer(config, llm_dim=12, signal_tokens=4, spec=spec).eval()


class Published(nn.Module):
    """NExT-GPT's layer, written down from its published names and sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 16)
        self.tfm = nn.Transformer(
            batch_first=True,
            norm_first=True,
            d_model=16,
            num_encoder_layers=2,
            num_decoder_layers=2,
            dim_feedforward=24,
            dropout=0.0,
            nhead=2,
        )
        self.model = nn.Linear(16, 10)
        self.query_embs = nn.Parameter(torch.randn(1, 7, 16))

    def forward(self, states: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        x = self.fc(states + embeddings)
        return self.model(self.tfm(x, self.query_embs.repeat(len(x), 1, 1)))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_a_published_state_dict_gives_the_published_values() -> None:
    published, ours = Published().eval(), text_fc()
    assert list(ours.state_dict()) != []
    ours.load_state_dict(published.state_dict())
    states, embeddings = torch.randn(3, 4, 12), torch.randn(3, 4, 12)
    made = ours(states, embeddings).tensors["prompt_embeds"]
    torch.testing.assert_close(made, published(states, embeddings), rtol=1e-5, atol=1e-6)


def test_the_default_has_next_gpts_31_96_million_parameters() -> None:
    spec = ConditionSpec(shapes={"prompt_embeds": (77, 768)})
    with torch.device("meta"):
        layer = TextFcLayer(TextFcLayerConfig(), llm_dim=4096, signal_tokens=4, spec=spec)
    assert round(sum(p.numel() for p in layer.parameters()) / 1e6, 2) == 31.96


def test_equal_queries_make_equal_condition_tokens() -> None:
    layer = text_fc(config=TextFcLayerConfig(width=16, heads=2, ffn=24, query_std=0.0))
    made = layer(torch.randn(2, 4, 12), torch.randn(2, 4, 12)).tensors["prompt_embeds"]
    torch.testing.assert_close(made, made[:, :1].expand_as(made))


def test_signal_states_are_a_set_to_the_transformer_and_a_sequence_to_the_mlp() -> None:
    states, order = torch.randn(2, 4, 12), torch.tensor([3, 1, 0, 2])
    zero = torch.zeros_like(states)
    layer = text_fc()
    torch.testing.assert_close(
        layer(states[:, order], zero).tensors["prompt_embeds"], layer(states, zero).tensors["prompt_embeds"]
    )
    torch.manual_seed(0)
    mlp = MLPOutputProjector(MLPOutputProjectorConfig(width=16), llm_dim=12, signal_tokens=4, spec=IMAGE)
    shuffled, plain = mlp(states[:, order], zero), mlp(states, zero)
    assert not torch.allclose(shuffled.tensors["prompt_embeds"], plain.tensors["prompt_embeds"], atol=1e-3)


def test_an_mlp_equals_its_formula() -> None:
    torch.manual_seed(0)
    mlp = MLPOutputProjector(MLPOutputProjectorConfig(width=16), llm_dim=12, signal_tokens=4, spec=IMAGE)
    states, embeddings = torch.randn(2, 4, 12), torch.randn(2, 4, 12)
    hidden = mlp.norm(nn.functional.gelu(mlp.fc(states + embeddings)))
    mixed = torch.einsum("ls,bse->ble", mlp.mix.weight, hidden) + mlp.places
    wanted = mlp.model(nn.functional.gelu(mixed))
    torch.testing.assert_close(mlp(states, embeddings).tensors["prompt_embeds"], wanted)


@pytest.mark.parametrize("name", ["text_fc", "mlp"])
def test_several_tensors_share_a_trunk_and_have_a_head_each(name: str) -> None:
    torch.manual_seed(0)
    mlp = MLPOutputProjector(MLPOutputProjectorConfig(width=16), llm_dim=12, signal_tokens=4, spec=SOUND)
    layer = text_fc(SOUND) if name == "text_fc" else mlp
    condition = SOUND.check(layer(torch.randn(2, 4, 12), torch.randn(2, 4, 12)))
    condition.tensors["pooled"].sum().backward()
    assert isinstance(layer.model, nn.ModuleDict)
    assert layer.fc.weight.grad is not None
    assert {n for n, head in layer.model.items() if next(head.parameters()).grad is not None} == {"pooled"}


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="width 10 is not divisible by 4 heads"):
        TextFcLayerConfig(width=10)
    with pytest.raises(ConfigError, match=r"condition 'latents' has shape \(4, 8, 8\); projectors make"):
        text_fc(ConditionSpec(shapes={"latents": (4, 8, 8)}))
