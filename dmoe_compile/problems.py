"""Short problems with worked answers, drawn at random, on which a small model is trained and judged.

    problem = next(draw("test", seed=0))
    problem.prompt   "Mia has 7 pens. Mia buys 5 more. Mia gives away 3. How many pens does Mia have? Solution:"
    problem.answer   "7 + 5 = 12. 12 - 3 = 9. Answer: 9"

Five skills: arithmetic (word problems in two or three steps), sorting, counting, edits of strings, look-ups in tables.
Every number is below 100 and every word one of a few hundred, so that a tokenizer may give each one token.

Training and test problems are disjoint by construction: what a problem is about (its `key`: numbers in their order, a
list, a table, letters) decides by a hash on which side it is, one in ten on the test's. The wording is not in the key,
nor what is asked of a list or a table, so that no test problem is a training problem in other words.

For training alone there are drills: small steps of a skill by themselves, several to a text, on the same side as the
list or the table that they are about.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test"]
_TEST_SHARE = 10  # one problem in so many is a test problem

_LARGEST = 30  # what arithmetic comes to, but for products
NAMES = ("Ann", "Ben", "Eva", "Ida", "Jon", "Kim", "Leo", "Mia", "Noa", "Pam", "Sam", "Tom")
THINGS = ("pens", "books", "cards", "coins", "eggs", "keys", "nuts", "shells", "stamps", "stones")
FRUITS = ("apple", "pear", "plum", "fig", "lemon", "melon", "mango", "grape")
COLOURS = ("red", "blue", "green", "white", "black", "brown", "pink", "grey")
LETTERS = tuple("abcdefghijklmnopqrst")


@dataclass(frozen=True)
class Problem:
    """A question, a worked answer and what the answer comes to.

    Attributes:
        skill: one of SKILLS; a drill's is that of which it is a part.
        prompt: the question, up to where the answer begins.
        answer: steps, then "Answer: " and `final`.
        final: what is right or wrong; empty for a drill.
        key: what the problem is about, whatever its wording.
    """

    skill: str
    prompt: str
    answer: str
    final: str
    key: str

    @property
    def split(self) -> Split:
        """Which of the two kinds it belongs to, for ever."""
        digest = hashlib.sha256(f"{self.skill} {self.key}".encode()).digest()
        return "test" if int.from_bytes(digest[:8], "big") % _TEST_SHARE == 0 else "train"


def draw(split: Split, seed: int, skills: Sequence[str] | None = None) -> Iterator[Problem]:
    """Yield problems without end, the skills in turn.

    Args:
        split: "train" or "test".
        seed: equal seeds give equal problems, on any machine.
        skills: which ones, in this order, of SKILLS, and to train of DRILLS, which nothing grades; SKILLS if None.

    Raises:
        ValueError: for a name that is none.
    """
    names = tuple(SKILLS) if skills is None else tuple(skills)
    known = SKILLS if split == "test" else SKILLS | DRILLS
    for name in names:
        if name not in known:
            drill = ", a drill to train on that nothing grades" if name in DRILLS else ""
            raise ValueError(f"skills has {name!r}{drill}, but must be of: {', '.join(known)}")
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}, but must be 'train' or 'test'")
    rng = random.Random(f"{split} {seed}")
    while True:
        for name in names:
            found = known[name](rng)
            while found.split != split:
                found = known[name](rng)
            yield found


def graded(problem: Problem, text: str) -> bool:
    """Whether a model's text ends with the right answer: exact match of what follows its last "Answer:"."""
    _, found, last = text.rpartition("Answer:")
    return bool(found) and last.split() == problem.final.split()


def words() -> list[str]:
    """Return every word that problems are made of, in the order of the alphabet, punctuation and numbers too."""
    found = {str(number) for number in range(100)} | {*NAMES, *THINGS, *FRUITS, *COLOURS, *LETTERS}
    rng = random.Random(0)
    for make in (SKILLS | DRILLS).values():
        for _ in range(2000):  # wordings are few; what fills them in is listed above
            problem = make(rng)
            found |= set(_spaced(f"{problem.prompt} {problem.answer}").split())
    return sorted(found)


