"""Text about pictures: the `memory` and `decoder` graphs with the bundle's prompts and lengths, ids to words and back.

How tokens are chosen is generation.py's, how answers are weighed likelihood.py's business.

Legend: P pictures, H heads, N image tokens, d channels of a head.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mammut_runtime import generation, generation_openmammut
from mammut_runtime.cached_decoder import CachedDecoder, CacheShape
from mammut_runtime.caption_options import CaptionOptions
from mammut_runtime.errors import InputError
from mammut_runtime.generation import StopRule
from mammut_runtime.generation_openmammut import OpenMammutOptions
from mammut_runtime.graphs import Graphs
from mammut_runtime.likelihood import score_continuations
from mammut_runtime.manifest import Manifest
from mammut_runtime.probabilities import log_softmax, softmax
from mammut_runtime.results import Answer, Candidate, Caption
from mammut_runtime.tokenizer import Tokenizer

Floats = NDArray[np.float32]
Memory = dict[str, Floats]
"""cross_k.J and cross_v.J of one picture, float32[1, H, N, d]."""


class Captioner:
    """Writes captions and answers. Safe to use from several threads."""

    def __init__(self, graphs: Graphs, tokenizer: Tokenizer, manifest: Manifest) -> None:
        self._graphs, self._tokenizer, self._rule = graphs, tokenizer, manifest.text
        model = manifest.model
        self._shape = CacheShape(model.text_layers, model.heads, model.text_width // model.heads)

    def memories(self, tokens: Floats) -> list[Memory]:
        """What the decoder looks at: float32[P, N, Wv] to each picture's keys and values."""
        whole = self._graphs.run("memory", {"tokens": tokens})
        return [{name: array[i : i + 1] for name, array in whole.items()} for i in range(len(tokens))]

    def caption(self, memories: Sequence[Memory], options: CaptionOptions) -> list[Caption]:
        """One caption for each picture. Raises InputError for a prompt that is empty or fills the decoder."""
        prompt, stop, notices = self._plan(options)
        texts = generation.generate(self._decoder(memories), prompt, options, stop)
        return [
            Caption(
                self._tokenizer.decode(each.ids),
                each.ids,
                each.mean_log_probability,
                each.log_probability,
                each.finished,
                notices,
            )
            for each in texts
        ]

    def stream(self, memory: Memory, options: CaptionOptions) -> Iterator[str]:
        """The caption of one picture in pieces, as its tokens are chosen; joined they are its text. See `caption`."""
        prompt, stop, _ = self._plan(options)
        return self._pieces(generation.stream(self._decoder([memory]), prompt, options, stop))

    def _pieces(self, tokens: Iterator[int]) -> Iterator[str]:
        ids: list[int] = []
        shown = ""
        for token in tokens:
            ids.append(token)
            text = self._tokenizer.decode(ids)
            # a character may be spread over several tokens; until it is whole, decoding ends in U+FFFD
            if text.startswith(shown) and not text.endswith("\ufffd") and text != shown:
                yield text[len(shown) :]
                shown = text
        rest = self._tokenizer.decode(ids)
        if rest != shown:
            yield rest.removeprefix(shown)

    def token_probabilities(self, memory: Memory, ids: Sequence[int], options: CaptionOptions) -> tuple[float, ...]:
        """The probability of each token of a caption of this picture, given the prompt and the tokens before it."""
        fed, _, _ = self._plan(options)
        decoder = self._decoder([memory])
        found = []
        for each in ids:
            log_probabilities = log_softmax(decoder.feed(np.array([[fed]], np.int64)))
            found.append(math.exp(float(log_probabilities[0, 0, each])))
            fed = [each]
        return tuple(found)

    def answer(self, memory: Memory, question: str, options: CaptionOptions) -> Answer:
        """A free answer, in the bundle's own form of a question. options.prompt must be None (InputError)."""
        if options.prompt is not None:
            raise InputError("a question brings its own prompt; leave options.prompt out")
        (caption,) = self.caption([memory], dataclasses.replace(options, prompt=self._question_prompt(question)))
        return Answer(
            question,
            caption.text,
            caption.ids,
            caption.score,
            caption.log_probability,
            caption.finished,
            notices=caption.notices,
        )

    def choose(self, memory: Memory, question: str, candidates: Sequence[str], normalise: bool = False) -> Answer:
        """The likeliest of given answers. normalise: compare means per token instead of sums (see likelihood.py).

        Raises InputError for an empty or repeated candidate, and for one that does not fit with the question.
        """
        prompt = self._prompt_ids(self._question_prompt(question))
        ids = self._candidate_ids(candidates, self._rule.context_length - len(prompt))
        end = self._rule.end_id
        (scores,) = score_continuations(self._decoder([memory]), prompt, ids, end, normalise=normalise)
        lengths = [len(each) + 1 for each in ids]
        sums = scores * lengths if normalise else scores
        probabilities = softmax(scores)
        order = sorted(range(len(ids)), key=lambda i: -scores[i])
        chosen = order[0]
        return Answer(
            question,
            candidates[chosen],
            tuple(ids[chosen]),
            float(sums[chosen] / lengths[chosen]),
            float(sums[chosen]),
            finished=True,
            candidates=tuple(Candidate(candidates[i], float(sums[i]), float(probabilities[i])) for i in order),
        )

    def openmammut(
        self, memories: Sequence[Memory], options: OpenMammutOptions, text: NDArray[np.int64] | None = None
    ) -> NDArray[np.int64]:
        """Captions by the public openMaMMUT rules: int64[P, width], start and end included (generation_openmammut.py).

        Start, end and pad ids that the options leave open are the bundle's. text: int64[P, L] to start from.
        """
        whole = self._decoder(memories)

        def next_logits(ids: NDArray[np.int64]) -> Floats:
            if ids.shape[1] > self._rule.context_length:
                room = self._rule.context_length
                raise InputError(f"{ids.shape[1]} ids do not fit a decoder of {room}; lower seq_len")
            by_picture = ids.reshape(len(memories), -1, ids.shape[1])
            decoder = whole.fork()
            decoder.select(np.zeros(by_picture.shape[:2], np.int64))
            return decoder.feed(by_picture).reshape(len(ids), -1)

        options = options.with_ids(self._rule.start_id, self._rule.end_id, self._rule.pad_id)
        return generation_openmammut.generate(next_logits, len(memories), options, text, self._rule.pad_id)

    def caption_openmammut(self, memories: Sequence[Memory], options: OpenMammutOptions) -> list[Caption]:
        """`openmammut` as captions; their scores are the decoder's log-probabilities, as everywhere."""
        start, end, pad = options.with_ids(self._rule.start_id, self._rule.end_id, self._rule.pad_id).special
        captions = []
        for memory, row in zip(memories, self.openmammut(memories, options).tolist(), strict=True):
            ids = row[1 : row.index(end)] if end in row else [each for each in row[1:] if each != pad]
            log_probability = 0.0
            if ids:
                log_probability = float(score_continuations(self._decoder([memory]), [start], [ids], end)[0, 0])
            text = self._tokenizer.decode(ids)
            score = log_probability / (len(ids) + 1)
            captions.append(Caption(text, tuple(ids), score, log_probability, finished=end in row))
        return captions

    def _decoder(self, memories: Sequence[Memory]) -> CachedDecoder:
        cross = memories[0]
        if len(memories) > 1:
            cross = {name: np.concatenate([memory[name] for memory in memories]) for name in cross}
        return CachedDecoder(self._graphs.engine("decoder"), cross, self._shape)

    def _plan(self, options: CaptionOptions) -> tuple[list[int], StopRule, tuple[str, ...]]:
        """The prompt's ids, when to stop, and what that changed of the options."""
        if options.prompt is not None and not self._tokenizer.clean(options.prompt):
            raise InputError("the prompt is empty; give words, or leave it out to caption without one")
        form = self._rule.prompts.get("caption", "") if options.prompt is None else options.prompt
        prompt = self._prompt_ids(form)
        room = min(self._rule.context_length - len(prompt), self._rule.max_tokens)
        wanted = options.max_tokens or room
        notices: tuple[str, ...] = ()
        if wanted > room:
            limits = f"this bundle writes {self._rule.max_tokens} and holds {self._rule.context_length}"
            notices = (f"max_tokens {wanted} lowered to {room}: {limits}, the prompt takes {len(prompt)}",)
        return prompt, StopRule(self._rule.end_id, min(wanted, room)), notices

    def _prompt_ids(self, prompt: str) -> list[int]:
        ids = [self._rule.start_id, *self._tokenizer.encode(prompt)]
        excess = len(ids) + 1 - self._rule.context_length
        if excess > 0:
            raise InputError(
                f"the prompt has {len(ids)} tokens, the decoder holds {self._rule.context_length} with the text to "
                f"come; shorten the prompt by {excess} tokens or more"
            )
        return ids

    def _question_prompt(self, question: str) -> str:
        if not self._tokenizer.clean(question):
            raise InputError(f"the question is empty: {question!r}; ask something")
        return self._rule.prompts.get("ask", "{question}").replace("{question}", question)

    def _candidate_ids(self, candidates: Sequence[str], room: int) -> list[list[int]]:
        if isinstance(candidates, str) or not candidates:
            raise InputError(f"expected a list of one or more candidates, got {candidates!r}")
        if len(set(candidates)) != len(candidates):
            raise InputError("a candidate is given twice; each answer may stand in the list once")
        ids = [self._tokenizer.encode(each) for each in candidates]
        for text, each in zip(candidates, ids, strict=True):
            if not each:
                raise InputError(f"a candidate is empty: {text!r}; give words")
            if len(each) > room:
                raise InputError(f"the candidate {text[:40]!r} has {len(each)} tokens, with the question {room} fit")
        return ids
