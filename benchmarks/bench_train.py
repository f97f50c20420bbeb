"""What a training step costs: profile, pictures a second of each objective, memory of the contrastive loss, loading.

    python benchmarks/bench_train.py                                  # the demo preset, some minutes on a laptop
    python benchmarks/bench_train.py --preset paper-base --batch 8 --caption-tokens 20 --only step
    python benchmarks/bench_train.py --device cuda --preset paper-base --batch 256

The objectives are timed in turns within one process: both passes, contrastive only, caption only, and a plain
CLIP-style step of the same two towers, written here without any of the training code. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import child, peak_megabytes, print_surroundings, surroundings
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mammut.accumulate import backward_of_step
from mammut.contrast import global_contrastive
from mammut.memory_plan import EveryToken
from mammut.model import Mammut
from mammut.objective import ObjectiveOptions, PairBatch, TwoPass, weighed
from mammut.optimizers import OptimizerOptions, make_adamw, set_learning_rate
from mammut.parallel import ParallelOptions, Place, Prepared
from mammut.recipes import model_preset

OBJECTIVES = {
    "both passes": ObjectiveOptions(),
    "contrastive only": ObjectiveOptions(1.0, 0.0),
    "caption only": ObjectiveOptions(0.0, 1.0),
}


def main() -> None:
    options = parser().parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps({"peak_mb": memory_of(options.memory_of, options.batch)}))
        return
    about = surroundings()
    print_surroundings(about)
    result: dict[str, Any] = {"surroundings": about, "options": vars(options)}
    if options.no_clock:
        result["arithmetic_overhead"] = two_pass_arithmetic(options)
        print(f"{options.preset}: both passes over contrastive only by arithmetic, by tokens a text:")
        print("  " + ", ".join(f"{tokens}: {extra:+.1%}" for tokens, extra in result["arithmetic_overhead"].items()))
    elif options.only in ("all", "step"):
        result["step"] = step_speed(options)
        result["profile"] = profile(options)
    if options.only in ("all", "memory") and not options.no_clock:
        result["contrastive_memory"] = contrastive_memory(options)
    if options.only in ("all", "data") and not options.no_clock:
        result["data"] = data_speed(options)
    print(json.dumps(result))


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--preset", default="demo")
    out.add_argument("--batch", type=int, default=64)
    out.add_argument("--caption-tokens", type=int, default=16, help="length of every text")
    out.add_argument("--image-size", type=int, help="pixels; default: the preset's")
    out.add_argument("--no-clock", action="store_true", help="count the arithmetic of a step only")
    out.add_argument("--repeats", type=int, default=9)
    out.add_argument("--threads", type=int, default=4)
    out.add_argument("--device", default="cpu")
    out.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    out.add_argument("--recompute", action="store_true")
    out.add_argument("--compile", action="store_true")
    out.add_argument("--largest", type=int, default=16_384, help="batch of the contrastive memory measurement")
    out.add_argument("--only", default="all", choices=["all", "step", "memory", "data"])
    out.add_argument("--memory-of", choices=["ring", "dense"], help=argparse.SUPPRESS)
    return out


# --- one step -------------------------------------------------------------------------------------------------


def step_speed(options: argparse.Namespace) -> dict[str, Any]:
    """Pictures a second of each objective, medians of steps taken in turns."""
    steps = {name: two_pass_step(options, objective) for name, objective in OBJECTIVES.items()}
    steps["plain CLIP step"] = clip_step(options)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(options.repeats + 2):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            synchronise(options.device)
            if turn >= 2:
                taken[name].append(time.perf_counter() - started)
    median = {name: statistics.median(seconds) for name, seconds in taken.items()}
    print(f"\n{options.preset}, batch {options.batch}, {options.caption_tokens} tokens a text, {options.precision}")
    for name, seconds in median.items():
        spread = f"({1e3 * min(taken[name]):.1f}-{1e3 * max(taken[name]):.1f})"
        print(f"  {name:18} {options.batch / seconds:9.1f} pictures/s  {1e3 * seconds:8.1f} ms {spread}")
    overhead = median["both passes"] / median["contrastive only"] - 1
    against_clip = median["contrastive only"] / median["plain CLIP step"] - 1
    print(f"  both passes take {overhead:+.1%} over contrastive only, which takes {against_clip:+.1%} over plain CLIP")
    speed = {name: round(options.batch / seconds, 2) for name, seconds in median.items()}
    arithmetic = two_pass_arithmetic(options)
    print("  both passes over contrastive only, by arithmetic alone (multiplications of a step):")
    print("   " + ", ".join(f" {tokens} tokens {extra:+.1%}" for tokens, extra in arithmetic.items()))
    return {
        "pictures_per_s": speed,
        "two_pass_overhead": round(overhead, 4),
        "over_clip": round(against_clip, 4),
        "arithmetic_overhead": arithmetic,
    }


def two_pass_arithmetic(options: argparse.Namespace) -> dict[int, float]:
    """Extra floating-point operations of both passes over contrastive only, by tokens of a text. No clock is involved:
    counted on fake tensors, so it can be asked of models that no machine here could run."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    found = {}
    longest = model_preset(options.preset).text.context_length
    for tokens in (each for each in (8, 16, 32, 64) if each <= longest):
        own = argparse.Namespace(**{**vars(options), "caption_tokens": tokens, "batch": 2, "device": "cpu"})
        counts = []
        for objective in (OBJECTIVES["both passes"], OBJECTIVES["contrastive only"]):
            with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
                model, batch, _ = parts(own)
                passes = EveryToken(model, objective, None, recompute_logits=False)
                with sdpa_kernel(SDPBackend.MATH):
                    losses = weighed(passes(batch), batch.keys, 1, model.config.contrastive, objective)
                    losses.total.backward()
            counts.append(counter.get_total_flops())
        found[tokens] = round(counts[0] / counts[1] - 1, 4)
    return found


