"""DiffusionGemma's own generate() through the backend.

E = routed experts, k = experts per token, B = sequences, S = tokens per sequence in one forward.

What generate(cache_implementation="static") of transformers 5.23 hands to the compiled functions:

- It compiles, once per model, `self.forward` (kept as `_compiled_decoder_forward`) for the denoising steps and
  `self.model.encoder` (kept as `_compiled_encoder`) for re-reading a finished canvas. Whatever is already stored under
  those names is used instead: that is the door for a backend with options. `model.compile()` is not looked at.
- The prompt is prefilled by the encoder uncompiled, whatever the backend is: its routing stays the model's own.
- A denoising forward sees the canvas alone, S = canvas_length. Masks are 4D and boolean, [B, 1, S, cache + S], one per
  kind of layer in a dict; no input is a 2D attention mask, also when the prompt is padded. A canvas holds no padding.
- The first step of a canvas has no self-conditioning logits: two graphs per decoding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DiffusionGemmaForBlockDiffusion

import zoo
from dmoe_compile import routing_stats
from dmoe_compile.backend import dmoe

pytestmark = pytest.mark.usefixtures("aten")
K = zoo.EXPECTED["diffusion_gemma"].top_k
RULE: dict[str, Any] = {"passes": ["dmoe"], "block_length": zoo.CANVAS, "stats": True}
ALL_EXPERTS = RULE | {"dmoe.min_experts": zoo.EXPECTED["diffusion_gemma"].num_experts, "experts": False}
# top_p so low that every block's coreset is exactly its min_experts: what is counted is then known in advance.
FEWEST = RULE | {"dmoe.top_p": 1e-6, "dmoe.min_experts": K}
BATCH = 2
PROMPT = 10
STEPS = 3


def test_tokens_are_inductors_when_the_coreset_is_all_experts(model: DiffusionGemmaForBlockDiffusion) -> None:
    stock = _decode(model)
    before = counters["dmoe"]["sites_rewritten"]
    model._compiled_decoder_forward = torch.compile(model.forward, backend="dmoe", options=ALL_EXPERTS, fullgraph=True)
    tokens = _decode(model)
    assert torch.equal(tokens, stock)
    # No empty equality: both graphs of the decoder were rewritten, and every forward used more than any coreset of k.
    assert counters["dmoe"]["sites_rewritten"] - before == 2
    (unique,) = routing_stats().sites.values()
    assert len(unique) == STEPS
    assert min(unique) > BATCH * K


def test_default_backend_reaches_all_that_generate_compiles(model: DiffusionGemmaForBlockDiffusion) -> None:
    """generate() passes a mode of its own then, and its sampler, which has no router, comes through the backend too."""
    with _default_backend(partial(dmoe, options=FEWEST)):
        tokens = _decode(model, canvases=2)
    assert tokens.shape == (BATCH, PROMPT + 2 * zoo.CANVAS)
    decoder, encoder = "model.decoder.layers.0", "language_model.layers.0"  # each is compiled as a module of its own
    unique = routing_stats().sites
    assert {name: len(counts) for name, counts in unique.items()} == {decoder: 2 * STEPS, encoder: 1}
    assert max(*unique[decoder], *unique[encoder]) <= BATCH * K


@pytest.fixture
def model() -> DiffusionGemmaForBlockDiffusion:
    """One layer: compiling is all that these tests spend their time on, and generate() is the same for any number."""
    return zoo.build("diffusion_gemma", num_layers=1)


def _decode(model: DiffusionGemmaForBlockDiffusion, canvases: int = 1) -> Tensor:
    """Return prompt and answer, [B, S]. The prompt's last row is padded on the left."""
    ids = zoo.inputs("diffusion_gemma", BATCH, PROMPT)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1:, :4] = 0
    routing_stats(reset=True)
    torch.manual_seed(7)  # the canvas and its renoising are drawn at random
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=canvases * zoo.CANVAS,
        max_denoising_steps=STEPS,
        cache_implementation="static",
        eos_token_id=None,  # random weights would write one anywhere
    )
    return out.sequences


@contextmanager
def _default_backend(backend: Callable[..., Any]) -> Iterator[None]:
    torch.compiler.set_default_backend(backend)
    try:
        yield
    finally:
        torch.compiler.set_default_backend(None)
