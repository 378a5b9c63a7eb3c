"""New modalities for a model that is there: an encoder with a fresh input projector, or a generator with fresh signal
rows and a fresh output projector. What the model could do before stays as it was, to the last bit of its weights.

Shapes: T feature tokens, S signal tokens.
"""

from dataclasses import replace

import torch

from anygen.encoders.base import Encoder
from anygen.errors import ConfigError
from anygen.extension import made_condition, prompt_tokens
from anygen.generators.base import Generator
from anygen.model import AnyGenModel
from anygen.model_config import (
    AnyGenConfig,
    InputConfig,
    ModalityConfig,
    OutputConfig,
    PartConfig,
    SourceConfig,
    SourcedPartConfig,
)
from anygen.model_parts import input_projector, output_projector
from anygen.registry import name_of
from anygen.signal_tokens import SignalTokens, SignalTokensConfig


def add_input(
    model: AnyGenModel, encoder: Encoder, *, tokens: int, projector: PartConfig, seed: int = 0
) -> AnyGenModel:
    """Gives a model a sense: it reads `encoder.modality` from now on, and understands it once the projector is trained.

    Args:
        model: changed in place.
        encoder: registered and trained; it is frozen.
        tokens: T of one medium.
        projector: which, with its options.
        seed: of the projector's weights.

    Returns:
        The model.

    Raises:
        ConfigError: the model reads that modality already, or the projector does not fit.
        UnknownComponentError: the encoder's class is not registered.
    """
    modality, old = encoder.modality, model.settings
    if modality in old.inputs:
        raise ConfigError(f"the model reads {modality} already; it reads {', '.join(old.inputs)}")
    reading = InputConfig(
        encoder=SourcedPartConfig(
            name=name_of("encoder", type(encoder)), source=SourceConfig(path=f"encoders/{modality}")
        ),
        feature_dim=encoder.feature_dim,
        slots=prompt_tokens(projector, tokens, encoder.feature_dim),
        projector=projector,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = input_projector(reading, model.llm.width)
    known = old.modalities.get(modality, ModalityConfig())
    model.settings = _with(old, modality, replace(known, input=reading))
    model.encoders[modality] = encoder.requires_grad_(False).eval().to(model.device)
    model.input_projectors[modality] = fresh.to(model.device).train(model.training)
    model.prompts = model.build_prompts()
    return model


def add_output(
    model: AnyGenModel, generator: Generator, *, signal_tokens: int, projector: PartConfig, seed: int = 0
) -> AnyGenModel:
    """Gives a model a way to answer: signal tokens that ask for `generator.modality`, and a projector to its condition.

    Generators are not part of a model: give this one to the pipeline, or to `saving.save_model`.

    Args:
        model: changed in place. Its `signal_tokens` are another object afterwards, with all old rows as they were.
        generator: registered and trained.
        signal_tokens: S of one medium.
        projector: which, with its options.
        seed: of the new rows' and the projector's weights. A model that makes media already lends its rows: the mean
            of its first signal tokens, of its second, and so on, with a little noise.

    Returns:
        The model.

    Raises:
        ConfigError: the model makes that modality already, its LLM has such tokens, or the projector does not fit.
        UnknownComponentError: the generator's class is not registered.
    """
    modality, old = generator.modality, model.settings
    if modality in old.outputs:
        raise ConfigError(f"the model makes {modality} already; it makes {', '.join(old.outputs)}")
    condition = {name: tuple(shape) for name, shape in generator.condition_spec.shapes.items()}
    made_condition(projector, signal_tokens, condition)
    making = OutputConfig(
        signal_tokens=signal_tokens,
        condition=condition,
        generator=SourcedPartConfig(
            name=name_of("generator", type(generator)), source=SourceConfig(path=f"generators/{modality}")
        ),
        projector=projector,
    )
    settings = _with(old, modality, replace(old.modalities.get(modality, ModalityConfig()), output=making))
    rows = SignalTokens(
        SignalTokensConfig(counts={m: c.signal_tokens for m, c in settings.outputs.items()}),
        vocab_size=model.llm.vocab_size,
        width=model.llm.width,
        tied=model.llm.tied,
    ).to(model.device)
    rows.check_vocabulary(model.llm.tokenizer.get_vocab())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = output_projector(making, model.llm.width)
    before, model.signal_tokens, model.settings = model.signal_tokens, rows, settings
    model.initialize(seed=seed)
    rows.adopt(before)
    _lend(rows, before, modality, seed)
    model.output_projectors[modality] = fresh.to(model.device).train(model.training)
    model.prompts = model.build_prompts()
    return model


@torch.no_grad()
def _lend(rows: SignalTokens, before: SignalTokens, modality: str, seed: int) -> None:
    """Signal tokens that an adapter knows already make states that tell of the words before them."""
    lenders = [run for run in before.runs.values() if len(run) >= len(rows.runs[modality])]
    if not lenders:
        return
    generator = torch.Generator().manual_seed(seed)
    for own, old in ((rows.rows, before.rows), (rows.head_rows, before.head_rows)):
        if own is None or old is None:
            continue
        for place, token in enumerate(rows.runs[modality]):
            lent = torch.stack([old[run[place] - before.vocab_size] for run in lenders])
            noise = torch.randn(lent.shape[1:], generator=generator).to(lent)
            own[token - rows.vocab_size] = lent.mean(0) + 0.1 * lent.std() * noise


def _with(settings: AnyGenConfig, modality: str, config: ModalityConfig) -> AnyGenConfig:
    return replace(settings, modalities={**settings.modalities, modality: config})
