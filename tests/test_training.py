"""Training the demonstration model: what it reads, what it learns in a minute, and that it goes on where it stopped."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeForCausalLM

from dmoe_compile import Config, evaluation, problems, training
from dmoe_compile.training import BLOCK_LENGTH, Settings, batches, block_mask, encode, loss_of, tokenizer, train

LEARNED_IN_TEN_MINUTES = 0.3  # share of problems, after 2,000 steps


@pytest.fixture(scope="module")
def words():
    return tokenizer()


def test_the_tokenizer_gives_every_text_back(words) -> None:
    for problem in itertools.islice(problems.draw("train", seed=0), 500):
        text = f"{problem.prompt} {problem.answer}"
        ids = words(text)["input_ids"]
        assert words.unk_token_id not in ids
        assert words.decode(ids) == text
        assert len(ids) == len(problems._spaced(text).split())  # a token a word: numbers are not cut up


def test_a_problem_is_whole_blocks(words) -> None:
    for problem in itertools.islice(problems.draw("train", seed=0), 500):
        ids, begin, end = encode(words, problem)
        assert len(ids) % BLOCK_LENGTH == 0
        assert end <= len(ids) < end + BLOCK_LENGTH
        assert words.decode(ids[begin : end - 1]) == problem.answer
        assert set(ids[end - 1 :]) == {words.eos_token_id}
        assert len(ids) <= 2 * BLOCK_LENGTH


def test_only_the_last_block_of_an_answer_is_noisy(words) -> None:
    sizes = set()
    for batch in itertools.islice(batches(words, 1024, seed=0), 20):
        number, size = batch.input_ids.shape
        sizes.add(size)
        assert number * size == 1024
        masked = batch.input_ids == words.mask_token_id
        assert not masked[:, :-BLOCK_LENGTH].any()
        assert torch.equal(masked[:, -BLOCK_LENGTH:], batch.weights > 0)
        assert (batch.worth[masked[:, -BLOCK_LENGTH:]] > 0).all()
        assert batch.worth.sum().item() == pytest.approx(1)
        assert torch.equal(
            batch.input_ids[:, -BLOCK_LENGTH:][~masked[:, -BLOCK_LENGTH:]], batch.targets[batch.weights == 0]
        )
        text = words.decode(torch.cat([batch.input_ids[0, :-BLOCK_LENGTH], batch.targets[0]]))
        assert " Solution:" in text
        # In the mean over the noise every position weighs the same, whatever its share of masks: they sum to 1.
        assert 0.5 < batch.weights.sum() < 1.5
    assert sizes == {BLOCK_LENGTH, 2 * BLOCK_LENGTH}


def test_half_of_the_blocks_are_masked_to_their_end(words) -> None:
    ordered = rows = 0
    for batch in itertools.islice(batches(words, 1024, seed=0), 40):
        answers = (batch.worth > 0) & (batch.targets != words.eos_token_id)
        for masked, answer in zip(batch.weights > 0, answers, strict=True):
            inside = masked[answer].tolist()
            if 0 < sum(inside) < len(inside) - 3:  # few or all masks could be so by chance
                rows += 1
                ordered += inside == sorted(inside)
    assert 0.35 < ordered / rows < 0.65


def test_an_autoregressive_step_predicts_every_token_of_the_answer_from_those_before(words) -> None:
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(training.model_config(words))
    model.config._experts_implementation = "grouped_mm"
    for batch in itertools.islice(batches(words, 128, seed=0), 4):
        clean = torch.cat([batch.input_ids[:, :-BLOCK_LENGTH], batch.targets], 1)
        with torch.no_grad():
            _, found = loss_of(model, batch, balance=0.0, autoregressive=True)
            logits = model(clean).logits.log_softmax(-1)  # causal by itself
        wanted = 0.0
        for row, place in (batch.worth > 0).nonzero().tolist():
            at = clean.shape[1] - BLOCK_LENGTH + place
            wanted -= batch.worth[row, place] * logits[row, at - 1, clean[row, at]]
        torch.testing.assert_close(found, wanted)


def test_no_test_problem_is_trained_on(words, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    draw = problems.draw
    monkeypatch.setattr(problems, "draw", lambda split, *rest: seen.append(split) or draw(split, *rest))
    next(batches(words, 128, seed=0))
    assert seen == ["train"]


def test_the_mask_is_full_in_a_block_and_causal_between() -> None:
    mask = block_mask(2 * BLOCK_LENGTH)[0, 0]
    assert not mask[:BLOCK_LENGTH, :BLOCK_LENGTH].any()
    assert not mask[BLOCK_LENGTH:].any()
    assert (mask[:BLOCK_LENGTH, BLOCK_LENGTH:] < -1e30).all()


def test_the_loss_is_the_weighted_cross_entropy_of_masked_positions(words) -> None:
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(training.model_config(words))
    model.config._experts_implementation = "grouped_mm"
    batch = next(batches(words, 128, seed=0))
    routers = [layer.mlp.gate for layer in model.model.layers]
    chosen, shares = [], []
    for router in routers:
        router.register_forward_hook(lambda _, args, out: chosen.append(out[2]))
        router.register_forward_hook(lambda gate, args, out: shares.append((args[0] @ gate.weight.T).softmax(-1)))
    with torch.no_grad():
        loss, diffusion = loss_of(model, batch, balance=0.5)
        load = torch.cat(chosen).flatten().bincount(minlength=64) / (4 * 128)
        spread = 64 * (load * torch.cat([share.reshape(-1, 64) for share in shares]).mean(0)).sum()
        logits = model(batch.input_ids, attention_mask=block_mask(batch.input_ids.shape[1])).logits[:, -BLOCK_LENGTH:]
        wanted = 0.0
        for row, place in (batch.weights > 0).nonzero().tolist():
            wanted -= batch.weights[row, place] * logits[row, place].log_softmax(-1)[batch.targets[row, place]]
    torch.testing.assert_close(diffusion, wanted)
    torch.testing.assert_close(loss - diffusion, 0.5 * spread)


def test_a_minute_lowers_the_loss_and_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_CHUNK", 20)
    settings = Settings(steps=60, tokens=1024, warm_up=10)
    whole = train(tmp_path / "whole", settings)
    losses = [line["loss"] for line in whole]
    assert losses[0] > 1.3 * losses[-1], losses
    assert [line["step"] for line in whole] == [20, 40, 60]

    first = train(tmp_path / "parts", Settings(steps=60, tokens=1024, warm_up=10, minutes=0))
    assert [line["step"] for line in first] == [20]
    rest = train(tmp_path / "parts", settings)
    assert [line["step"] for line in rest] == [20, 40, 60]
    assert [line["loss"] for line in rest] == pytest.approx(losses, rel=1e-3)
    assert train(tmp_path / "parts", settings) == rest  # nothing is left to do

    with pytest.raises(ValueError, match=r"was written with .*'seed': 0.*give the same settings, or another folder"):
        train(tmp_path / "parts", Settings(steps=60, tokens=1024, warm_up=10, seed=1))

    # Killed after a state is saved, and before the log tells of it: the state that the log knows is gone on from.
    killed = tmp_path / "killed"
    train(killed, Settings(steps=60, tokens=1024, warm_up=10, minutes=0))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", _killed)
        with pytest.raises(KeyboardInterrupt):
            train(killed, settings)
    assert sorted(each.name for each in killed.glob("state-*")) == ["state-20", "state-40"]
    assert [line["loss"] for line in train(killed, settings)] == pytest.approx(losses, rel=1e-3)
    assert [each.name for each in killed.glob("state-*")] == ["state-60"]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "whole").mask_token_id == model.config.mask_token_id
    assert sum(file.stat().st_size for file in (tmp_path / "whole").glob("*.safetensors")) < 12 * 2**20
    lines = (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == losses


@pytest.mark.nightly
def test_ten_minutes_teach_a_part_of_it(tmp_path: Path) -> None:
    """What anybody gets from a short run; the model that the package brings took 7,500 steps."""
    train(tmp_path, Settings(steps=2000))
    run = evaluation.evaluate(str(tmp_path), Config(), evaluation.Settings(problems=250, batch=25))
    found = evaluation.summary(run)
    assert found.accuracy >= LEARNED_IN_TEN_MINUTES, found.by_skill


def _killed(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps=0 must be an integer of at least 1"),
        ({"tokens": 100}, "tokens is 100, but must be a multiple of two blocks, 64"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, but must be above 0"),
    ],
)
def test_bad_settings_are_refused(wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)
