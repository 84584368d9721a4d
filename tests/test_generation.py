"""generate(): what comes back, what is streamed and traced, what is refused. The decoder itself: test_decoding.py.

B: sequences; L: block length
"""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import PreTrainedModel, TextStreamer

import dmoe_compile
from dmoe_compile import Config, Generated, decoding, generation
from dmoe_compile.context import Denoising
from dmoe_compile.stored import Stored
from test_decoding import MASK, TEAM, case, load
from tiny_moe import ATEN

NAME = next(name for name in TEAM if "_B_" in name)  # a low threshold: few forwards


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return load(tmp_path_factory.mktemp("sdar"))


def generate(model: Any, prompts: Tensor, **kwargs: Any) -> Generated:
    return dmoe_compile.generate(model, prompts, **{"mask_token_id": MASK, "threshold": 0.5, **kwargs})


def prompt(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 126, (1, length), generator=torch.Generator().manual_seed(seed))


class Blocks:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.got: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.got.append(value)

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("how", ["config", "compiled by torch.compile"])
def test_decodes_as_the_released_team_decoder(model: PreTrainedModel, how: str, tmp_path: Path) -> None:
    tensors, about = case(NAME)
    params = about["params"]
    options = {"passes": ["team"], **ATEN}
    arguments: dict[str, Any] = {"config": Config.from_options(options)}
    if how != "config":
        model, arguments = torch.compile(model, backend="dmoe", options={**options, "stats": True}), {}
    path = tmp_path / "trace.jsonl"
    prompts, new = tensors["prompt_ids"].long(), params["gen_length"]
    out = generate(model, prompts, threshold=params["threshold"], max_new_tokens=new, trace=path, **arguments)
    assert torch.equal(out.sequences, tensors["final_ids"].long()[:, : prompts.shape[1] + new])
    assert sum(out.forwards.values()) == len(tensors["calls.kind"])
    denoised = (tensors["calls.kind"] == 1) | (tensors["calls.kind"] == 2)
    assert out.denoising == denoised.sum()
    assert out.unique_experts == pytest.approx(tensors["calls.unique_experts"][denoised].double().mean().item())

    header, *lines, end = map(json.loads, path.read_text().splitlines())
    assert header["kind"] == "decoding"
    assert header["options"]["passes"] == ["team"]
    assert end == {"kind": "end", "lengths": out.lengths, "forwards": out.forwards}
    assert [line["forward"] for line in lines].count("speculate") == len(tensors["spec.choice_id_after"])
    assert all(len(line["unique_experts"]) == len(model.model.layers) for line in lines)
    steps = [line for line in lines if "sequences" in line]
    ids = dict(zip(range(prompts.shape[1]), prompts[0].tolist(), strict=True))
    for line in steps:
        (row,) = line["sequences"]
        assert not row["edited"]
        assert not ids.keys() & set(row["committed"])  # each position once
        assert set(row["decoded"]) <= ids.keys()
        assert not set(row["decoded"]) & set(row["cold"])
        ids |= dict(zip(row["committed"], row["tokens"], strict=True))
    assert [ids[i] for i in range(out.lengths[0])] == out.sequences[0].tolist()
    speculated = [line["sequences"][0] for line in steps if line["forward"] == "speculate"]
    assert [row["choice"] for row in speculated] == tensors["spec.choice_id_after"].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_prompts_alone(model: PreTrainedModel, side: str) -> None:
    prompts = [prompt(length, length)[0] for length in (5, 45, 33)]
    mask = [torch.ones_like(each) for each in prompts]
    ids, mask = (torch.nn.utils.rnn.pad_sequence(x, batch_first=True, padding_side=side) for x in (prompts, mask))
    blocks = Blocks()
    out = generate(model, ids, attention_mask=mask, max_new_tokens=40, streamer=blocks, pad_token_id=126)
    assert out.prompts == [5, 45, 33]
    for row, each in enumerate(prompts):
        alone = generate(model, each.unsqueeze(0), max_new_tokens=40)
        assert torch.equal(out.answers[row], alone.answers[0])
        assert torch.equal(out.sequences[row, : out.lengths[row]], alone.sequences[0])
        assert (out.sequences[row, out.lengths[row] :] == 126).all()
    first, *streamed = blocks.got
    assert torch.equal(first, ids)
    answers = torch.cat(streamed, 1)
    assert [[x for x in row.tolist() if x != 126] for row in answers] == [x.tolist() for x in out.answers]


