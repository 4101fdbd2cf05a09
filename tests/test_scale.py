"""Several processes: what they train is what one trains, whole or shared out, in one go or resumed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from safetensors.torch import load_file

from dalle_mini_impl.config import Recipe, Stage, StageConfig
from dalle_mini_impl.training.loop import StageTrainer
from dalle_mini_impl.training.run import train
from dalle_mini_impl.training.sharding import Replica, Sharding
from dalle_mini_impl.training.stages import ORDER
from tests.processes import launch_environment
from tests.test_training_run import DATA, lines, recipe
from tests.test_training_tasks import vae_task
from tests.tiny import tiny_bundle

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


def cut_up() -> Recipe:
    """Each of two processes takes its half of a transformer's batch in two parts; CLIP has a captioner."""
    return recipe("train.dalle.micro_batch_size=2", "clip.caption_layers=1")


def launch(config: str, folder: Path) -> None:
    """Runs `two_processes.py` as a person would start a training."""
    (folder / "recipe.json").write_text(cut_up().model_dump_json())
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
    command += [str(ROOT / "configs" / "accelerate" / f"{config}.yaml"), str(ROOT / "tests" / "two_processes.py")]
    command += [str(folder), str(folder / "recipe.json"), DATA]
    done = subprocess.run(command, env=launch_environment(), capture_output=True, text=True, timeout=480, check=False)
    assert done.returncode == 0, done.stderr[:8000]


def weights(run: Path, stage: Stage) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoint" / f"{stage}.safetensors")


@pytest.mark.parametrize("config", ["cpu2", "cpu2-fsdp"])
def test_two_processes_train_what_one_does_whole_or_shared_out_in_one_go_or_resumed(
    config: str, tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    assert train(cut_up(), DATA, alone)
    launch(config, tmp_path)
    for stage in ORDER:
        for ours, theirs in zip(lines(tmp_path / "whole", stage), lines(alone, stage), strict=True):
            assert ours.pop("stage") == theirs.pop("stage")
            assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-4)
        one, two = weights(alone, stage), weights(tmp_path / "whole", stage)
        assert one.keys() == two.keys()
        atol = 2e-3 if stage == "dalle" else 2e-5  # Muon iterates in bf16
        for name, weight in one.items():
            assert torch.allclose(weight, two[name], atol=atol), name
    resumed = weights(tmp_path / "stopped", "dalle")
    assert all(torch.equal(weight, resumed[name]) for name, weight in weights(tmp_path / "whole", "dalle").items())
    # One process goes on with what two have saved.
    assert train(cut_up(), DATA, tmp_path / "saved", stages=["dalle"], resume=True)
    resumed = weights(tmp_path / "saved", "dalle")
    assert all(torch.allclose(w, resumed[name], atol=2e-3) for name, w in weights(alone, "dalle").items())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_understands_every_config(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config_from_file(str(path))
    text = path.read_text(encoding="utf-8")
    assert f"accelerate launch --config_file configs/accelerate/{path.name}" in text
    assert config.mixed_precision == "no"
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments, *_ = _validate_launch_command(arguments)
    assert arguments.num_processes == config.num_processes and arguments.num_machines == config.num_machines
    assert arguments.use_fsdp == path.stem.endswith("fsdp")
    assert arguments.multi_gpu == (config.num_processes > 1 and not arguments.use_fsdp)


class Processes:
    """As much of an Accelerator as sharding asks."""

    state: Any = object()
    num_processes = 2
    mixed_precision = "no"


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem.endswith("fsdp")], ids=lambda path: path.stem)
def test_sharding_follows_every_config(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, **load_config_from_file(str(path)).fsdp_config)
    assert Sharding.of(Processes()) == Sharding(("Block",), reshard_after_forward=True)  # type: ignore[arg-type]


def use(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    """Sets what the launcher would; see `accelerate.utils.launch`."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, value in {"fsdp_version": 2, **settings}.items():
        variable = {"fsdp_transformer_layer_cls_to_wrap": "fsdp_transformer_cls_to_wrap"}.get(name, name)
        monkeypatch.setenv(variable.upper(), str(value).lower() if isinstance(value, bool) else str(value))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp_version": 1}, "set fsdp_version: 2"),
        ({"fsdp_offload_params": True}, "fsdp_offload_params"),
        ({"fsdp_activation_checkpointing": True}, "checkpoint_gradients"),
        ({"fsdp_auto_wrap_policy": "SIZE_BASED_WRAP"}, "set TRANSFORMER_BASED_WRAP"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, **settings)
    with pytest.raises(ValueError, match=message):
        Sharding.of(Processes())  # type: ignore[arg-type]


def test_nothing_is_shared_out_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert Sharding.of(Processes()) is None  # type: ignore[arg-type]


def test_recipes_that_processes_would_pass_differently_are_refused() -> None:
    dalle = tiny_bundle("text.slot_step=4", "text.fit_length=false").dalle
    assert dalle is not None
    with pytest.raises(ValueError, match=r"text\.slot_step doesn't work with FSDP"):
        Sharding().check("dalle", dalle, StageConfig())
    with pytest.raises(ValueError, match="compile = true doesn't work with FSDP"):
        Sharding().check("dalle", torch.nn.Linear(1, 1), StageConfig(compile=True))
    with pytest.raises(ValueError, match="--stage vqgan and a config without FSDP"):
        Sharding().check("vqgan", torch.nn.Linear(1, 1), StageConfig())


class Elsewhere(Processes):
    """Processes on a device that models aren't built on."""

    device = torch.device("meta")
    process_index = 0


def test_a_model_is_shared_out_before_any_of_its_weights_is_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []

    class Stop(Exception):
        pass

    class Probe(Sharding):
        def apply(self, module: torch.nn.Module) -> None:
            seen.extend({t.device.type for t in tensors} for tensors in (module.parameters(), module.buffers()))
            raise Stop

    monkeypatch.setattr(Sharding, "of", lambda accelerator: Probe())
    accelerator: Any = Elsewhere()
    parts: Any = dict.fromkeys(("state", "log", "samples"))
    with pytest.raises(Stop):
        StageTrainer(vae_task(), StageConfig(), accelerator=accelerator, seed=0, **parts)
    assert seen == [{"cpu"}, {"meta"}], "its buffers alone have moved: nothing shares them out"


def test_a_replica_takes_whole_weights_without_another_copy() -> None:
    dalle = tiny_bundle().dalle
    assert dalle is not None
    weights = dalle.state_dict()
    taken = Replica(dalle).take(weights)
    assert all(parameter.data_ptr() == weights[name].data_ptr() for name, parameter in taken.named_parameters())


def test_a_replica_has_weights_only_while_it_is_lent() -> None:
    dalle = tiny_bundle().dalle
    assert dalle is not None
    text, ids = torch.ones(1, dalle.stream.text_length, dtype=torch.long), torch.zeros(1, 16, dtype=torch.long)
    replica = Replica(dalle)
    for _ in range(2):
        with replica.holding(dalle.state_dict()) as model, torch.no_grad():
            assert torch.equal(model(text, ids)[1], dalle(text, ids)[1])
            next(model.parameters()).zero_()  # a copy: the original keeps its weights
        assert {p.device.type for p in replica._model.parameters()} == {"meta"}
    assert next(dalle.parameters()).any()