def two_pass_step(options: argparse.Namespace, objective: ObjectiveOptions) -> Callable[[], None]:
    """A whole step of the training loop's own parts: forward, losses, backward, AdamW."""
    model, batch, device = parts(options)
    parallel = ParallelOptions("ddp", options.precision, options.recompute, options.compile)
    passes = TwoPass(model, objective, parallel.autocast)
    for name in passes.unused_parameters():
        model.get_parameter(name).requires_grad_(False)
    prepared = Prepared(passes, parallel, Place(0, 1, device))
    optimizer = make_adamw(passes, model.config, OptimizerOptions())
    set_learning_rate(optimizer, 1e-4)

    def step() -> None:
        backward_of_step(prepared, [batch], objective, model.config.contrastive)
        optimizer.step()
        optimizer.zero_grad()

    return step


def clip_step(options: argparse.Namespace) -> Callable[[], None]:
    """CLIP's: two towers, one dense matrix of similarities, softmax both ways."""
    model, batch, device = parts(options)
    towers = [*model.vision.parameters(), *model.text.parameters(), *model.memory_projection.parameters()]
    optimizer = torch.optim.AdamW([*towers, model.log_logit_scale], lr=1e-4, fused=True)
    labels = torch.arange(len(batch.pixels), device=device)

    def attention() -> AbstractContextManager[None]:
        # The same kernel as the training loop's, for a fair comparison (see accumulate.py).
        return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()

    def step() -> None:
        with attention(), torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            _, images = model.encode_image(batch.pixels)
            logits = model.logit_scale * images @ model.encode_text(batch.text_ids).T
            loss = (F.cross_entropy(logits.float(), labels) + F.cross_entropy(logits.float().T, labels)) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def parts(options: argparse.Namespace) -> tuple[Mammut, PairBatch, torch.device]:
    torch.manual_seed(0)
    config, device = model_preset(options.preset), torch.device(options.device)
    length, size = options.caption_tokens, options.image_size or config.vision.image_size
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=size))
    ids = torch.randint(3, config.text.vocab_size, (options.batch, length))
    padded = ids if config.text.mask_pads else F.pad(ids, (0, config.text.context_length - length))
    batch = PairBatch(
        torch.randn(options.batch, 3, size, size), padded, torch.arange(options.batch), ids[:, :-1], ids[:, 1:],
        torch.ones(options.batch, length - 1, dtype=torch.bool),
    )  # fmt: skip
    with device:
        model = Mammut(config)
    return model, batch.to(device), device


def profile(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Where the time of one step with both passes goes: the operators that take most of it."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    step = two_pass_step(options, OBJECTIVES["both passes"])
    step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if options.device == "cuda" else [])]
    with profiler(activities=activities) as found:
        step()
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
    from mammut.loop import Run
    from mammut.recipes import pretrain
    from mammut.run_config import RunConfig, changed
    from mammut_runtime.strict import to_dict

    with tempfile.TemporaryDirectory() as folder:
        sources = write_shards(Path(folder))
        config = pretrain(model_preset(options.preset, 49_408), [sources], "clip")
        steps = options.repeats + 2
        changes = [f"stages.0.steps={steps}", f"batch_size={options.batch}", "save.log_every=2",
                   f'parallel.precision="{options.precision}"', "stages.0.learning_rate=1e-5"]  # fmt: skip
        config = RunConfig.from_dict(changed(to_dict(config), changes), "config")
        run = Run(config, Path(folder) / "out", Place(0, 1, torch.device(options.device)), print)
        batches = run._open(config.stages[0])
        next(batches)
        started = time.perf_counter()
        for _ in range(steps):
            next(batches)
        alone = steps * options.batch / (time.perf_counter() - started)
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
