"""The recipe: every choice of a run as typed, strict models.

A recipe is written as TOML (``configs/*.toml``), overridden with ``--set section.key=value`` and stored whole in the
``config.json`` of a checkpoint, so that a checkpoint needs no flags. Unknown keys are refused with the nearest name.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Stage = Literal["clip", "vae", "dalle", "prior", "distill", "vqgan", "upscale"]
STAGES: tuple[Stage, ...] = ("clip", "vae", "dalle")
"""What every recipe trains unless told otherwise."""
OPTIONAL_STAGES: tuple[Stage, ...] = ("prior", "upscale")
"""Those with a model of their own that not every recipe has; `vqgan` and `distill` train those of `vae` and `dalle`
further."""
MODELS: tuple[Stage, ...] = (*STAGES, *OPTIONAL_STAGES)
"""What a checkpoint may hold."""
View = Literal["plain", "flip", "up", "down", "left", "right", "up_left", "up_right", "down_left", "down_right"]
Augmentation = Literal["colour", "translation", "cutout"]
AttentionPattern = Literal["full", "row", "column", "conv"]
AheadCell = Literal["right", "below"]
NeighbourCell = Literal["above", "above_left", "above_right", "two_left", "two_above"]

Fit = Literal["crop", "pad", "stretch"]
"""How a picture becomes a square."""
Share = Annotated[float, Field(ge=0.0, le=1.0)]
LEAST_PATCHES = 3
"""Side of a picture in the discriminator after its halvings, at least."""
MOST_CODES = 65_536
"""What two bytes a token can tell apart."""
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A strict, immutable part of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class DataConfig(Section):
    """How captioned pictures are read, cut to squares and split."""

    image_size: Annotated[int, Field(ge=8, le=1024)] = 64
    """Side of the square pictures in pixels."""
    fit: Fit = "crop"
    """How a picture that isn't square becomes one: centre crop, white borders, or stretching."""
    validation_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Share of pictures held out by content hash where the source states no validation split."""
    views: tuple[View, ...] = ("plain",)
    """Augmented views in the id cache; each has a learned id, and sampling always asks for "plain". flip: mirrored left
    to right. The others are moved by 3/64 of the side, so that other pixels share a token."""
    image_column: str | None = None
    """Column that holds the picture, where it can't be told from its name or type."""
    caption_column: str | None = None
    """Column that holds the caption or list of captions."""
    min_side_px: Positive = 16
    """Pictures with a shorter side are skipped as tiny."""
    max_megapixels: Annotated[float, Field(gt=0)] = 100.0
    """Pictures with more pixels are skipped as bombs, before they are decoded."""

    @model_validator(mode="after")
    def _plain_first(self) -> Self:
        if not self.views or self.views[0] != "plain" or len(set(self.views)) != len(self.views):
            raise ValueError(f'data.views is {list(self.views)}; it must start with "plain" and repeat nothing')
        return self


class TextConfig(Section):
    """The caption tokenizer and the length of the text part of the stream."""

    vocab_size: Annotated[int, Field(ge=300, le=65_536)] = 2048
    """Upper bound of SentencePiece pieces, 256 byte pieces included; small caption sets get fewer."""
    max_length: Annotated[int, Field(ge=4, le=1024)] = 64
    """Most text tokens a caption may take, begin and end included."""
    fit_length: bool = True
    """Shorten the text part of the stream to what 99.5 % of the captions need (an even number)."""
    slot_step: Positive | None = None
    """Captions take a multiple of this many slots of the stream, None: always all. It pays where captions differ a lot
    in length; short ones run faster in one group than sorted into several."""
    bpe_dropout: Share = 0.1
    """Probability of segmentation sampling while training; 0 always gives the best segmentation."""


