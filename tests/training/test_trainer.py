"""Runs that are killed, spread over processes, or fail: they end as if nothing had happened, or say what to do."""

import copy
import errno
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from anygen.errors import CheckpointError, ConfigError, OutOfMemoryError, OutputError
from anygen.messages import Message, TextPart
from anygen.model import AnyGenModel
from anygen.training.adapters import Pairs
from anygen.training.loop import RunLog, lowering
from anygen.training.new_input import Questions
from anygen.training.new_output import Mixture, Wording
from anygen.training.recipes import KINDS
from anygen.training.sharding import check_shardable, load_shards, name_layers, whole
from anygen.training.trainer import SafeTrainer, fit

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
_spec = importlib.util.spec_from_file_location("run_fit", HERE / "run_fit.py")
assert _spec is not None and _spec.loader is not None
run_fit: Any = importlib.util.module_from_spec(_spec)
sys.modules["run_fit"] = run_fit  # under the name by which the processes started here know it
_spec.loader.exec_module(run_fit)
Net, Points = run_fit.Net, run_fit.Points


OPTIONS: dict[str, Any] = dict(steps=12, batch_size=4, seed=3, checkpoint_steps=3, identity={"recipe": 1})


def train(out: Path, data: Any = None, net: nn.Module | None = None, **options: Any) -> list[Tensor]:
    """What a run leaves: the parameters."""
    net = Net() if net is None else net
    assert net is not None
    data = data or Points()
    groups = [{"params": list(net.parameters()), "lr": 1e-2}]
    fit(net.train(), data, data.collate, groups, RunLog(out, "run"), **(OPTIONS | options))
    return [p.detach() for p in net.parameters()]


