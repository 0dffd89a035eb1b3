"""Run as a script: load a checkpoint as a stranger would, and write the logits of a prompt.

    python fresh_process.py FOLDER REFERENCE OUTPUT [PACKAGE]

The reference file holds the prompt. With PACKAGE, a module to import first, the checkpoint needs it (the published
layout); without, transformers loads what the folder holds, its code included, and this package stays out.
"""

import importlib
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main(folder: str, reference: str, output: str, package: str | None = None) -> None:
    """Load, compute, write."""
    if package is not None:
        importlib.import_module(package)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=package is None, dtype="auto", output_loading_info=True
    )
    problems = {kind: sorted(names) for kind, names in info.items() if names}
    if problems:
        sys.exit(f"its tensors are not those of the model: {problems}")
    if package is None and "parscale_adapt" in sys.modules:
        sys.exit("its code imports parscale_adapt")
    with torch.no_grad():
        logits = model.eval()(input_ids=load_file(reference)["input_ids"], use_cache=False).logits
    save_file({"logits": logits.float()}, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
