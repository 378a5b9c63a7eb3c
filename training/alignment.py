"""Decoder alignment on kept states: trains output projectors alone, with the LLM read once for every caption.

While the LLM, its adapter and the signal rows stand still, the states at a run are fixed numbers. They are computed
once, in the contexts in which runs are emitted, kept beside the targets, and the projectors of all output modalities
are trained on them for as many passes as they need: no LLM, no generator and no medium is in memory then. Source:
caption-only alignment, MM-LLMs survey (arXiv:2401.13601) eq. 4; NExT-GPT (arXiv:2309.05519) section 4.2.

Shapes: M runs of one modality, S signal tokens, D LLM width, L condition tokens, C condition width, R rows of a batch,
W tokens of a row.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from anygen.config import Config
from anygen.errors import ConfigError
from anygen.features import Condition
from anygen.losses import AlignmentConfig, condition_loss
from anygen.messages import MediaPart
from anygen.model import AnyGenModel
from anygen.model_config import PartConfig
from anygen.training import sound_captions
from anygen.training.captions import Drawing, canonical, varied
from anygen.training.conditions import alignment_metrics, encode_captions, load_generators
from anygen.training.icons import TRAINED_STYLES
from anygen.training.loop import AveragedWeights, Progress, RunLog, bf16_on_gpu, lowering
from anygen.training.motion import MOTIONS, Shot, canonical_clip, varied_clip
from anygen.training.packing import PackedDecoder, block_mask, pack, rows_of, segments_of
from anygen.training.pictures import load_icons
from anygen.training.requests import Conversation, Conversations
from anygen.training.sounds import load_sounds
from anygen.training.wishes import ClipWishes, ImageWishes, SoundWishes, Wishes, captions_of, wishes_of


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignmentRecipe(Config):
    """Everything that decides the result."""

    icons: str
    """Directory of the built icon set, for its names."""
    model: str
    """Directory of the model whose output projectors are trained."""
    generators: dict[str, str]
    """Output modality -> directory of its trained generator, whose text encoder gives the targets; projectors of the
    model's other modalities stay as they are."""
    sounds: str | None = None
    """Directory of the built sound bank, for its names; needed where sounds are made."""
    llm: str = "smollm2-135m-instruct"
    checksum: str | None = None
    """The icon set's checksum; None accepts any."""
    sounds_checksum: str | None = None
    """The sound bank's checksum; None accepts any."""
    low_rank: int | None = None
    """Replaces the projectors by `LowRankProjector`s of this rank, fitted in closed form; None trains what is there."""
    ridge: float = 3e-3
    """Penalty of the closed form, see `fit_low_rank`."""
    contexts: int = 60_000
    """Conversations that are read: everything that can be made, said plainly, first, then free ones."""
    rows: int = 32
    """Rows of a batch that the LLM reads; each holds several conversations."""
    row_tokens: int = 320
    """Tokens of a row. Longer conversations are left out."""
    batch_size: int = 256
    """Runs of each modality a step."""
    steps: int = 20_000
    minutes: float | None = None
    learning_rate: float = 1e-3
    ema: float = 0.998
    compile: bool = False
    """Compiles the projectors and their losses."""
    workers: int = 0
    """Processes that build prompts."""
    seed: int = 0

    def __post_init__(self) -> None:
        if "audio" in self.generators and self.sounds is None:
            raise ConfigError("the recipe aligns audio, so it must name the sound bank: sounds: data/sounds")


