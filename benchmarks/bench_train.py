"""What a training step costs: the second pass, a profile, memory of the contrastive loss, attention kernels, loading.

    python benchmarks/bench_train.py                                  # everything, under eight minutes, one thread
    python benchmarks/bench_train.py --only step --cases demo@96x64+16 paper-base@224x4+12 --budget-s 120
    python benchmarks/bench_train.py --only step --device cuda --cases paper-base@224x256+64

A case is MODEL@PIXELSxBATCH+TOKENS. The objectives are timed in turns within one process: both passes, contrastive
only, caption only, and a plain CLIP-style step of the same two towers, written here without any of the training code.
Beside what the second pass costs (the median over turns of the ratio within a turn; on a CPU of processor time, which a
busy machine disturbs least) stands what it must cost by arithmetic. Each case ends when its time is spent. Prints one
JSON line last.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measuring import child, peak_megabytes, print_surroundings, surroundings
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mammut.model import Mammut
from mammut.training.accumulate import backward_of_step
from mammut.training.contrast import global_contrastive
from mammut.training.objective import ObjectiveOptions, PairBatch, TwoPass
from mammut.training.optimizers import OptimizerOptions, make_optimizers, set_learning_rate
from mammut.training.parallel import ParallelOptions, Place, Prepared, blocks_of
from mammut.training.recipes import model_preset

OBJECTIVES = {
    "both passes": ObjectiveOptions(),
    "contrastive only": ObjectiveOptions(1.0, 0.0),
    "caption only": ObjectiveOptions(0.0, 1.0),
}


CASES = ("demo@96x64+16", "demo@224x16+16", "openmammut-S-16@224x8+16", "paper-base@224x6+12")
"""The demo as it is trained; the demo with as many picture tokens as the paper has; public and published sizes."""


@dataclass(frozen=True)
class Case:
    """One model and the shape of its batch."""

    preset: str
    image_size: int
    batch: int
    tokens: int
    """Of every text."""

    @classmethod
    def read(cls, text: str) -> Case:
        found = re.fullmatch(r"([\w-]+)@(\d+)x(\d+)\+(\d+)", text)
        if found is None:
            raise SystemExit(f"{text!r}: expected MODEL@PIXELSxBATCH+TOKENS, such as {CASES[0]}")
        return cls(found[1], int(found[2]), int(found[3]), int(found[4]))


def main() -> None:
    options = parser().parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps({"peak_mb": memory_of(options.memory_of, options.batch)}))
        return
    about, began = surroundings(), time.monotonic()
    print_surroundings(about)
    result: dict[str, Any] = {"surroundings": about, "options": vars(options)}
    cases = [Case.read(text) for text in options.cases]
    if options.only in ("all", "step"):
        result["step"] = {text: step_speed(case, options) for text, case in zip(options.cases, cases, strict=True)}
        result["profile"] = profile(cases[0], options)
    if options.only in ("all", "arithmetic"):
        result["arithmetic"] = arithmetic_table()
    if options.only in ("all", "attention"):
        result["attention"] = attention_kernels()
    if options.only in ("all", "memory"):
        result["contrastive_memory"] = contrastive_memory(options)
    if options.only in ("all", "data"):
        result["data"] = data_speed(options)
    result["took_s"] = round(time.monotonic() - began, 1)
    print(f"\ntook {result['took_s']:.0f} s")
    print(json.dumps(result))


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--cases", nargs="+", default=list(CASES))
    out.add_argument("--budget-s", type=float, default=30, help="seconds for the steps of each case")
    out.add_argument("--threads", type=int, default=1)
    out.add_argument("--device", default="cpu")
    out.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    out.add_argument("--recompute", action="store_true")
    out.add_argument("--compile", action="store_true")
    out.add_argument("--largest", type=int, default=4096, help="batch of the contrastive memory measurement")
    out.add_argument("--only", default="all", choices=["all", "step", "arithmetic", "attention", "memory", "data"])
    out.add_argument("--memory-of", choices=["ring", "dense"], help=argparse.SUPPRESS)
    out.add_argument("--batch", type=int, default=0, help=argparse.SUPPRESS)
    return out


# --- one step -------------------------------------------------------------------------------------------------


def step_speed(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Pictures a second of each objective, medians of steps taken in turns."""
    steps = {name: two_pass_step(case, options, objective) for name, objective in OBJECTIVES.items()}
    steps["plain CLIP step"] = clip_step(case, options)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    worked: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for step in steps.values():
        step.passes()  # warm-up
        step.update()
    until = time.monotonic() + options.budget_s
    while len(taken["both passes"]) < 3 or (time.monotonic() < until and len(taken["both passes"]) < 25):
        for name, step in steps.items():
            passes, update = _measured(step.passes, options.device), _measured(step.update, options.device)
            taken[name].append(passes[0] + update[0])
            worked[name].append((passes[1], update[1]))
    median = {name: statistics.median(seconds) for name, seconds in taken.items()}
    print(f"\n{case.preset}, {case.image_size} px, batch {case.batch}, {case.tokens} tokens a text")
    print(f"  {options.precision}, threads: {options.threads}, turns: {len(taken['both passes'])} after 1")
    for name, seconds in median.items():
        spread = f"({1e3 * min(taken[name]):.1f}-{1e3 * max(taken[name]):.1f})"
        update_share = statistics.median(update / (passes + update) for passes, update in worked[name])
        print(f"  {name:18} {case.batch / seconds:9.1f} pictures/s  {1e3 * seconds:8.1f} ms {spread}, "
              f"of it the optimizer {update_share:.0%}")  # fmt: skip
    arithmetic = two_pass_arithmetic(case)
    shares = ", ".join(f"{name} {share:.1%}" for name, share in arithmetic["parts"].items())
    found = {
        "passes": _over([p for p, _ in worked["both passes"]], [p for p, _ in worked["contrastive only"]]),
        "step": _over([sum(w) for w in worked["both passes"]], [sum(w) for w in worked["contrastive only"]]),
        "over_clip": _over([sum(w) for w in worked["contrastive only"]], [sum(w) for w in worked["plain CLIP step"]]),
    }
    print(f"  both over contrastive only: forward and backward {found['passes']:+.1%} (by arithmetic "
          f"{arithmetic['overhead']:+.1%}), with the optimizer {found['step']:+.1%}")  # fmt: skip
    print(f"  contrastive only over plain CLIP: {found['over_clip']:+.1%}; arithmetic of both passes: {shares}")
    speed = {name: round(case.batch / seconds, 2) for name, seconds in median.items()}
    overheads = {name: round(value, 4) for name, value in found.items()}
    return {
        "pictures_per_s": speed,
        "turns": len(taken["both passes"]),
        "overhead": overheads,
        "arithmetic": arithmetic,
    }


