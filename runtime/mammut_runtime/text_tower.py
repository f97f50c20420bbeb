"""Texts to embeddings: the `text` graph with the bundle's rules for length and padding, prompt templates, a cache.

Legend: N texts, C classes, E embedding.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mammut_runtime.errors import InputError
from mammut_runtime.graphs import Graphs
from mammut_runtime.manifest import TextRule
from mammut_runtime.tokenizer import Tokenizer

Floats = NDArray[np.float32]

BATCH = 8
"""Texts computed together. 64 prompts at S-32's size on one core took 1.9 s by 4 or 8, 2.4 s by 16, 2.1 s one by one;
64 at once took 290 MiB more than 16 at B-32's size."""
REMEMBERED = 1024
"""Embeddings of texts kept for the next call: a camera asks for the same classes 30 times a second."""


@dataclass(frozen=True, eq=False)
class Classifier:
    """Named classes as embeddings: made once, matched with many pictures."""

    names: tuple[str, ...]
    embeddings: Floats
    """float32[C, E], unit length."""
    notices: tuple[str, ...] = ()
    """What was cut from texts that are too long."""


class TextTower:
    """Embeds texts. Safe to use from several threads."""

    def __init__(self, graphs: Graphs, tokenizer: Tokenizer, rule: TextRule) -> None:
        self._graphs, self._tokenizer, self._rule = graphs, tokenizer, rule
        self._known: OrderedDict[str, Floats] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def length(self) -> int:
        """Longest text in tokens, start and end counted."""
        return self._rule.text_length or self._rule.context_length

    @property
    def templates(self) -> tuple[str, ...]:
        """The bundle's own zero-shot templates, each with one {}; ("{}",) where it has none."""
        return tuple(self._rule.prompts.get("zero_shot", "{}").split("\n"))

    def cut_tokens(self, text: str) -> int:
        """How many tokens of a text do not fit and are left out; 0 for most texts."""
        return self._tokenizer.count_cut(text, self.length)

    def notices(self, texts: Sequence[str]) -> tuple[str, ...]:
        """A line for every text that is cut."""
        cuts = ((text, self.cut_tokens(text)) for text in texts)
        return tuple(f"{cut} tokens cut from {_shown(text)}, {self.length} fit" for text, cut in cuts if cut)

    def embed(self, texts: Sequence[str]) -> Floats:
        """float32[N, E], unit length. Raises InputError for a text without words."""
        if isinstance(texts, str) or not texts:
            raise InputError(f"expected a list of one or more texts, got {texts!r}")
        with self._lock:
            found = {text: self._known[text] for text in texts if text in self._known}
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        for text in missing:
            if not self._tokenizer.clean(text):
                raise InputError(f"a text is empty: {text!r}; give words to compare pictures with")
        found.update(zip(missing, self._compute(missing), strict=True))
        with self._lock:
            for text in found:
                self._known[text] = found[text]
                self._known.move_to_end(text)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return np.stack([found[text] for text in texts])

    def classifier(self, names: Sequence[str], templates: Sequence[str] | None = None) -> Classifier:
        """Zero-shot classes: per name the mean of its prompts' unit vectors, again of unit length.

        templates: each holds {} once, for the name; None takes the bundle's own. Raises InputError.
        """
        templates = self.templates if templates is None else check_templates(templates)
        if isinstance(names, str) or not names:
            raise InputError(f"expected a list of one or more class names, got {names!r}")
        for name in names:
            if not self._tokenizer.clean(name):
                raise InputError(f"a class name is empty: {name!r}")
        prompts = [template.replace("{}", name) for name in names for template in templates]
        vectors = self.embed(prompts).reshape(len(names), len(templates), -1).mean(axis=1)
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return Classifier(tuple(names), unit.astype(np.float32), self.notices(prompts))

    def _compute(self, texts: list[str]) -> list[Floats]:
        """An embedding float32[E] for each, computed in batches of texts of about one length."""
        ids = self._tokenizer.tokenize(texts, self.length)
        lengths = [min(len(self._tokenizer.encode(text)) + 2, self.length) for text in texts]
        order = sorted(range(len(texts)), key=lambda i: lengths[i])
        rows: list[Floats] = [np.empty(0, np.float32)] * len(texts)
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            width = self.length if self._rule.text_length else lengths[chosen[-1]]
            embedding = self._graphs.run("text", {"ids": np.ascontiguousarray(ids[chosen, :width])})["embedding"]
            for i, row in zip(chosen, embedding, strict=True):
                rows[i] = row
        return rows


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """The templates, if there are any and each holds {} once. Raises InputError."""
    if isinstance(templates, str) or not templates:
        raise InputError(f"expected a list of one or more templates, got {templates!r}")
    for template in templates:
        if template.count("{}") != 1:
            raise InputError(f"a template must hold {{}} once, for the name, got {template!r}")
    return tuple(templates)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")