def plain(wishes: Wishes, rng: random.Random) -> list[tuple[Any, str]]:
    """Everything that can be asked for in a modality, by itself: contents, each with somebody's words.

    Pictures of each concept in each style and in none, clips of each concept in each motion and in none, and each
    thing that sounds, plain and in several ways.
    """
    say: Callable[[Any], str]
    say_so: Callable[[Any, random.Random], str]
    match wishes:
        case ImageWishes():
            contents: list[Any] = [
                Drawing(label=concept.label, style=style)
                for concept in wishes.concepts
                for style in (None, *TRAINED_STYLES)
            ]
            say, say_so = canonical, varied
        case ClipWishes():
            contents = [
                Shot(drawing=Drawing(label=concept.label), motion=motion)
                for concept in wishes.concepts
                for motion in (None, *MOTIONS)
            ]
            say, say_so = canonical_clip, varied_clip
        case SoundWishes():
            bank = wishes.bank
            contents = [
                *(sound_captions.random_music(player, rng) for player in bank.instruments for _ in range(12)),
                *(sound_captions.random_beat(drum, rng) for drum in (*bank.percussion, None) for _ in range(4)),
                *(sound_captions.random_effect(effect, bank, rng) for effect in bank.effects for _ in range(4)),
            ]
            contents += [sound_captions.bare(sound) for sound in contents[::3]]
            say, say_so = sound_captions.canonical, sound_captions.varied
        case _:
            return []
    return [(content, say(content) if rng.random() < 0.5 else say_so(content, rng)) for content in contents]


def contexts(conversations: Conversations, count: int, seed: int) -> list[Conversation]:
    """Conversations of words that end with media: all that can be asked for by itself first, then random ones."""
    rng = random.Random(seed)
    wanted = [
        (modality, content, words)
        for modality, wishes in conversations.wishes.items()
        for content, words in plain(wishes, rng)
    ]
    rng.shuffle(wanted)
    made = [conversations.ask_for(modality, content, words, rng) for modality, content, words in wanted[:count]]
    while len(made) < count:
        made.append(conversations.free_request(rng))
    return made


class _Prompts(Dataset[list[int]]):
    """The token ids of conversations, built where they are asked for: a loader's workers share the work."""

    def __init__(self, model: AnyGenModel, items: Sequence[Conversation]) -> None:
        self.prompts, self.items = model.prompts, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> list[int]:
        return self.prompts.example(self.items[number].messages).ids


Kept = dict[str, tuple[Tensor, list[str]]]
"""Output modality -> states float16[M, S, D] at its runs, and their M captions."""


@torch.no_grad()
def read_states(
    model: AnyGenModel, items: Sequence[Conversation], *, rows: int = 32, width: int = 320, workers: int = 0
) -> Kept:
    """The states at every run of the conversations, by modality, in the items' order.

    Conversations are packed into rows of one shape, as the instruction stage packs them.

    Args:
        model: in evaluation mode.
        items: that end with media.
        rows: R.
        width: W; longer conversations are left out.
        workers: processes that build prompts.
    """
    loader = DataLoader(_Prompts(model, items), batch_size=256, num_workers=workers, collate_fn=list)
    ids = [line for batch in loader for line in batch]
    decoder, device = PackedDecoder(model.llm, bf16=False, compile=False, graph=False), model.device
    states: dict[str, dict[int, list[Tensor]]] = {name: {} for name in model.settings.outputs}
    for packed in _packed(ids, rows, width):
        lines = [[ids[item] for item in row] for row in packed]
        segments, places = segments_of(lines, width)
        input_ids = rows_of(lines, width, 0)
        found = {name: model.signal_tokens.run_starts(input_ids, name) for name in states}
        input_ids, segments, places = (part.to(device, non_blocking=True) for part in (input_ids, segments, places))
        hidden = decoder(model.embed(input_ids), block_mask(segments), places)
        for name, starts in found.items():
            if not len(starts):
                continue
            columns = starts[:, 1:] + torch.arange(len(model.signal_tokens.runs[name]))
            picked = hidden[starts[:, :1].to(device), columns.to(device)].to(torch.float16).cpu()
            for (row, column), state in zip(starts.tolist(), picked, strict=True):
                states[name].setdefault(_item_at(lines[row], packed[row], column), []).append(state)
    kept: Kept = {}
    for name, by_item in states.items():
        numbers = sorted(by_item)
        said = [
            str(part.media)
            for number in numbers
            for message in items[number].messages
            if message.role == "assistant"
            for part in message.parts
            if isinstance(part, MediaPart) and part.modality == name
        ]
        if numbers:
            kept[name] = torch.stack([state for number in numbers for state in by_item[number]]), said
    return kept


