"""A caption as the words that are compared: Penn Treebank tokens in lower case, without punctuation.

Published figures come from Stanford's PTBTokenizer (Java). These are its rules as far as captions need them: clitics
are words of their own ("it's": it 's; "isn't": is n't), words with hyphens, numbers with a comma, times and
abbreviations are one word, brackets become -lrb- and -rrb- (which the official list of punctuation, in capitals, lets
through). Rare forms may be split otherwise, so compare figures from one tokenizer only.
"""

from __future__ import annotations

import re

PUNCTUATION = frozenset(["'", "''", "`", "``", *'.?!,:;"“”…—–-', "--", "..."])
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_TWO_WORDS = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "gimme": "gim me",
              "lemme": "lem me"}  # fmt: skip
_CLITIC = re.compile(r"(?<=\w)('(?:s|re|ve|ll|m|d))\b|(?<=\w)(n't)\b")
_TOKEN = re.compile(
    r"n't\b|'(?:s|re|ve|ll|m|d)\b"  # clitics, which stand alone by now
    r"|(?:[^\W\d_]\.){2,}|\b(?:mr|mrs|ms|dr|st|jr|sr|vs)\."  # u.s., mr.
    r"|\d+(?:[.,:]\d+)+"  # 3,000 1.5 10:30
    r"|\w+(?:[-/&']\w+)*"  # close-up, o'clock
    r"|\.{2,}|-{2,}|'{2}|`{2}|[^\w\s]"
)


def caption_words(text: str) -> list[str]:
    """The words of a caption, in order."""
    plain = text.lower().replace("’", "'").replace("‘", "'")
    plain = _CLITIC.sub(lambda found: f" {found.group(0)}", plain)
    tokens = (_BRACKETS.get(token, token) for token in _TOKEN.findall(plain))
    words = " ".join(_TWO_WORDS.get(token, token) for token in tokens).split()
    return [word for word in words if word not in PUNCTUATION and not set(word) <= {".", "-"}]
