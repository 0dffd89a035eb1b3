"""The shipped accelerate configs are what the installed accelerate understands, and do what their names say."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser


FOLDER = Path(__file__).parents[2] / "accelerate_configs"
NAMES = ("cpu", "ddp", "fsdp2", "single_gpu", "zero1", "zero2", "zero3", "zero3_offload")


def launch_arguments(name):
    """What `accelerate launch` makes of a config file and its own defaults."""
    parser = launch_command_parser()
    arguments = parser.parse_args(["--config_file", str(FOLDER / f"{name}.yaml"), "recipes/cpt.py"])
    return _validate_launch_command(arguments)[0]


def test_one_copy_of_each():
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(NAMES)
    assert not list((FOLDER.parent / "recipes").rglob("*zero*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_the_first_line_is_the_command(name):
    first = (FOLDER / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith(f"# accelerate launch --config_file accelerate_configs/{name}.yaml ")
    assert "recipes/cpt.py" in first


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_knows_every_key(name):
    path = str(FOLDER / f"{name}.yaml")
    config = load_config_from_file(path)
    assert config.use_cpu == (name == "cpu")
    arguments = vars(launch_arguments(name))
    settings = yaml.safe_load(Path(path).read_text())
    for section in ("deepspeed_config", "fsdp_config"):
        assert settings.get(section, {}).keys() <= arguments.keys(), "a key that accelerate would ignore"


@pytest.mark.parametrize("name", NAMES)
def test_precision_is_decided_in_one_place(name):
    assert load_config_from_file(str(FOLDER / f"{name}.yaml")).mixed_precision == "no"


@pytest.mark.parametrize(("name", "stage"), [("zero1", 1), ("zero2", 2), ("zero3", 3), ("zero3_offload", 3)])
def test_deepspeed_stages(name, stage):
    arguments = launch_arguments(name)
    assert arguments.use_deepspeed
    assert int(arguments.zero_stage) == stage
    device = "cpu" if name == "zero3_offload" else "none"
    assert (arguments.offload_optimizer_device, arguments.offload_param_device) == (device, device)
    assert str(arguments.zero3_init_flag).lower() == str(stage == 3).lower()


def test_fsdp_is_the_second_version():
    arguments = launch_arguments("fsdp2")
    assert arguments.use_fsdp
    assert int(arguments.fsdp_version) == 2
    assert str(arguments.fsdp_cpu_ram_efficient_loading).lower() == "false"


@pytest.mark.parametrize(("name", "multi_gpu"), [("cpu", False), ("single_gpu", False), ("ddp", True)])
def test_plain_configs(name, multi_gpu):
    arguments = launch_arguments(name)
    assert bool(arguments.multi_gpu) == multi_gpu
    assert not arguments.use_deepspeed
    assert not arguments.use_fsdp
