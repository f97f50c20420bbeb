"""What a bundle does with held-out data, written down: embeddings, greedy captions, answers. drift.py compares two.

The reference is observed first and decides what is asked; a candidate is then given the same texts and questions, and
is led through the reference's captions token by token (teacher forcing), so that one early difference does not make
all later tokens count as different.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mammut_calibration.data import Damaged, Dataset, Question, Sample
from mammut_calibration.questions import DEFAULT_NAMES, DEFAULT_QUESTIONS, SHORT_QUESTION, names_to_find
from mammut_runtime.bundle import Bundle
from mammut_runtime.cached_decoder import CachedDecoder, CacheShape
from mammut_runtime.caption_options import CaptionOptions
from mammut_runtime.captioner import Memory
from mammut_runtime.detection.boxes import Detection
from mammut_runtime.engines import Engine, EngineOptions, open_engine
from mammut_runtime.errors import InputError
from mammut_runtime.model import Model, Seen

Floats = NDArray[np.float32]
Progress = Callable[[int, int, str], None]

MIN_HELD_OUT = 8
"""Fewest pictures to judge with."""
MAX_TEXTS = 256
"""Texts that pictures are matched with."""
FEW_TEXTS = 8
"""With fewer texts than this in the data, the reference's captions and everyday names are added."""
QUESTIONS_EACH = 3
"""Questions asked about a picture."""
MAX_CANDIDATES = 32
HESITANT = 0.7
"""Times the threshold: what one bundle finds just above it and the other just below was found by both."""


@dataclass(frozen=True)
class Behaviour:
    """What one bundle made of the data."""

    model: str
    bundle_hash: str
    data_hash: str
    graphs: tuple[str, ...]
    pictures: tuple[str, ...]
    """Names of the pictures, P of them; damaged ones are not among them."""
    damaged: tuple[str, ...]
    texts: tuple[str, ...]
    """T texts that the pictures are matched with."""
    questions: tuple[tuple[Question, ...], ...]
    """Asked about each picture."""
    max_tokens: int
    logit_scale: float
    """Factor on cosines, of the model."""
    embeddings: Floats
    """float32[P, E]."""
    text_embeddings: Floats
    """float32[T, E]; T is 0 in a bundle without the text graph."""
    captions: tuple[tuple[int, ...], ...]
    """Of each picture, greedy: ids, and the end id where the model ended it. Empty in a bundle without decoder."""
    caption_texts: tuple[str, ...]
    forced: tuple[tuple[int, ...], ...]
    """At each place of the REFERENCE's captions, the token this bundle thinks most probable."""
    answers: tuple[tuple[str, ...], ...]
    """To each of the picture's questions."""
    unasked: tuple[str, ...]
    """Questions that could not be asked, and why."""
    clip_embeddings: Floats
    """float32[P, E], of the clip that each picture is from or that was made of it; [0, E] without a video graph."""
    clip_captions: tuple[tuple[int, ...], ...] = ()
    """Of these clips, as `captions`."""
    clip_forced: tuple[tuple[int, ...], ...] = ()
    """As `forced`."""
    detections: tuple[tuple[Detection, ...], ...] = ()
    """What is found in each picture of names_to_find, down to HESITANT times the bundle's own threshold; empty in a
    bundle without a detector."""
    detection_threshold: float = 0.0
    """The bundle's own."""
    filmed: int = 0
    """Of the clips: parts of the data's own. The others were made of pictures, by a crop that moves."""