def _measured(work: Callable[[], None], device: str) -> tuple[float, float]:
    """Seconds by the clock, and of this process's work (on a GPU the clock's)."""
    synchronise(device)
    clock, processor = time.perf_counter(), time.process_time()
    work()
    synchronise(device)
    took = time.perf_counter() - clock
    return took, time.process_time() - processor if device == "cpu" else took


def _over(longer: list[float], shorter: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(longer, shorter, strict=True)) - 1


def two_pass_arithmetic(case: Case) -> dict[str, Any]:
    """Multiplications of a step, counted on fake tensors: what both passes cost over contrastive only, and the share of
    each part. No clock is involved, so it can be asked of models that no machine here could run."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    small = dataclasses.replace(case, batch=2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, batch, _ = parts(small, torch.device("cpu"))
        for block in blocks_of(model):
            block.plain_attention = True  # the counter knows matrix products
        hidden = torch.zeros(batch.targets.numel(), model.config.text.width, requires_grad=True)
        picture = _operations(lambda: model.encode_image(batch.pixels)[1])
        first = _operations(lambda: model.encode_text(batch.text_ids))
        tokens = torch.zeros(2, model.config.vision.tokens, model.config.vision.width, requires_grad=True)
        second = _operations(lambda: model.text.caption(batch.ids, model.memory(tokens)))
        words = _operations(lambda: model.text.vocabulary_logits(hidden))
    named = {"picture": picture, "first text pass": first, "second": second, "vocabulary": words}
    total = sum(named.values())
    return {
        "overhead": round(total / (picture + first) - 1, 4),
        "parts": {name: round(count / total, 4) for name, count in named.items()},
    }


def _operations(forward: Callable[[], Tensor]) -> int:
    """Of forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        forward().sum().backward()
    return int(counter.get_total_flops())


