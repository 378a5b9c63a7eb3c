"""Every stage of training on two processes, as a user starts them, gives what one process does."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from anygen.component import read_safetensors
from anygen.training import recipes, stage_trainer
from anygen.training.recipes import run
from anygen.training.sharding import touching

STAGES = {
    "encoder_alignment": "data: {image: DATA/pairs.jsonl}\nbatch_size: 4\n",
    "decoder_alignment": "captions: {audio: DATA/captions.txt}\nbatch_size: 2\n",
    "instruction_tuning": "data: DATA/chats.jsonl\npeft: {kind: lora, rank: 2}\nbatch_size: 4\n"
    "trains: [llm, ROWS input_projectors, output_projectors]\n",
    "everything": "data: DATA/chats.jsonl\ntext_data: DATA/talk.jsonl\ntext_share: 0.4\n"
    "peft: {kind: lora, rank: 2}\nbatch_size: 4\nunfreeze: ['llm.*']\nactivation_checkpointing: true\n"
    "trains: [llm, ROWS input_projectors, output_projectors]\n",
    "preference_tuning": "data: DATA/wanted.jsonl\npeft: {kind: lora, rank: 2}\nbatch_size: 2\n",
}
KINDS = {"everything": "instruction_tuning"}
CASES = [("ddp", stage) for stage in STAGES]
CASES += [("fsdp2", "instruction_tuning"), ("deepspeed", "instruction_tuning"), ("deepspeed", "preference_tuning")]


def curve(out: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def start(config: str, recipe: Path, out: Path) -> subprocess.Popen[str]:
    """Two processes of a run."""
    file = Path(recipes.__file__).parent / "accelerate" / f"{config}.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", "2"]
    command = [*launch, "-m", "anygen", "train", str(recipe), f"out={out}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def finished(running: subprocess.Popen[str]) -> None:
    said, _ = running.communicate(timeout=240)
    assert running.returncode == 0, said[-4000:]


@pytest.mark.parametrize(("config", "stage"), CASES)
def test_two_processes_learn_as_one_does(
    config: str, stage: str, user_model: Path, user_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the command line; with media, words and conditions, measured before, between and after."""
    rows = "signal_tokens,"
    if config == "deepspeed":
        pytest.importorskip("deepspeed", reason="DeepSpeed is no part of anygen")
    elif config == "fsdp2":
        if torch.cuda.device_count() < 2:
            pytest.skip("accelerate shards on accelerators alone; test_trainer.py has it on CPUs")
        rows = ""  # single rows cannot be sharded
    if config != "ddp":  # there what a whole batch lacks has a gradient of zero, which AdamW does not take for none
        monkeypatch.setattr(stage_trainer, "with_equal_gradients", lambda _, model: touching(model))
    told = STAGES[stage].replace("DATA", str(user_data)).replace("ROWS", rows)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"kind: {KINDS.get(stage, stage)}\nmodel: {user_model}\nout: {tmp_path / 'one'}\ncache: {user_data / 'cache'}\n"
        f"{told}steps: 3\nheld_out: 0.35\nevaluate_every: 2\nlearning_rate: 0.01\nbf16: false\nreport_to: []\n"
    )
    run(recipe)
    finished(start(config, recipe, tmp_path / "two"))
    for name in ("loss", "eval_loss", "grad_norm"):
        np.testing.assert_allclose(curve(tmp_path / "two", name), curve(tmp_path / "one", name), rtol=2e-4)
    one, two = (read_safetensors(tmp_path / out / "model", "projectors") for out in ("one", "two"))
    for name, value in one.items():
        assert value.dtype == two[name].dtype
        torch.testing.assert_close(two[name], value, rtol=1e-2, atol=2e-4)


def test_two_processes_that_are_killed_go_on_bit_for_bit(user_model: Path, user_data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"kind: preference_tuning\nmodel: {user_model}\ndata: {user_data / 'wanted.jsonl'}\nsteps: 30\nbatch_size: 2\n"
        f"cache: {user_data / 'cache'}\npeft: {{kind: lora, rank: 2}}\nsave_every: 4\nlearning_rate: 0.01\n"
        "held_out: 0.35\nreport_to: []\n"
    )
    finished(start("ddp", recipe, tmp_path / "whole"))
    cut = start("ddp", recipe, tmp_path / "cut")
    try:
        while cut.poll() is None and not (tmp_path / "cut" / "checkpoints" / "checkpoint-8").exists():
            time.sleep(0.01)
        assert cut.poll() is None, cut.communicate()[0][-4000:]
    finally:  # each worker has a session of its own, and would go on to the end
        for process in (*psutil.Process(cut.pid).children(recursive=True), cut):
            process.kill()
    cut.communicate()
    told = (tmp_path / "cut" / "training.jsonl").read_text().splitlines()[:-1]  # the last line may be cut off
    until = [line for line in told if json.loads(line).get("step", 0) <= 8]
    finished(start("ddp", recipe, tmp_path / "cut"))
    again = (tmp_path / "cut" / "training.jsonl").read_text().splitlines()
    assert until and again[: len(until)] == until, "with their times: it went on, and did not begin anew"
    assert curve(tmp_path / "cut", "loss") == curve(tmp_path / "whole", "loss")
    one, two = (read_safetensors(tmp_path / out / "model", "signal_tokens") for out in ("whole", "cut"))
    assert all(torch.equal(two[name], value) for name, value in one.items())
