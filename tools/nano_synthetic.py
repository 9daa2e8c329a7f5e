"""Generated text of two domains: lines of arithmetic and short chat conversations.

Every exercise belongs to exactly one split ("train", "mixed" or "eval"), chosen by a hash of its question, so that no
question of the calibration or evaluation text was ever seen in training. Generated here, CC0-1.0.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator

Message = dict[str, str]
Exercise = tuple[str, str]  # question, answer


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words("Anna Ben Carla David Emma Farid Greta Hugo Ines Jonas Kira Leo Mei Nora")
THINGS = _words("apples books coins eggs keys letters maps pens rings stones tickets toys")
WORDS = _words(
    "river stone garden winter yellow planet forest bridge silver window market candle copper island thunder "
    "letter mirror orange pepper rabbit saddle temple velvet walnut anchor basket castle desert engine feather "
    "harbor jungle kitchen"
)
ONES = {
    "German": _words("null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf"),
    "French": _words("zéro un deux trois quatre cinq six sept huit neuf dix onze douze"),
    "Spanish": _words("cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce"),
}
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
SYSTEM = (
    "You are a careful calculator.",
    "Answer briefly.",
    "You are a helpful assistant.",
    "Reply with the result only.",
)
OPENERS = ("", "", "", "Please tell me: ", "Quick question. ", "Hello! ", "I need help. ")


def split_of(question: str) -> str:
    """The split that owns `question`: 1 in 40 goes to "eval", 1 in 20 to "mixed", the rest to "train"."""
    bucket = int.from_bytes(hashlib.sha256(question.encode()).digest()[:4], "little") % 40
    return "eval" if bucket == 0 else "mixed" if bucket < 3 else "train"


def _number(rng: random.Random) -> int:
    return rng.randrange(10 ** rng.choice((1, 2, 2, 3)))


def _line(rng: random.Random) -> Exercise:
    a, b = _number(rng), _number(rng)
    kind = rng.randrange(8)
    if kind <= 1:
        return f"{a} + {b}", f"{a + b}"
    if kind == 2:
        return f"{max(a, b)} - {min(a, b)}", f"{abs(a - b)}"
    if kind == 3:
        return f"{a % 13} * {b % 100}", f"{(a % 13) * (b % 100)}"
    if kind == 4:
        numbers = [rng.randrange(100) for _ in range(rng.randint(3, 6))]
        return "sort " + " ".join(map(str, numbers)), " ".join(map(str, sorted(numbers)))
    if kind == 5:
        return f"max({a}, {b})", f"{max(a, b)}"
    if kind == 6:
        b = b % 12 + 1
        return f"{a} mod {b}", f"{a % b}"
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    a, b = a % 50, b % 50
    return f"{name} has {a} {thing} and finds {b} more, so now {name} has", f"{a + b} {thing}."


def _sum(rng: random.Random) -> Exercise:
    a, b = _number(rng), _number(rng)
    text = rng.choice(
        (
            "What is {a} + {b}?",
            "Add {a} and {b}.",
            "Compute {a} plus {b}.",
            "Combien font {a} + {b} ?",
            "Was ist {a} + {b}?",
        )
    )
    return text.format(a=a, b=b), rng.choice((f"{a + b}", f"{a} + {b} = {a + b}"))


def _difference(rng: random.Random) -> Exercise:
    a, b = sorted((_number(rng), _number(rng)), reverse=True)
    text = rng.choice(("What is {a} - {b}?", "Subtract {b} from {a}.", "How much is {a} minus {b}?"))
    return text.format(a=a, b=b), f"{a} - {b} = {a - b}"


def _product(rng: random.Random) -> Exercise:
    a, b = rng.randint(0, 12), rng.randint(0, 60)
    return rng.choice((f"What is {a} * {b}?", f"Multiply {a} by {b}.")), f"{a} * {b} = {a * b}"


def _sort(rng: random.Random) -> Exercise:
    numbers = [rng.randrange(100) for _ in range(rng.randint(3, 6))]
    return "Sort these numbers: " + ", ".join(map(str, numbers)), ", ".join(map(str, sorted(numbers)))


def _sort_words(rng: random.Random) -> Exercise:
    words = rng.sample(WORDS, rng.randint(3, 5))
    return "Put these words in alphabetical order: " + ", ".join(words), ", ".join(sorted(words))


def _spell(rng: random.Random) -> Exercise:
    word = "".join(rng.choices("abcdefghilmnoprstuw", k=rng.randint(3, 6)))
    if rng.random() < 0.5:
        return f'Spell "{word}" letter by letter.', " ".join(word)
    return f'Write "{word}" in capital letters.', word.upper()


def _translate(rng: random.Random) -> Exercise:
    language = rng.choice(list(ONES))
    number, other = rng.randrange(13), rng.randrange(13)
    question = f"How do you say {number} and {other} in {language}?"
    return question, f"{ONES[language][number]}, {ONES[language][other]}"


def _day(rng: random.Random) -> Exercise:
    day, steps = rng.randrange(7), rng.randint(1, 40)
    question = f"Today is {DAYS[day]}. Which day is it in {steps} days?"
    return question, f"In {steps} days it is {DAYS[(day + steps) % 7]}."


def _story(rng: random.Random) -> Exercise:
    name, thing, a, b = rng.choice(NAMES), rng.choice(THINGS), rng.randint(5, 60), rng.randint(1, 30)
    if rng.random() < 0.5:
        return (
            f"{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have?",
            f"{a} + {b} = {a + b} {thing}.",
        )
    b = min(a, b)
    return f"{name} had {a} {thing} and gave away {b}. How many {thing} are left?", f"{a} - {b} = {a - b} {thing}."


CHAT_KINDS: tuple[Callable[[random.Random], Exercise], ...] = (
    _sum, _difference, _product, _sort, _sort_words, _spell, _translate, _day, _story,
)  # fmt: skip


def _of_split(rng: random.Random, make: Callable[[random.Random], Exercise], split: str) -> Exercise:
    while True:
        exercise = make(rng)
        if split_of(exercise[0]) == split:
            return exercise


def arithmetic_documents(split: str, seed: int) -> Iterator[str]:
    """Endless documents of about 40 lines such as `37 + 45 = 82`."""
    rng = random.Random(f"arithmetic {split} {seed}")
    while True:
        lines = (_of_split(rng, _line, split) for _ in range(rng.randint(30, 50)))
        yield "\n".join(f"{q} {a}" if q.endswith("has") else f"{q} = {a}" for q, a in lines)


def conversations(split: str, seed: int) -> Iterator[list[Message]]:
    """Endless conversations of 1 to 4 exchanges, every fourth with a system message."""
    rng = random.Random(f"chat {split} {seed}")
    while True:
        messages: list[Message] = []
        if rng.random() < 0.25:
            messages.append({"role": "system", "content": rng.choice(SYSTEM)})
        for _ in range(rng.choice((1, 1, 2, 3, 4))):
            question, answer = _of_split(rng, rng.choice(CHAT_KINDS), split)
            messages.append({"role": "user", "content": rng.choice(OPENERS) + question})
            messages.append({"role": "assistant", "content": answer})
        yield messages
