"""The training loop: both passes and both losses over one encoding of the pictures, one backward.

AdamW with warm-up and cosine decay, bfloat16 autocast, gradient clipping, an exponential moving average of the weights
(which is what is kept), stochastic depth, and a smaller picture size in the first part. The state is saved every few
minutes and a run goes on from it exactly where it stopped.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from mammut.augment import AugmentOptions
from mammut.batches import Batch, Batcher
from mammut.checkpoint import save_checkpoint
from mammut.config import MammutConfig
from mammut.data import Corpus
from mammut.initial import structured_start
from mammut.losses import caption_cross_entropy, focal_contrastive, info_nce, same
from mammut.model import Mammut
from mammut.muon import Muon, block_matrices
from mammut.vision import resize_positions
from mammut.workers import Crew, run_together
from mammut_runtime.errors import InputError, MammutError
from mammut_runtime.preprocess import PreprocessRule
from mammut_runtime.tokenizer import Tokenizer

STATE_FILE = "training.pt"
LOG_FILE = "log.jsonl"


@dataclass(frozen=True)
class Stage:
    """A part of the run at one picture size."""

    until: float
    """Where it ends, as a share of the run, up to 1."""
    image_size: int
    """Pixels; position embeddings are resized to its grid."""


@dataclass(frozen=True)
class TrainOptions:
    """How to train. Exactly one of `steps` and `minutes` is set."""

    steps: int | None = None
    minutes: float | None = None
    """Wall-clock length of the whole run; the schedule follows the clock. Runs of a number of steps can be repeated
    exactly, runs of a length of time cannot."""
    batch_size: int = 64
    """Pictures a step, over all workers; each contrasts its own share."""
    workers: int = 1
    """Processes, one thread each if there are several (see workers.py)."""
    learning_rate: float = 1e-3
    """Peak, of AdamW."""
    muon_learning_rate: float | None = None
    """Peak, of Muon for the matrices of the blocks (see muon.py); None leaves them to AdamW."""
    weight_decay: float = 0.1
    """On matrices only."""
    warmup_steps: int = 100
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema_decay: float = 0.999
    """Of the averaged weights, which are those that are kept."""
    drop_path: float = 0.1
    """Probability that the last vision block leaves a picture's tokens as they are; less for earlier ones."""
    caption_weight: float = 1.0
    contrastive_weight: float = 1.0
    """The paper has both at 1."""
    gamma: float = 1.0
    """Of the focal loss, where the model's config says focal."""
    label_smoothing: float = 0.1
    """Of the caption loss."""
    question_share: float = 0.4
    """How often a picture that has questions is asked one instead of being captioned."""
    stages: tuple[Stage, ...] = ()
    """Ascending `until`, the last 1; empty: the model's own picture size throughout."""
    precision: Literal["bf16", "fp32"] = "bf16"
    initial: Literal["plain", "structured"] = "structured"
    """structured: see initial.py; helps small sets of pictures."""
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    seed: int = 0
    log_every: int = 50
    """Steps."""
    save_every_s: float = 120.0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise InputError("expected either a number of steps or a number of minutes to train, got both or neither")
        numbers = {"steps": self.steps, "minutes": self.minutes, "batch size": self.batch_size,
                   "learning rate": self.learning_rate, "workers": self.workers}  # fmt: skip
        for name, value in numbers.items():
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{name}: expected more than 0, got {value}")


