"""What a user does first, in an environment that has the wheel and no checkout: run by `test_wheel.py`.

python -I smoke.py FOLDER
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig

import parscale_adapt  # before PEFT, which is then told about the method
from parscale_adapt import ParScaleConfig, StreamTrainer
from parscale_adapt.data import load_stdlib_corpus, train_tokenizer


folder = Path(sys.argv[1])
texts = load_stdlib_corpus()["train"]["text"][:4]
tokenizer = train_tokenizer(texts, 300)
torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
backbone = Qwen2ForCausalLM(Qwen2Config(vocab_size=300, num_key_value_heads=1, **sizes))
backbone.save_pretrained(folder / "backbone")
model = get_peft_model(Qwen2ForCausalLM.from_pretrained(folder / "backbone"), ParScaleConfig(num_streams=2))

training = SFTConfig(
    output_dir=str(folder / "run"), max_steps=2, use_cpu=True, bf16=False, report_to="none", save_strategy="no"
)
rows = Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"][:64]} for text in texts])
trainer = StreamTrainer(model, training, train_dataset=rows, processing_class=tokenizer)
assert trainer.train().global_step == 2

model.save_pretrained(folder / "adapter")
loaded = PeftModel.from_pretrained(Qwen2ForCausalLM.from_pretrained(folder / "backbone"), folder / "adapter")
prompt = torch.tensor([[5, 6, 7]])
torch.testing.assert_close(loaded(prompt).logits, model.eval()(prompt).logits)
assert loaded.generate(input_ids=prompt, max_new_tokens=3, min_new_tokens=3).shape == (1, 6)

outside = [
    module.__file__
    for name, module in sys.modules.items()
    if name.split(".")[0] == "parscale_adapt" and not Path(module.__file__).is_relative_to(sys.prefix)
]
assert not outside, outside
print(parscale_adapt.__version__)
