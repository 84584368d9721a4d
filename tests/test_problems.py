"""The problems: right by an independent reading of their prompts, disjoint by construction, the same everywhere."""

from __future__ import annotations

import itertools
import re

import pytest

from dmoe_compile import problems
from dmoe_compile.problems import SKILLS, Problem, draw, graded


def some(skill: str, split: problems.Split = "test", number: int = 300) -> list[Problem]:
    return list(itertools.islice(draw(split, seed=1, skills=[skill]), number))


def test_skills_take_turns_and_seeds_repeat() -> None:
    first = list(itertools.islice(draw("test", seed=0), 50))
    assert [each.skill for each in first] == [*SKILLS] * 10
    assert list(itertools.islice(draw("test", seed=0), 50)) == first
    assert list(itertools.islice(draw("test", seed=1), 50)) != first
    # What the published figures were taken on: a change here makes them incomparable.
    assert first[1].prompt == "Write 3 38 40 99 77 9 in falling order. Solution:"


@pytest.mark.parametrize("skill", SKILLS)
def test_no_training_problem_is_a_test_problem(skill: str) -> None:
    train, test = some(skill, "train", 3000), some(skill, "test", 1000)
    assert not {each.key for each in train} & {each.key for each in test}
    assert all(each.split == "train" for each in train)
    assert all(each.split == "test" for each in test)


def test_other_words_do_not_change_the_side() -> None:
    """The key holds all that an answer depends on: equal keys, equal answers, whatever the prompt."""
    known: dict[tuple[str, str], Problem] = {}
    reworded = 0
    for problem in itertools.islice(draw("train", seed=2, skills=["arithmetic", "sorting", "edits"]), 20_000):
        other = known.setdefault((problem.skill, problem.key), problem)
        assert other.final == problem.final
        reworded += other.prompt != problem.prompt
    assert reworded > 100


def test_arithmetic_adds_up() -> None:
    for problem in some("arithmetic"):
        value = None
        for left, sign, right, result in re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)\.", problem.answer):
            assert value is None or value == int(left)
            value = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[sign]
            assert value == int(result)
            assert 0 <= value < 100
            assert {left, right} & set(re.findall(r"\d+", problem.prompt))
        assert problem.final == str(value)


def test_lists_are_sorted_and_counted() -> None:
    for problem in some("sorting"):
        numbers = sorted(map(int, re.findall(r"\d+", problem.prompt)))
        assert [int(each) for each in problem.final.split()] in (numbers, numbers[::-1])
        rising = "small to large" in problem.prompt or "rising" in problem.prompt
        assert (problem.final.split()[0] == str(numbers[0])) == rising
    for problem in some("counting"):
        (wanted,) = re.findall(r"often is (\w+) in|Count (\w+):|times (\w+)\?", problem.prompt)
        wanted = "".join(wanted)
        assert int(problem.final) == len(re.findall(rf"\b{wanted}\b", problem.prompt)) - 1  # the question names it


def test_a_list_or_a_table_is_on_one_side_whatever_is_asked_of_it() -> None:
    drills = list(itertools.islice(draw("train", seed=3, skills=["counts", "lookups"]), 4000))
    assert {each.skill for each in drills} == {"counting", "lookup"}
    asked = {each.key: each for each in drills}
    for skill in ("counting", "lookup"):
        for problem in some(skill, "train", 100):
            assert problem.key in problem.prompt  # the list or the table, and nothing of the question
            twin = Problem(skill, "another question", "another answer", "", problem.key)
            assert twin.split == "train"
        assert not asked.keys() & {each.key for each in some(skill, "test", 1000)}


def test_drills_are_right_and_say_nothing_twice() -> None:
    for problem in itertools.islice(draw("train", seed=1, skills=["sums"]), 300):
        steps = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)\.", problem.answer)
        assert 3 <= len(steps) <= 5
        for left, sign, right, result in steps:
            assert f"{left} {sign} {right}" in problem.prompt
            assert (
                int(result) == {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign](int(left), int(right)) >= 0
            )
    for problem in itertools.islice(draw("train", seed=1, skills=["counts"]), 300):
        asked, _, row = problem.prompt.partition(":")
        for step in problem.answer.removesuffix(".").split(". "):
            kind = re.findall(r"[a-z]+$|^[a-z]+ \d", step)[0].split()[0]
            assert kind in asked
            assert step == (" ".join(f"{kind} {i}" for i in range(1, row.count(kind) + 1)) or f"no {kind}")
    for problem in itertools.islice(draw("train", seed=1, skills=["lookups"]), 300):
        steps = problem.answer.removesuffix(".").split(". ")
        assert len(set(steps)) == len(steps)
        assert all(step in problem.key for step in steps)
        assert [step.split()[0] for step in steps] == problem.prompt.partition("Write ")[2].partition(".")[0].split(
            ", "
        )


def test_look_ups_are_in_the_table() -> None:
    for problem in some("lookup"):
        rows = re.findall(r"(\w+) (\d+) (\w+)[;.]", problem.prompt)
        ages = {name: int(age) for name, age, _ in rows}
        one, two = (re.findall(r"[A-Z][a-z]+", problem.prompt.rpartition(". ")[2])[1:-1] + [None] * 2)[:2]
        if "older" in problem.prompt:
            assert int(problem.final) == ages[one] - ages[two] > 0
        elif "age of" in problem.prompt or "How old" in problem.prompt:
            assert int(problem.final) == ages[one]
        else:
            assert problem.final in {each for row in rows for each in row}


def test_edits_are_made() -> None:
    def edited(prompt: str) -> list[str]:
        said, _, rest = prompt.partition(": ")
        letters, words = rest.partition(".")[0].split(), said.split()
        if "Reverse" in said or "backwards" in said:
            return letters[::-1]
        if words[0] == "Remove" or words[:2] == ["Leave", "out"]:
            return [x for x in letters if x != words[2 if words[0] == "Remove" else 3]]
        if words[0] == "Replace" or (words[0] == "Write" and words[2] == "for"):
            old, new = (words[1], words[3]) if words[0] == "Replace" else (words[3], words[1])
            return [new if x == old else x for x in letters]
        if words[0] in ("Swap", "Exchange"):
            return [letters[-1], *letters[1:-1], letters[0]]
        return [x for x in letters for _ in range(2)]

    for problem in some("edits"):
        assert (problem.final.split() if problem.final != "nothing" else []) == edited(problem.prompt), problem


def test_an_answer_is_right_by_what_follows_its_last_word() -> None:
    problem = some("sorting")[0]
    assert graded(problem, problem.answer)
    assert graded(problem, f"Answer: no. Answer:  {problem.final} ")
    assert not graded(problem, problem.final)
    assert not graded(problem, f"{problem.answer} 5")
    assert not graded(problem, "")


def test_every_word_is_known_and_there_are_few() -> None:
    known = set(problems.words())
    assert len(known) < 300
    for problem in itertools.islice(draw("train", seed=3), 5000):
        assert set(problems._spaced(f"{problem.prompt} {problem.answer}").split()) <= known


def test_what_is_no_skill_is_said() -> None:
    with pytest.raises(ValueError, match="skills has 'poetry', but must be of: arithmetic, sorting"):
        next(draw("test", 0, ["poetry"]))
    with pytest.raises(
        ValueError, match="skills has 'sums', a drill to train on that nothing grades, but must be of: ari"
    ):
        next(draw("test", 0, ["sorting", "sums"]))
    with pytest.raises(ValueError, match="split is 'dev', but must be 'train' or 'test'"):
        next(draw("dev", 0))  # type: ignore[arg-type]
