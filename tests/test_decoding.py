"""The decoder against the released ones, token for token and forward for forward, through transformers' own Qwen3-MoE.

tests/reference/case4_*: TEAM's decoder, greedy; case5_*: SDAR's vanilla decoders. B: sequences; L: block length
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from dmoe_compile.passes.team import Options
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, Qwen3MoeForCausalLM

from dmoe_compile.candidates import _distance, filled_in, verify
from dmoe_compile.decoding import Decoder, Forward
from dmoe_compile.kv_cache import keep
from dmoe_compile.sampling import Sampling
from tiny_moe import ATEN

REFERENCE = Path(__file__).parent / "reference"
TEAM = sorted(path.stem for path in REFERENCE.glob("case4_*.json"))
VANILLA = sorted(path.stem for path in REFERENCE.glob("case5_*.json"))
KINDS = {"prefill": 0, "first": 1, "speculate": 2, "store": 3}
MASK, L = 127, 32


def case(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(REFERENCE / f"{name}.safetensors"), json.loads((REFERENCE / f"{name}.json").read_text())


def load(folder: Path, norm_topk_prob: bool = True) -> PreTrainedModel:
    """Load the recorded SDAR weights, named as Qwen3-MoE's, as README says."""
    config = json.loads((REFERENCE / "sdar_tiny_weights.json").read_text())["config"]
    named = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": norm_topk_prob}
    (folder / "config.json").write_text(json.dumps(config | named))
    weights = load_file(REFERENCE / "sdar_tiny_weights.safetensors")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = Qwen3MoeForCausalLM.from_pretrained(folder).eval()
    model.set_experts_implementation("grouped_mm")
    return model


def sampling(params: dict[str, Any], **changes: Any) -> Sampling:
    values = {"steps": params["denoising_steps"], "threshold": params["threshold"]}
    return Sampling(MASK, L, **{**values, "eos_token_ids": tuple(params["stopping_criteria_idx"]), **changes})


def decode(
    forward: Any, prompts: list[Tensor], new: int, how: Sampling, **kwargs: Any
) -> tuple[Decoder, list[Forward]]:
    steps: list[Forward] = []
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    decoder = Decoder(forward, ids, [len(each) for each in prompts], new, how, watch=steps.append, **kwargs)
    for _ in decoder.blocks():
        pass
    return decoder, steps


@pytest.mark.parametrize("name", TEAM)
def test_reproduces_the_released_team_decoder(name: str, tmp_path: Path) -> None:
    tensors, about = case(name)
    params = about["params"]
    options = {"passes": ["team"], **ATEN}
    compiled = torch.compile(load(tmp_path, about["norm_topk_prob"]), backend="dmoe", options=options, fullgraph=True)
    prompt = tensors["prompt_ids"][0].long()
    decoder, steps = decode(compiled, [prompt], params["gen_length"], sampling(params), team=Options())
    assert torch.equal(decoder.ids, tensors["final_ids"].long())
    assert [KINDS[step.kind] for step in steps] == tensors["calls.kind"].tolist()
    speculated = [step for step in steps if step.kind == "speculate"]
    for i, step in enumerate(speculated):
        assert step.choice is not None
        assert step.decoded is not None
        assert step.cold is not None
        assert torch.equal(step.input_ids.flatten(), tensors["spec.input_ids"][i].long())
        assert step.choice.tolist() == [tensors["spec.choice_id_after"][i]]
        assert torch.equal(step.decoded.repeat(1, 4)[0], tensors["spec.decoded_index"][i].bool())
        assert torch.equal(step.cold.repeat(1, 4)[0], tensors["spec.expert_limit_index"][i].bool())
    denoised = (tensors["calls.kind"] == 1) | (tensors["calls.kind"] == 2)
    unique = [list(step.unique_experts.values()) for step in decoder.context.stats]
    assert unique == tensors["calls.unique_experts"][denoised].tolist()


