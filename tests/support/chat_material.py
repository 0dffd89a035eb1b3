"""A tiny backbone that answers in plain letters, with a chat template, adapters on it and their exports, in a folder.

A random model says bytes that are no text. This one can only choose tokens of one ASCII character that merge with
nothing, so that text and tokens stand for each other one to one, however they are cut.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from parscale_adapt import Qwen2ParScaleConfig, Qwen2ParScaleForCausalLM
from parscale_adapt.data import CHATML, load_stdlib_corpus, train_tokenizer
from support.tiny_models import tiny_model, with_streams


VOCABULARY = 320
MAX_LENGTH = 512


class ChatMaterial:
    """Folders `backbone`, adapters `two` (P = 2), `four` (P = 4) and `four_too`, and the export of `four`."""

    def __init__(self, root: Path):
        self.root = root
        self.tokenizer = train_tokenizer(
            [text[:900] for text in load_stdlib_corpus()["train"]["text"][:60]], VOCABULARY
        )
        self.tokenizer.chat_template = CHATML
        backbone = tiny_model(
            vocab_size=VOCABULARY,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=None,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        silent = sorted(set(range(VOCABULARY)) - set(single_characters(self.tokenizer)))
        with torch.no_grad():
            backbone.lm_head.weight[silent] = 0
        backbone.save_pretrained(root / "backbone")
        self.tokenizer.save_pretrained(root / "backbone")
        for seed, (name, num_streams) in enumerate({"two": 2, "four": 4, "four_too": 4}.items()):
            with_streams(self.plain(), num_streams, seed=seed).save_pretrained(root / name)
        self.adapted("four").merge_and_unload().save_pretrained(self.export)
        self.tokenizer.save_pretrained(self.export)

    @property
    def export(self) -> Path:
        return self.root / "export"

    def plain(self):
        """The backbone as transformers loads it."""
        return AutoModelForCausalLM.from_pretrained(self.root / "backbone").eval()

    def adapted(self, name: str) -> PeftModel:
        return PeftModel.from_pretrained(self.plain(), self.root / name).eval()

    def published(self) -> Qwen2ParScaleForCausalLM:
        """A random checkpoint in the authors' layout (P = 2), as it is saved in the folder `published`."""
        fields = json.loads((self.root / "backbone" / "config.json").read_text())
        for name in ("model_type", "architectures"):
            del fields[name]
        torch.manual_seed(5)
        config = Qwen2ParScaleConfig(**fields, parscale_n=2, parscale_n_tokens=3)
        model = Qwen2ParScaleForCausalLM(config).eval()
        model.lm_head.weight = self.plain().lm_head.weight
        model.save_pretrained(self.root / "published")
        self.tokenizer.save_pretrained(self.root / "published")
        return model

    def model(self, name: str | None):
        return self.plain() if name is None else self.adapted(name)


def single_characters(tokenizer) -> list[int]:
    """Tokens of one visible ASCII character that no longer token contains."""
    words = tokenizer.get_vocab()
    longer = "".join(word for word in words if len(word) > 1)
    return [token for word, token in words.items() if len(word) == 1 and "!" <= word <= "~" and word not in longer]


def chat_prompt(tokenizer, messages: Sequence[dict[str, str]]) -> torch.Tensor:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, return_tensors="pt").input_ids


def greedy_answer(model, tokenizer, prompt: torch.Tensor, num_tokens: int) -> str:
    """What `generate` answers to a prompt, from an empty cache."""
    tokens = model.generate(prompt, max_new_tokens=num_tokens, do_sample=False)
    return tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True)
