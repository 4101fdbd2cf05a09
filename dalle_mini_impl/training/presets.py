"""``--preset auto``: a recipe chosen from the data, the hardware and the time, with a reason for each choice.

Sizes on CPUs follow runs of this project (docs/experiments.md, docs/log.md), those on GPUs the field's habits. A CPU is
short of operations, a GPU on a small set is short of data: what helps one can hurt the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator

from dalle_mini_impl.data.survey import Survey
from dalle_mini_impl.data.views import MOVES
from dalle_mini_impl.precision import computes_bf16
from dalle_mini_impl.training.budget import format_duration

SMALL, MEDIUM, LARGE = 500, 5_000, 50_000
"""Numbers of pictures that the presets are named after; a set belongs to the nearest, by ratio."""
ASSUMED_SEC = 7200.0
"""The time that a model's size is chosen for where no budget is given."""
ENCODED_PER_SEC, ENCODING_SHARE = 450.0, 0.05
"""Pictures of 64 pixels that a core with bf16 encodes in a second (one without: 184, docs/experiments.md), and how much
of the time may go into that."""
GPU_ENCODED_PER_SEC, GPU_FP32_SPEED = 40_000.0, 0.1
"""The same of a GPU with bf16, and of one without as a share of that. Nothing was measured: of 128 pixels, where these
are 10,000 and 1,000, an RTX 4090 has operations for 23,000 and a T4 for 1,100, and pictures have to be read, too."""
FP32_SPEED = 0.4
"""How fast a CPU without bf16 trains, as a share of what the same number of cores with it does (docs/log.md: 0.38)."""


@dataclass(frozen=True)
class Hardware:
    """What a run computes on.

    kind: "cpu" or "gpu". processes: over all machines. cores: of CPUs that compute, over all processes. has_bf16:
    whether it computes in bf16.
    """

    kind: str
    processes: int = 1
    cores: int = 1
    has_bf16: bool = True

    def __str__(self) -> str:
        """For people: 2 cores, 8 GPUs."""
        count, unit = (self.cores, "core") if self.kind == "cpu" else (self.processes, "GPU")
        return f"{count} {unit}{'s' * (count != 1)}"

    @property
    def core_speed(self) -> float:
        """Of a core, where one that computes in bf16 has 1."""
        return 1.0 if self.has_bf16 else FP32_SPEED


@dataclass
class Choice:
    """A recipe in the making: nested values as `Recipe.parse` takes them, and what to tell people."""

    values: dict[str, Any] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    def set(self, reason: str, **values: Any) -> None:
        """Notes values, given as section__key or train__stage__key, and, in one line, why; no reason, no line."""
        for path, value in values.items():
            *sections, key = path.split("__")
            node = self.values
            for section in sections:
                node = node.setdefault(section, {})
            node[key] = value
        if reason:
            self.reasons.append(reason)


def hardware_of(accelerator: Accelerator) -> Hardware:
    """What the launcher has given this run."""
    processes, has_bf16 = accelerator.num_processes, computes_bf16(accelerator.device)
    if accelerator.device.type in ("cuda", "xpu"):
        return Hardware("gpu", processes, has_bf16=has_bf16)
    return Hardware("cpu", processes, torch.get_num_threads() * processes, has_bf16)


def choose(data: Survey, hardware: Hardware, budget_sec: float | None = None, image_size: int | None = None) -> Choice:
    """A recipe for some data on some hardware in a wall-clock time (None: unlimited); a pure function.

    image_size: the side in pixels that was asked for, None: chosen, too.
    """
    size = min((SMALL, MEDIUM, LARGE), key=lambda size: max(data.num_pictures / size, size / max(1, data.num_pictures)))
    more = "" if data.is_counted else "at least "
    choice = Choice()
    name = f"auto-{size}-{str(hardware).replace(' ', '-')}".lower()
    choice.set(f"preset for {size:,} pictures on {hardware}: --data has {more}{data.num_pictures:,}", name=name)
    _picture(choice, data, hardware, image_size)
    _codes(choice, size, hardware)
    _regularization(choice, size, hardware)
    _views(choice, data, size, hardware, budget_sec)
    (_cpu_models if hardware.kind == "cpu" else _gpu_models)(choice, size, hardware, budget_sec)
    choice.set("CLIP reads captions word by word, too: it ranks far better by that", clip__caption_layers=2)
    _batches(choice, data, size, hardware)
    return choice