def arithmetic_table() -> dict[str, dict[int, float]]:
    """What the second pass must cost, by length of the texts."""
    print("\nboth passes over contrastive only, by arithmetic, by tokens of a text")
    found: dict[str, dict[int, float]] = {}
    models = (("demo", 96), ("demo", 224), ("openmammut-S-16", 224), ("openmammut-L-14", 224), ("paper-base", 224),
              ("paper-huge", 224))  # fmt: skip
    for preset, size in models:
        longest = model_preset(preset).text.context_length
        lengths = [tokens for tokens in (8, 12, 16, 32, 64) if tokens <= longest]
        row = {tokens: two_pass_arithmetic(Case(preset, size, 2, tokens))["overhead"] for tokens in lengths}
        print(f"  {preset:16} {size} px " + ", ".join(f"{tokens}: {extra:+.1%}" for tokens, extra in row.items()))
        found[f"{preset}@{size}"] = row
    return found


class Step(NamedTuple):
    """A training step in two parts."""

    passes: Callable[[], None]
    """Forward, losses and backward."""
    update: Callable[[], None]
    """The optimizer: costs the same however many pictures there are."""


def two_pass_step(case: Case, options: argparse.Namespace, objective: ObjectiveOptions) -> Step:
    """A whole step of the training loop's own parts: forward, losses, backward, AdamW."""
    model, batch, device = parts(case, torch.device(options.device))
    parallel = ParallelOptions("ddp", options.precision, options.recompute, options.compile)
    passes = TwoPass(model, objective, parallel.autocast)
    for name in passes.unused_parameters():
        model.get_parameter(name).requires_grad_(False)
    prepared = Prepared(passes, parallel, Place(0, 1, device))
    optimizers = make_optimizers(passes, model.config, OptimizerOptions())
    set_learning_rate(optimizers, 1e-4)

    def passes_of_step() -> None:
        backward_of_step(prepared, [batch], objective, model.config.contrastive)

    def update() -> None:
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return Step(passes_of_step, update)


def clip_step(case: Case, options: argparse.Namespace) -> Step:
    """CLIP's: two towers, one dense matrix of similarities, softmax both ways."""
    model, batch, device = parts(case, torch.device(options.device))
    towers = [*model.vision.parameters(), *model.text.parameters(), *model.memory_projection.parameters()]
    optimizer = torch.optim.AdamW([*towers, model.log_logit_scale], lr=1e-4, fused=True)
    labels = torch.arange(len(batch.pixels), device=device)

    for block in blocks_of(model):  # the same kernel as the training loop's, for a fair comparison
        block.plain_attention = device.type == "cpu"

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            _, images = model.encode_image(batch.pixels)
            logits = model.logit_scale * images @ model.encode_text(batch.text_ids).T
            loss = (F.cross_entropy(logits.float(), labels) + F.cross_entropy(logits.float().T, labels)) / 2
        loss.backward()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Step(step, update)


