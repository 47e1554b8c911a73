"""A training step of each method at its paper's size, and GroupViT's against transformers' in the same run.

    python -m benchmarks training                                              CPU: GroupViT and its peer, 16 images
    python -m benchmarks.bench_training --device cuda --batch 256 --compile blocks --methods groupvit zeroseg sseg
    python -m benchmarks.bench_training --host --batch 2 --rounds 20 --compile blocks whole

Fresh weights and random pixels on the device. Captions are as long as CC3M's, and lie as each method's loader lays them
out: side by side in rows, OVSegmentor's padded to the longest of a batch. transformers' are padded to CLIP's 77 tokens,
and in an entry of its own to the longest of the batch (the same captions). Steps are those of `pipeline.training`
(forward, backward, clipping, AdamW). Times are medians over rounds that go through all contestants in turn, so that a
busy machine slows all of them. MFU: the step's matrix products (counted by torch, attention included) at the rate of a
large square product.

`--host`: GroupViT and its peer as deep as ever but a few channels wide, our rows no longer than the longest caption,
on one thread of the CPU: what is left of a step is what its operations, as many as ever, cost the host. On a GPU no
step is shorter.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench_encoders import save_towers
from benchmarks.paper import PAPER, paper_config
from benchmarks.peak import device_name, multiplies_bfloat16, product_rate, wait_for
from pipeline import methods
from pipeline.datasets.entity_batches import EntityBatch
from pipeline.datasets.region_batches import RegionBatch
from pipeline.datasets.text_rows import in_rows
from pipeline.interfaces import TrainBatch
from pipeline.methods import scg
from pipeline.methods.scg.model import IMAGE_SIDE
from pipeline.training.compiling import compile_blocks, compile_whole
from pipeline.training.optimiser import adamw, parameter_groups

CONTEXT = 77
# Of the logarithm of a caption's tokens, start and end among them: mean and deviation over 8,000 of CC3M's validation
# set (12.6 tokens in the mean, one in a hundred has 30); noun prompts of the ImageNet templates have 9.
CAPTION, PROMPT = (2.47, 0.35), 9
REGIONS = 16  # pseudo-masks of an image
NOUNS = 2  # of a caption, for SCG
CELL = 8  # pixels of a pseudo-mask's cell: DINO's patch
# As deep as the paper's GroupViT, and next to nothing to compute.
NARROW = ["grouping.dim=12", "text.width=8", "projector_hidden=16", "embed_dim=16"]
NARROW += ["patches.image_size=32", "augmentation.image_size=32"]
TO_REACH = {"cpu": 1.5, "cuda": 2.0}  # images/s of GroupViT over transformers'


@dataclass
class Contestant:
    """One setting of one model.

    Attributes:
        loss: the batch's loss, forward only.
        frozen: bytes of weights that are read and not learned.
        seconds: of forward, backward and update, a list each.
    """

    model: nn.Module
    loss: Callable[[], Tensor]
    precision: torch.dtype
    frozen: int = 0
    flops: float = 0.0
    memory: int = 0
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"forward": [], "backward": [], "update": []})

    @property
    def step(self) -> float:
        """Median seconds."""
        return sum(statistics.median(values) for values in self.seconds.values())


def token_ids(texts: int, end: int, generator: torch.Generator, tokens: int = 0) -> Int64[Tensor, "texts 77"]:
    """Random texts of as many tokens, or where that is 0 of as many as captions have; the end token is their last."""
    lengths = torch.full((texts,), tokens)
    if not tokens:
        mean, deviation = CAPTION
        drawn = torch.randn(texts, generator=generator) * deviation + mean
        lengths = drawn.exp().round().long().clamp(3, CONTEXT)
    found = torch.randint(1, 40_000, (texts, CONTEXT), generator=generator)
    found[torch.arange(CONTEXT) >= lengths[:, None]] = 0
    found[torch.arange(texts), lengths - 1] = end
    return found


def to_longest(ids: Int64[Tensor, "texts 77"]) -> Int64[Tensor, "texts length"]:
    """Without the columns that are padding in all of them."""
    return ids[:, : int((ids != 0).sum(1).max())]


def batch_for(name: str, model: Any, config: Any, images: int, tokens: int = 0) -> Any:
    """Random inputs of the sizes that the method's loader would give.

    Args:
        tokens: of every text, none beside another, for the most that a batch can take; 0 for captions and prompts.
    """
    generator, side = torch.Generator().manual_seed(0), image_side(config)
    pixels = torch.randn(images, 3, side, side, generator=generator)
    uids = [str(i) for i in range(images)]

    def ids(tokens: int = tokens) -> Tensor:
        return token_ids(images, model.tokenizer.eot, generator, tokens)

    if name == "ovsegmentor":
        texts = {name: to_longest(ids()) for name in ("token_ids", "masked_ids", "answer_ids")}
        return EntityBatch(pixels=pixels, uids=uids, **texts)
    if name == "scg":
        cells = side // CELL
        groups = torch.randint(model.clusters, (images, cells, cells), generator=generator)
        owner = torch.arange(images).repeat_interleave(NOUNS)
        nouns = [f"noun{number}" for number in range(NOUNS)] * images
        return RegionBatch(pixels=pixels, groups=groups, nouns=nouns, owner=owner, uids=uids)
    batch = TrainBatch(
        pixels=pixels, captions=[""] * images, token_ids=torch.zeros(images, 1).long(), regions=None, uids=uids
    )
    if name == "zeroseg":
        views = sum(n * n for n in config.scales)
        batch.views = nn.functional.normalize(torch.randn(images, views, config.embed_dim, generator=generator), dim=-1)
        return batch
    batch.token_ids = to_longest(ids()) if tokens else ids()
    if name == "groupvit" and config.loss.num_prompts:
        prompts = torch.stack([ids(tokens or PROMPT) for _ in range(config.loss.num_prompts)])
        batch.prompt_ids = prompts[..., :tokens] if tokens else prompts
    texts = batch.texts
    if config.text.takes_rows and not tokens and isinstance(texts, Tensor):
        batch.rows = in_rows(texts, model.tokenizer.eot)
    if name in ("sseg", "pseudo_mask_vit"):
        cells = side // CELL
        batch.regions = torch.randint(REGIONS, (images, cells, cells), generator=generator).to(torch.uint8)
    return batch


def image_side(config: Any) -> int:
    """Pixels of a side of the training images."""
    for block in ("patches", "encoder", "augmentation", "views"):
        if hasattr(config, block):
            return getattr(config, block).image_size
    raise ValueError("no block of the config has an image size")


def ours(
    name: str,
    options: argparse.Namespace,
    precision: torch.dtype,
    *,
    compiled: str = "none",
    settings: Sequence[str] = (),
    texts: Literal["rows", "short rows", "padded"] = "rows",
) -> Contestant:
    """A method of this package at its paper's size, with `settings` of params.yaml besides.

    Args:
        texts: side by side as the loader lays them out, in rows as short as the longest, or each alone, padded.
    """
    config = paper_config(name, *settings)
    model, frozen = fresh(name, config, options.device)
    batch = batch_for(name, model, config, options.batch).to(options.device)
    if texts == "short rows":
        batch.rows = in_rows(to_longest(batch.token_ids), model.tokenizer.eot)  # captions alone
    elif texts == "padded":
        batch.rows = None
    loss = model.loss
    if compiled == "blocks":
        compile_blocks(model)
    elif compiled == "whole":
        whole = compile_whole(lambda batch, _: model.loss(batch), options.batch)
        return Contestant(model, lambda: whole(batch, None)["total"], precision, frozen)
    elif compiled == "graphs":  # CUDA's, which take launching kernels off the host
        loss = torch.compile(model.loss, mode="reduce-overhead")
    return Contestant(model, lambda: loss(batch)["total"], precision, frozen)


def fresh(name: str, config: Any, device: str) -> tuple[Any, int]:
    """The method's model with fresh weights, in training mode; and the bytes of what it reads and does not learn."""
    torch.manual_seed(0)
    model = methods.get(name).build(config, None).to(device).train()
    return model, lend_towers(model) if name == "scg" else 0