class VAEConfig(Section):
    """The discrete VAE: pictures to grids of ids and back."""

    downsample: Literal[4, 8, 16, 32] = 8
    """Pixels a token covers in each direction (the f of VQGAN)."""
    patch: Literal[1, 2, 4, 8] = 4
    """Pixel-unshuffle factor of the stem and pixel-shuffle factor of the head."""
    width: Positive = 64
    """Channels right after the stem."""
    latent_width: Positive = 128
    """Channels at the grid's resolution."""
    encoder_blocks: Positive = 2
    """Residual blocks a level in the encoder."""
    decoder_blocks: Positive = 3
    """Residual blocks a level in the decoder."""
    quantizer: Literal["vq", "fsq", "gumbel"] = "vq"
    codebook_size: Annotated[int, Field(ge=2, le=MOST_CODES)] = 1024
    """Number of codes of vq and gumbel; fsq has the product of its levels."""
    code_dim: Positive = 8
    """Dimension of a code (vq)."""
    fsq_levels: tuple[Annotated[int, Field(ge=2)], ...] = (8, 5, 5, 5)
    """Levels of each fsq dimension."""
    quantize_after: Share = 0.05
    """Share of the run before vq quantizes at all, so that its codebook starts from encoder outputs worth having."""
    codebook_decay: Share = 0.99
    """EMA decay of the vq codebook."""
    dead_code_share: Share = 0.03
    """A vq code used less than this share of the uniform rate is restarted from encoder outputs."""
    commitment_weight: Annotated[float, Field(ge=0)] = 0.25
    balance_weight: Annotated[float, Field(ge=0)] = 0.02
    """Weight of vq's use-all-codes term: ln K minus the entropy of the batch's mean soft assignment."""
    kl_weight: Annotated[float, Field(ge=0)] = 6.6
    """Final weight of the gumbel relaxation's KL to the uniform prior, per picture, ramped over kl_warmup. It is
    weighed against the nats of logit_laplace; mixed, whose terms are smaller, loses its codes to so large a weight."""
    kl_warmup: Share = 0.2
    """Share of the run over which the KL weight rises from 0 along a cosine."""
    temperature_final: Annotated[float, Field(gt=0)] = 1 / 16
    """Gumbel temperature at the end of temperature_anneal; it starts at 1."""
    temperature_anneal: Share = 0.8
    """Share of the run over which the gumbel temperature falls."""
    reconstruction: Literal["mixed", "logit_laplace"] = "mixed"
    """mixed: L1 + L2 + SSIM + Laplacian pyramid; logit_laplace: DALL-E 1's likelihood."""
    l1_weight: Annotated[float, Field(ge=0)] = 1.0
    l2_weight: Annotated[float, Field(ge=0)] = 1.0
    ssim_weight: Annotated[float, Field(ge=0)] = 0.25
    laplacian_weight: Annotated[float, Field(ge=0)] = 0.5

    @property
    def num_codes(self) -> int:
        """Size of the image vocabulary."""
        if self.quantizer != "fsq":
            return self.codebook_size
        codes = 1
        for levels in self.fsq_levels:
            codes *= levels
        return codes

    @model_validator(mode="after")
    def _codes_fit(self) -> Self:
        if not 2 <= self.num_codes <= MOST_CODES:
            raise ValueError(
                f"vae.fsq_levels {list(self.fsq_levels)} make {self.num_codes} codes; 2 to {MOST_CODES:,} are possible"
            )
        return self

    @model_validator(mode="after")
    def _patch_fits(self) -> Self:
        if self.patch > self.downsample:
            raise ValueError(f"vae.patch is {self.patch}, more than vae.downsample {self.downsample}: lower it")
        return self


class VQGANConfig(Section):
    """Adversarial training of a trained VAE, so that what it paints looks real and not only close on average."""

    phase: Literal["decoder", "full"] = "decoder"
    """decoder: encoder and codes are frozen, so that ids, id cache and DALL·E stay valid; full: everything is trained,
    and DALL·E has to come after it."""
    loss: Literal["hinge", "nonsaturating"] = "hinge"
    weight: Annotated[float, Field(ge=0)] = 0.2
    """Weight of the adversarial loss, times the adaptive ratio of gradients."""
    max_adaptive_weight: Annotated[float, Field(gt=0)] = 100.0
    """Cap of that ratio."""
    alone_steps: Annotated[int, Field(ge=0)] = 100
    """First steps, in which the discriminator learns alone."""
    ramp_steps: Annotated[int, Field(ge=0)] = 400
    """Steps after those over which the adversarial weight rises from 0."""
    discriminator_width: Positive = 32
    """Channels of the discriminator's first layer."""
    discriminator_layers: Annotated[int, Field(ge=0, le=5)] = 2
    """How often it halves the sides: a logit sees 16 pixels each way with 1, 34 with 2, 70 with 3."""
    discriminator_learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    lecam_weight: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the LeCam penalty, which holds the discriminator of a small set back."""
    augment: tuple[Augmentation, ...] = ("colour", "translation", "cutout")
    """DiffAugment's changes of the pictures that the discriminator sees."""
    perceptual: Literal["clip", "lpips", "none"] = "clip"
    """clip: distance in the layers of the checkpoint's own CLIP; lpips: in those of VGG16, read from lpips_weights."""
    perceptual_weight: Annotated[float, Field(ge=0)] = 1.0
    lpips_weights: tuple[str, ...] = ()
    """Files (safetensors or PyTorch) with VGG16's convolutions and the linear heads of LPIPS."""

    @model_validator(mode="after")
    def _lpips_has_files(self) -> Self:
        if (self.perceptual == "lpips") != bool(self.lpips_weights):
            raise ValueError(
                f"vqgan.perceptual is {self.perceptual!r} and lpips_weights {list(self.lpips_weights)}: "
                f'"lpips" needs files of VGG16 and its heads, the others take none'
            )
        return self


