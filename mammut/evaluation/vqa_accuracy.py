"""How right an answer is: by the official rules of VQAv2, or word for word.

VQAv2 (https://visualqa.org/evaluation.html): ten people answered. An answer is right by min(1, people who gave it / 3),
averaged over the ten ways to leave one person out. Unless all ten gave the same answer, answers are first made alike:
punctuation, articles, number words and missing apostrophes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
           "seven": "7", "eight": "8", "nine": "9", "ten": "10"}  # fmt: skip
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_WITH_APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
"""From the list of the official evaluation (GT-Vision-Lab/VQA, BSD-2-Clause): words that often lack an apostrophe."""
CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word
    for word in _WITH_APOSTROPHES.split()
    for at, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}
"""What is written: what counts. The last is a slip of the official list, kept so that figures agree."""

_PERIOD = re.compile(r"\.(?!\d)")
_NUMBER_WITH_COMMA = re.compile(r"\d,\d")
_MOST_PERIODS = 32
"""The official script removes so many, no more."""


def normalised(answer: str) -> str:
    """An answer in the form in which VQAv2 compares answers."""
    text = answer
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if beside_space or _NUMBER_WITH_COMMA.search(answer) else " ")
    text = _PERIOD.sub("", text, count=_MOST_PERIODS)
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """0 to 1: how far an answer agrees with those of (usually ten) people."""
    given = _one_line(answer)
    others = [_one_line(each) for each in people]
    if len(set(others)) > 1:
        given, others = normalised(given), [normalised(each) for each in others]
    same = [each == given for each in others]
    return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(same)


def exact_match(answer: str, truth: str) -> float:
    """1 or 0: the same words; capitals and white space do not count. The rule of MSRVTT-QA and MSVD-QA."""
    return float(answer.lower().split() == truth.lower().split())


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
