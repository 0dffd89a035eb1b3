"""Loads checkpoints where `parscale_adapt` can't be imported, and writes what they compute.

Run as a script by [`read_in_fresh_process`]: it gets a list of jobs and loads all of them in one process.
"""

import json
import os
import pathlib
import subprocess
import sys
from dataclasses import dataclass, field

from safetensors.torch import load_file, save_file


@dataclass
class Job:
    """A checkpoint, the inputs that it gets, and how many tokens it generates greedily and with three beams.

    `inputs` holds `input_ids` and whatever else the model shall be called with.
    """

    folder: pathlib.Path
    inputs: dict
    generates: bool = True
    num_tokens: dict = field(default_factory=lambda: {"greedy": 6, "beams": 6})
    options: dict = field(default_factory=dict)  # of from_pretrained


def read_in_fresh_process(jobs, scratch):
    """`(facts, tensors)` per job: what transformers said while loading, and logits and generated tokens."""
    described = []
    for index, job in enumerate(jobs):
        save_file(job.inputs, scratch / f"{index}.inputs")
        fields = {key: value for key, value in vars(job).items() if key not in ("inputs", "folder")}
        described.append({"folder": str(job.folder), "files": str(scratch / str(index)), **fields})
    (scratch / "jobs.json").write_text(json.dumps(described))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(scratch / "modules")
    command = [sys.executable, "-P", __file__, str(scratch / "jobs.json")]
    done = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        (json.loads(pathlib.Path(f"{job['files']}.facts").read_text()), load_file(f"{job['files']}.outputs"))
        for job in described
    ]


class Blocked:
    """Makes the import of this package fail, wherever it may be installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "parscale_adapt":
            raise ImportError("parscale_adapt is blocked here")


def read(job):
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        job["folder"], trust_remote_code=True, dtype="auto", output_loading_info=True, **job["options"]
    )
    inputs = load_file(f"{job['files']}.inputs")
    generation = {key: inputs[key] for key in ("input_ids", "attention_mask") if key in inputs}
    generation |= {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        outputs = {"logits": model(**inputs).logits}
        for kind, num_beams in (("greedy", 1), ("beams", 3)) if job["generates"] else ():
            outputs[kind] = model.generate(**generation, num_beams=num_beams, max_new_tokens=job["num_tokens"][kind])
        again = f"{job['files']}.again"
        model.save_pretrained(again)
        reloaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True, dtype="auto")
        outputs["logits_again"] = reloaded(**inputs).logits
        base = AutoModel.from_pretrained(job["folder"], trust_remote_code=True, dtype="auto")
        base.save_pretrained(f"{again}.base")
        base = AutoModel.from_pretrained(f"{again}.base", trust_remote_code=True, dtype="auto")
        outputs["states"] = model.base_model(**inputs).last_hidden_state
        outputs["states_again"] = base(**inputs).last_hidden_state
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    facts = {
        "problems": {key: sorted(map(str, names)) for key, names in info.items() if names},
        "class": type(model).__name__,
        "base_class": type(base).__name__,
        "dtype": str(model.dtype),
        "stream_dtypes": sorted({str(p.dtype) for name, p in model.named_parameters() if ".parscale." in name}),
        "tied": tied,
        "again": sorted(os.listdir(again)),
    }
    save_file({key: value.contiguous() for key, value in outputs.items()}, f"{job['files']}.outputs")
    pathlib.Path(f"{job['files']}.facts").write_text(json.dumps(facts))


if __name__ == "__main__":
    sys.meta_path.insert(0, Blocked)
    for described_job in json.loads(pathlib.Path(sys.argv[1]).read_text()):
        read(described_job)