def parts(case: Case, device: torch.device) -> tuple[Mammut, PairBatch, torch.device]:
    torch.manual_seed(0)
    config, length = model_preset(case.preset), case.tokens
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=case.image_size))
    ids = torch.randint(3, config.text.vocab_size, (case.batch, length))
    padded = ids if config.text.mask_pads else F.pad(ids, (0, config.text.context_length - length))
    batch = PairBatch(
        torch.randn(case.batch, 3, case.image_size, case.image_size), padded, torch.arange(case.batch), ids[:, :-1],
        ids[:, 1:], torch.ones(case.batch, length - 1, dtype=torch.bool),
    )  # fmt: skip
    with device:
        model = Mammut(config)
    return model, batch.to(device), device


def profile(case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Where the time of one step with both passes goes: the operators that take most of it."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    step = two_pass_step(case, options, OBJECTIVES["both passes"])
    step.passes()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if options.device == "cuda" else [])]
    with profiler(activities=activities) as found:
        step.passes()
        step.update()
        synchronise(options.device)
    cuda = options.device == "cuda"
    events = found.key_averages()
    times = {e.key: (e.self_device_time_total if cuda else e.self_cpu_time_total, e.count) for e in events}
    total = sum(time_us for time_us, _ in times.values())
    rows = sorted(times.items(), key=lambda item: -item[1][0])[:12]
    print(f"\nprofile of one step with both passes, {total / 1e3:.0f} ms")
    for name, (time_us, count) in rows:
        print(f"  {time_us / total:6.1%}  {time_us / 1e3:8.1f} ms  {count:5d} x  {name}")
    return [{"operator": name, "ms": round(us / 1e3, 2), "calls": count} for name, (us, count) in rows]


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# --- attention on a CPU ---------------------------------------------------------------------------------------


def attention_kernels() -> list[dict[str, Any]]:
    """Forward and backward of the formula against PyTorch's fused kernel on this CPU: what PLAIN_LENGTH rests on."""
    from mammut.transformer import PLAIN_LENGTH

    print(f"\nattention on the CPU, forward and backward; the formula is used up to {PLAIN_LENGTH} keys")
    rows = []
    for shape in (
        (64, 3, 16, 64),
        (64, 4, 36, 64),
        (4, 6, 77, 64),
        (16, 4, 196, 64),
        (8, 4, 256, 64),
        (2, 12, 784, 64),
    ):
        for dtype in (torch.bfloat16, torch.float32):
            taken: dict[str, list[float]] = {"formula": [], "fused": []}
            for _ in range(9):
                for name, seconds in taken.items():
                    seconds.append(_attention_s(shape, dtype, name == "formula"))
            formula, fused = (1e3 * statistics.median(seconds[2:]) for seconds in taken.values())
            kind = str(dtype).removeprefix("torch.")
            print(f"  {shape!s:18} {kind:9} formula {formula:8.2f} ms  fused {fused:8.2f} ms  {fused / formula:5.2f} x")
            rows.append({"shape": shape, "dtype": kind, "formula_ms": round(formula, 3), "fused_ms": round(fused, 3)})
    return rows