class CLIPConfig(Section):
    """Two towers that share one space."""

    embed_dim: Positive = 256
    """Dimension of the shared space."""
    stem_width: Positive = 64
    """Channels of the image tower's convolutional stem."""
    width: Positive = 192
    """Width of both towers' transformers and of the captioner's."""
    heads: Positive = 4
    image_layers: Positive = 3
    text_layers: Positive = 3
    token_shift: bool = True
    """Each layer of the text tower and of the captioner mixes every token with the one before it."""
    loss: Literal["siglip", "infonce"] = "infonce"
    hard_negatives: Annotated[int, Field(ge=0, le=8)] = 0
    """Captions changed in a word or two that each training picture is compared with besides those of the batch."""
    caption_layers: Annotated[int, Field(ge=0)] = 0
    """Layers of a captioner on the image tower: it reads captions word by word, which ranks pictures beside the cosine
    and writes captions; 0: none."""
    caption_weight: Annotated[float, Field(ge=0)] = 2.0
    """Weight of the captioner's loss, nats a token, beside the contrastive one; CoCa's."""
    reconstructed_share: Share = 0.33
    """Share of training pictures passed through the VAE, once it is trained, so that decodes are judged fairly."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"clip.width {self.width} must be a multiple of clip.heads {self.heads}")
        return self


class DALLEConfig(Section):
    """The decoder-only transformer over the one stream."""

    dim: Positive = 256
    layers: Positive = 8
    heads: Positive = 4
    attention: Literal["full", "dalle1"] | tuple[AttentionPattern, ...] = "full"
    """What image tokens see of the picture so far: all of it, or less, by layer. dalle1 is the paper's order: row, in
    every fourth layer from the second on column, in the last one conv. A list names the pattern of each layer."""
    attention_kernel: Positive = 11
    """Side of conv's neighbourhood in cells, odd."""
    positions: Literal["rope", "learned"] = "rope"
    """rope: rotated queries and keys, and a row + column embedding of the cell to be predicted. learned: DALL-E 1's, a
    row + column embedding of each image token's own cell. Text slots have a learned embedding in both."""
    ffn: Literal["relu2", "swiglu", "gelu"] = "relu2"
    ffn_multiple: Annotated[float, Field(gt=0)] = 4.0
    """Hidden width of the feed-forward layer as a multiple of dim (2.67 matches a swiglu to 4 of relu2)."""
    token_shift: bool = True
    """Each layer mixes every token with the one before it; words learn of their neighbours at once."""
    neighbours: tuple[NeighbourCell, ...] = ()
    """Cells around the one that it predicts whose codes each token is told; the code to the left is its own."""
    look_ahead: tuple[AheadCell, ...] = ()
    """Cells besides the next one that each token also predicts in training: "right", the one after the next, "below",
    the one under the next. It has captions learned sooner; checkpoints and drawing stay as they are."""
    look_ahead_weight: Annotated[float, Field(ge=0)] = 0.3
    """Weight of each of them beside the next one's 1."""
    code_features: bool = False
    """In training, what is learned of a code is learned of codes like it, too: beside a row for each code, the tables
    of codes have a linear map of what the VAE's decoder is given for it. Checkpoints and drawing stay as they are."""
    soft_targets: Share = 0.0
    """Share of the image tokens' loss that is about targets spread over codes like the true one, where training begins;
    it falls to 0 at the middle of the run. What a cell shows is learned before which of several like codes it has."""
    dropout: Share = 0.0
    token_corruption: Share = 0.02
    """Share of image input ids replaced by random ones in training."""
    caption_dropout: Share = 0.1
    """Share of captions replaced by the null caption in training."""
    reading_share: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of the training pictures whose captions are read from the picture, instead of the picture being drawn:
    what a caption's likelihood, a second ranker beside CLIP, is learned from."""
    reading_after: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training that is over before captions are read: which word belongs to which thing is learned sooner
    where all pictures are drawn."""
    image_prefix: Annotated[int, Field(ge=0, le=64)] = 0
    """Tokens ahead of the caption that stand for CLIP's embedding of the picture (unCLIP's decoder); 0: none."""
    embedding_dropout: Share = 0.1
    """Share of picture embeddings dropped in training, where image_prefix asks for them."""
    text_loss_weight: Share = 0.125
    """Weight of the text loss; the image loss has the rest."""

    @model_validator(mode="before")
    @classmethod
    def _above_had_a_key_of_its_own(cls, values: Any) -> Any:
        """Recipes and checkpoints from before `neighbours` say above_embedding = true for neighbours = ["above"]."""
        if not isinstance(values, dict) or "above_embedding" not in values:
            return values
        rest = {key: value for key, value in values.items() if key != "above_embedding"}
        own = ["above"] if values["above_embedding"] else []
        given = rest.setdefault("neighbours", own)
        if given not in (own, tuple(own)):
            raise ValueError(
                f"dalle.above_embedding {values['above_embedding']} is the older name of dalle.neighbours {own}, but "
                f"neighbours is {given!r}: leave above_embedding out"
            )
        return rest

    @model_validator(mode="after")
    def _cells_once(self) -> Self:
        for key, cells in (("look_ahead", self.look_ahead), ("neighbours", self.neighbours)):
            if len(set(cells)) < len(cells):
                raise ValueError(f"dalle.{key} is {list(cells)}: name each cell once")
        return self

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.dim % self.heads or (self.dim // self.heads) % 4:
            raise ValueError(f"dalle.dim {self.dim} must be heads {self.heads} times a multiple of 4")
        return self

    @model_validator(mode="after")
    def _attention_fits(self) -> Self:
        patterns = self.layer_patterns
        if len(patterns) != self.layers:
            raise ValueError(f"dalle.attention names {len(patterns)} patterns for {self.layers} layers: give as many")
        if self.attention_kernel % 2 == 0:
            raise ValueError(f"dalle.attention_kernel is {self.attention_kernel}, but it must be odd, as 11 is")
        if self.reading_share and set(patterns) != {"full"}:
            raise ValueError(
                f"dalle.reading_share {self.reading_share} needs full attention, since the sparse patterns put the "
                'caption before the picture: set dalle.reading_share=0 or dalle.attention="full"'
            )
        if self.image_prefix and set(patterns) != {"full"}:
            raise ValueError(
                f"dalle.image_prefix {self.image_prefix} needs full attention, since the sparse patterns know of "
                'captions and cells only: set dalle.image_prefix=0 or dalle.attention="full"'
            )
        return self

    @property
    def layer_patterns(self) -> tuple[AttentionPattern, ...]:
        """The attention pattern of each layer (arXiv 2102.12092, appendix B.1)."""
        if isinstance(self.attention, tuple):
            return self.attention
        order: list[AttentionPattern] = ["full"] * self.layers
        if self.attention == "dalle1":
            order = ["column" if (i - 2) % 4 == 0 else "row" for i in range(1, self.layers + 1)]
            order[-1] = "conv"
        return tuple(order)


class PriorConfig(Section):
    """The prior of unCLIP, from captions to picture embeddings; trained where dalle.image_prefix is above 0."""

    num_dims: Positive | None = None
    """Principal components of an embedding that are kept; None: a third of clip.embed_dim."""
    num_buckets: Annotated[int, Field(ge=2, le=4096)] = 256
    """Values that a component is quantised to, equally frequent in training; DALL·E 2 had 1,024."""
    num_dot_buckets: Annotated[int, Field(ge=2, le=1024)] = 16
    """Values of the dot product of caption and picture."""
    dim: Positive = 192
    layers: Positive = 4
    heads: Positive = 3
    dropout: Share = 0.0
    caption_dropout: Share = 0.1
    """Share of captions replaced by the null caption in training, for sampling.prior_guidance."""

    def kept_dims(self, embed_dim: int) -> int:
        """Components that are kept of a space of so many dimensions."""
        return self.num_dims or max(1, embed_dim // 3)

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"prior.dim {self.dim} must be heads {self.heads} times an even number")
        return self


class UpscaleConfig(Section):
    """A net that draws the VAE's ids at twice the size; its loss is the VAE's mixed one."""

    factor: Literal[1, 2] = 1
    """2: train one, on pictures that are prepared once more at 2 × data.image_size; 1: none."""
    width: Positive = 48
    """Channels of its trunk."""
    blocks: Positive = 4
    """Residual blocks of its trunk."""


class StageConfig(Section):
    """How one stage is trained."""

    steps: Positive = 2000
    """Optimiser steps; --budget replaces them by what fits into the stage's share of the time."""
    budget_share: Annotated[float, Field(gt=0)] = 1.0
    """The stage's share of a --budget, relative to the other stages that run."""
    batch_size: Positive = 64
    """Pictures a step, over all processes and accumulation steps together."""
    micro_batch_size: Positive | None = None
    """Pictures a process computes at once; smaller than its part of the batch means gradient accumulation."""
    checkpoint_gradients: bool = False
    """Keep only what goes into each block and compute its inside again for the gradient: less memory, more time."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """muon trains the hidden matrices and kernels with Muon and everything else with AdamW."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    """Peak rate of AdamW."""
    muon_learning_rate: Annotated[float, Field(gt=0)] = 5e-3
    """Peak rate of Muon, whose steps are scaled to the size of AdamW's."""
    muon_smallest: Annotated[float, Field(ge=1e-6, le=0.5)] = 1.5e-3
    """Muon brings singular values from this share of a gradient's norm on near to 1, smaller ones less. The smaller,
    the more products it takes: 5 iterations for 1.5e-3, 4 for 3e-3, 3 for 1e-2."""
    muon_per_head: bool = False
    """Muon takes queries, keys and values of each attention head as matrices of their own, instead of all as one."""
    muon_beta2: Share = 0.0
    """Decay of the mean squares by which Muon moves all neurons of a matrix equally far (NorMuon); 0 leaves that be."""
    beta1: Share = 0.9
    beta2: Share = 0.95
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of matrices that AdamW trains, and of Muon's where muon_timescale is 0; a step takes it times the rate."""
    muon_timescale: Annotated[float, Field(ge=0)] = 0.0
    """Share of the run in which weight decay makes Muon's matrices e times smaller at the peak rate: their decay is
    1 / (timescale × peak rate × steps), whatever the rate and the run's length. 0, and where trained weights are
    trained further: they decay as AdamW's do."""
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    decay_share: Share = 0.5
    """Share of the run over which the learning rate falls linearly to final_lr_share."""
    final_lr_share: Share = 0.02
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.998
    """Decay of the averaged weights that are evaluated and kept; 0 keeps the raw weights."""
    evaluations: Positive = 5
    """Evaluations spread evenly over the run, the last at its end."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast where the hardware computes it natively."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile the transformer's blocks in dalle's training; auto: in stages long enough to gain from it."""