def curve(out: Path) -> list[tuple[int, float]]:
    """The steps and losses of a run's log."""
    rows = [json.loads(line) for line in (out / "run.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def checkpoints(out: Path) -> list[str]:
    """Whatever lies in the folder of checkpoints."""
    return sorted(path.name for path in (out / "checkpoints" / "training").iterdir())


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends at a step as if it were killed there."""
    original = SafeTrainer.training_step

    def training_step(self: Any, *arguments: Any, **more: Any) -> Any:
        if self.state.global_step + 1 == step:
            raise KeyboardInterrupt
        return original(self, *arguments, **more)

    monkeypatch.setattr(SafeTrainer, "training_step", training_step)


def launch(before: list[str], case: dict[str, Any], out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Runs `run_fit.py` under another interpreter, or several."""
    out.mkdir(parents=True)
    (out / "case").write_bytes(pickle.dumps(case))
    command = [sys.executable, *before, str(HERE / "run_fit.py"), str(out / "case"), str(out), *more]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.mark.parametrize("step", [1, 5, 8, 12])
def test_a_run_that_is_stopped_goes_on_bit_for_bit(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = train(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(step, patch)
        train(tmp_path / "cut")
    assert not (tmp_path / "cut" / "checkpoints").exists() or "checkpoint-12" not in checkpoints(tmp_path / "cut")
    torch.manual_seed(99)  # a new process would have other random numbers
    made = train(tmp_path / "cut")
    for one, other in zip(made, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole") and len(curve(tmp_path / "cut")) == 12
    assert checkpoints(tmp_path / "cut") == ["checkpoint-12", "checkpoint-9"]
    again = train(tmp_path / "cut")  # all of it is done: nothing is trained
    assert all(torch.equal(one, other) for one, other in zip(again, wanted, strict=True))


def test_a_process_that_is_killed_leaves_whole_checkpoints_that_another_goes_on_from(tmp_path: Path) -> None:
    wanted = train(tmp_path / "whole")
    killed = launch([], {"runs": [(Net(), Points(), OPTIONS)]}, tmp_path / "cut", "8")
    assert killed.returncode == -9, killed.stderr
    assert checkpoints(tmp_path / "cut" / "0") == ["checkpoint-3", "checkpoint-6"]
    for one, other in zip(train(tmp_path / "cut" / "0"), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert curve(tmp_path / "cut" / "0") == curve(tmp_path / "whole")


def cases(model: AnyGenModel) -> list[tuple[nn.Module, Any, dict[str, Any]]]:
    """A run with the LM loss of answers of different lengths, and one with the alignment loss of some items."""
    words = ["a rose", "an old shoe and a very long story about it", "tea", "the smell of rain on a road"]
    torch.manual_seed(0)
    pairs = Pairs(torch.randn(4, 1, 6), words)
    asked = Questions(model, "image", pairs, ["What is it?"], "It is {caption}.", count=32, noise=0.5, seed=0)
    wording = Wording("audio", ("Play {caption}.", "I want to hear {caption}."), "Here is {caption}.")
    aims = {"generated_prompt_embeds": torch.randn(4, 2, 4), "prompt_embeds": torch.randn(4, 3, 6)}
    user, answer = Message("user", (TextPart("Hello"),)), Message("assistant", (TextPart("Good day to you, friend."),))
    mixed = Mixture(model, wording, words, aims, [model.prompts.example([user, answer])], count=32, seed=0)
    options: dict[str, Any] = dict(steps=8, batch_size=4, seed=3)
    return [(model, asked, options), (model, mixed, options)]


@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_two_processes_give_the_curve_and_the_weights_of_one(
    config: str, tiny_model: Callable[..., AnyGenModel], tmp_path: Path
) -> None:
    """Under `accelerate launch` with the file that is shipped; the third run finds the first one's checkpoint."""
    model = tiny_model()
    model.input_projectors.requires_grad_(True)
    runs = cases(model)
    untrained = copy.deepcopy(runs[0])
    for options in (runs[0][2], untrained[2]):
        options |= {"checkpoint_steps": 8, "identity": {"recipe": 1}}
    file = ROOT / "training" / "accelerate" / f"{config}.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", "2"]
    done = launch(launcher, {"runs": [*runs, (*untrained[:2], untrained[2] | {"folder": 0})]}, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["process-0-of-2", "process-1-of-2"]
    assert checkpoints(tmp_path / "two" / "0") == ["checkpoint-8"]
    for number, (module, data, options) in enumerate(runs):
        trained = [p for p in module.parameters() if p.requires_grad]
        log = RunLog(tmp_path / "one" / str(number), "run")
        fit(module.train(), data, data.collate, [{"params": trained, "lr": 1e-2}], log, **options)
        alone, both = curve(tmp_path / "one" / str(number)), curve(tmp_path / "two" / str(number))
        assert len(alone) == 8 and alone[-1][1] < alone[0][1]
        for (step, loss), (other_step, other) in zip(alone, both, strict=True):
            assert step == other_step and other == pytest.approx(loss, rel=2e-4)
        weights = torch.load(tmp_path / "two" / str(number) / "trained.pt", weights_only=True)
        for one, other in zip(trained, weights, strict=True):
            torch.testing.assert_close(other, one.detach().cpu(), rtol=1e-3, atol=1e-4)


def test_a_checkpoint_of_shards_that_is_missing_or_does_not_fit_is_told(group: None, tmp_path: Path) -> None:
    from torch.distributed import checkpoint as shards

    with pytest.raises(CheckpointError, match="does not fit"):
        load_shards(Net(), tmp_path)
    net = Net()
    shards.save(
        {"model": {k: v + 1 for k, v in net.state_dict().items()}}, checkpoint_id=tmp_path / "pytorch_model_fsdp_0"
    )
    other = Net()
    load_shards(other, tmp_path)
    assert all(torch.equal(one + 1, two) for one, two in zip(net.parameters(), other.parameters(), strict=True))
    with pytest.raises(CheckpointError, match=r"does not fit: .*"):
        load_shards(Net(16), tmp_path)


def test_a_loss_that_is_no_number_names_the_batch_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[list[int]] = []
    original = SafeTrainer.compute_loss
    with monkeypatch.context() as patch:
        patch.setattr(SafeTrainer, "compute_loss", lambda *a, **k: met.append(a[2]["items"]) or original(*a, **k))
        train(tmp_path / "good")
    (bad,) = sorted({n for batch in met[5:] for n in batch} - {n for batch in met[:5] for n in batch})[:1]
    step = next(number for number, batch in enumerate(met, start=1) if bad in batch)  # of the second epoch
    with pytest.raises(ConfigError) as error:
        train(tmp_path / "bad", Points(bad=bad))
    batch = ", ".join(f"item {number} (point {number})" for number in met[step - 1])
    kept = f"checkpoint-{(step - 1) // 3 * 3}"
    told = str(error.value)
    assert f"no number at step {step}; lower the learning rate, or look at the batch: {batch}; " in told
    assert told.endswith(f"{kept} is good") and kept in checkpoints(tmp_path / "bad")
    made = train(tmp_path / "bad")  # with mended data it goes on
    for one, other in zip(made, train(tmp_path / "good"), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    with pytest.raises(ConfigError, match="no number at step 1; .* item 7.*; there is no checkpoint yet"):
        train(tmp_path / "all", Points(8, bad=7), batch_size=8)


def test_weights_that_are_no_numbers_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, steps = torch.optim.AdamW.step, []

    def overflow(self: Any, *arguments: Any, **options: Any) -> None:
        step(self, *arguments, **options)
        steps.append(1)
        if len(steps) == 2:
            self.param_groups[0]["params"][0].data.fill_(torch.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    with pytest.raises(ConfigError, match="weights are no numbers after step 2; .*checkpoint-1 is good"):
        train(tmp_path, checkpoint_steps=1)
    assert checkpoints(tmp_path) == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc] . unexpected pos 64 vs 0"), "unexpected pos 64"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
    ],
)
def test_a_disk_that_refuses_a_checkpoint_leaves_the_last_one_and_says_so(
    fault: Exception, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = train(tmp_path / "whole")
    save, written = torch.save, []

    def full(*arguments: Any, **options: Any) -> None:
        if "optimizer" in str(arguments[1]) and len(written) == 1:
            raise fault
        written.extend(["optimizer"] * ("optimizer" in str(arguments[1])))
        save(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OutputError) as error:
            train(tmp_path / "cut")
    message = str(error.value)
    assert message.startswith(f"the checkpoint of step 6 cannot be written to {tmp_path / 'cut'}") and told in message
    assert "MB are free); nothing of it was left behind" in message and "checkpoint-3 is good" in message
    assert checkpoints(tmp_path / "cut") == ["checkpoint-3"]
    for one, other in zip(train(tmp_path / "cut"), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_checkpoint_of_another_architecture_or_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(5, patch)
        train(tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoint-3 does not fit: layers.0.weight is \(8, 4\), not \(16, 4\)"):
        train(tmp_path, net=Net(16))
    with pytest.raises(CheckpointError, match="does not fit: missing 0.weight; .* unexpected layers.0.weight"):
        deep = nn.Sequential(nn.Linear(4, 4))
        train(tmp_path, net=deep)
    with pytest.raises(CheckpointError, match="of another run: recipe was 1, is 2; begin anew with resume=false"):
        train(tmp_path, identity={"recipe": 2})
    (tmp_path / "checkpoints" / "training" / "checkpoint-3" / "optimizer.pt").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="the optimizer's state in .*checkpoint-3 does not fit, or is broken"):
        train(tmp_path)
    fresh = train(tmp_path, identity={"recipe": 2}, resume=False)
    assert all(torch.equal(one, other) for one, other in zip(fresh, train(tmp_path / "whole"), strict=True))


def test_without_checkpoints_nothing_is_written(tmp_path: Path) -> None:
    train(tmp_path, checkpoint_steps=0)
    assert checkpoints(tmp_path) == [] and len(curve(tmp_path)) == 12


def test_a_batch_is_spread_evenly_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="a batch of 4 cannot be spread over 3 processes; choose a multiple of them"):
        train(tmp_path)


def test_the_log_is_the_first_process_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    log = RunLog(tmp_path, "run")
    log.write(loss=1.0)
    log.restore("x")
    assert log.text() == ""


def test_too_little_memory_says_what_to_lower() -> None:
    @lowering("batch_size", "rows")
    def run(recipe: Any, out: Path) -> float:
        raise recipe.fault

    recipe: Any = type("Recipe", (), {"batch_size": 64, "rows": 48})()
    faults = (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
        MemoryError(),
    )
    for fault in faults:
        recipe.fault = fault
        with pytest.raises(OutOfMemoryError, match=r"lower batch_size \(64\), rows \(48\); .*fsdp2.yaml"):
            run(recipe, Path())
    for fault in (RuntimeError("no"), OutOfMemoryError("told already"), ConfigError("other")):
        recipe.fault = fault
        with pytest.raises(type(fault), match=str(fault)):
            run(recipe, Path())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_to_be_lowered_is_in_the_recipe(kind: str) -> None:
    module = importlib.import_module(KINDS[kind][0])
    fields = getattr(module, KINDS[kind][1]).__dataclass_fields__
    assert set(getattr(module.train, "lowers", ())) <= set(fields)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "deepspeed"])
def test_the_shipped_configurations_are_read_by_accelerate(kind: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config: Any = load_config_from_file(str(ROOT / "training" / "accelerate" / f"{kind}.yaml"))
    assert config.num_processes == 2 and config.mixed_precision == "no"
    assert config.distributed_type == {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}[kind]
    known = {action.dest for action in launch_command_parser()._actions}
    options = {*config.fsdp_config, *config.deepspeed_config}
    assert options <= known and bool(options) == (kind != "ddp"), options - known


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_sharded_model_is_whole_again_afterwards(tiny_model: Callable[..., AnyGenModel], group: None) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = tiny_model()
    names = [(name, type(part)) for name, part in model.named_modules()]
    ids = torch.tensor([[5, 6, 7, 8]])
    wanted = model(ids).hidden_states
    name_layers(model)
    layers: Any = model.llm.base.get_decoder().layers
    assert cast(Any, model)._no_split_modules == ["LlamaDecoderLayer"]
    for _ in range(2):
        for layer in layers:
            fully_shard(layer)
        fully_shard(model)
        assert isinstance(model.signal_tokens.rows, DTensor)
        torch.testing.assert_close(model(ids).hidden_states, wanted)
        assert whole(model) is model
    assert [(name, type(part)) for name, part in model.named_modules()] == names
    assert model.llm.tied and not any(isinstance(p, DTensor) for p in model.parameters())
    torch.testing.assert_close(model(ids).hidden_states, wanted)
    torch.testing.assert_close(model.llm.embedding(ids), model.llm.embedding(ids))  # a part alone works again, too


def test_single_rows_are_not_sharded(tiny_model: Callable[..., AnyGenModel]) -> None:
    model = tiny_model()
    check_shardable(model)
    model.signal_tokens.rows.register_hook(lambda gradient: gradient)
    with pytest.raises(ConfigError, match=r"FSDP2 cannot train single rows \(signal_tokens.rows\); use .*ddp.yaml"):
        check_shardable(model)
