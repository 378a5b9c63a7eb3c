"""What is looked at while a stage runs: curves in TensorBoard, answers to fixed prompts, and what was known before."""

import logging
import random
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from anygen.loading import load_generator
from anygen.media import Audio, Image, Video
from anygen.messages import Message, TextPart
from anygen.model import AnyGenModel
from anygen.training.loop import is_main
from anygen.training.requests import self_prompts
from anygen.training.stage import Ready, StageRecipe

logger = logging.getLogger("anygen.training")


def tensorboard(folder: Path) -> tuple[TrainerCallback, Any] | None:
    """The callback that writes curves to `folder`, and its writer; None where TensorBoard is not installed, and on all
    processes but the first."""
    from transformers.integrations import TensorBoardCallback

    if not is_main():
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning("curves are not written: TensorBoard is not installed (pip install 'anygen-mm[train]')")
        return None

    class Board(TensorBoardCallback):
        """Stays open: the last measurement comes after the training."""

        def on_train_end(self, *_: Any, **__: Any) -> None:
            writer.flush()

    writer: Any = SummaryWriter(log_dir=str(folder))
    return Board(tb_writer=writer), writer


class Samples(TrainerCallback):
    """Answers a recipe's prompts now and then. Generators are loaded for it and let go again."""

    def __init__(self, recipe: StageRecipe, ready: Ready, folder: Path, writer: Any) -> None:
        self.recipe, self.ready, self.folder, self.writer = recipe, ready, folder, writer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the trainer."""
        due = state.global_step % self.recipe.sample_every == 0 or state.global_step == state.max_steps
        if due and is_main():
            self.sample(state.global_step)

    def sample(self, step: int) -> None:
        """Writes the answers of one step."""
        from anygen.pipeline import AnyGenPipeline

        model, training = self.ready.model, self.ready.model.training
        model.eval()
        generators = {
            modality: load_generator(self.ready.directory, making, model.device, torch.float32)
            for modality, making in model.settings.outputs.items()
        }
        pipe = AnyGenPipeline(model, generators)
        for number, prompt in enumerate(self.recipe.samples):
            reply = pipe(prompt, seed=self.recipe.seed, max_new_tokens=64)
            folder = self.folder / f"step-{step:06d}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.txt").write_text(f"{prompt}\n\n{reply.text}\n", encoding="utf-8")
            reply.save(folder / f"{number}", overwrite=True)
            if self.writer is not None:
                self._show(f"samples/{number}", prompt, reply, step)
        model.train(training)

    def _show(self, tag: str, prompt: str, reply: Any, step: int) -> None:
        self.writer.add_text(tag, f"**{prompt}**\n\n{reply.text}", step)
        for place, medium in enumerate([*reply.images, *reply.videos, *reply.audios]):
            name = f"{tag}/{place}"
            if isinstance(medium, Image):
                self.writer.add_image(name, medium.array, step, dataformats="HWC")
            elif isinstance(medium, Video):  # TensorBoard needs another package for clips
                self.writer.add_images(name, medium.frames, step, dataformats="NHWC")
            elif isinstance(medium, Audio):
                self.writer.add_audio(name, torch.from_numpy(medium.mono)[None], step, medium.sampling_rate)


class Retention(TrainerCallback):
    """The share of old prompts, plain questions and requests for media, that still get an answer of the same kind."""

    def __init__(self, recipe: StageRecipe, model: AnyGenModel, log: Any, writer: Any) -> None:
        self.every, self.model, self.log, self.writer = recipe.retention_every or 1, model, log, writer
        self.probes = probes(model, recipe.retention_probes, recipe.seed)
        self.before = self._kinds()  # now: a run that goes on loads its checkpoint later

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the trainer."""
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        kinds = self._kinds()
        share = sum(a == b for a, b in zip(self.before, kinds, strict=True)) / max(1, len(kinds))
        self.log.on_log(args, state, control, logs={"retention": share})
        if self.writer is not None:
            self.writer.add_scalar("retention", share, state.global_step)

    def _kinds(self) -> list[Any]:
        from anygen.training.new_output import kinds_of_answers, made

        training = self.model.training
        self.model.eval()
        found = [(answer.route, made(answer)) for answer in kinds_of_answers(self.model, self.probes)]
        self.model.train(training)
        return found


def probes(model: AnyGenModel, count: int, seed: int) -> list[list[Message]]:
    """Plain questions and requests for what the model makes, half of each."""
    from anygen.training.new_output import OTHERS, THINGS

    rng = random.Random(seed)
    texts = rng.sample(self_prompts(), min(count // 2, len(self_prompts())))
    asked = [modality for modality in model.settings.outputs if modality in OTHERS]
    for number in range(count - len(texts) if asked else 0):
        forms = [form for form in OTHERS[asked[number % len(asked)]] if "{x}" in form]
        texts.append(rng.choice(forms).format(x=rng.choice(THINGS)))
    return [[Message("user", (TextPart(text),))] for text in texts]