class FastBesideMuonConfig(StageConfig):
    """Stages in which what Muon leaves to AdamW is known to gain from a high rate."""

    learning_rate: Annotated[float, Field(gt=0)] = 8e-3
    """Peak rate of AdamW beside Muon. 2e-3 where it trains the matrices, too, and no other is given."""

    @model_validator(mode="before")
    @classmethod
    def _gentler_on_matrices(cls, values: Any) -> Any:
        """Matrices don't bear the rate that suits the rest."""
        if isinstance(values, dict) and values.get("optimizer") == "adamw":
            return {"learning_rate": StageConfig().learning_rate, **values}
        return values


class VAEStageConfig(FastBesideMuonConfig):
    """The VAE's defaults. Stages have classes of their own, so that setting one key leaves the others as they are."""

    steps: Positive = 4000
    budget_share: Annotated[float, Field(gt=0)] = 0.3
    batch_size: Positive = 32


class CLIPStageConfig(StageConfig):
    """CLIP's: large batches, each picture's caption being a negative to all others."""

    steps: Positive = 1500
    budget_share: Annotated[float, Field(gt=0)] = 0.14
    batch_size: Positive = 128


class DALLEStageConfig(FastBesideMuonConfig):
    """DALL·E's, the one whose matrices are known to gain from weight decay."""

    steps: Positive = 4000
    budget_share: Annotated[float, Field(gt=0)] = 0.56
    muon_smallest: Annotated[float, Field(ge=1e-6, le=0.5)] = 1e-2
    muon_per_head: bool = True
    muon_beta2: Share = 0.95
    muon_timescale: Annotated[float, Field(ge=0)] = 0.4


