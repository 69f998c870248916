"""The launch files of examples/launch are what accelerate and DeepSpeed read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

LAUNCH = Path(__file__).parents[1] / "examples" / "launch"
PROCESSES = {"one_gpu": 1, "eight_gpus": 8, "eight_gpus_fsdp": 8, "nodes": 32}


@pytest.mark.parametrize("name", PROCESSES)
def test_accelerate_reads_it(name: str) -> None:
    path = LAUNCH / f"{name}.yaml"
    config = load_config_from_file(str(path))  # raises at a key that it does not know
    assert config.num_processes == PROCESSES[name]
    command = ["--config_file", str(path), "--module", "fastqadapter", "train", "--config", "run.yaml"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(command))
    assert arguments.num_processes == PROCESSES[name]
    sharded = "fsdp" in name or name == "nodes"
    assert bool(arguments.use_fsdp) == sharded
    assert not sharded or arguments.fsdp_version == 2
    assert (arguments.training_script, arguments.training_script_args[0]) == ("fastqadapter", "train")


def test_every_launch_file_is_tested() -> None:
    assert {path.stem for path in LAUNCH.glob("*.yaml")} == set(PROCESSES)
    assert json.loads((LAUNCH / "deepspeed_zero3.json").read_text())["zero_optimization"]["stage"] == 3
