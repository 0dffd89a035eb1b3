"""Published checkpoints on backbones of their own, written by hand: names and configuration as the authors' files."""

import json

import torch
from safetensors.torch import load_file, save_file

from support.tiny_models import tiny_model


def save_backbone(folder, seed=0, dtype=torch.float32, **changes):
    """A tiny plain Qwen2 with tied embeddings."""
    model = tiny_model("qwen2", seed=seed, tie_word_embeddings=True, **changes).to(dtype)
    model.save_pretrained(folder)
    return model


def save_published(folder, backbone, num_streams, num_prefix_tokens=5, smoothing=0.01, seed=1):
    """The backbone of a folder with random streams, in the published layout."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(backbone / "model.safetensors")
    fields = json.loads((backbone / "config.json").read_text())

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(tensors["model.embed_tokens.weight"].dtype)

    size, heads = fields["hidden_size"], fields["num_key_value_heads"]
    for layer in range(fields["num_hidden_layers"]):
        for kind in "kv":
            shape = (num_streams, heads, num_prefix_tokens, size // fields["num_attention_heads"])
            tensors[f"model.layers.{layer}.self_attn.prefix_{kind}"] = random(*shape)
    tensors["model.aggregate_layer.0.weight"] = random(size, num_streams * size)
    tensors["model.aggregate_layer.0.bias"] = random(size)
    tensors["model.aggregate_layer.2.weight"] = random(num_streams, size)
    tensors["model.aggregate_layer.2.bias"] = random(num_streams)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rotary = fields.pop("rope_parameters")
    fields |= {
        "model_type": "qwen2_parscale",
        "architectures": ["Qwen2ParScaleForCausalLM"],
        "rope_theta": rotary["rope_theta"],
        "torch_dtype": fields.pop("dtype"),
        "parscale_n": num_streams,
        "parscale_n_tokens": num_prefix_tokens,
        "parscale_attn_smooth": smoothing,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def change_tensors(path, change):
    """Let `change(tensors)` edit a file of tensors in place."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