class PriorStageConfig(StageConfig):
    """The prior's: its streams are short."""

    steps: Positive = 3000
    budget_share: Annotated[float, Field(gt=0)] = 0.12
    batch_size: Positive = 128


class UpscaleStageConfig(StageConfig):
    """The upscaler's: its pictures are twice as large."""

    steps: Positive = 3000
    budget_share: Annotated[float, Field(gt=0)] = 0.2
    batch_size: Positive = 16


class AdversarialStageConfig(StageConfig):
    """How adversarial training is: small steps of AdamW with little momentum, so that the other side can follow."""

    steps: Positive = 3000
    budget_share: Annotated[float, Field(gt=0)] = 0.25
    batch_size: Positive = 32
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    beta1: Share = 0.5


class DistillStageConfig(StageConfig):
    """Distillation's: a short, gentle training, in which rates fall from the start."""

    steps: Positive = 300
    budget_share: Annotated[float, Field(gt=0)] = 0.06
    learning_rate: Annotated[float, Field(gt=0)] = 6e-4
    muon_learning_rate: Annotated[float, Field(gt=0)] = 1.5e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    decay_share: Share = 1.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.98
    evaluations: Positive = 2


class TrainConfig(Section):
    """The stages."""

    stages: tuple[Stage, ...] = ("vae", "clip", "dalle")
    """What is trained where no --stage is given; add "distill" for a DALL·E that needs no guidance,
    "vqgan" for adversarial training of the VAE."""
    clip: CLIPStageConfig = CLIPStageConfig()
    vae: VAEStageConfig = VAEStageConfig()
    dalle: DALLEStageConfig = DALLEStageConfig()
    prior: PriorStageConfig = PriorStageConfig()
    distill: DistillStageConfig = DistillStageConfig()
    vqgan: AdversarialStageConfig = AdversarialStageConfig()
    upscale: UpscaleStageConfig = UpscaleStageConfig()

    @model_validator(mode="after")
    def _stages_once(self) -> Self:
        if not self.stages or len(set(self.stages)) != len(self.stages):
            raise ValueError(f"train.stages is {list(self.stages)}; name at least one stage, and none twice")
        return self


