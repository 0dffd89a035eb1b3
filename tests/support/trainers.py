"""Trainers of TRL on tiny models and rows."""

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from support.tiny_models import random_tokens


def word_tokenizer():
    vocabulary = {f"w{index}": index for index in range(97)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w1"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", unk_token="w1", eos_token="w2")


def rows_of_uneven_lengths():
    lengths = (3, 12, 5, 9, 4, 13, 7, 6)
    return Dataset.from_list([{"input_ids": random_tokens(1, n, seed=n)[0].tolist()} for n in lengths])


def trainer_of(model, folder, **options):
    defaults = {
        "per_device_train_batch_size": 8,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "max_length": None,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    arguments = SFTConfig(output_dir=str(folder), **{**defaults, **options})
    return SFTTrainer(model, arguments, train_dataset=rows_of_uneven_lengths(), processing_class=word_tokenizer())