def lend_towers(model: scg.SCG) -> int:
    """Lend fresh towers of the paper's sizes; returns the bytes of the image tower that a step runs."""
    with tempfile.TemporaryDirectory() as folder:
        save_towers(Path(folder), "scg")
        scg.attach(model, Path(folder))
    clip: Any = model.clip
    return sum(value.nbytes for name, value in clip.named_parameters() if name.startswith(IMAGE_SIDE))


def peer(options: argparse.Namespace, precision: torch.dtype, *, longest: bool) -> Contestant:
    """transformers' GroupViT, the released sizes, with its own contrastive loss; `longest`: how captions are padded."""
    from transformers import GroupViTConfig, GroupViTModel

    torch.manual_seed(0)
    sizes: Any = GroupViTConfig()
    if options.host:
        narrowed = {"hidden_size": 12, "intermediate_size": 48, "image_size": 32}
        sizes.vision_config.update(narrowed)
        sizes.text_config.update({"hidden_size": 8, "intermediate_size": 32})
        sizes.update({"projection_dim": 16, "projection_intermediate_dim": 16})
    model: Any = GroupViTModel(sizes).to(options.device).train()
    generator, side = torch.Generator().manual_seed(0), sizes.vision_config.image_size
    pixels = torch.randn(options.batch, 3, side, side, generator=generator)
    ids = token_ids(options.batch, model.config.text_config.eos_token_id, generator)
    inputs = {"pixel_values": pixels, "input_ids": to_longest(ids) if longest else ids}
    inputs["attention_mask"] = (inputs["input_ids"] > 0).long()
    inputs = {key: value.to(options.device) for key, value in inputs.items()}
    return Contestant(model, lambda: model(**inputs, return_loss=True).loss, precision)


