"""Servers for checkpoints with streams: `transformers serve` with their classes made known, or vLLM with its plugin."""

import errno
import os
import socket
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE
from transformers.utils.import_utils import is_serve_available

from ..checkpoints.folders import Kind, find_kind, find_tokenizer
from .exports import register_classes


_VLLM_MODULES = {"vLLM": "vllm", "parscale-vllm": "parscale_vllm"}
_VLLM_SERVER = "vllm.entrypoints.openai.api_server"
# A name such as localhost has an address of a family that this machine may lack; the server does without it.
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def serve(source: str, host: str, port: int, options: Sequence[str] = ()) -> None:
    """Run `transformers serve` until it ends; all is checked before weights are read.

    Args:
        source: folder of an export or of a published checkpoint. Requests name the model exactly so.
        host, port: where to listen.
        options: further options of `transformers serve`, handed over as they are.

    Raises:
        ValueError: there is no such checkpoint, no tokenizer in it, a missing package, or a port that is taken.
    """
    if "@" in source:
        raise ValueError(f"`transformers serve` reads what follows @ as a revision: rename {source}.")
    kind = _find_export(source, f"transformers serve {source}")
    if not is_serve_available():
        raise ValueError("`transformers serve` needs more packages: install them with `pip install '.[serving]'`.")
    check_address(host, port)
    model_class = register_classes(kind)
    # Importing models replaces the module `transformers`, so the class goes into the one that the server has at hand.
    from transformers.cli.serving import model_manager
    from transformers.cli.transformers import app

    setattr(model_manager.transformers, model_class.__name__, model_class)
    # /v1/models lists this folder, and fails without it.
    Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
    app(["serve", source, "--host", host, "--port", str(port), *options], prog_name="transformers")


def serve_by_vllm(source: str, host: str, port: int, options: Sequence[str] = ()) -> None:
    """Become vLLM's own server, which finds the plugin parscale-vllm by itself.

    Args:
        source, host, port: see [`serve`]; requests name the model as vLLM says, by `--served-model-name`.
        options: further options of vLLM's server, handed over as they are.

    Raises:
        ValueError: there is no such checkpoint, no tokenizer in it, vLLM or the plugin is missing, or the port is taken.
    """
    _find_export(source, f"vllm serve {source}")
    missing = [name for name, module in _VLLM_MODULES.items() if find_spec(module) is None]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} can't be imported here; vLLM 0.32 wants an older transformers than parscale_adapt, so "
            "make an environment for both, `python3 -m venv vllm-env && vllm-env/bin/pip install 'vllm>=0.32,<0.33' "
            f"./vllm_plugin` in the repository of parscale_adapt, and start `vllm-env/bin/vllm serve {source}`."
        )
    check_address(host, port)
    address = ["--host", host, "--port", str(port)]
    os.execv(sys.executable, [sys.executable, "-m", _VLLM_SERVER, "--model", source, *address, *options])


def _find_export(source: str, command_without_streams: str) -> Kind:
    if not Path(source).is_dir():
        raise ValueError(
            f"There is no folder {source}: give the folder of an export first and options after it; a repository of the "
            "hub is fetched with `hf download REPOSITORY --local-dir DIR`."
        )
    kind = find_kind(source)
    if kind.name == "adapter":
        raise ValueError(
            f"{source} holds an adapter, which can't be served by itself: export it first, with `parscale export "
            f"{source} --output DIR`."
        )
    if kind.name == "plain":
        raise ValueError(f"{source} has no streams, so it needs no launcher: use `{command_without_streams}`.")
    find_tokenizer([kind.folder])
    return kind


def check_address(host: str, port: int) -> None:
    """Refuse what a server could not bind, before it has loaded the model.

    Raises:
        ValueError: the port is taken, or the address is none of this machine.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        problems = [error for family, *_, address in addresses if (error := _binding_error(family, address))]
        taken = [error for error in problems if error.errno not in _NOT_HERE]
        if taken or len(problems) == len(addresses):
            raise (taken or problems)[0]
    except OSError as error:
        raise ValueError(
            f"The server can't listen on port {port} of {host} ({error.strerror}): give another with --port or --host."
        ) from error


def _binding_error(family: int, address: Any) -> OSError | None:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error
    return None