def _packed(ids: Sequence[Sequence[int]], rows: int, width: int) -> Iterator[list[list[int]]]:
    """Numbers of all conversations no longer than `width`, laid out in batches of at most `rows` rows."""
    left = [number for number, line in enumerate(ids) if len(line) <= width]
    while left:
        tokens = sum(len(ids[number]) for number in left)
        laid = pack([len(ids[number]) for number in left], tokens // width + 1, width)
        full = [[left[place] for place in row] for row in laid if row]
        for first in range(0, len(full), rows):
            yield full[first : first + rows]
        done = {number for row in full for number in row}
        left = [number for number in left if number not in done]


def _item_at(lines: Sequence[Sequence[int]], items: Sequence[int], column: int) -> int:
    """Which of a row's conversations stands at `column`."""
    end = 0
    for line, item in zip(lines, items, strict=True):
        end += len(line)
        if column < end:
            return item
    raise IndexError(column)


@torch.no_grad()
def fit_low_rank(states: Tensor, targets: Tensor, *, rank: int, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Reduced-rank ridge regression of conditions on states: the best low-rank linear projector, without gradients.

    Source: Izenman 1975, reduced-rank regression; the ridge solution's predictions are projected on their first
    principal directions, which is optimal for the given rank.

    Args:
        states: float[M, S, D].
        targets: float[M, L, C].
        rank: at most as many directions are kept.
        ridge: of the penalty, in units of the states' mean variance times M.

    Returns:
        down float[rank, S * D], up float[L * C, rank], bias float[L * C]: `LowRankProjector`'s weights.
    """
    x, y = states.flatten(1).double(), targets.flatten(1).double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x
    penalty = ridge * gram.diagonal().mean()
    weight = torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=gram.dtype), x.T @ y)  # [S * D, L * C]
    # The predictions' principal directions, from the small side: x @ weight and root @ weight have equal Gram matrices.
    root = torch.linalg.cholesky(gram + 1e-9 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)).mH
    predicted = root @ weight  # [S * D, L * C]
    values, vectors = torch.linalg.eigh(predicted @ predicted.T)
    kept = min(rank, len(values))
    up = predicted.T @ (vectors[:, -kept:] / values[-kept:].clamp(min=1e-12).sqrt())  # orthonormal columns
    down = (weight @ up).T
    bias = y_mean - up @ (down @ x_mean)
    return down.float(), up.float(), bias.float()


@torch.no_grad()
def fit_projector(
    states: Tensor, targets: Mapping[str, Tensor], metrics: Mapping[str, Tensor], *, rank: int, ridge: float
) -> dict[str, Tensor]:
    """The weights of a `LowRankProjector`, fitted to conditions of one or several tensors.

    Args:
        states: float[M, S, D].
        targets: name -> float[M, L, C], in the order of the generator's specification.
        metrics: name -> float[C, C], invertible; errors are measured through them.
        rank: as for `fit_low_rank`.
        ridge: as for `fit_low_rank`.
    """
    seen = [(value.float() @ metrics[name].to(value.device)).flatten(1) for name, value in targets.items()]
    down, up, bias = fit_low_rank(states, torch.cat(seen, 1)[:, None], rank=rank, ridge=ridge)
    back, first = [], 0
    for (name, value), flat in zip(targets.items(), seen, strict=True):
        inverse = torch.linalg.inv(metrics[name].double()).cpu()
        part = slice(first, first + flat.shape[1])
        turned = torch.cat([up[part], bias[part, None]], 1).double().view(-1, value.shape[-1], up.shape[1] + 1)
        back.append(torch.einsum("lcr,cd->ldr", turned, inverse).flatten(0, 1).float())
        first += flat.shape[1]
    joined = torch.cat(back)
    return {"down.weight": down, "up.weight": joined[:, :-1].contiguous(), "up.bias": joined[:, -1].contiguous()}


def with_low_rank(model: AnyGenModel, rank: int, modalities: Sequence[str]) -> AnyGenModel:
    """The same model with untrained `LowRankProjector`s for these modalities."""
    for name, output in model.settings.outputs.items():
        if output.shares in modalities and name not in modalities:
            raise ConfigError(f"{name} shares the projector of {output.shares}: fit both or neither")
    changed = {}
    for name in modalities:
        modality = model.settings.modalities[name]
        assert modality.output is not None
        output = replace(modality.output, projector=PartConfig(name="low_rank", options={"rank": rank}), shares=None)
        changed[name] = replace(modality, output=output)
    config = replace(model.settings, modalities=model.settings.modalities | changed)
    other = AnyGenModel(config, model.llm, cast(Any, dict(model.encoders)))
    other.signal_tokens.load_state_dict(model.signal_tokens.state_dict())
    other.input_projectors.load_state_dict(model.input_projectors.state_dict())
    for name, projector in model.output_projectors.items():
        if name not in modalities:
            other.output_projectors[name].load_state_dict(projector.state_dict())
    other.origin = model.origin
    return other.to(model.device).eval()


@dataclass(frozen=True, slots=True)
class Runs:
    """What one projector learns from and is measured on."""

    states: Tensor
    """float16[M, S, D]."""
    targets: dict[str, Tensor]
    """name -> float16[M, L, C]."""
    held_out: int
    """Runs at the end that are measured only."""

    def __len__(self) -> int:
        return len(self.states) - self.held_out

    def part(self, rows: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """States and targets of these rows."""
        return self.states[rows], {name: value[rows] for name, value in self.targets.items()}


@torch.no_grad()
def distance(model: AnyGenModel, modality: str, states: Tensor, targets: Mapping[str, Tensor]) -> float:
    """Squared error as the generator's cross-attention sees it, as a share of the targets' variance; the mean over the
    tensors of a condition."""
    parts = zip(states.split(2048), *(value.split(2048) for value in targets.values()), strict=True)
    metrics = {name: metric.float() for name, metric in model.metrics[modality].items()}
    means = {name: value.float().mean(0).to(model.device) for name, value in targets.items()}
    error, spread = ({name: torch.zeros((), device=model.device) for name in targets} for _ in range(2))
    for rows, *values in parts:
        made = model.project(modality, rows.to(model.device).float()).tensors
        for name, value in zip(targets, values, strict=True):
            aim = value.to(model.device).float()
            error[name] += ((made[name].float() - aim) @ metrics[name]).square().sum()
            spread[name] += ((aim - means[name]) @ metrics[name]).square().sum()
    return sum((error[name] / spread[name]).item() for name in targets) / len(targets)


class _Objective(nn.Module):
    """All projectors with their losses, so that a step compiles whole."""

    def __init__(self, model: AnyGenModel, modalities: Sequence[str]) -> None:
        super().__init__()
        self.owners = {name: model.projects(name) for name in modalities}
        self.projectors = nn.ModuleDict({name: model.output_projectors[name] for name in self.owners.values()})
        self.metrics = {name: model.metrics[name] for name in modalities}
        self.embeddings = {name: model.run_embeddings(name).detach() for name in modalities}

    def forward(self, states: dict[str, Tensor], targets: dict[str, dict[str, Tensor]]) -> Tensor:
        """modality -> float[B, S, D], and name -> float[B, L, C] -> float32[], the sum of the modalities' losses."""
        losses = []
        for name, owner in self.owners.items():
            given = states[name].float()
            condition: Condition = self.projectors[owner](given, self.embeddings[name].expand(len(given), -1, -1))
            aim = {key: value.float() for key, value in targets[name].items()}
            losses.append(condition_loss(condition.tensors, aim, AlignmentConfig(mse=1.0), metrics=self.metrics[name]))
        return torch.stack(losses).sum()


@lowering("rows", "batch_size")
def train(recipe: AlignmentRecipe, out: Path) -> dict[str, float]:
    """Runs the recipe and writes `out/model`, where only the output projectors are new.

    Returns:
        Steps and loss; for each modality `held_out_…`, the `distance` of runs that were not trained on.

    Raises:
        ConfigError: the model does not make what the recipe has generators for, or data are not those that it pins.
    """
    from anygen import hub

    torch.manual_seed(recipe.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    log = RunLog(out, "alignment")
    icons = load_icons(recipe.icons, recipe.checksum)
    bank = load_sounds(recipe.sounds, recipe.sounds_checksum) if recipe.sounds is not None else None
    generators = load_generators(recipe.generators, device)
    llm_directory = hub.resolve(recipe.llm)
    model = AnyGenModel.from_pretrained(
        recipe.model, dtype=torch.bfloat16, device=device, encoders=False, resolve=lambda _: llm_directory
    )
    modalities = list(generators)
    if lacking := [name for name in modalities if name not in model.settings.outputs]:
        made = ", ".join(model.settings.outputs)
        raise ConfigError(f"the model in {recipe.model} does not make {', '.join(lacking)}; it makes {made}")
    wishes = wishes_of(modalities, icons, bank)
    items = contexts(Conversations(wishes, [], recipe.seed), recipe.contexts, recipe.seed)
    kept = read_states(model, items, rows=recipe.rows, width=recipe.row_tokens, workers=recipe.workers)
    runs = {}
    for one in wishes:
        states, captions = kept[one.modality]
        generator = generators[one.modality]
        runs[one.modality] = Runs(states, encode_captions(generator, captions), min(1024, len(states) // 8))
        model.set_metric(one.modality, alignment_metrics(generator, captions_of(one, 512, recipe.seed)))
        log.write(modality=one.modality, runs=len(states), contexts=len(items))
    return _fit(recipe, model, runs, log) if recipe.low_rank is not None else _descend(recipe, model, runs, log)


def _measure(model: AnyGenModel, runs: Mapping[str, Runs]) -> dict[str, float]:
    """`held_out_…` of each modality."""
    return {
        f"held_out_{name}": distance(model, name, *own.part(slice(len(own), None)))
        for name, own in runs.items()
        if own.held_out
    }


def _fit(recipe: AlignmentRecipe, model: AnyGenModel, runs: Mapping[str, Runs], log: RunLog) -> dict[str, float]:
    assert recipe.low_rank is not None
    metrics = model.metrics
    model = with_low_rank(model, recipe.low_rank, list(runs))
    model.metrics = metrics
    for name, own in runs.items():
        states, targets = own.part(slice(len(own)))
        on_cpu = {key: metric.cpu() for key, metric in metrics[name].items()}
        weights = fit_projector(states, targets, on_cpu, rank=recipe.low_rank, ridge=recipe.ridge)
        model.output_projectors[name].load_state_dict(weights)
    figures = {f"loss_{name}": distance(model, name, *own.part(slice(1024))) for name, own in runs.items()}
    figures |= _measure(model, runs)
    model.save_pretrained(log.path.parent / "model", dtype=torch.bfloat16, parts=False)
    log.write(final=True, low_rank=recipe.low_rank, **figures)
    return figures


def _descend(recipe: AlignmentRecipe, model: AnyGenModel, runs: Mapping[str, Runs], log: RunLog) -> dict[str, float]:
    device = model.device
    log.write(step=0, **_measure(model, runs))
    objective = _Objective(model, list(runs)).train()
    optimizer = torch.optim.AdamW(
        objective.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.01,
        fused=device.type == "cuda",
    )
    average = AveragedWeights(objective.projectors, recipe.ema)
    run: Any = torch.compile(objective) if recipe.compile else objective
    there = {
        name: (
            own.states[: len(own)].to(device),
            {key: value[: len(own)].to(device) for key, value in own.targets.items()},
        )
        for name, own in runs.items()
    }
    progress, loss = Progress(recipe.steps, recipe.minutes), torch.zeros(())
    while not progress.done:
        for group in optimizer.param_groups:
            group["lr"] = progress.learning_rate(recipe.learning_rate, warmup=100)
        states, targets = {}, {}
        for name, (given, aims) in there.items():
            rows = torch.randint(len(given), (recipe.batch_size,), device=device)
            states[name], targets[name] = given[rows], {key: value[rows] for key, value in aims.items()}
        with bf16_on_gpu(device):
            loss = run(states, targets)
        loss.backward()
        for projector in objective.projectors.values():  # each by itself: one's outliers do not slow the others
            torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update(objective.projectors, progress.step)
        progress.step += 1
        if progress.step % 200 == 0 or progress.done:
            log.write(step=progress.step, loss=loss.item())
    for name, projector in average.module.items():
        model.output_projectors[name].load_state_dict(projector.state_dict())
    model.eval()
    figures = {"steps": float(progress.step), "loss": loss.item()} | _measure(model, runs)
    model.save_pretrained(log.path.parent / "model", dtype=torch.bfloat16, parts=False)
    log.write(final=True, **figures)
    return figures