@pytest.mark.parametrize("name", VANILLA)
def test_reproduces_the_released_vanilla_decoders(name: str, tmp_path: Path) -> None:
    """V3 samples from a top-k of one, whose probability its file takes for 1: ours is the full softmax, so V1's ids.

    V4's schedule is static: a threshold that no probability exceeds.
    """
    if "_V3_" in name:
        name = next(each for each in VANILLA if "_V1_" in each)
        changes: dict[str, Any] = {"top_k": 1}
    else:
        changes = {"threshold": 1.5} if "static" in name else {}
    tensors, about = case(name)
    params = about["params"]
    how = sampling(params, **changes)
    decoder, steps = decode(load(tmp_path), [tensors["prompt_ids"][0].long()], params["gen_length"], how)
    assert torch.equal(decoder.ids, tensors["final_ids"].long())
    assert len(steps) == about["summary"]["n_forward"]


def test_a_batch_decodes_as_its_sequences_alone(tmp_path: Path) -> None:
    """Prompts of different lengths: padding comes in whole blocks and is seen by nobody."""
    model, how = load(tmp_path), Sampling(MASK, L, steps=8, threshold=0.6)
    prompts = [torch.randint(0, 126, (length,)) for length in (5, 45, 64, 33)]
    decoder, _ = decode(model, prompts, 30, how)
    for row, prompt in enumerate(prompts):
        alone, _ = decode(model, [prompt], 30, how)
        ids = decoder.ids[row, decoder.padding[row] :]
        assert torch.equal(ids[: alone.ids.shape[1]], alone.ids[0])


@pytest.mark.nightly
def test_team_decodes_a_batch_as_its_sequences_alone(tmp_path: Path) -> None:
    """Nothing of one sequence is limited, served or chosen by another's."""
    compiled = partial(torch.compile, backend="dmoe", fullgraph=True, isolate_recompiles=True)
    model, options = load(tmp_path), {"passes": ["team"], **ATEN}
    how, team = Sampling(MASK, L, threshold=0.9), Options()
    prompts = [torch.randint(0, 126, (length,)) for length in (40, 33)]
    decoder, _ = decode(compiled(model, options=options), prompts, 20, how, team=team)
    one = compiled(model, options=options)  # rows are static: a batch of another size is another set of graphs
    for row, prompt in enumerate(prompts):
        alone, _ = decode(one, [prompt], 20, how, team=team)
        assert torch.equal(decoder.ids[row], alone.ids[0])