def step(contestant: Contestant, optimiser: torch.optim.Optimizer, device: str) -> dict[str, float]:
    """Seconds of its parts, each waited for."""
    marks = [_now(device)]
    optimiser.zero_grad(set_to_none=True)
    kind = torch.device(device).type
    with torch.autocast(kind, torch.bfloat16, enabled=contestant.precision == torch.bfloat16):
        loss = contestant.loss()
    marks.append(_now(device))
    loss.backward()
    marks.append(_now(device))
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, 5.0)
    optimiser.step()
    marks.append(_now(device))
    return {name: marks[i + 1] - marks[i] for i, name in enumerate(("forward", "backward", "update"))}


def _now(device: str) -> float:
    wait_for(device)
    return time.perf_counter()


def measure(entries: dict[str, Contestant], options: argparse.Namespace) -> None:
    """Fill in times, memory and FLOPs. The first two steps of each warm up, and compile where it compiles."""
    optimisers = {}
    for name, entry in entries.items():
        groups = parameter_groups(entry.model, lr=1e-4, weight_decay=0.05, lr_multipliers={})
        optimisers[name] = adamw(groups, (0.9, 0.999))
        if "compiled" not in name:
            with FlopCounterMode(display=False) as counter:
                entry.loss().backward()
            entry.flops = counter.get_total_flops()
        for _ in range(2):
            step(entry, optimisers[name], options.device)
    for _ in range(options.rounds):
        for name, entry in entries.items():
            optimisers[name].zero_grad(set_to_none=True)
            others = _allocated(options.device) - _state_bytes(entry.model, optimisers[name])
            for part, seconds in step(entry, optimisers[name], options.device).items():
                entry.seconds[part].append(seconds)
            if options.device != "cpu":
                entry.memory = torch.cuda.max_memory_allocated() - others


def _allocated(device: str) -> int:
    """Bytes of the GPU's memory in use; from here on its peak is counted."""
    if device == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _state_bytes(model: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Of weights and moments."""
    moments = [value for state in optimiser.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in [*model.state_dict().values(), *moments])


def contestants(options: argparse.Namespace) -> dict[str, Contestant]:
    """transformers' GroupViT and ours with the same inputs (captions alone); then methods as their papers have them."""
    captions = ["train.groupvit.loss.num_prompts=0", "train.groupvit.loss.multi_label=0"]
    captions.append("train.groupvit.loss.share_scale=true")
    settings = [(torch.float32, "none"), *((torch.bfloat16, kind) for kind in ("none", *options.compile))]
    rows: Literal["rows", "short rows"] = "rows"
    if options.host:
        settings, rows = settings[1:], "short rows"
        captions += [f"train.groupvit.{size}" for size in NARROW]
    elif not multiplies_bfloat16(options.device):
        settings = settings[:1]
    found = {}
    for precision, compiled in settings:
        kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}[precision]
        if compiled == "none":
            if not options.host:
                found[f"transformers' GroupViT, {kind}, 77 tokens"] = peer(options, precision, longest=False)
            found[f"transformers' GroupViT, {kind}"] = peer(options, precision, longest=True)
        label = kind if compiled == "none" else f"{kind}, compiled {compiled}"
        for name in options.methods:
            if name == "groupvit":
                found[f"groupvit, captions, {label}"] = ours(
                    name, options, precision, compiled=compiled, settings=captions, texts=rows
                )
            if not options.host and (precision == torch.bfloat16 or len(settings) == 1):
                found[f"{name}, {label}"] = ours(name, options, precision, compiled=compiled)
                if name == "groupvit" and compiled == "none":
                    found[f"{name}, {label}, padded texts"] = ours(name, options, precision, texts="padded")
    return found