class SamplingConfig(Section):
    """What the sampler does where the caller doesn't say."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    """0 always takes the likeliest token."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Keep the likeliest tokens whose probabilities add up to top_p."""
    min_p: Share = 0.0
    """Drop tokens less than min_p times as likely as the likeliest; 0 keeps all."""
    guidance: Annotated[float, Field(ge=0)] = 2.0
    """Classifier-free guidance scale; 1 means none."""
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """linear and cosine let the scale rise from 1 at the first token to guidance at the last."""
    guidance_power: Annotated[float, Field(gt=0)] = 1.0
    """cosine rises later in the grid where this is above 1."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of weights and cache while drawing; auto is bf16 where the device computes in it, else fp32."""
    kernel: Literal["auto", "compiled", "torch"] = "auto"
    """What computes: code compiled on this machine, which is several times as fast, or PyTorch's operations. auto:
    compiled where it can be (Linux, g++, AVX2, and a model that it is made for). Their last bits differ."""
    upscale: bool = False
    """Draw pictures at twice the size, with a checkpoint that has an upscaler."""
    unclip: bool = True
    """Draw by way of a picture embedding, where the checkpoint has a prior to draw one from the prompt."""
    prior_draws: Annotated[int, Field(ge=1, le=64)] = 2
    """Embeddings that the prior draws for each picture; the one nearest to the prompt is kept."""
    prior_dot: Share = 0.75
    """How well prompt and picture are to fit: the quantile of training's dot products that the prior is asked for."""
    prior_temperature: Annotated[float, Field(ge=0)] = 1.0
    prior_guidance: Annotated[float, Field(ge=0)] = 1.0
    """Classifier-free guidance of the prior; 1 means none."""