def test_graphs_of_blocks_have_numbers_for_sizes(tmp_path: Path) -> None:
    """By which kernels for GPUs are chosen: one graph serves all blocks, whatever the lengths of prompts."""
    seen: list[Any] = []

    def watch(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        values = [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")]
        ids = next(x for x in values if isinstance(x, Tensor) and x.dtype == torch.int64)
        seen.append(ids.shape[1])
        return gm.forward

    compiled = torch.compile(load(tmp_path), backend=watch, fullgraph=True, isolate_recompiles=True)
    for length in (70, 100, 135):
        decode(compiled, [torch.randint(0, 126, (length,))], 40, Sampling(MASK, L, steps=2))
    assert len(seen) == 3
    assert seen[:2] == [64, L]
    assert isinstance(seen[2], torch.SymInt)


def test_what_is_kept_of_a_forward_is_not_its_own_memory() -> None:
    """A CUDA graph writes to its outputs again when it runs again; a cache of 1 row may have any stride there."""
    cache = DynamicCache()
    own = cache.update(torch.randn(1, 2, 3, 4), torch.randn(1, 3, 2, 4).transpose(1, 2), 0)
    keep(cache)
    kept = (cache.layers[0].keys, cache.layers[0].values)
    for before, after in zip(own, kept, strict=True):
        assert torch.equal(before, after)
        assert after.is_contiguous()
        assert before.data_ptr() != after.data_ptr()


def test_greedy_decoding_is_reproducible_bit_for_bit(tmp_path: Path) -> None:
    model, prompt = load(tmp_path), torch.randint(0, 126, (20,))
    results = [decode(model, [prompt], 40, Sampling(MASK, L))[0].ids for _ in range(2)]
    assert torch.equal(*results)


def test_no_mask_is_left(tmp_path: Path) -> None:
    """Few steps at a threshold above 1: the schedule alone has to fill every block."""
    model = load(tmp_path)
    for steps in (1, 3):
        decoder, _ = decode(model, [torch.randint(0, 126, (7,))], 50, Sampling(MASK, L, steps=steps, threshold=1.5))
        assert not (decoder.ids == MASK).any()


def test_a_model_that_predicts_masks_leaves_none(tmp_path: Path) -> None:
    """What it would leave masked after all steps is committed by one more, as the best token that is none."""
    model = load(tmp_path)
    with torch.no_grad():
        model.lm_head.weight[MASK] = 2 * model.lm_head.weight.abs().max(0).values * model.lm_head.weight[5].sign()
    for team in (None, Options(cache=False, limit=False)):
        decoder, forwards = decode(model, [torch.randint(0, 126, (7,))], 50, Sampling(MASK, L, steps=4), team=team)
        assert not (decoder.ids == MASK).any()
        assert max(forward.step for forward in forwards) == 5  # four, the last, and then the store


def test_editing_reads_what_was_committed_last(tmp_path: Path) -> None:
    """All tokens are committed in one step; a forward that reads them may change them, and never into a mask."""
    model = load(tmp_path)
    how = Sampling(MASK, L, threshold=1e-6, editing_threshold=1e-6, max_post_steps=3)
    decoder, forwards = decode(model, [torch.randint(0, 126, (32,))], 32, how)
    first, *posts = [forward for forward in forwards if forward.kind == "denoise"]
    assert first.committed is not None
    assert first.committed.all()
    assert posts
    assert any(forward.edited is not None and forward.edited.any() for forward in posts)
    assert not (decoder.ids == MASK).any()


def test_confidence_is_the_whole_probability(tmp_path: Path) -> None:
    """Sampled from the best token alone it would be 1, and a block one step."""
    model, prompt = load(tmp_path), torch.randint(0, 126, (32,))
    greedy, _ = decode(model, [prompt], 32, Sampling(MASK, L))
    for temperature in (0.5, 1.0):
        sampled, _ = decode(model, [prompt], 32, Sampling(MASK, L, temperature=temperature, top_k=1))
        assert torch.equal(sampled.ids, greedy.ids)


def test_a_row_that_has_its_tokens_is_finished(tmp_path: Path) -> None:
    model, how = load(tmp_path), Sampling(MASK, L, threshold=0.5)
    decoder, forwards = decode(model, [torch.randint(0, 126, (length,)) for length in (31, 2)], 32, how)
    assert decoder.finished.tolist() == [True, True]
    last = [forward for forward in forwards if forward.kind == "denoise"][-1]
    assert decoder.ids.shape[1] == 64
    assert last.block == 1


def test_prompts_are_never_overwritten(tmp_path: Path) -> None:
    model, prompt = load(tmp_path), torch.randint(0, 126, (45,))
    for editing in (None, 0.1):
        decoder, _ = decode(model, [prompt], 40, Sampling(MASK, L, steps=2, editing_threshold=editing))
        assert torch.equal(decoder.ids[0, :45], prompt)


def test_finished_sequences_stop(tmp_path: Path) -> None:
    model, prompt = load(tmp_path), torch.randint(0, 126, (20,))
    free, steps = decode(model, [prompt], 90, Sampling(MASK, L, threshold=0.5))
    eos = int(free.ids[0, 40])
    stopped, fewer = decode(model, [prompt], 90, Sampling(MASK, L, threshold=0.5, eos_token_ids=(eos,)))
    assert len(fewer) < len(steps)
    known = stopped.ids[0] != MASK
    assert torch.equal(stopped.ids[0, known], free.ids[0, known])


def test_the_cache_of_experts_is_freed_with_the_decoding(tmp_path: Path) -> None:
    options = {"passes": ["team"], **ATEN}
    compiled = torch.compile(load(tmp_path), backend="dmoe", options=options, fullgraph=True)
    ids = torch.randint(0, 126, (1, 40))
    decoder = Decoder(compiled, ids, [40], 60, Sampling(MASK, L, threshold=0.5), team=Options())
    blocks = decoder.blocks()
    next(blocks)
    assert decoder.context.nbytes > 0
    blocks.close()
    assert decoder.context.nbytes == 0


@pytest.mark.parametrize(
    ("predicted", "moved", "choice"),
    [
        # positions 0 and 1 are filled in with tokens 5 and 6; what c0..c3 predict and commit there
        ([[5, 6], [5, 6], [5, 6], [5, 6]], [[1, 1], [0, 1], [1, 0], [0, 0]], 3),  # 1 and 2
        ([[5, 9], [5, 6], [5, 6], [5, 6]], [[1, 0], [0, 1], [0, 0], [0, 0]], 3),  # 1 and 12
        ([[9, 6], [5, 6], [5, 6], [5, 6]], [[0, 1], [0, 0], [1, 0], [0, 0]], 3),  # 2 and 21
        ([[5, 6], [5, 9], [9, 6], [5, 6]], [[1, 0], [0, 1], [1, 0], [0, 0]], 1),  # 1 alone
        ([[9, 6], [5, 9], [9, 6], [5, 6]], [[1, 1], [0, 1], [1, 0], [0, 0]], 2),  # 2 alone
        ([[9, 9], [5, 6], [5, 6], [5, 6]], [[1, 1], [0, 1], [1, 0], [0, 0]], 0),  # neither: c0 disagrees
        ([[5, 6], [5, 6], [5, 6], [5, 6]], [[0, 0], [0, 1], [1, 0], [0, 0]], 0),  # neither: c0 commits nothing
    ],
)
def test_verification(predicted: list[list[int]], moved: list[list[int]], choice: int) -> None:
    places = torch.tensor([[0, 1]])
    assert verify(torch.tensor([predicted]), torch.tensor([moved]).bool(), places).tolist() == [choice]


def test_a_guess_has_two_chances() -> None:
    """What docs/decoding.md says of sampling: where the second guess is accepted, the first is drawn twice."""
    outcomes = {}
    for drawn in (5, 9):  # by the plain candidate at the first place; 5 is the guess
        for again in (5, 9):  # by the candidate with the second guess in view
            predicted = torch.tensor([[[drawn, 6], [5, 9], [again, 6], [5, 6]]])
            moved = torch.tensor([[[1, 1], [0, 1], [1, 0], [0, 0]]]).bool()
            (choice,) = verify(predicted, moved, torch.tensor([[0, 1]])).tolist()
            outcomes[drawn, again] = int(predicted[0, choice, 0])
    assert outcomes == {(5, 5): 5, (5, 9): 5, (9, 5): 5, (9, 9): 9}


def test_verification_of_one_guess() -> None:
    predicted, places = torch.tensor([[[5], [5]], [[9], [5]]]), torch.tensor([[0], [0]])
    moved = torch.ones(2, 2, 1, dtype=torch.bool)
    assert verify(predicted, moved, places).tolist() == [1, 0]


def test_candidates_fill_in_masked_places_only() -> None:
    ids = torch.tensor([[MASK, 3, MASK]])
    rows = filled_in(ids, torch.tensor([[2, 1]]), torch.tensor([[8, 9]]), ids == MASK)
    assert rows.tolist() == [[[MASK, 3, MASK], [MASK, 3, 8], [MASK, 3, MASK], [MASK, 3, 8]]]


def test_distance_to_the_nearest_known_token() -> None:
    known = torch.tensor([[0, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0]]).bool()
    assert _distance(known).tolist() == [[2, 1, 0, 1, 1, 0], [6] * 6]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_length": 0}, "block_length=0 must be an integer of at least 1"),
        ({"steps": True}, "steps=True"),
        ({"threshold": 0}, "threshold=0 must be a number above 0"),
        ({"threshold": float("inf")}, "threshold=inf must be a number above 0 and finite"),
        ({"temperature": -1}, "temperature=-1 must be a number of at least 0"),
        ({"temperature": float("inf")}, "temperature=inf must be a number of at least 0"),
        ({"editing_threshold": float("inf")}, "editing_threshold=inf must be a number above 0"),
        ({"top_k": 0}, "top_k=0 must be an integer of at least 1"),
        ({"top_p": 1.5}, r"top_p=1.5 must be a number in \(0, 1\]"),
        ({"mask_token_id": -1}, "mask_token_id=-1 must be an integer of at least 0"),
    ],
)
def test_bad_sampling_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**{"mask_token_id": MASK, **changes})
