"""diffusers' own pipelines, driven by a compiled model: their schedulers decide, the model underneath is ours.

E = routed experts, k = experts per token, L = tokens per block, B = sequences, S = tokens per sequence in one forward.

What the pipelines of diffusers 0.42 hand to the model:

- LLaDA2Pipeline calls `model(ids, attention_mask=, position_ids=)`, all [B, S] int64, without a cache of its own. S is
  everything up to the end of the current block: it grows by L a block and is a multiple of L. Blocks are cut from
  column 0, padding included. The 2D mask is the tokenizer's over the prompt (zeros left of a shorter prompt), ones over
  the answer, and *zeros over the tail* of the last block past prompt + gen_length. Those tail positions are still
  denoised, and how sure the model is of them has a say in how many tokens of that block are committed at a time.
  When S has become symbolic, the mask's length is a symbol of its own: nothing in the model says that it equals S.
- DiffusionGemmaPipeline calls `model(decoder_input_ids=, past_key_values=, decoder_attention_mask=, ...)` on the canvas
  alone, S = L. The masks are a dict of None with a growing cache, and of 4D booleans [B, 1, S, cache + S] with a static
  one: never 2D. The encoder is called as `model.model.encoder`, past the compiled model, so it runs uncompiled unless
  it is compiled by itself; it then sees a 2D mask [B, cached + S] that is longer than its S tokens.
"""

from typing import Any

import pytest
import torch
from diffusers import BlockRefinementScheduler, DiffusionGemmaPipeline, LLaDA2Pipeline
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import PreTrainedTokenizerFast

import zoo

L = 8
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<mask>", "<user>", "<model>")
MASK = SPECIAL.index("<mask>")


@pytest.mark.parametrize("gen_length", [22, 17], ids=["whole blocks", "a tail past the answer"])
def test_llada2_pipeline(gen_length: int) -> None:
    model = _never_predicting(MASK, zoo.build("qwen3_moe"))
    tokenizer = _tokenizer(128)

    def decode(**compile_options: Any) -> Tensor:
        # Dynamic from the start: S grows with every block, and a graph per length would only cost time.
        compiled = torch.compile(model, dynamic=True, fullgraph=True, **compile_options)
        pipeline = LLaDA2Pipeline(compiled, BlockRefinementScheduler(), tokenizer)
        pipeline.set_progress_bar_config(disable=True)
        out = pipeline(
            ["w9 w10 w11 w12 w13 w14 w15 w16 w17 w18", "w20 w21 w22 w23 w24 w25"],  # the second is padded on the left
            use_chat_template=False,
            gen_length=gen_length,
            block_length=L,
            num_inference_steps=4,
            threshold=0.5,
            sampling_method="greedy",
            eos_early_stop=False,  # random weights would write one anywhere
        )
        assert len(out.texts) == 2
        return out.sequences

    stock = decode(backend="inductor")
    before = counters["dmoe"]["sites_rewritten"]
    tokens = decode(backend="dmoe", options=_rule("qwen3_moe", L, all_experts=True))
    assert torch.equal(tokens, stock)
    assert counters["dmoe"]["sites_rewritten"] > before  # the equality above is not an empty one

    tokens = decode(backend="dmoe", options=_rule("qwen3_moe", L))
    assert tokens.shape == (2, gen_length)
    assert not (tokens == MASK).any()
    assert not torch.equal(tokens, stock)


@pytest.mark.parametrize("part", ["model", "decoder"])
def test_diffusion_gemma_pipeline(part: str) -> None:
    """Compile the whole model, or the decoder alone as diffusers' documentation has it."""
    tokenizer = _tokenizer(512)

    def decode(**compile_options: Any) -> Tensor:
        model: Any = zoo.build("diffusion_gemma", num_layers=1)
        compiled = torch.compile(model if part == "model" else model.model.decoder, fullgraph=True, **compile_options)
        if part == "decoder":
            model.model.decoder = compiled
        pipeline = DiffusionGemmaPipeline(compiled if part == "model" else model, BlockRefinementScheduler(), tokenizer)
        pipeline.set_progress_bar_config(disable=True)
        out = pipeline(
            ["w20 w21 w22 w23", "w30 w31 w32 w33"],
            gen_length=2 * zoo.CANVAS,
            num_inference_steps=4,
            cache_implementation="static",
            generator=torch.Generator().manual_seed(0),
            eos_early_stop=False,
        )
        assert len(out.texts) == 2
        return out.sequences

    stock = decode(backend="inductor")
    before = counters["dmoe"]["sites_rewritten"]
    tokens = decode(backend="dmoe", options=_rule("diffusion_gemma", zoo.CANVAS, all_experts=True))
    assert torch.equal(tokens, stock)
    assert counters["dmoe"]["sites_rewritten"] - before == 2  # one layer; with and without self-conditioning

    tokens = decode(backend="dmoe", options=_rule("diffusion_gemma", zoo.CANVAS))
    assert tokens.shape == (2, 2 * zoo.CANVAS)
    assert not torch.equal(tokens, stock)


def _rule(name: str, block_length: int, *, all_experts: bool = False) -> dict[str, Any]:
    """Return the backend's options. The default of 16 experts at least would be all that the tiny models have."""
    facts = zoo.EXPECTED[name]
    size = facts.num_experts if all_experts else facts.top_k + 1
    return {"passes": ["dmoe"], "block_length": block_length, "dmoe.min_experts": size, "experts": False}


def _never_predicting(token: int, model: nn.Module) -> nn.Module:
    """Give a token a logit of 0, which no maximum over the vocabulary is: a trained model never writes [MASK]."""
    head: Any = model.get_submodule("lm_head")
    with torch.no_grad():
        head.weight[token] = 0
    return model


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose word "w9" has id 9, with a chat template and padding on the left."""
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        padding_side="left",
        chat_template="{% for m in messages %}<user> {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}<model>{% endif %}",
    )
