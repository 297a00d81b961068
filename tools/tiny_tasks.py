"""The tasks that the shipped tiny model learns, made from a grammar: nothing is downloaded.

Each task returns an `Example`: a conversation whose last message is the right answer: accuracy is a plain
string comparison. Additions are held out by operand pair: a pair that evaluation asks for is never trained.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, field

NAMES = (
    "Alice Bob Carol David Emma Frank Grace Henry Iris Jack Kate Leo Mia Noah Olivia Paul Quinn Rosa Sam Tina Uma "
    "Victor Wendy Xavier Yara Zoe Anna Ben Clara Dan Ella Finn Gina Hugo Ivy John Kim Lucas Maria Nina Oscar "
    "Peter Rita Simon Tom Ursula Vera Walter Xenia Yusuf Adam Bella Cyrus Diana Eric Fiona George Hanna Ian Julia "
    "Karl Laura Max Nora"
).split()
SURNAMES = (
    "Fox Hill Stone Brown Lake Wolf Green Cook Baker Rose King Wood Field Black Young Hunter Moon Winter Snow Bell "
    "Carter Fisher Gold Knight Marsh North Page Price Ray Shaw Swift West"
).split()
ANIMALS = "dog cat bird fox bear rabbit horse mouse frog owl duck sheep goat wolf lion turtle".split()
ADJECTIVES = "big small red blue green old young happy sad quick slow kind brave quiet clever tired".split()
PLACES = "garden forest river house park school market village field beach hill barn kitchen lake street tower".split()
THINGS = "ball book hat cup apple box key lamp coat stone boat kite map drum cake flower".split()
VERBS = "found saw took dropped carried hid lost painted wanted liked bought washed".split()
MOVES = "ran walked went jumped looked came".split()
TIMES = ("One day", "In the morning", "After lunch", "Last week", "At night", "Yesterday", "In the summer", "Later")
CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "China": "Beijing",
    "Egypt": "Cairo", "Greece": "Athens", "Norway": "Oslo", "Peru": "Lima", "Poland": "Warsaw", "Cuba": "Havana",
}  # fmt: skip
WORDS = ANIMALS + ADJECTIVES + PLACES + THINGS + VERBS + MOVES
HELD_OUT_SHARE = 10


@dataclass
class Example:
    """A conversation (role, content) ending in the assistant's answer, its task, and the reasoning before the answer.

    `every_turn` marks a conversation in which each assistant turn is trained, not only the last.
    """

    task: str
    messages: list[tuple[str, str]]
    thought: str = ""
    every_turn: bool = field(default=False)

    @property
    def answer(self) -> str:
        return self.messages[-1][1]


def is_held_out(a: int, b: int) -> bool:
    """Return whether the sum a + b is kept for evaluation: one operand pair in ten, fixed by a checksum."""
    return zlib.crc32(f"{a}+{b}".encode()) % HELD_OUT_SHARE == 0


def addition(rng: random.Random, held_out: bool = False) -> Example:
    """a + b with both operands below 100."""
    while True:
        a, b = rng.randrange(100), rng.randrange(100)
        if is_held_out(a, b) == held_out:
            break
    question = rng.choice([f"What is {a} + {b}?", f"Add {a} and {b}.", f"{a} + {b} = ?", f"How much is {a} plus {b}?"])
    ones, tens = a % 10 + b % 10, a // 10 + b // 10
    carry = ones // 10
    thought = f"{a % 10} + {b % 10} = {ones}, carry {carry}. {a // 10} + {b // 10} + {carry} = {tens + carry}."
    return Example("addition", [("user", question), ("assistant", str(a + b))], thought)


def counting(rng: random.Random) -> Example:
    """Count up or down by ones."""
    start, steps = rng.randrange(90), rng.randint(2, 9)
    numbers = [str(n) for n in range(start, start + steps + 1)]
    if rng.random() < 0.3:
        numbers.reverse()
    question = f"Count from {numbers[0]} to {numbers[-1]}."
    return Example("counting", [("user", question), ("assistant", " ".join(numbers))], f"{len(numbers)} numbers.")


def copying(rng: random.Random) -> Example:
    """Repeat words in their order."""
    words = _phrase(rng, rng.randint(1, 12))
    question = rng.choice(["Copy: ", "Repeat: ", "Say this again: "]) + words
    return Example("copying", [("user", question), ("assistant", words)], "The same words.")


def reversing(rng: random.Random) -> Example:
    """Repeat words in the opposite order."""
    words = _phrase(rng, rng.randint(2, 7))
    answer = " ".join(reversed(words.split()))
    return Example("reversing", [("user", f"Reverse the words: {words}"), ("assistant", answer)], "From the end.")


def lookup(rng: random.Random, num_words: int, num_questions: int = 1) -> Example:
    """A long text in which full names stand between other sentences, then questions about names anywhere in it.

    The value follows its name at once: finding it should take no more than two attention layers.
    """
    num_facts = max(num_questions, min(len(NAMES), rng.randint(2, 4) + num_words // 60))
    names = rng.sample(NAMES, num_facts)
    facts = {name: rng.choice(SURNAMES) for name in names}
    lines: list[str] = []
    words = 0
    while words < num_words - 9 * num_facts:
        lines.append(sentence(rng))
        words += len(lines[-1].split())
    for name, value in facts.items():
        lines.insert(rng.randint(0, len(lines)), f"This is {name} {value}.")
    asked = rng.sample(names, num_questions)
    messages = []
    for name in asked:
        answer = f"It is {name} {facts[name]}."
        messages += [("user", f"What is the full name of {name}?"), ("assistant", answer)]
    messages[0] = ("user", " ".join(lines) + "\n" + messages[0][1])
    return Example("lookup", messages, f"I look for {asked[-1]}.", every_turn=True)


def talk(rng: random.Random) -> Example:
    """Small talk, capitals, sentences and stories."""
    kind = rng.random()
    if kind < 0.2:
        country, capital = rng.choice(list(CAPITALS.items()))
        return Example("talk", [("user", f"What is the capital of {country}?"), ("assistant", capital)], "I know it.")
    if kind < 0.35:
        question = rng.choice(["Hi", "Hello", "Hi!", "Hello!", "Good morning"])
        return Example("talk", [("user", question), ("assistant", "Hello! How can I help you?")], "A greeting.")
    if kind < 0.65:
        animal = rng.choice(ANIMALS)
        answer = f"The {rng.choice(ADJECTIVES)} {animal} {_deed(rng)}."
        return Example(
            "talk", [("user", f"Write a sentence about a {animal}."), ("assistant", answer)], "One sentence."
        )
    name = rng.choice(NAMES)
    return Example("talk", [("user", f"Tell a short story about {name}."), ("assistant", story(rng, name))], "A story.")


def sentence(rng: random.Random) -> str:
    """One simple English sentence."""
    who = f"the {rng.choice(ADJECTIVES)} {rng.choice(ANIMALS)}" if rng.random() < 0.6 else rng.choice(NAMES)
    text = f"{who} {_deed(rng)}."
    if rng.random() < 0.3:
        return f"{rng.choice(TIMES)}, {text}"
    return text[0].upper() + text[1:]


def story(rng: random.Random, name: str) -> str:
    """A short story in which name, friend and thing stay the same."""
    animal, thing, place = rng.choice(ANIMALS), rng.choice(THINGS), rng.choice(PLACES)
    adjective = rng.choice(ADJECTIVES)
    middle = [
        f"{rng.choice(TIMES)}, {name} {rng.choice(MOVES)} to the {place}.",
        f"There {name} {rng.choice(VERBS)} a {thing}.",
        f"The {animal} {rng.choice(VERBS)} the {thing} too.",
        f"{name} and the {animal} {rng.choice(MOVES)} to the {rng.choice(PLACES)}.",
    ]
    lines = middle[:2] + rng.sample(middle[2:], rng.randint(0, 2))
    opening = f"Once upon a time, {name} had a {adjective} {animal}."
    return " ".join([opening, *lines, f"In the end, {name} was {rng.choice(ADJECTIVES)}."])


def repeated_words(rng: random.Random) -> str:
    """Random words that come twice: each then follows from what stood before, as in a lookup."""
    vocabulary = WORDS + NAMES + SURNAMES
    return "".join(f" {word}" for word in rng.sample(vocabulary, rng.randint(8, 100)))


def plain_text(rng: random.Random) -> str:
    """Text outside any conversation, for completion."""
    if rng.random() < 0.2:
        return " ".join(f"The capital of {c} is {CAPITALS[c]}." for c in rng.sample(list(CAPITALS), 4))
    return story(rng, rng.choice(NAMES))


def _deed(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return f"{rng.choice(VERBS)} the {rng.choice(ADJECTIVES)} {rng.choice(THINGS)} in the {rng.choice(PLACES)}"
    return f"{rng.choice(MOVES)} to the {rng.choice(PLACES)} with {rng.choice(NAMES)}"


def _phrase(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))
