"""Writes what `test_regression.py` reloads: adapters of every kind and an export of each format, with their logits.

Run at each release, with the version of the package that shall be kept:

    PYTHONPATH=CHECKOUT python tests/regression/make_artifacts.py

It calls nothing but public names, so that it runs on any version.
"""

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile


os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from test_regression import GENERATION, compute
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import parscale_adapt


VOCABULARY = 97
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BACKBONES = {
    "qwen2": {},
    "gemma3_text": {"sliding_window": 5, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
}
# Fields of the adapters' configurations; settings that a file has to carry differ from their defaults.
_PREFIX = {"num_streams": 3, "num_prefix_tokens": 4}
ADAPTERS = {
    "prefix": {**_PREFIX, "num_streams": 4},
    "prefix_gemma3": _PREFIX,
    "lora": {"num_streams": 3, "stream_transform": "lora", "stream_lora_rank": 2, "stream_lora_alpha": 3.0},
    "bitfit": {"num_streams": 3, "stream_transform": "bitfit"},
    "aggregator_dynamic": {**_PREFIX, "aggregator": "dynamic", "aggregator_smoothing": 0.3},
    "aggregator_static": {**_PREFIX, "aggregator": "static", "aggregator_smoothing": 0.3},
    "aggregator_mean": {**_PREFIX, "aggregator": "mean"},
    "shared_lora": {**_PREFIX, "lora": LoraConfig(r=4)},
    "one_stream": {"num_streams": 1, "lora": LoraConfig(r=4, target_modules=["q_proj", "down_proj"])},
    "train_backbone": {**_PREFIX, "train_backbone": True},
    "reparameterized": {**_PREFIX, "init_weights": "reparameterized"},
    "tokens": {**_PREFIX, "init_weights": "tokens"},
    "modules_to_save": {**_PREFIX, "modules_to_save": ["lm_head"]},
}
BACKBONE_OF = dict.fromkeys(ADAPTERS, "qwen2") | {"prefix_gemma3": "gemma3_text"}
# Which adapter is exported.
EXPORTS = {"standalone": "shared_lora", "published": "prefix", "merged": "one_stream"}


def make_inputs() -> dict[str, torch.Tensor]:
    """Token ids and attention mask `[2, 9]`, the first sample padded on the left."""
    input_ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :3] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def load_backbone(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(f"backbones/{name}")


@torch.no_grad()
def disturb(model: torch.nn.Module) -> None:
    """Move all trained parameters off their start, which is zero or one for some, so that each of them matters."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn_like(parameter)


def write_backbones() -> None:
    for name, changes in BACKBONES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**_SIZES, **changes}))
        disturb(model)
        model.save_pretrained(f"backbones/{name}")


def write_adapter(case: str, inputs: dict[str, torch.Tensor]) -> None:
    """Write an adapter, and what the model that saved it computes."""
    torch.manual_seed(1)
    fields = {"task_type": "CAUSAL_LM", "init_std": 0.5, **ADAPTERS[case]}
    model = get_peft_model(load_backbone(BACKBONE_OF[case]), parscale_adapt.ParScaleConfig(**fields)).eval()
    disturb(model)
    check_clear_choices(case, model, inputs)
    model.save_pretrained(f"{case}/adapter")
    save_file({**inputs, **compute(model, inputs)}, f"{case}/expected.safetensors")


def check_clear_choices(case: str, model: PeftModel, inputs: dict[str, torch.Tensor]) -> None:
    """Refuse a model whose greedy choice of a token hangs on rounding.

    Raises:
        ValueError: the two largest logits of a step are closer than 0.001.
    """
    steps = model.generate(**inputs, **GENERATION, return_dict_in_generate=True, output_logits=True).logits
    best, second = torch.stack(steps).topk(2).values.unbind(-1)
    if (margin := float((best - second).min())) < 0.001:
        raise ValueError(
            f"The greedy choice of a token in {case!r} hangs on a margin of {margin:.1e}, which other machines may "
            "round away: change the seed of the inputs."
        )


def write_export(case: str) -> None:
    """Export an adapter, to be compared with what the adapter computed."""
    source = EXPORTS[case]
    if case == "merged":
        model = PeftModel.from_pretrained(load_backbone(BACKBONE_OF[source]), f"{source}/adapter")
        model.merge_and_unload().save_pretrained(f"{case}/export")
    else:
        # The console script of the environment may belong to another version.
        command = [sys.executable, "-P", "-c", "from parscale_adapt.cli import main; main()", "export"]
        options = ["--output", f"{case}/export", "--format", case]
        subprocess.run([*command, f"{source}/adapter", *options], check=True)
    shutil.copyfile(f"{source}/expected.safetensors", f"{case}/expected.safetensors")


def main() -> None:
    """Write the folder of the version that is imported.

    Raises:
        FileExistsError: it exists; released artifacts are never written anew.
    """
    torch.set_num_threads(1)
    target = pathlib.Path(__file__).resolve().parent / parscale_adapt.__version__
    if target.exists():
        raise FileExistsError(f"{target} exists: artifacts stay as their version wrote them.")
    print(f"parscale_adapt {parscale_adapt.__version__} from {parscale_adapt.__file__}")
    inputs = make_inputs()
    # Relative paths keep this machine's folders out of the files.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_backbones()
        for case in ADAPTERS:
            write_adapter(case, inputs)
        for case in EXPORTS:
            write_export(case)
        # Nothing reads model cards, and PEFT's are longer than the adapters.
        shutil.copytree(folder, target, ignore=shutil.ignore_patterns("README.md"))
    print(f"{target}: {len(ADAPTERS)} adapters, {len(EXPORTS)} exports")


if __name__ == "__main__":
    main()
