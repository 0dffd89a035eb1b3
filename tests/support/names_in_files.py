"""What adapters on a tiny Qwen2 or Llama of two layers call their tensors in a file, by transform and by aggregator."""

LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LINEARS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
IN_FILE = {
    "prefix": {f"layers.{n}.self_attn.parscale_prefix_{kind}" for n in range(2) for kind in "kv"},
    "lora": {f"layers.{n}.{linear}.parscale_lora_{kind}" for n in range(2) for linear in LINEARS for kind in "AB"},
    "bitfit": {f"layers.{n}.{linear}.parscale_bias" for n in range(2) for linear in LINEARS},
    "dynamic": {f"parscale_aggregator.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")},
    "static": {"parscale_aggregator.weight_logits"},
    "mean": set(),
}
