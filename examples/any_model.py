"""Compile a transformers model with a pass, and read what was found in it: python examples/any_model.py"""

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import dmoe_compile

torch.manual_seed(0)
shape = Qwen3MoeConfig(
    vocab_size=512, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    moe_intermediate_size=64, num_experts=32, num_experts_per_tok=4,
)  # fmt: skip
model = Qwen3MoeForCausalLM(shape).eval()  # or from_pretrained(...)
ids = torch.randint(0, 512, (1, 64))

config = dmoe_compile.Config.from_options({"passes": ["dmoe"], "dmoe.top_p": 0.6, "dmoe.min_experts": 8})
print(dmoe_compile.explain(model, config=config, input_ids=ids))

compiled = torch.compile(model, backend="dmoe", options={**config.to_options(), "stats": True})
with torch.no_grad():
    compiled(input_ids=ids)
print(dmoe_compile.routing_stats())
