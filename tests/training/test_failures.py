"""The command that a failed run hands out."""

import json
import subprocess
import sys

import pytest

from parscale_adapt.training.failures import command_to_resume


RESUME = ["--resume_from_checkpoint", "true"]


@pytest.mark.parametrize("arguments", [["--config", "a b.yaml"], ["--config", "a b.yaml", *RESUME]])
def test_a_run_that_nothing_launched_goes_on_under_python(arguments):
    found = command_to_resume("recipes/cpt.py", arguments)
    assert found == "python recipes/cpt.py --config 'a b.yaml' --resume_from_checkpoint true"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_launcher_is_in_the_command(tmp_path):
    script, launcher = tmp_path / "recipe.py", tmp_path / "launch.py"
    script.write_text(
        "import sys\nfrom parscale_adapt.training.failures import command_to_resume\n"
        "print(command_to_resume(sys.argv[0], ['--config', 'demo.yaml']))\n"
    )
    launcher.write_text(
        "import subprocess, sys\nsys.exit(subprocess.run([sys.executable, *sys.argv[2:]]).returncode)\n"
    )
    command = [sys.executable, str(launcher), "--config_file=zero3.yaml", str(script)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.split() == [*command, "--config", "demo.yaml", *RESUME]


def test_it_needs_the_standard_library_alone():
    from parscale_adapt.training import failures

    code = f"import json, runpy, sys; runpy.run_path({failures.__file__!r}); print(json.dumps([*sys.modules]))"
    loaded = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    names = {name.partition(".")[0] for name in json.loads(loaded.stdout)}
    assert names <= {*sys.stdlib_module_names, "__main__"}