def _picture(choice: Choice, data: Survey, hardware: Hardware, image_size: int | None) -> None:
    """The side of the pictures, and how many pixels a token covers."""
    most = 64 if hardware.kind == "cpu" else 128
    if image_size is not None:
        side, why = image_size, "as data.image_size asks"
    elif data.made is not None:
        side = 80 if data.made == "emoji" else 64  # glyphs stand on cells of 8 pixels, ten in a row
        why = f"what {data.made} are drawn for"
    elif data.side_px is None:
        side, why = 64, "no picture could be measured"
    else:
        side = max([32, *(side for side in (64, 128) if side <= min(most, data.side_px * 1.1))])
        why = f"shorter sides are {data.side_px:.0f} px in the median, and {most} is the most on {hardware}"
    downsample = 4 if side < 64 else 8  # 64 tokens at least: fewer can't say much
    tokens = (side // downsample) ** 2
    choice.set(
        f"pictures of {side} × {side} pixels, {tokens} tokens each: {why}",
        data__image_size=side,
        vae__downsample=downsample,
    )


def _codes(choice: Choice, size: int, hardware: Hardware) -> None:
    """The VAE's codes and width."""
    codes = {SMALL: 256, MEDIUM: 512, LARGE: 1024}[size] if hardware.kind == "cpu" else 512 if size == SMALL else 1024
    # Codes used below a fifth of their share are moved: with fewer moves much of a small codebook lay idle.
    choice.set(f"{codes} codes: more would stay empty or cost more than they give", vae__codebook_size=codes)
    choice.set("", vae__dead_code_share=0.2)
    if hardware.kind == "gpu":
        choice.set("", vae__width=128, vae__latent_width=256)
    choice.set("", text__vocab_size={SMALL: 1024, MEDIUM: 2048, LARGE: 4096}[size])


def _regularization(choice: Choice, size: int, hardware: Hardware) -> None:
    """Against learning by heart: the fewer pictures and the more operations, the more of it."""
    is_short = size == SMALL or (size == MEDIUM and hardware.kind == "gpu")
    dropout = 0.1 if hardware.kind == "gpu" else 0.0  # on CPUs it makes steps twice as long
    corruption = 0.1 if is_short else 0.05 if size == MEDIUM or hardware.kind == "gpu" else 0.02
    choice.set(
        f"dropout {dropout:g}, {corruption:.0%} of the tokens that are read replaced by random ones: "
        + ("the set will be seen many times" if is_short else "the set is not seen too often"),
        dalle__dropout=dropout,
        dalle__token_corruption=corruption,
    )


def _views(choice: Choice, data: Survey, size: int, hardware: Hardware, budget_sec: float | None) -> None:
    """As many views of each picture as can be encoded in a small part of the time: they are worth pictures.

    Made pictures have none, since more of them can be made.
    """
    if data.made is not None:
        return
    views = ["plain"] if data.names_sides else ["plain", "flip"]
    diagonal = [view for view, (down, right) in MOVES.items() if down and right]
    room = _encodings(choice, hardware, budget_sec) / max(1, data.num_pictures)
    moves = next((moves for moves in (list(MOVES), diagonal) if len(views) + len(moves) <= room), [])
    if size == LARGE and not moves:
        return
    if data.names_sides:
        reason = "no mirrored pictures: captions say left or right, or speak of writing"
    else:
        reason = "mirrored pictures, too: no caption says left or right"
    choice.set(reason, data__views=[*views, *moves])
    if moves:
        choice.set(f"each picture moved a little in {len(moves)} directions, too: it is less learned by heart so")


def _encodings(choice: Choice, hardware: Hardware, budget_sec: float | None) -> float:
    """How many pictures the VAE can encode in ENCODING_SHARE of the time."""
    if hardware.kind == "gpu":
        per_sec = hardware.processes * GPU_ENCODED_PER_SEC * (1.0 if hardware.has_bf16 else GPU_FP32_SPEED)
    else:
        per_sec = hardware.cores * ENCODED_PER_SEC * hardware.core_speed
    side_px: int = choice.values["data"]["image_size"]
    return ENCODING_SHARE * (budget_sec or ASSUMED_SEC) * per_sec * (64 / side_px) ** 2


def _cpu_models(choice: Choice, size: int, hardware: Hardware, budget_sec: float | None) -> None:
    """A transformer that the time suffices for.

    The law of `bench.law`, fitted to runs on `shapes`, has a best size of 0.56, 1.4, 3.0 and 6.8 M parameters after 5,
    30, 120 and 480 minutes of one core (with bf16) that a transformer has for itself, which is 0.61 of the whole; these
    are the sizes at hand, each as long as it is the nearest by ratio.
    """
    core_sec = (budget_sec or ASSUMED_SEC) * hardware.cores * hardware.core_speed
    ladder = [
        (800, 96, 4, 3),
        (6_000, 128, 8, 2),
        (18_000, 192, 6, 3),
        (43_000, 256, 6, 4),
        (120_000, 256, 8, 4),
        (float("inf"), 384, 8, 6),
    ]
    dim, layers, heads = next((d, n, h) for limit, d, n, h in ladder if core_sec < limit)
    why = _suits(hardware, budget_sec)
    if size == SMALL and dim > 256:
        dim, layers, heads, why = 256, 8, 4, "more would learn so few pictures by heart"
    choice.set(
        f"a transformer of {layers} layers, {dim} wide: {why}", dalle__dim=dim, dalle__layers=layers, dalle__heads=heads
    )
    # Captions are learned sooner where each token knows what stands above the cell that it predicts, and where it is
    # asked for cells further on, too; and pictures where what is learned of a code is learned of codes like it.
    choice.set("", dalle__neighbours=["above"], dalle__look_ahead=["right", "below"], dalle__code_features=True)
    # CLIP: with a stem of 64 channels and Muon's rate at 0.01 it names 92 % of single shapes right after two minutes.
    choice.set("", clip__embed_dim=128, clip__width=128, clip__stem_width=64, clip__image_layers=2)
    choice.set("", clip__text_layers=2, train__clip__muon_learning_rate=0.01)
    for stage, share in (("vae", 0.25), ("clip", 0.14), ("dalle", 0.61)):
        choice.set("", **{f"train__{stage}__budget_share": share})


def _gpu_models(choice: Choice, size: int, hardware: Hardware, budget_sec: float | None) -> None:
    """A transformer as large as the data bear, and the time."""
    gpu_sec = (budget_sec or ASSUMED_SEC) * hardware.processes
    sizes = [(256, 8, 4), (512, 12, 8), (768, 16, 12)]
    by_data = {SMALL: 0, MEDIUM: 1, LARGE: 2}[size]
    by_time = 0 if gpu_sec < 600 else 1 if gpu_sec < 3600 else 2
    dim, layers, heads = sizes[min(by_data, by_time)]
    why = _suits(hardware, budget_sec) if by_time < by_data else f"larger ones would learn {size:,} pictures by heart"
    why = "the largest preset" if (dim, layers, heads) == sizes[-1] else why
    choice.set(
        f"a transformer of {layers} layers, {dim} wide, SwiGLU: {why}",
        dalle__dim=dim,
        dalle__layers=layers,
        dalle__heads=heads,
        dalle__ffn="swiglu",
        dalle__ffn_multiple=2.67,
    )
    if size != SMALL:
        choice.set("", clip__width=256, clip__image_layers=4, clip__text_layers=4)
    if dim >= 512:
        # AdamW's rate beside Muon falls with the square root of the width, as is usual; not measured at these widths.
        choice.set("", train__dalle__learning_rate=4e-3, train__dalle__warmup_steps=100)
    if budget_sec is None:  # about as many passes over the data as they bear
        steps = {SMALL: 2_000, MEDIUM: 6_000, LARGE: 20_000}[size]
        choice.set(f"{steps:,} steps of the transformer, as no --budget is given", train__dalle__steps=steps)


def _batches(choice: Choice, data: Survey, size: int, hardware: Hardware) -> None:
    """Pictures a step: more on GPUs, never more than a quarter of the set, and evenly over the processes."""
    wanted = {"vae": 32, "clip": 128, "dalle": 64}
    if hardware.kind == "gpu":
        scale = 2 if hardware.processes < 4 else 4
        wanted = {"vae": 64 * scale, "clip": 256 * scale, "dalle": 128 * scale}
    batches = {}
    for stage, batch in wanted.items():
        fair = min(batch, max(8, 1 << max(3, int(data.num_pictures / 4).bit_length() - 1)))
        batches[stage] = max(1, -(-fair // hardware.processes)) * hardware.processes
        choice.set("", **{f"train__{stage}__batch_size": batches[stage]})
    choice.set(f"batches of {batches['vae']} (VAE), {batches['clip']} (CLIP) and {batches['dalle']} (transformer)")


def _suits(hardware: Hardware, budget_sec: float | None) -> str:
    where = f"{hardware}{'' if hardware.has_bf16 else ' without bf16'}"
    if budget_sec is None:
        return f"suits {format_duration(ASSUMED_SEC)} on {where}, as no --budget is given"
    return f"suits {format_duration(budget_sec)} on {where}"