def observe(
    bundle: Bundle | Path,
    data: Dataset,
    *,
    reference: Behaviour | None = None,
    questions: Sequence[Question] = (),
    max_tokens: int = 24,
    options: EngineOptions | None = None,
    progress: Progress = lambda done, total, name: None,
) -> Behaviour:
    """Run a bundle over held-out data.

    reference: None observes the reference itself; for a candidate, what the reference gave on the same data, which
    also says what to ask (questions and max_tokens are then not looked at). questions: asked about every picture; none
    takes the data's own, or a few that fit any picture.

    Raises InputError for fewer than MIN_HELD_OUT usable pictures, or a reference on other data.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    if reference is not None:
        _check_reference(reference, opened, data)
    observer = _Observer(opened, data, reference, questions, reference.max_tokens if reference else max_tokens, options)
    try:
        for done, sample in enumerate(data.samples(clip_frames=opened.manifest.model.video_frames), 1):
            observer.take(sample)
            progress(done, len(data), sample.name)
        return observer.result()
    finally:
        observer.model.close()


class _Observer:
    """A bundle at work on the data, picture by picture."""

    def __init__(
        self,
        bundle: Bundle,
        data: Dataset,
        reference: Behaviour | None,
        questions: Sequence[Question],
        max_tokens: int,
        options: EngineOptions | None,
    ) -> None:
        self._bundle, self._data, self._reference, self._given = bundle, data, reference, tuple(questions)
        self._max_tokens, self._options = max_tokens, options
        self._engines: dict[str, Engine] = {}
        self.model = Model(bundle, open_graph=self._open)
        self._answers_in_data = () if questions or reference else tuple(_answers_in(data))
        self._samples: list[Sample] = []
        self._damaged: list[str] = []
        self._embeddings: list[Floats] = []
        self._captions: list[tuple[int, ...]] = []
        self._caption_texts: list[str] = []
        self._forced: list[tuple[int, ...]] = []
        self._questions: list[tuple[Question, ...]] = []
        self._answers: list[tuple[str, ...]] = []
        self._unasked: dict[str, str] = {}
        self._clip_embeddings: list[Floats] = []
        self._clip_captions: list[tuple[int, ...]] = []
        self._clip_forced: list[tuple[int, ...]] = []
        self._filmed = 0
        self._rule = bundle.manifest.detection
        self._detections: list[tuple[Detection, ...]] = []

    def _open(self, name: str) -> Engine:
        engine = open_engine(self._bundle.graph_path(name), self._bundle.manifest.target, self._options)
        self._engines[name] = engine
        return engine

    def take(self, sample: Sample | Damaged) -> None:
        """Look at one picture."""
        if isinstance(sample, Damaged):
            self._damaged.append(sample.name)
            return
        index = len(self._samples)
        seen = self.model.encode(sample.image)
        self._samples.append(_without_picture(sample))
        self._embeddings.append(seen.embedding)
        if self.model.watches:
            self._watch(sample, index)
        if self._rule is not None:
            names = names_to_find(self._bundle.manifest)
            self._detections.append(seen.detect(names, HESITANT * self._rule.threshold).detections)
        if "decoder" not in self._bundle.manifest.graphs:
            return
        text, ids = self._described(seen)
        self._captions.append(ids)
        self._caption_texts.append(text)
        self._forced.append(self._led(seen, self._reference.captions[index]) if self._reference else ids)
        asked = self._reference.questions[index] if self._reference else self._questions_for(sample, index)
        answered = self._answered(seen, asked)
        if not answered and not self._given:
            answered = self._answered(seen, (SHORT_QUESTION,))
        self._questions.append(tuple(question for question, _ in answered))
        self._answers.append(tuple(answer for _, answer in answered))

    def _watch(self, sample: Sample, index: int) -> None:
        """Look at the picture's clip."""
        clip = self.model.encode_frames(sample.clip(self.model.manifest.model.video_frames))
        self._filmed += bool(sample.filmed)
        self._clip_embeddings.append(clip.embedding)
        if "decoder" in self._bundle.manifest.graphs:
            ids = self._described(clip)[1]
            self._clip_captions.append(ids)
            self._clip_forced.append(self._led(clip, self._reference.clip_captions[index]) if self._reference else ids)

    def _described(self, seen: Seen) -> tuple[str, tuple[int, ...]]:
        """The greedy caption: its text and ids, the end among them where the model ended it."""
        caption = seen.caption(CaptionOptions(beams=1, max_tokens=self._max_tokens))
        return caption.text, caption.ids + ((self.model.manifest.text.end_id,) if caption.finished else ())

    def _led(self, seen: Seen, wanted: Sequence[int]) -> tuple[int, ...]:
        """The most probable token at each place of a caption, given the tokens before it."""
        memory: Memory | None = seen.memory
        assert memory is not None  # the caption has made it
        model, rule = self.model.manifest.model, self.model.manifest.text
        shape = CacheShape(model.text_layers, model.heads, model.text_width // model.heads)
        decoder = CachedDecoder(self._engines["decoder"], memory, shape)
        new = [rule.start_id, *self.model.tokenizer.encode(rule.prompts.get("caption", ""))]
        chosen = []
        for token in wanted:
            logits = decoder.feed(np.array([[new]], np.int64))
            chosen.append(int(logits[0, 0].argmax()))
            new = [token]
        return tuple(chosen)

    def _questions_for(self, sample: Sample, index: int) -> tuple[Question, ...]:
        """The given ones; else a few of the data's or of ours, others for each picture."""
        own = tuple(self._with_candidates(each) for each in sample.questions)
        source = self._given or own or DEFAULT_QUESTIONS
        count = len(source) if self._given else min(QUESTIONS_EACH, len(source))
        return tuple(source[(index + turn) % len(source)] for turn in range(count))

    def _with_candidates(self, question: Question) -> Question:
        """A question of the data, with all answers of the data to choose from where it has none of its own."""
        few = 2 <= len(self._answers_in_data) <= MAX_CANDIDATES
        known = question.answer is not None and question.answer in self._answers_in_data
        if question.candidates or not (few and known):
            return question
        return Question(question.text, question.answer, self._answers_in_data)

    def _answered(self, seen: Seen, asked: Sequence[Question]) -> list[tuple[Question, str]]:
        """The questions with their answers. One that is too long for the model, or has no words, is left out."""
        found = []
        for question in asked:
            try:
                if question.candidates:
                    answer = seen.ask(question.text, question.candidates)
                else:
                    answer = seen.ask(question.text, options=CaptionOptions(beams=1, max_tokens=self._max_tokens))
            except InputError as problem:
                self._unasked.setdefault(question.text, str(problem))
            else:
                found.append((question, answer.text))
        return found

    def result(self) -> Behaviour:
        """Everything written down. Raises InputError for too few pictures."""
        if len(self._samples) < MIN_HELD_OUT:
            raise InputError(
                f"{len(self._samples)} usable pictures of {len(self._data)} to judge with, expected at least "
                f"{MIN_HELD_OUT}: agreement on fewer says nothing; give more data, or hold out a larger share"
            )
        if self._given and not any(self._questions):
            raise InputError(
                f"none of the questions could be asked: {next(iter(self._unasked.values()), 'no decoder')}"
            )
        manifest = self._bundle.manifest
        texts: tuple[str, ...] = ()
        text_embeddings = np.zeros((0, manifest.model.embed_dim), np.float32)
        if "text" in manifest.graphs:
            texts = self._reference.texts if self._reference else tuple(self._texts())
            text_embeddings = self.model.embed_texts(texts)
        return Behaviour(
            model=manifest.model.name,
            bundle_hash=self._bundle.content_hash,
            data_hash=self._data.content_hash,
            graphs=tuple(manifest.graphs),
            pictures=tuple(sample.name for sample in self._samples),
            damaged=tuple(self._damaged),
            texts=texts,
            questions=tuple(self._questions),
            max_tokens=self._max_tokens,
            logit_scale=manifest.model.logit_scale,
            embeddings=np.stack(self._embeddings),
            text_embeddings=text_embeddings,
            captions=tuple(self._captions),
            caption_texts=tuple(self._caption_texts),
            forced=tuple(self._forced),
            answers=tuple(self._answers),
            unasked=tuple(f"{text!r}: {problem}" for text, problem in self._unasked.items()),
            clip_embeddings=np.array(self._clip_embeddings, np.float32).reshape(-1, manifest.model.embed_dim),
            clip_captions=tuple(self._clip_captions),
            clip_forced=tuple(self._clip_forced),
            detections=tuple(self._detections),
            detection_threshold=self._rule.threshold if self._rule is not None else 0.0,
            filmed=self._filmed,
        )

    def _texts(self) -> list[str]:
        """Texts of the data: one caption of each picture, and class names in the model's prompt form."""
        template = self.model.templates[0]
        labels = [template.replace("{}", each.label) for each in self._samples if each.label]
        texts = [*labels, *(each.captions[0] for each in self._samples if each.captions)]
        distinct = list(dict.fromkeys(text for text in texts if self.model.tokenizer.clean(text)))
        if len(distinct) < FEW_TEXTS:
            own = [text for text in self._caption_texts if self.model.tokenizer.clean(text)]
            names = [template.replace("{}", name) for name in DEFAULT_NAMES]
            distinct = list(dict.fromkeys([*distinct, *own, *names]))
        return distinct[:MAX_TEXTS]


def _check_reference(reference: Behaviour, bundle: Bundle, data: Dataset) -> None:
    if reference.data_hash != data.content_hash:
        raise InputError("the reference was observed on other data; observe both bundles on the same held-out data")
    missing = [name for name in reference.graphs if name not in bundle.manifest.graphs]
    if missing:
        raise InputError(
            f"{bundle.path}: has no {missing[0]!r} graph, the reference has; export both with the same tasks"
        )


def _answers_in(data: Dataset) -> Iterator[str]:
    """Different answers in the data's notes, one more than MAX_CANDIDATES at most."""
    found: dict[str, None] = {}
    for item in data.items:
        try:
            questions = item.notes().questions
        except InputError:
            continue  # the picture will be reported as damaged
        found.update(dict.fromkeys(each.answer for each in questions if each.answer is not None))
        if len(found) > MAX_CANDIDATES:
            break
    yield from found


def _without_picture(sample: Sample) -> Sample:
    return Sample(sample.name, np.zeros((1, 1, 3), np.uint8), sample.captions, sample.label, sample.questions)