def _spaced(text: str) -> str:
    for mark in ".,:;?":
        text = text.replace(mark, f" {mark} ")
    return text


def _problem(skill: str, key: Sequence[object], question: str, steps: Sequence[str], final: str) -> Problem:
    worked = " ".join([*(f"{step}." for step in steps), f"Answer: {final}"])
    return Problem(skill, f"{question} Solution:", worked, final, " ".join(map(str, key)))


def _arithmetic(rng: random.Random) -> Problem:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    if rng.random() < 0.3:  # boxes of as many each
        boxes, each = rng.randint(2, 6), rng.randint(2, 6)
        value, key = boxes * each, [boxes, "x", each]
        said = rng.choice((
            f"{name} has {boxes} boxes of {each} {thing}.",
            f"There are {boxes} boxes, each with {each} {thing}, and {name} takes them all.",
        ))  # fmt: skip
        steps = [f"{boxes} * {each} = {value}"]
        changes = rng.randint(1, 2)
    else:
        value = rng.randint(3, 20)
        key, steps = [value], []
        said = rng.choice((f"{name} has {value} {thing}.", f"At first {name} owns {value} {thing}."))
        changes = rng.randint(2, 3)
    for _ in range(changes):
        other = rng.randint(1, 9)
        if value >= other and (rng.random() < 0.5 or value + other > _LARGEST):
            lost = f"{name} gives away {other}.", f"{name} loses {other}.", f"Then {other} are sold."
            said, sign, result = f"{said} {rng.choice(lost)}", "-", value - other
        else:
            won = f"{name} buys {other} more.", f"{name} finds {other}.", f"Then {name} gets {other} more."
            said, sign, result = f"{said} {rng.choice(won)}", "+", value + other
        steps.append(f"{value} {sign} {other} = {result}")
        key += [sign, other]
        value = result
    asked = f"How many {thing} does {name} have?", f"How many {thing} are left?", f"What is the number of {thing}?"
    return _problem("arithmetic", key, f"{said} {rng.choice(asked)}", steps, str(value))


def _sorting(rng: random.Random) -> Problem:
    numbers = rng.sample(range(100), rng.randint(3, 6))
    up = rng.random() < 0.5
    order = sorted(numbers, reverse=not up)
    ways = ("from small to large", "in rising order") if up else ("from large to small", "in falling order")
    listed = " ".join(map(str, numbers))
    question = rng.choice((f"Sort {rng.choice(ways)}: {listed}.", f"Write {listed} {rng.choice(ways)}."))
    ends = f"The {'smallest' if up else 'largest'} is {order[0]}"
    return _problem("sorting", [up, listed], question, [ends], " ".join(map(str, order)))


def _basket(rng: random.Random) -> tuple[list[str], list[str]]:
    kinds = rng.sample(FRUITS, 3)
    return kinds, rng.choices(kinds, k=rng.randint(5, 10))


def _counted(row: Sequence[str], wanted: str) -> str:
    return " ".join(f"{wanted} {number}" for number in range(1, row.count(wanted) + 1)) or f"no {wanted}"


def _counting(rng: random.Random) -> Problem:
    kinds, row = _basket(rng)
    wanted = rng.choice(kinds)
    listed = " ".join(row)
    question = rng.choice((
        f"How often is {wanted} in this list: {listed}?",
        f"Count {wanted}: {listed}.",
        f"A basket holds {listed}. How many times {wanted}?",
    ))  # fmt: skip
    return _problem("counting", [listed], question, [_counted(row, wanted)], str(row.count(wanted)))


def _edits(rng: random.Random) -> Problem:
    letters = rng.choices(LETTERS, k=rng.randint(4, 7))
    kind = rng.choice(("reverse", "remove", "replace", "swap", "double"))
    old, new = rng.choice(letters), rng.choice(LETTERS)
    if kind == "reverse":
        asked, made = ("Reverse", "Write backwards"), letters[::-1]
    elif kind == "remove":
        asked, made = (f"Remove every {old} from", f"Leave out each {old} of"), [x for x in letters if x != old]
    elif kind == "replace":
        asked = f"Replace {old} by {new} in", f"Write {new} for {old} in"
        made = [new if x == old else x for x in letters]
    elif kind == "swap":
        asked = "Swap the first and the last letter of", "Exchange both ends of"
        made = [letters[-1], *letters[1:-1], letters[0]]
    else:
        asked, made = ("Write every letter twice of", "Double each letter of"), [x for x in letters for _ in range(2)]
        letters, made = letters[:5], made[:10]
    listed = " ".join(letters)
    key = [kind, listed, old if kind in ("remove", "replace") else "", new if kind == "replace" else ""]
    final = " ".join(made) or "nothing"
    return _problem("edits", key, f"{rng.choice(asked)}: {listed}.", [f"There are {len(letters)} letters"], final)


