"""Commands print their own lines and nothing else, with every optional package that is installed here."""

import json
import logging
import os
import subprocess
import sys
import warnings

import pytest
from support.chat_material import ChatMaterial

from parscale_adapt.commands.foreign_messages import DEPRECATED, LOGGED, drop_foreign_messages


# Writes down, for all that is printed, which package wrote it: the nearest one on the stack that is not a mere printer.
RUN_COMMANDS = """
import io, json, sys

PRINTERS = {"rich", "__main__", *sys.stdlib_module_names}


class Attributed(io.StringIO):
    def write(self, text):
        frame = sys._getframe(1)
        while frame.f_globals["__name__"].split(".")[0] in PRINTERS:
            frame = frame.f_back
        printed.append([frame.f_globals["__name__"], text])
        return super().write(text)


printed, report = [], {}
terminal, sys.stdout, sys.stderr = sys.stdout, Attributed(), Attributed()
for command, answers in json.loads(sys.argv[1]):
    from parscale_adapt.cli import main

    sys.argv, sys.stdin = ["parscale", *command], io.StringIO(answers)
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    report[" ".join(command)] = [code, list(printed)]
    printed.clear()
print(json.dumps(report), file=terminal)
"""
OWN = ("parscale_adapt.", "typer.", "transformers.generation.streamers")  # the last one writes what the model says


@pytest.mark.slow
def test_commands_print_nothing_foreign(tmp_path):
    material = ChatMaterial(tmp_path)
    (tmp_path / "text.txt").write_text("a text that nobody trained on\n" * 20)
    two, standalone, published = (str(tmp_path / name) for name in ("two", "standalone", "published"))
    commands = [
        (["inspect", two], ""),
        (["diagnose", two, "--data", str(tmp_path / "text.txt"), "--max-rows", "2", "--max-length", "16"], ""),
        (["export", two, "--output", standalone], ""),
        (["export", two, "--output", published, "--format", "published"], ""),
        (["verify", standalone], ""),
        (["verify", published], ""),
        (["inspect", standalone], ""),
        (["import", published, "--output", str(tmp_path / "imported")], ""),
        (["chat", two, "--max-new-tokens", "4"], "Hello\n/off\nHello\n/quit\n"),
        (["chat", str(material.export), "--max-new-tokens", "4"], "Hello\n/quit\n"),
        (["cost", "--plot", str(tmp_path / "cost.png")], ""),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN_COMMANDS, json.dumps(commands)], capture_output=True, text=True, env=environment
    )
    assert done.stderr == ""  # also of the processes that commands start
    for command, (code, printed) in json.loads(done.stdout).items():
        assert code == 0, (command, printed)
        assert printed, command
        assert not [text for module, text in printed if not f"{module}.".startswith(OWN)], command


def test_only_the_known_messages_are_dropped(caplog):
    drop_foreign_messages()
    for name, (beginning, *_) in LOGGED.items():
        logger = logging.getLogger(name)
        logger.addHandler(caplog.handler)
        logger.warning("%s: for some reason", beginning)
        logger.warning("Something is wrong")
        logger.removeHandler(caplog.handler)
    with warnings.catch_warnings(record=True, action="always") as caught:
        drop_foreign_messages()
        warnings.warn(f"{DEPRECATED} and will be removed", FutureWarning, stacklevel=1)
        warnings.warn("`something_else` is deprecated", FutureWarning, stacklevel=1)
    assert {record.getMessage() for record in caplog.records} == {"Something is wrong"}
    assert [str(warning.message) for warning in caught] == ["`something_else` is deprecated"]