def report(entries: dict[str, Contestant], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the table and GroupViT's ratio to its peer; returns the rows."""
    rates = {entry.precision: product_rate(options.device, entry.precision) for entry in entries.values()}
    print(f"a step of {options.batch} images of 224 px; {device_name(options.device)}; torch {torch.__version__}")
    for precision, rate in rates.items():
        print(f"  a large product in {precision}: {rate / 1e12:.2f} TFLOP/s")
    print(f"  {'':44s} images/s  forward backward  update  memory   MFU  floor")
    rows = []
    for name, entry in entries.items():
        parts = {part: statistics.median(values) for part, values in entry.seconds.items()}
        flops = entry.flops or next(e.flops for n, e in entries.items() if e.flops and n == name.split(", compiled")[0])
        floor = flops / rates[entry.precision]
        row = {"name": name, "images_per_second": options.batch / entry.step, **parts, "memory": entry.memory}
        rows.append(row | {"tflop": flops / 1e12, "mfu": floor / entry.step, "floor": floor})
        times = " ".join(f"{1e3 * seconds:7.0f}" for seconds in parts.values())
        memory, rate = entry.memory / 2**30, options.batch / entry.step
        print(f"  {name:44s} {rate:8.1f} {times} ms {memory:5.1f} GiB {floor / entry.step:5.1%} {1e3 * floor:6.0f} ms")
    compare(entries, TO_REACH[torch.device(options.device).type])
    return rows


def report_host(entries: dict[str, Contestant], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print what a step costs the host, the best of each part's rounds, since others only add; returns the rows."""
    print(f"what a step costs the host; {device_name(options.device)}; torch {torch.__version__}")
    print(f"  {'ms':44s}    step  forward backward  update")
    rows = []
    for name, entry in entries.items():
        entry.seconds = {part: [min(values)] for part, values in entry.seconds.items()}
        parts = {part: best for part, [best] in entry.seconds.items()}
        times = " ".join(f"{1e3 * seconds:8.1f}" for seconds in (entry.step, *parts.values()))
        rows.append({"name": name, "step": entry.step, **parts})
        print(f"  {name:44s}{times}")
    compare(entries, TO_REACH["cuda"])
    return rows


def compare(entries: dict[str, Contestant], wanted: float) -> None:
    """Print GroupViT's ratios to its peer, and to itself with padded texts."""
    peers = {name: entry.step for name, entry in entries.items() if name.startswith("transformers")}
    mine = {name: entry.step for name, entry in entries.items() if name.startswith("groupvit, captions")}
    if mine and peers:
        best = min(mine, key=lambda name: mine[name])
        for name, seconds in peers.items():
            print(f"  {seconds / mine[best]:.2f} x as fast ({best}) as {name}; to reach: {wanted}")
    for name, entry in entries.items():
        if name.endswith(", padded texts"):
            rows = name.removesuffix(", padded texts")
            print(f"  {entry.step / entries[rows].step:.2f} x as fast ({rows}) as {name}")


def main() -> None:
    """Print the table; write it where `--out` says."""
    parser = argparse.ArgumentParser(description="training steps at the papers' sizes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", choices=sorted(PAPER), default=["groupvit"])
    parser.add_argument(
        "--compile", nargs="*", choices=["blocks", "whole", "graphs"], default=[], help="bf16 variants to add"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    parser.add_argument("--host", action="store_true", help="what GroupViT's step costs the host")
    options = parser.parse_args()
    if options.host and (options.device != "cpu" or options.methods != ["groupvit"]):
        parser.error("--host: GroupViT on a CPU")
    if options.host:
        torch.set_num_threads(1)
    entries = contestants(options)
    measure(entries, options)
    rows = report_host(entries, options) if options.host else report(entries, options)
    if options.out:
        options.out.write_text(json.dumps({"device": device_name(options.device), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