def _table(rng: random.Random) -> tuple[list[tuple[str, int, str]], str]:
    people = rng.sample(NAMES, rng.randint(3, 5))
    ages = rng.sample(range(8, 21), len(people))
    colours = rng.choices(COLOURS, k=len(people))
    rows = list(zip(people, ages, colours, strict=True))
    return rows, "; ".join(f"{name} {age} {colour}" for name, age, colour in rows)


def _lookup(rng: random.Random) -> Problem:
    rows, table = _table(rng)
    (one, age, colour), (two, other, _) = rng.sample(rows, 2)
    kind = rng.choice(("age", "colour", "who", "older"))
    if kind == "age":
        asked, steps, final = (f"How old is {one}?", f"What is the age of {one}?"), [f"{one} {age} {colour}"], str(age)
    elif kind == "colour":
        asked = f"What colour does {one} like?", f"Which colour has {one}?"
        steps, final = [f"{one} {age} {colour}"], colour
    elif kind == "who":
        asked, steps, final = (f"Who is {age}?", f"Whose age is {age}?"), [f"{one} {age} {colour}"], one
    else:
        (one, age), (two, other) = sorted([(one, age), (two, other)], key=lambda each: -each[1])
        asked = f"By how much is {one} older than {two}?", f"How many years is {one} older than {two}?"
        steps, final = [f"{one} {age}", f"{two} {other}", f"{age} - {other} = {age - other}"], str(age - other)
    return _problem("lookup", [table], f"Table: {table}. {rng.choice(asked)}", steps, final)


def _sums(rng: random.Random) -> Problem:
    asked, steps = [], []
    for _ in range(rng.randint(3, 5)):
        sign, left, right = rng.choice("++--*"), rng.randint(1, _LARGEST), rng.randint(1, 9)
        if sign == "*":
            left, right = rng.randint(2, 6), rng.randint(2, 6)
        elif sign == "+":
            left = min(left, _LARGEST - right)
        else:
            left = max(left, right)
        result = {"+": left + right, "-": left - right, "*": left * right}[sign]
        asked.append(f"{left} {sign} {right}")
        steps.append(f"{asked[-1]} = {result}")
    return _drill("arithmetic", asked, f"Write {', '.join(asked)}.", steps)


def _counts(rng: random.Random) -> Problem:
    kinds, row = _basket(rng)
    listed = " ".join(row)
    return _drill("counting", [listed], f"Count {', '.join(kinds)}: {listed}.", [_counted(row, kind) for kind in kinds])


def _lookups(rng: random.Random) -> Problem:
    rows, table = _table(rng)
    some = rng.sample(rows, len(rows) - 1)
    steps = [f"{name} {age} {colour}" for name, age, colour in some]
    return _drill("lookup", [table], f"Table: {table}. Write {', '.join(name for name, *_ in some)}.", steps)


def _drill(skill: str, key: Sequence[object], question: str, steps: Sequence[str]) -> Problem:
    """Return several small steps of a skill with no final answer, in which nothing is said twice."""
    return Problem(skill, f"{question} Solution:", " ".join(f"{step}." for step in steps), "", " ".join(map(str, key)))


SKILLS: dict[str, Callable[[random.Random], Problem]] = {
    "arithmetic": _arithmetic, "sorting": _sorting, "counting": _counting, "edits": _edits, "lookup": _lookup,
}  # fmt: skip
DRILLS: dict[str, Callable[[random.Random], Problem]] = {
    "sums": _sums,
    "counts": _counts,
    "lookups": _lookups,
}  # to train on