def test_padding_and_finished_rows_are_told(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards of a batch say which tokens are no sequence's, so that they do not vote; one prompt has none."""
    told: list[Tensor | None] = []
    plain = Denoising.plain
    monkeypatch.setattr(Denoising, "plain", lambda self, absent=None: (told.append(absent), plain(self, absent))[1])
    ids = torch.nn.utils.rnn.pad_sequence([prompt(5)[0], prompt(45)[0]], batch_first=True)
    mask = torch.arange(45) < torch.tensor([[5], [45]])
    free = generate(model, ids, attention_mask=mask, max_new_tokens=40, pad_token_id=1_000_000)  # what no model reads
    first, *blocks = told
    assert first is not None
    assert torch.equal(first, torch.tensor([[True] * 32, [False] * 32]))  # whole blocks of padding
    assert all(absent is not None and absent.shape == (2, 32) for absent in blocks)
    assert not any(absent.any() for absent in blocks[: free.forwards["denoise"] // 2])
    told.clear()
    stop = int(free.answers[0][3])
    assert stop not in free.answers[1][:19]
    generate(model, ids, attention_mask=mask, max_new_tokens=40, eos_token_id=stop)
    last = told[-1]
    assert last is not None
    assert torch.equal(last, torch.tensor([[True] * 32, [False] * 32]))  # the first has come to its end
    told.clear()
    generate(model, prompt(45), max_new_tokens=32)
    assert told
    assert not any(each is not None for each in told)


def elsewhere(function: Callable[..., Any]) -> Callable[..., Any]:
    """Call it where tensors are made on another device by default."""

    def call(*args: Any) -> Any:
        with torch.device("meta"):
            return function(*args)

    return call


def test_another_default_device_is_not_asked(model: PreTrainedModel) -> None:
    """Where answers end, and which rows go on, is found on the CPU."""
    wanted = generate(model, prompt(20), max_new_tokens=40, eos_token_id=1, streamer=Blocks())
    blocks = Blocks()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("block", "result"):
            patch.setattr(generation._Answers, name, elsewhere(getattr(generation._Answers, name)))
        out = generate(model, prompt(20), max_new_tokens=40, eos_token_id=1, streamer=blocks)
    assert torch.equal(out.sequences, wanted.sequences)
    assert len(blocks.got) > 1
    weights, buffer, choice = torch.zeros(1), torch.zeros(4, 1, 1), torch.tensor([1, 0])
    with torch.device("meta"):
        assert Stored(weakref.ref(weights), buffer, candidates=2).sources(choice, 1).tolist() == [1, 2]


def test_an_answer_ends_with_the_end_of_text(model: PreTrainedModel) -> None:
    free = generate(model, prompt(20), max_new_tokens=70).answers[0]
    stop = int(free[37])
    end = free.tolist().index(stop) + 1
    blocks = Blocks()
    out = generate(model, prompt(20), max_new_tokens=70, eos_token_id=[stop, 126], streamer=blocks)
    assert torch.equal(out.answers[0], free[:end])
    assert torch.equal(torch.cat(blocks.got[1:], 1)[0], out.answers[0])
    assert blocks.ended
    assert sum(out.forwards.values()) < 70


def test_transformers_streamer_prints_blocks(model: PreTrainedModel, capsys: pytest.CaptureFixture[str]) -> None:
    class Words:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(f"{i} " for i in ids)

    out = generate(model, prompt(20), max_new_tokens=40, streamer=TextStreamer(Words(), skip_prompt=True))
    assert capsys.readouterr().out.split() == [str(i) for i in out.answers[0].tolist()]


def test_sampling_follows_its_seed(model: PreTrainedModel) -> None:
    def sampled(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        how = {"temperature": 1.0, "top_k": 20, "top_p": 0.95}
        return generate(model, prompt(20), max_new_tokens=20, generator=generator, **how).answers[0].tolist()

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_the_models_own_tokens_are_found(model: PreTrainedModel) -> None:
    before = generate(model, prompt(20), max_new_tokens=40)
    try:
        model.config.mask_token_id, model.generation_config.eos_token_id = MASK, int(before.answers[0][3])
        out = dmoe_compile.generate(model, prompt(20), max_new_tokens=40, threshold=0.5)
        assert torch.equal(out.answers[0], before.answers[0][:4])
    finally:
        del model.config.mask_token_id
        model.generation_config.eos_token_id = None


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mask_token_id": None}, r"names no mask_token_id: pass mask_token_id=, such as tokenizer\.mask_token_id"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be an integer of at least 1"),
        ({"threshold": -1}, "threshold=-1 must be a number above 0"),
        ({"threshold": None}, "threshold=None must be a number above 0"),
        ({"temperature": "0"}, "temperature='0' must be a number of at least 0"),
        ({"temperature": True}, "temperature=True must be a number of at least 0"),
        ({"top_p": "0.9"}, r"top_p='0\.9' must be a number in \(0, 1\]"),
        ({"editing_threshold": "0.9"}, r"editing_threshold='0\.9' must be a number above 0"),
        ({"mask_token_id": "<mask>"}, "mask_token_id='<mask>' must be an integer of at least 0"),
        ({"mask_token_id": 1.7}, r"mask_token_id=1\.7 must be an integer"),
        ({"mask_token_id": True}, "mask_token_id=True must be an integer"),
        (
            {"eos_token_id": "</s>"},
            "eos_token_id='</s>' must be an integer of at least 0: the id of a token, or a list",
        ),
        ({"eos_token_id": [None]}, "eos_token_id=None must be an integer"),
        ({"eos_token_id": 1.5}, r"eos_token_id=1\.5 must be an integer"),
        ({"pad_token_id": "x"}, "pad_token_id='x' must be an integer of at least 0"),
        ({"pad_token_id": -5}, "pad_token_id=-5 must be an integer of at least 0"),
        ({"trace": 5}, "trace=5 must name a file"),
        ({"generator": 5}, r"generator=5 must be a torch\.Generator"),
        ({"streamer": print}, r"streamer=<built-in function print> must be a streamer with put\(\) and end\(\)"),
        ({"progress": True}, r"progress=True must be a rich\.progress\.Progress"),
        ({"input_ids": None}, "input_ids is of type NoneType, but must be a tensor"),
        ({"input_ids": [[1, 2]]}, "input_ids is of type list, but must be a tensor"),
        ({"attention_mask": [[1] * 4]}, "attention_mask is of type list, but must be a tensor"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask is \[1, 3\], but must be as input_ids, \[1, 4\]"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1]])}, "attention_mask has a hole in row 0"),
        ({"input_ids": torch.ones(4, dtype=torch.int64)}, r"input_ids is int64\[4\], but must be int64\[B, S\]"),
        ({"input_ids": torch.tensor([[1, MASK, 3]])}, "prompt 0 holds the mask token, 127"),
        ({"input_ids": torch.tensor([[1, 128]])}, "input_ids holds 128, but the model has tokens 0 to 127"),
        ({"input_ids": torch.tensor([[1, -1]])}, "input_ids holds -1, but the model has tokens 0 to 127"),
        ({"mask_token_id": 128}, "mask_token_id holds 128, but the model has tokens 0 to 127"),
        (
            {"config": Config(passes=("dmoe",)), "block_length": 8},
            "block_length=8, but the passes vote in blocks of 32",
        ),
    ],
)
def test_bad_arguments_are_refused(model: PreTrainedModel, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dmoe_compile.generate(model, **{"input_ids": prompt(4), "mask_token_id": MASK, **kwargs})


def test_a_compiled_model_takes_no_config(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="config= is for a model that is not compiled yet"):
        generate(torch.compile(model, backend="dmoe"), prompt(4), config=Config())


def test_a_model_is_compiled_once_for_each_config(model: PreTrainedModel) -> None:
    """And beside what was compiled with others, however many: Dynamo's limit is for each alone."""
    mine = [copy.deepcopy(model)]

    def decode(mass: float) -> int:
        config = Config.from_options({"passes": ["cover"], "cover.mass": mass, **ATEN})
        generate(mine[0], prompt(20), max_new_tokens=8, config=config)
        return counters["stats"]["unique_graphs"]

    with torch._dynamo.config.patch(recompile_limit=1), patch.object(decoding, "_RECOMPILE_LIMIT", 1):
        before = counters["stats"]["unique_graphs"]
        assert [decode(mass) - before for mass in (0.6, 0.6, 0.8)] == [1, 1, 2]
    known = mine[0].__dict__["_dmoe_compiled"]
    assert len(known) == 2
    assert copy.deepcopy(known) == pickle.loads(pickle.dumps(known)) == {}
    seen = weakref.ref(mine.pop())
    del known
    torch._dynamo.reset()
    gc.collect()
    assert seen() is None


def test_models_that_would_not_decode_as_asked_are_refused(model: PreTrainedModel) -> None:
    other = copy.deepcopy(model)
    other.train()
    with pytest.raises(ValueError, match=r"in training mode, where dropout and the like are random; call model\.eval"):
        generate(other, prompt(4))
    other.eval().compile(backend="dmoe", options={"passes": ["team"]})
    with pytest.raises(ValueError, match=r"compiled by model\.compile\(\), which hides its options"):
        generate(other, prompt(4))


def test_a_trace_writes_options_that_are_no_json(model: PreTrainedModel, tmp_path: Path) -> None:
    def mine(graph: torch.fx.Graph) -> None:
        """An Inductor pass of the user's."""

    config = Config.from_options({**ATEN, "post_grad_custom_post_pass": mine})
    generate(model, prompt(20), max_new_tokens=12, config=config, trace=tmp_path / "trace.jsonl")
    header = json.loads((tmp_path / "trace.jsonl").read_text().splitlines()[0])
    assert "mine" in header["options"]["post_grad_custom_post_pass"]


def test_ends_of_text_may_be_a_tensor(model: PreTrainedModel) -> None:
    first = int(generate(model, prompt(20), max_new_tokens=12).answers[0][0])
    out = generate(model, prompt(20), max_new_tokens=12, eos_token_id=torch.tensor([first, 126]))
    assert len(out.answers[0]) == 1


@pytest.mark.parametrize(
    "changes",
    [{"team.candidates": 1}, {"team.speculate": False}, {"team.cache": False}, {"team.limit": False}],
    ids=lambda each: next(iter(each)),
)
@pytest.mark.nightly
def test_each_strategy_alone(model: PreTrainedModel, changes: dict[str, Any]) -> None:
    """What is switched off is not done, and the answer is whole."""
    config = Config.from_options({"passes": ["team"], **ATEN, **changes})
    lines: list[Any] = []
    out = generate(model, prompt(40), config=config, max_new_tokens=50, trace=lines.append)
    assert len(out.answers[0]) == 50
    assert not (out.sequences == MASK).any()
    kinds = {line.get("forward") for line in lines}
    assert ("speculate" in kinds) == changes.get("team.speculate", True)
    assert ("denoise" in kinds) == (not changes.get("team.speculate", True))