class Objective(nn.Module):
    """The two losses of a batch. A module, so that a call can replace one parameter (positions, see Trainer)."""

    def __init__(self, model: Mammut, options: TrainOptions) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Contrastive and caption loss, two float32 scalars, unweighted."""
        tokens, embedding = self.model.encode_image(batch.pixels)
        return self._contrastive(embedding, batch), self._caption(tokens, batch)

    def _caption(self, tokens: Tensor, batch: Batch) -> Tensor:
        """Mean over all counted tokens of the batch."""
        total, count = tokens.new_zeros(()), 0
        for part in batch.sequences:
            logits = self.model.caption_logits(tokens[part.pictures], part.ids)
            loss = caption_cross_entropy(logits, part.targets, part.counted, self.options.label_smoothing)
            number = int(part.counted.sum())
            total, count = total + loss * number, count + number
        return total / max(1, count)

    def _contrastive(self, embedding: Tensor, batch: Batch) -> Tensor:
        if not batch.text_ids:
            return embedding.new_zeros(())
        texts = torch.cat([self.model.encode_text(ids) for ids in batch.text_ids])
        bias = self.model.logit_bias
        logits = self.model.logit_scale * (embedding[batch.matched].float() @ texts.float().T)
        logits = logits if bias is None else logits + bias
        positives = same(batch.picture_keys, batch.text_keys)
        if self.model.config.contrastive == "focal":
            return focal_contrastive(logits, positives, self.options.gamma)
        return info_nce(logits, positives)


class Trainer:
    """One run. `run` trains to the end; `model` is what is being trained, `average` its moving average."""

    def __init__(
        self,
        model: Mammut,
        tokenizer: Tokenizer,
        rule: PreprocessRule,
        corpora: Sequence[Corpus],
        ask_form: str,
        options: TrainOptions,
        crew: Crew | None = None,
    ) -> None:
        self.options, self.model, self.crew = options, model, crew
        self.rank = crew.rank if crew else 0
        self.generator = torch.Generator().manual_seed(options.seed + self.rank)
        self.batcher = Batcher(
            corpora, tokenizer, rule, model.config.text.context_length, augment=options.augment, ask_form=ask_form,
            question_share=options.question_share, generator=self.generator,
        )  # fmt: skip
        if options.initial == "structured":
            structured_start(model, options.seed)
        self.objective = Objective(model, options)
        matrices = {} if options.muon_learning_rate is None else block_matrices(model)
        self.muon = Muon(matrices) if matrices else None
        self.optimizer = _adamw(model, options, set(matrices))
        self.average = {name: value.detach().clone() for name, value in model.state_dict().items()}
        _stochastic_depth(model, options.drop_path, self.generator)
        self.step, self.elapsed_s = 0, 0.0
        self._started: float | None = None

    @property
    def progress(self) -> float:
        """0 to 1."""
        if self.options.steps is not None:
            return min(1.0, self.step / self.options.steps)
        assert self.options.minutes is not None
        return min(1.0, self.elapsed_s / (60 * self.options.minutes))

    @property
    def image_size(self) -> int:
        """Pixels, at this point of the run."""
        own = self.model.config.vision.image_size
        return next((stage.image_size for stage in self.options.stages if self.progress < stage.until), own)

    def run(self, folder: Path, report: Callable[[dict[str, Any]], None] = lambda row: None) -> None:
        """Train to the end; writes `training.pt` and `log.jsonl` into `folder`.

        report: gets each logged row: step, progress, image_size, loss_contrastive, loss_caption, pictures_per_s.

        Raises:
            MammutError: a loss is not finite; says at which step. The state saved before it stays.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.model.train()
        saved, since = self.elapsed_s, self.elapsed_s
        sums, steps = torch.zeros(2), 0
        while self.progress < 1.0:
            sums += self.train_step()
            steps += 1
            if self.rank == 0 and (self.step % self.options.log_every == 0 or self.progress >= 1.0):
                row = self._row(sums / steps, steps * self.options.batch_size / (self.elapsed_s - since))
                _append(folder / LOG_FILE, row)
                report(row)
                sums, steps, since = torch.zeros(2), 0, self.elapsed_s
            if self.elapsed_s - saved > self.options.save_every_s:
                self.save(folder)
                saved = self.elapsed_s
        self.save(folder)
        self.model.eval()

    def train_step(self) -> Tensor:
        """One batch; returns float32[2]: contrastive and caption loss, averaged over the workers."""
        options, size = self.options, self.image_size
        batch = self.batcher.draw(max(1, options.batch_size // options.workers), size)
        rate = schedule(self.step, options.warmup_steps, self.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate * rate
        with _fast_attention(), torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            contrastive, caption = functional_call(self.objective, self._positions(size), (batch,))
            loss = options.contrastive_weight * contrastive + options.caption_weight * caption
        self.model.zero_grad()
        with _fast_attention():
            loss.backward()
        losses = [contrastive.detach().float(), caption.detach().float()]
        measured = torch.stack([*losses, torch.tensor(self._clock())])
        if self.crew is not None:
            measured = self._average_gradients(self.crew, measured)
        if not bool(torch.isfinite(measured).all()):
            raise MammutError(
                f"step {self.step}: the loss is not finite (contrastive {measured[0]}, caption {measured[1]}); train "
                f"again with a lower learning rate than {options.learning_rate} or --precision fp32"
            )
        nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
        self.optimizer.step()
        if self.muon is not None and options.muon_learning_rate is not None:
            self.muon.step(options.muon_learning_rate * rate, self.crew, 2 * self.step + 1)
        self.step += 1
        if self.rank == 0:
            self._update_average()
        # The clock all workers go by is the same number for all, so that they change picture size and end together.
        self.elapsed_s = float(measured[2])
        return measured[:2]

    def _clock(self) -> float:
        """Seconds of training so far, those before a resume included."""
        if self._started is None:
            self._started = time.monotonic() - self.elapsed_s
        return time.monotonic() - self._started

    def _average_gradients(self, crew: Crew, measured: Tensor) -> Tensor:
        """Replace each worker's gradients by the mean over the workers; returns the mean of `measured`."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([*(p.grad.flatten() for p in parameters if p.grad is not None), measured])
        mean = crew.average(flat, 2 * self.step)
        start = 0
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.copy_(mean[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()
        return mean[start:].clone()

    def averaged(self) -> Mammut:
        """A copy of the model with the averaged weights, in eval mode."""
        with torch.device("meta"):
            copy = Mammut(self.model.config, pad_id=self.model.text.pad_id)
        copy.load_state_dict({name: value.clone() for name, value in self.average.items()}, assign=True)
        return copy.requires_grad_(False).eval()

    def save(self, folder: Path) -> None:
        """Write the whole state, atomically (the first worker does; all must call)."""
        generators = self.generator.get_state()[None]
        if self.crew is not None:
            self.crew.generators[self.rank] = generators[0]
            self.crew.meet()
            generators = self.crew.generators.clone()
        if self.rank != 0:
            return
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "muon": {} if self.muon is None else self.muon.buffers,
            "generators": generators,
            "step": self.step,
            "elapsed_s": self.elapsed_s,
        }
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            torch.save(state, file)
        Path(file.name).replace(folder / STATE_FILE)

    def resume(self, folder: Path) -> None:
        """Go on from a saved state. Raises InputError where there is none or it does not fit the model."""
        path = folder / STATE_FILE
        if not path.is_file():
            raise InputError(f"{path}: nothing to resume; start without --resume")
        try:
            state = torch.load(path, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(f"{path}: does not fit this run's model: {str(error).splitlines()[0]}") from error
        if self.muon is not None:
            self.muon.buffers = state["muon"]
        self.average = state["average"]
        if len(state["generators"]) != self.options.workers:
            raise InputError(f"{path}: was saved by {len(state['generators'])} workers; resume with as many")
        self.generator.set_state(state["generators"][self.rank].clone())  # of a view, PyTorch reads past the end
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]

    def _positions(self, size: int) -> dict[str, Tensor]:
        """The vision tower's positions for another picture size; nothing at the model's own."""
        vision = self.model.config.vision
        if size == vision.image_size:
            return {}
        resized = resize_positions(self.model.vision.positions, vision.class_token, size // vision.patch_size)
        return {"model.vision.positions": resized}

    @torch.no_grad()
    def _update_average(self) -> None:
        # Early weights are poor: the average begins short and reaches its length after some hundred steps.
        decay = min(self.options.ema_decay, (1 + self.step) / (10 + self.step))
        now = self.model.state_dict()
        torch._foreach_lerp_([self.average[name] for name in now], list(now.values()), 1 - decay)

    def _row(self, losses: Tensor, speed: float) -> dict[str, Any]:
        return {
            "step": self.step,
            "progress": round(self.progress, 4),
            "image_size": self.image_size,
            "loss_contrastive": round(float(losses[0]), 4),
            "loss_caption": round(float(losses[1]), 4),
            "pictures_per_s": round(speed, 1),
            "elapsed_s": round(self.elapsed_s, 1),
        }


def schedule(step: int, warmup_steps: int, progress: float) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to 1 %."""
    return min(1.0, (step + 1) / max(1, warmup_steps)) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class Job:
    """A whole training run, as it is handed to the worker processes."""

    config: MammutConfig
    tokenizer_json: bytes
    rule: PreprocessRule
    prompts: dict[str, str]
    corpora: tuple[Corpus, ...]
    options: TrainOptions
    folder: Path
    """Gets training.pt, log.jsonl and, at the end, checkpoint/."""
    resume: bool = False
    weights: dict[str, Tensor] | None = None
    """To start from, instead of random ones."""
    report: Callable[[dict[str, Any]], None] | None = None


def train(job: Job) -> Path:
    """Train and write the checkpoint; returns its folder. Errors as Trainer's."""
    if job.options.workers == 1:
        _work(job, None)
    else:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        # Gradients of every parameter and three measured numbers.
        length = sum(p.numel() for p in Mammut(job.config).parameters()) + 3
        run_together(_work, job, job.options.workers, length)
        torch.set_num_threads(threads)
    return job.folder / "checkpoint"


def _work(job: Job, crew: Crew | None) -> None:
    tokenizer = Tokenizer.from_bytes(job.tokenizer_json)
    torch.manual_seed(job.options.seed)  # all workers start from the same weights
    model = Mammut(job.config, pad_id=tokenizer.pad_id)
    if job.weights is not None:
        model.load_state_dict(job.weights)
    trainer = Trainer(model, tokenizer, job.rule, job.corpora, job.prompts["ask"], job.options, crew)
    if job.resume:
        trainer.resume(job.folder)
    trainer.run(job.folder, job.report or (lambda row: None))
    if trainer.rank == 0:
        write_checkpoint(trainer, job.tokenizer_json, job.rule, job.prompts, job.folder / "checkpoint")


def write_checkpoint(
    trainer: Trainer, tokenizer_json: bytes, rule: PreprocessRule, prompts: dict[str, str], folder: Path
) -> None:
    """The averaged weights as a checkpoint, float16: half the bytes, and no measurable difference."""
    save_checkpoint(folder, trainer.averaged(), tokenizer_json, rule, prompts, dtype=torch.float16)


def _adamw(model: Mammut, options: TrainOptions, others: set[str]) -> torch.optim.AdamW:
    """Of all parameters but `others`; weight decay on matrices only."""
    free = {"positions", "class_token", "token_embedding.weight"}
    own = {n: p for n, p in model.named_parameters() if n not in others}
    decayed = {n for n, p in own.items() if p.ndim > 1 and not any(n.endswith(f) for f in free)}
    groups = [
        {"params": [p for n, p in own.items() if n in decayed], "weight_decay": options.weight_decay},
        {"params": [p for n, p in own.items() if n not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98), fused=True)


def _stochastic_depth(model: Mammut, rate: float, generator: torch.Generator) -> None:
    """In training, blocks of the vision tower leave some pictures as they are, the later the block the more often."""
    blocks = list(model.vision.blocks)
    for index, block in enumerate(blocks):
        keep = 1 - rate * index / max(1, len(blocks) - 1)

        def drop(module: nn.Module, _: Any, out: Tensor, keep: float = keep) -> Tensor:
            if not module.training or keep == 1:
                return out
            kept = torch.rand(out.shape[0], 1, 1, generator=generator) < keep
            return out * (kept.to(out.dtype) / keep)

        for branch in (block.out, block.mlp):
            assert isinstance(branch, nn.Module)
            branch.register_forward_hook(drop)


@contextmanager
def _fast_attention() -> Iterator[None]:
    """The plain attention: for our short sequences on a CPU its backward is several times faster than the fused one."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