def _attention_s(shape: tuple[int, ...], dtype: torch.dtype, formula: bool) -> float:
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    gradient = torch.randn(shape, dtype=dtype)
    kernel = contextlib.nullcontext() if formula else sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    started = time.perf_counter()
    with kernel, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        if formula:
            out = torch.softmax((q * shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
    out.backward(gradient)
    return time.perf_counter() - started


# --- the contrastive loss's memory ----------------------------------------------------------------------------


def contrastive_memory(options: argparse.Namespace) -> dict[str, dict[int, float]]:
    """Most memory of a process that takes the loss and its gradient, over one that only holds the embeddings."""
    print("\nmemory of the contrastive loss with its gradient, 256 channels, above the embeddings themselves")
    found: dict[str, dict[int, float]] = {"ring": {}, "dense": {}}
    batch = 1024
    while batch <= options.largest:
        for kind in found:
            if kind == "dense" and batch > 8192:
                continue  # 1 GB a matrix from here on, several of them
            script = [__file__, "--memory-of", kind, "--batch", str(batch), "--threads", str(options.threads)]
            found[kind][batch] = child(script, options.threads)["peak_mb"]
        print(f"  batch {batch:6d}: " + ", ".join(f"{k} {v[batch]:8.1f} MB" for k, v in found.items() if batch in v))
        batch *= 2
    return found


def memory_of(kind: str, batch: int) -> float:
    """Megabytes that the loss and its backward add to the process's peak."""
    torch.manual_seed(0)
    warm = [F.normalize(torch.randn(16, 256), dim=-1).requires_grad_() for _ in range(2)]
    loss_of(kind, warm, torch.arange(16)).backward()
    given = [F.normalize(torch.randn(batch, 256), dim=-1).requires_grad_() for _ in range(2)]
    before = peak_megabytes()
    loss_of(kind, given, torch.arange(batch)).backward()
    return round(peak_megabytes() - before, 1)


def loss_of(kind: str, given: list[Tensor], keys: Tensor) -> Tensor:
    scale = torch.tensor(14.0)
    if kind == "ring":
        return global_contrastive(given[0], given[1], scale, None, keys, keys, kind="infonce")
    logits = scale * given[0] @ given[1].T
    return (F.cross_entropy(logits, keys) + F.cross_entropy(logits.T, keys)) / 2


# --- data -----------------------------------------------------------------------------------------------------


def data_speed(options: argparse.Namespace) -> dict[str, Any]:
    """Pictures a second of loading alone, of training, and the share of training that waited for data."""
    from mammut.training.loop import Run
    from mammut.training.recipes import pretrain
    from mammut.training.run_config import RunConfig, changed
    from mammut_runtime.strict import to_dict

    with tempfile.TemporaryDirectory() as folder:
        sources = write_shards(Path(folder))
        config = pretrain(model_preset("demo", 49_408), [sources], "clip")
        steps, batch = 12, 64
        changes = [f"stages.0.steps={steps}", f"batch_size={batch}", "save.log_every=2",
                   f'parallel.precision="{options.precision}"', "stages.0.learning_rate=1e-5"]  # fmt: skip
        config = RunConfig.from_dict(changed(to_dict(config), changes), "config")
        run = Run(config, Path(folder) / "out", Place(0, 1, torch.device(options.device)), print)
        batches = run._open(config.stages[0])
        next(batches)
        started = time.perf_counter()
        for _ in range(steps):
            next(batches)
        alone = steps * batch / (time.perf_counter() - started)
        del batches
        rows: list[dict[str, Any]] = []
        run.save = lambda: Path(folder)  # type: ignore[method-assign]
        run.run(type("Log", (), {"row": staticmethod(rows.append), "step": staticmethod(lambda done: None)})())
    training = statistics.median(row["pictures_per_s"] for row in rows[1:])
    waited = statistics.median(row["waited_for_data"] for row in rows[1:])
    workers = config.data.workers
    print(f"\ndata, {workers} loading processes, JPEG 320 x 240 to {config.stages[0].image_size} px")
    print(f"  loading alone {alone:9.1f} pictures/s; training {training:9.1f} pictures/s, waited {waited:.1%} for data")
    return {"loading_per_s": round(alone, 1), "training_per_s": training, "waited": waited, "workers": workers}


def write_shards(folder: Path) -> str:
    """Four shards of 256 noisy JPEGs with captions."""
    import io
    import tarfile

    import cv2

    rng = np.random.default_rng(0)
    for shard in range(4):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for index in range(256):
                small = rng.integers(0, 255, (30, 40, 3), np.uint8)
                picture = cv2.resize(small, (320, 240), interpolation=cv2.INTER_CUBIC)
                text = f"a picture of {index} things beside {shard} others on a table in the garden"
                for suffix, data in (("jpg", cv2.imencode(".jpg", picture)[1].tobytes()), ("txt", text.encode())):
                    member = tarfile.TarInfo(f"{shard}{index:05d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return str(folder / "{0..3}.tar")


if __name__ == "__main__":
    sys.exit(main())
