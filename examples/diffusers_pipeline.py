"""TEAM and a coreset inside diffusers' LLaDA2Pipeline: python examples/diffusers_pipeline.py"""

import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from torch import Tensor, nn

import dmoe_compile

BLOCK = 32


class BlockDiffusion(nn.Module):
    """The model that comes along, as the pipeline calls one: Qwen3-MoE alone would not see the rest of a block."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config, self.device, self.dtype = model, model.config, model.device, model.dtype

    def forward(self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> object:
        """Run a forward; ids [B, S], the 2D mask of padding is not needed for one prompt."""
        block = torch.arange(ids.shape[1]) // BLOCK
        later = block.unsqueeze(0) > block.unsqueeze(1)
        mask = torch.zeros(later.shape, dtype=self.dtype).masked_fill(later, torch.finfo(self.dtype).min)
        return self.model(ids, attention_mask=mask[None, None], position_ids=position_ids, use_cache=False)


model, tokenizer = dmoe_compile.load_demo_model()
options = {"passes": ["team", "cover"], "cover.mass": 0.8, "block_length": BLOCK}
compiled = torch.compile(BlockDiffusion(model).eval(), backend="dmoe", options=options)
pipeline = LLaDA2Pipeline(model=compiled, scheduler=BlockRefinementScheduler(), tokenizer=tokenizer)
with dmoe_compile.StepCallback(pipeline) as callback:
    out = pipeline(
        "Write 43 38 40 99 77 59 in rising order. Solution:", callback_on_step_end=callback, use_chat_template=False,
        gen_length=32, block_length=BLOCK, num_inference_steps=BLOCK, threshold=0.9, editing_threshold=None,
        mask_token_id=tokenizer.mask_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
print(out.texts[0])
print(f"{len(callback.stats)} forwards; experts of the last: {callback.stats[-1].unique_experts}")
