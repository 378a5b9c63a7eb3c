"""From what `AnyGenPipeline.from_pretrained` is given to the parts of a pipeline, on their device and on their way."""

import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, cast

import torch

from anygen.generators.base import Generator
from anygen.generators.placing import check_savers
from anygen.loading import choose_device, choose_dtype, memory, model_directory
from anygen.memory_need import model_need
from anygen.memory_plan import MemoryPlan, plan_memory, precision_of
from anygen.model import AnyGenModel
from anygen.model_config import AnyGenConfig
from anygen.offload import PLACED, Generators, check_generators, check_offload, free_memory
from anygen.plugins import check_parts
from anygen.progress import quiet_libraries
from anygen.quantization import check_quantization
from anygen.speed import Speed

logger = logging.getLogger(__name__)
_LEVELS = {"resident": logging.DEBUG} | dict.fromkeys(PLACED, logging.WARNING)
"""How loud a plan is told: one that takes much longer is told unasked."""


def assemble(
    name_or_dir: str | os.PathLike[str] | None,
    *,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    offload: str | None,
    quantization: str | None,
    generators: Collection[str] | bool | None,
    compile: bool | str,
    graphs: bool | None,
    device_map: str | Mapping[str, Any] | None,
    savers: Collection[str],
) -> tuple[AnyGenModel, Generators, MemoryPlan]:
    """The model, its generators (loaded when they are first used), and what they are expected to take.

    Takes and raises the same as `AnyGenPipeline.from_pretrained`.
    """
    bits = check_quantization(quantization)
    policy = check_offload("auto" if offload is None else offload)
    check_savers(savers)
    chosen = choose_device(device)
    kind = choose_dtype(dtype, chosen)
    directory = model_directory(name_or_dir)
    settings = AnyGenConfig.load(directory / "anygen.json")
    wanted = list(settings.outputs) if generators in (None, True) else list(cast(Any, generators) or ())
    check_parts(settings, generators=bool(wanted))
    speed = Speed.chosen(chosen, compile=compile, graphs=graphs)
    check_generators(directory, settings, wanted)
    need = model_need(directory, wanted=wanted)
    if device_map is not None:  # the LLM goes where it finds room
        need = replace(need, needs=tuple(one for one in need.needs if one.role != "LLM"))
    plan = plan_memory(
        need,
        free_memory(chosen),
        chosen,
        precision=precision_of(kind, bits),
        offload=policy,
    )
    logger.log(_LEVELS.get(plan.offload, logging.INFO), "%s", plan)
    making = replace(speed, graphs=speed.graphs and plan.offload not in PLACED)  # what moves has no address

    def prepare(generator: Generator) -> Generator:
        generator.save_memory(savers)
        return making.apply(generator)

    policy = policy if plan.offload == "resident" else check_offload(plan.offload)
    makers = Generators.of(directory, settings, wanted, chosen, kind, offload=policy, prepare=prepare)
    with quiet_libraries(), memory():
        model = AnyGenModel.from_pretrained(
            directory, dtype=kind, device=chosen, quantization=bits, device_map=device_map
        )
        speed.apply_to_llm(model)
    return model, makers, plan
