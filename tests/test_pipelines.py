"""diffusers' own pipelines, driven by a compiled model: their schedulers decide, the model underneath is ours.

E = routed experts, k = experts per token, L = tokens per block, B = sequences, S = tokens per sequence in one forward.

What the pipelines of diffusers 0.42 hand to the model:

- LLaDA2Pipeline calls `model(ids, attention_mask=, position_ids=)`, all [B, S] int64, without a cache of its own. S is
  everything up to the end of the current block: it grows by L a block and is a multiple of L. Blocks are cut from
  column 0, padding included. The 2D mask is the tokenizer's over the prompt (zeros left of a shorter prompt), ones over
  the answer, and *zeros over the tail* of the last block past prompt + gen_length. Those tail positions are still
  denoised, and how sure the model is of them has a say in how many tokens of that block are committed at a time.
  When S has become symbolic, the mask's length is a symbol of its own: nothing in the model says that it equals S.
  The ids are a slice of the whole sequence, contiguous only in its last block: one more graph.
- DiffusionGemmaPipeline calls `model(decoder_input_ids=, past_key_values=, decoder_attention_mask=, ...)` on the canvas
  alone, S = L. The masks are a dict of None with a growing cache, and of 4D booleans [B, 1, S, cache + S] with a static
  one: never 2D. The encoder is called as `model.model.encoder`, past the compiled model, so it runs uncompiled unless
  it is compiled by itself; it then sees a 2D mask [B, cached + S] that is longer than its S tokens.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import BlockRefinementScheduler, DiffusionGemmaPipeline, LLaDA2Pipeline
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import PreTrainedTokenizerFast

import zoo

pytestmark = pytest.mark.usefixtures("aten")
L = 8
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<mask>", "<user>", "<model>")
MASK = SPECIAL.index("<mask>")
NUM_PROMPTS = 8
PROMPT = 26  # tokens; the last 2 lie in the block that the answer begins in


# With an answer of 6 tokens the one block that is left ends where the answer does; with 3 it has a tail of 3. The long
# answers do the same over 3 blocks, so that S grows.
@pytest.mark.parametrize("gen_lengths", [(6, 3), pytest.param((22, 19), marks=pytest.mark.nightly)], ids=str)
def test_llada2_pipeline(gen_lengths: tuple[int, int]) -> None:
    model = zoo.build("qwen3_moe", num_layers=1)
    with torch.no_grad():
        model.lm_head.weight[MASK] = 0  # a logit of 0 is never the highest of 128: a trained model writes no [MASK]
    stock = _llada2(model, gen_lengths, backend="inductor")

    before = counters["dmoe"]["sites_rewritten"]
    tokens = _llada2(model, gen_lengths, backend="dmoe", options=_rule("qwen3_moe", L, all_experts=True))
    # The tail is padding by its mask, but the scheduler reads it: routing it in another way changes these tokens.
    assert all(map(torch.equal, tokens, stock))
    assert counters["dmoe"]["sites_rewritten"] > before  # the equality above is not an empty one

    tokens = _llada2(model, gen_lengths, backend="dmoe", options=_rule("qwen3_moe", L))
    assert [len(row) for batch in tokens for row in batch] == [n for n in gen_lengths for _ in range(2 * NUM_PROMPTS)]
    assert not any((batch == MASK).any() for batch in tokens)
    assert not all(map(torch.equal, tokens, stock))


def test_diffusion_gemma_pipeline() -> None:
    """The whole model compiled; then the decoder alone, which is how diffusers' documentation compiles it."""
    model = zoo.build("diffusion_gemma", num_layers=1)
    stock = _diffusion_gemma(torch.compile(model, fullgraph=True))

    before = counters["dmoe"]["sites_rewritten"]
    options = _rule("diffusion_gemma", zoo.CANVAS, all_experts=True)
    tokens = _diffusion_gemma(torch.compile(model, backend="dmoe", options=options, fullgraph=True))
    assert torch.equal(tokens, stock)
    assert counters["dmoe"]["sites_rewritten"] - before == 2  # one layer; with and without self-conditioning

    options = _rule("diffusion_gemma", zoo.CANVAS)
    model.model.decoder = torch.compile(model.model.decoder, backend="dmoe", options=options, fullgraph=True)
    tokens = _diffusion_gemma(model)
    assert tokens.shape == (2, 2 * zoo.CANVAS)
    assert not torch.equal(tokens, stock)


def _llada2(model: nn.Module, gen_lengths: Sequence[int], **compile_options: Any) -> list[Tensor]:
    """Decode pairs of prompts; the second of a pair is shorter, so it is padded on the left."""
    compiled = torch.compile(model, fullgraph=True, **compile_options)
    pipeline = LLaDA2Pipeline(compiled, BlockRefinementScheduler(), tokenizer(128))
    pipeline.set_progress_bar_config(disable=True)
    ids = zoo.inputs("qwen3_moe", 2 * NUM_PROMPTS, PROMPT)["input_ids"].clamp(min=len(SPECIAL))
    texts = [" ".join(f"w{i}" for i in row[: PROMPT - 6 * (n % 2)]) for n, row in enumerate(ids)]
    pairs = [texts[n : n + 2] for n in range(0, len(texts), 2)]
    tokens = []
    for gen_length in gen_lengths:
        for prompts in pairs:
            out = pipeline(
                prompts,
                use_chat_template=False,
                gen_length=gen_length,
                block_length=L,
                num_inference_steps=4,
                threshold=0.3,
                sampling_method="greedy",
                eos_early_stop=False,  # random weights would write one anywhere
            )
            assert len(out.texts) == 2
            tokens.append(out.sequences)
    return tokens


def _diffusion_gemma(model: Any) -> Tensor:
    """Decode two canvases from a random canvas that is always the same."""
    pipeline = DiffusionGemmaPipeline(model, BlockRefinementScheduler(), tokenizer(512))
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


def _rule(name: str, block_length: int, *, all_experts: bool = False) -> dict[str, Any]:
    """Return the backend's options. The default of 16 experts at least would be all that the tiny models have."""
    facts = zoo.EXPECTED[name]
    size = facts.num_experts if all_experts else facts.top_k + 1
    return {"passes": ["dmoe"], "block_length": block_length, "dmoe.min_experts": size, "experts": False}


def tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
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
