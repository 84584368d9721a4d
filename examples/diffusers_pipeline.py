"""TEAM and a coreset inside diffusers' LLaDA2Pipeline: python examples/diffusers_pipeline.py"""

import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline

import dmoe_compile

model, tokenizer = dmoe_compile.load_demo_model()
options = {"passes": ["team", "cover"], "cover.mass": 0.8}
compiled = torch.compile(model, backend="dmoe", options=options)
pipeline = LLaDA2Pipeline(model=compiled, scheduler=BlockRefinementScheduler(), tokenizer=tokenizer)
question = "Sort: 7 3 9 1 5. Solution:"
with dmoe_compile.StepCallback(pipeline) as callback:
    out = pipeline(
        question, use_chat_template=False, gen_length=32, block_length=32, num_inference_steps=32, threshold=0.9,
        mask_token_id=tokenizer.mask_token_id, eos_token_id=tokenizer.eos_token_id, callback_on_step_end=callback,
    )  # fmt: skip
print(out.texts[0])
print(f"{len(callback.stats)} forwards; experts of the last: {callback.stats[-1].unique_experts}")