class Recipe(Section):
    """Everything a run needs besides its data."""

    name: str = "custom"
    seed: Annotated[int, Field(ge=0)] = 0
    data: DataConfig = DataConfig()
    text: TextConfig = TextConfig()
    vae: VAEConfig = VAEConfig()
    vqgan: VQGANConfig = VQGANConfig()
    clip: CLIPConfig = CLIPConfig()
    dalle: DALLEConfig = DALLEConfig()
    prior: PriorConfig = PriorConfig()
    upscale: UpscaleConfig = UpscaleConfig()
    train: TrainConfig = TrainConfig()
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _grid_fits(self) -> Self:
        if self.data.image_size % self.vae.downsample:
            raise ValueError(
                f"data.image_size {self.data.image_size} is not a multiple of vae.downsample {self.vae.downsample}"
            )
        layers = self.vqgan.discriminator_layers
        if "vqgan" in self.train.stages and self.data.image_size >> layers < LEAST_PATCHES:
            raise ValueError(
                f"vqgan.discriminator_layers {layers} are too many for data.image_size {self.data.image_size}: lower it"
            )
        if self.prior.kept_dims(self.clip.embed_dim) > self.clip.embed_dim:
            raise ValueError(f"prior.num_dims {self.prior.num_dims} exceeds clip.embed_dim {self.clip.embed_dim}")
        return self

    @property
    def grid_size(self) -> int:
        """Side of the token grid."""
        return self.data.image_size // self.vae.downsample

    @classmethod
    def parse(cls, values: Mapping[str, Any], overrides: Iterable[str] = (), where: str = "recipe") -> Self:
        """Builds a recipe from nested values and ``section.key=value`` overrides (values are TOML, else plain text).

        Raises ValueError that names each bad key with its nearest right one, and each bad value with its limit.
        """
        tree: dict[str, Any] = json.loads(json.dumps(values))
        for override in overrides:
            _apply_override(tree, override)
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ValueError("\n".join(_explain(cls, item, where) for item in error.errors())) from None

    @classmethod
    def from_toml(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """Reads a recipe from a TOML file; see `parse` for the errors."""
        path = Path(path)
        if not path.is_file():
            near = sorted(p.name for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
            raise ValueError(f"no recipe at {path}" + (f"; there are {', '.join(near)}" if near else ""))
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is not valid TOML: {error}") from None
        return cls.parse({"name": path.stem, **values}, overrides, where=str(path))

    def to_toml(self, comments: Iterable[str] = ()) -> str:
        """The whole recipe as `from_toml` reads it, with comment lines above."""
        lines = [f"# {comment}" for comment in comments]
        tables: list[tuple[str, dict[str, Any]]] = [("", self.model_dump(mode="json"))]
        while tables:
            path, table = tables.pop(0)
            plain = {key: value for key, value in table.items() if not isinstance(value, dict) and value is not None}
            if path and plain:
                lines += ["", f"[{path}]"]
            lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in plain.items()]
            inner = [(key, value) for key, value in table.items() if isinstance(value, dict)]
            tables[:0] = [(f"{path}.{key}" if path else key, value) for key, value in inner]
        return "\n".join(lines) + "\n"


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets one ``a.b=value`` in a nested dictionary, in place."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ValueError(f"--set {override!r} must read section.key=value, for example train.dalle.steps=500")
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, leaf = key.strip().split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ValueError(f"--set {override!r}: {parent} is a value, not a section")
    node[leaf] = value


def _explain(model: type[BaseModel], error: Any, where: str) -> str:
    """One line of a pydantic error in the user's own terms."""
    location = [str(part) for part in error["loc"]]
    name = ".".join(location) or where
    if error["type"] != "extra_forbidden":
        given = error.get("input")
        return f"{where}: {name}: {error['msg']}" + ("" if isinstance(given, dict) else f" (given {given!r})")
    section: Any = model
    for part in location[:-1]:
        section = section.model_fields[part].annotation
    known = list(section.model_fields)
    nearest = difflib.get_close_matches(location[-1], known, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(known)}"
    return f"{where}: unknown key {name!r}; {hint}"
