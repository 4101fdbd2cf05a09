"""DALL·E: a decoder-only transformer over one stream of caption and picture tokens (arXiv 2102.12092).

It knows ids only and never sees a pixel. `DALLE.generate` is the slow, obvious sampler: no cache, the whole stream
again for every token. Every faster path is tested against it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_mini_impl.config import DALLEConfig
from dalle_mini_impl.layers.attention import KVCache
from dalle_mini_impl.layers.blocks import Block
from dalle_mini_impl.layers.code_features import CodeFeatures, add_features, features_of, fold_features
from dalle_mini_impl.layers.look_ahead import LookAhead
from dalle_mini_impl.layers.masks import stream_mask
from dalle_mini_impl.layers.native_attention import kernel_types
from dalle_mini_impl.layers.neighbours import Neighbours
from dalle_mini_impl.layers.norm import Norm
from dalle_mini_impl.layers.prefix import ImagePrefix
from dalle_mini_impl.layers.recompute import recomputed
from dalle_mini_impl.layers.rope import stream_angles
from dalle_mini_impl.stream import NULL, PAD, Stream


@dataclass(frozen=True)
class DALLELosses:
    """Summed negative log-likelihoods in nats and the numbers of tokens behind them, all 0-d tensors.

    Sums, not means, so that the loss of a global batch doesn't depend on how it was cut up. text and image are of
    pictures that are drawn, read of captions that are read from theirs. ahead is that of the cells further on that a
    model in training predicts (see `LookAhead`), for the image tokens' number; 0 where it predicts none. soft is that
    of the image tokens with targets spread over codes like them; 0 where nothing says which codes are alike.
    num_right: image tokens that were the likeliest of all, counted in evaluation mode alone.
    """

    text_nll_sum: Tensor
    num_text: Tensor
    image_nll_sum: Tensor
    num_image: Tensor
    read_nll_sum: Tensor
    num_read: Tensor
    ahead_nll_sum: Tensor
    soft_nll_sum: Tensor
    num_right: Tensor

    def total(self, text_weight: float, num_text: Tensor | float, num_image: Tensor | float) -> Tensor:
        """text_weight × text mean + (1 - text_weight) × image mean, the means over the given global counts."""
        text = self.text_nll_sum / torch.as_tensor(num_text, device=self.text_nll_sum.device).clamp(min=1)
        image = self.image_nll_sum / torch.as_tensor(num_image, device=self.image_nll_sum.device).clamp(min=1)
        return text_weight * text + (1 - text_weight) * image


class DALLE(nn.Module):
    """The transformer: embeddings, trunk, and a head for each vocabulary."""

    def __init__(self, config: DALLEConfig, stream: Stream, num_views: int = 1, embed_dim: int = 0) -> None:
        super().__init__()
        if config.image_prefix != stream.image_prefix or (stream.image_prefix and embed_dim < 1):
            raise ValueError(
                f"dalle.image_prefix is {config.image_prefix}, the stream's prefix {stream.image_prefix} and the "
                f"embeddings' dimension {embed_dim}: make the first two equal, and the last that of CLIP's space"
            )
        self.config = config
        self.stream = stream
        self.num_views = num_views
        dim = config.dim
        self.text_embedding = nn.Embedding(stream.text_vocab, dim)
        self.image_embedding = nn.Embedding(stream.image_vocab, dim)
        self.text_pad = nn.Embedding(stream.text_length, dim)  # a learned pad for each text slot
        self.text_position = nn.Embedding(stream.text_length, dim)
        self.target_row = nn.Embedding(stream.grid_size, dim)  # see `place_embedding`
        self.target_column = nn.Embedding(stream.grid_size, dim)
        self.neighbours = (
            Neighbours(config.neighbours, stream.grid_size, stream.image_vocab, dim) if config.neighbours else None
        )
        self.view_embedding = nn.Embedding(num_views, dim) if num_views > 1 else None
        self.reading = nn.Embedding(1, dim) if config.reading_share > 0 else None  # marks a picture that is read
        self.prefix = ImagePrefix(embed_dim, stream.image_prefix, dim) if stream.image_prefix else None
        self.blocks = nn.ModuleList(
            Block(
                dim,
                config.heads,
                causal=True,
                ffn=config.ffn,
                ffn_multiple=config.ffn_multiple,
                dropout=config.dropout,
                token_shift=config.token_shift,
            )
            for _ in range(config.layers)
        )
        self.look_ahead: LookAhead | None = None
        self.final_norm = Norm(dim)
        self.text_head = nn.Linear(dim, stream.text_vocab, bias=False)
        self.image_head = nn.Linear(dim, stream.image_vocab, bias=False)
        angles = stream_angles(stream, dim // config.heads)
        if config.positions == "learned":
            angles = torch.zeros_like(angles)
        self.register_buffer("rope_cos", angles.cos(), persistent=False)
        self.register_buffer("rope_sin", angles.sin(), persistent=False)
        self.rope_cos: Tensor
        self.rope_sin: Tensor
        self._patterns = sorted(set(config.layer_patterns) - {"full"})
        for pattern in self._patterns:
            mask = stream_mask(stream, pattern, config.attention_kernel)
            self.register_buffer(f"{pattern}_mask", mask, persistent=False)
        self._training_block: Callable[..., Tensor] | None = None
        self._recomputes = False
        self._init_weights()

    @property
    def num_lengths(self) -> int:
        """Numbers of slots that captions may take: 1 where all take as many."""
        return len(range(0, self.stream.text_length, self.stream.slot_step or self.stream.text_length))

    def learn_to_look_ahead(self) -> None:
        """Has `loss` ask in training for the cells of config.look_ahead, too; those weights are no checkpoint's."""
        if self.config.look_ahead:
            self.look_ahead = LookAhead(self.config.dim, self.stream.grid_size, self.config.look_ahead)

    def learn_by_features(self, vectors: Tensor) -> None:
        """Has what is learned of a code be learned of codes like it, too, where config.code_features asks for it.

        vectors: (V, C), what the VAE's decoder is given for each code. What is computed stays as it is; see
        `CodeFeatures`. Raises ValueError for another number of codes.
        """
        if not self.config.code_features:
            return
        if len(vectors) != self.stream.image_vocab:
            raise ValueError(f"vectors of {len(vectors)} codes for a DALLE of {self.stream.image_vocab}: give each one")
        dim, features = self.config.dim, features_of(vectors.detach()).to(self.image_head.weight.device)
        for table in (self.image_embedding, self.image_head):
            add_features(table, CodeFeatures(features, dim))
        if self.neighbours is not None:
            cells = len(self.config.neighbours)
            add_features(self.neighbours.table, CodeFeatures(features, dim, tables=cells, has_none=True))

    def end_training(self) -> None:
        """Leaves out what serves training alone: looking ahead, features of codes beside their rows, compiled blocks.

        What it draws stays as it is.
        """
        self.look_ahead = None
        self.run_plainly()
        fold_features(self)

    def add_views(self, num_views: int) -> None:
        """Makes room for so many views in all; what it makes of those that it knows stays as it is.

        Raises ValueError for fewer than it knows.
        """
        if num_views < self.num_views:
            raise ValueError(f"{num_views} views are fewer than the {self.num_views} that this DALLE knows")
        if num_views == self.num_views:
            return
        known = self.view_embedding.weight.detach() if self.view_embedding is not None else None
        self.view_embedding = nn.Embedding(num_views, self.config.dim, device=self.image_head.weight.device)
        with torch.no_grad():
            self.view_embedding.weight.zero_()
            if known is not None:
                self.view_embedding.weight[: len(known)] = known
        self.num_views = num_views

    def compile_blocks(self) -> None:
        """Has the blocks run compiled in training steps from now on; evaluation and decoding never are.

        Each shape is compiled by itself, so that what is computed doesn't depend on the shapes before, and only
        batches whose captions all take as many slots have one of few shapes.
        """
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, 4 * self.num_lengths)  # beyond it blocks run as they are
        kernel_types()
        self._training_block = torch.compile(Block.__call__, dynamic=False)

    def checkpoint_blocks(self) -> None:
        """Has gradients compute the inside of the blocks again from now on, instead of keeping it."""
        self._recomputes = True

    def run_plainly(self) -> None:
        """Undoes `compile_blocks` and `checkpoint_blocks`, which are one stage's: what is copied of it begins anew."""
        self._training_block, self._recomputes = None, False

    def _init_weights(self) -> None:
        """Small embeddings and heads; hidden matrices by fan-in; output projections stay zero."""
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.blocks:
            assert isinstance(block, Block)
            for linear in (block.attention.qkv, block.ffn.up):
                nn.init.normal_(linear.weight, std=self.config.dim**-0.5)
        nn.init.zeros_(self.image_head.weight)
        nn.init.zeros_(self.text_head.weight)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The weights of the trunk's linear layers, which Muon may train."""
        return [p for p in self.blocks.parameters() if p.ndim == 2]

    def forward(
        self, text_ids: Tensor, image_ids: Tensor, view: Tensor | None = None, embedding: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits of every next token.

        text_ids: (B, t) int64, captions that all take t slots (see `Stream.groups`). image_ids: (B, n) int64, the
        first n ≤ N tokens of the pictures; a last one beyond N - 1 is not read. view: (B,) int64 view ids, default
        the plain view 0. embedding: (B, E) CLIP's unit vectors of the pictures, for a model with an image_prefix; a
        row of zeros, and None, say nothing.
        Returns text logits (B, t - 1, text_vocab) of text ids 1 … t-1 and image logits (B, min(n + 1, N),
        image_vocab) of image ids 0 … n.
        """
        self.stream.check_text(text_ids)
        self.stream.check_image(image_ids)
        num_slots, start = text_ids.shape[1], self.stream.image_prefix
        x = self.embed(text_ids, image_ids[:, : self.stream.num_image_tokens - 1], view, embedding)
        rope = self._rope(self._drawing_slots(num_slots)[: x.shape[1]])
        hidden = self._run(x, rope, masks=self.drawing_masks(num_slots, x.shape[1] - start - num_slots))
        first = start + num_slots - 1  # the output of the last text slot
        return self.text_head(hidden[:, start:first]), self.image_head(hidden[:, first:])

    def loss(
        self,
        text_ids: Tensor,
        image_ids: Tensor,
        view: Tensor | None = None,
        inputs: Tensor | None = None,
        reads: Tensor | None = None,
        embedding: Tensor | None = None,
        likeness: Tensor | None = None,
    ) -> DALLELosses:
        """Negative log-likelihood sums of captions (B, T) and whole pictures (B, N).

        inputs: the image ids that are read, where they differ from those predicted (token corruption). reads: (B,)
        bool, rows whose caption is read from the picture instead; both directions share one pass of the trunk.
        embedding: (B, E), see `forward`; what is read is never shown its own. likeness: (V, V), rows that add up to 1,
        how soft_nll_sum spreads each code's target.
        text_ids and reads decide what is computed; on the host they do so without waiting for image_ids' device.
        Padding is no target, and a null caption none either: its text is not a caption.
        """
        expected = (text_ids.shape[0], self.stream.num_image_tokens)
        if tuple(image_ids.shape) != expected:
            raise ValueError(f"image_ids have shape {tuple(image_ids.shape)}; expected {expected}, whole pictures")
        inputs = image_ids if inputs is None else inputs
        parts = []
        groups = self.stream.groups(text_ids)
        for rows, text in groups:
            own_reads = None if reads is None else reads[rows]
            rows, text = (values.to(image_ids.device, non_blocking=True) for values in (rows, text))
            own_view, own_embedding = (None if values is None else values[rows] for values in (view, embedding))
            own = image_ids[rows], inputs[rows], own_view, own_reads, own_embedding
            parts.append(self._group_loss(len(groups) == 1, text, *own, likeness=likeness))
        return DALLELosses(*(torch.stack(part).sum() for part in zip(*parts, strict=True)))

    def _group_loss(
        self,
        is_batch: bool,
        text: Tensor,
        ids: Tensor,
        inputs: Tensor,
        view: Tensor | None,
        reads: Tensor | None,
        embedding: Tensor | None,
        *,
        likeness: Tensor | None,
    ) -> list[Tensor]:
        """The fields of DALLELosses for captions (B, t) that all take t slots: a whole batch, or a part of one."""
        start = self.stream.image_prefix
        first = start + text.shape[1] - 1  # the output of the last text slot
        rope = self._rope(self._drawing_slots(text.shape[1]))
        if reads is None:
            masks = self.drawing_masks(text.shape[1], self.stream.num_image_tokens - 1)
            hidden = self._run(self.embed(text, inputs[:, :-1], view, embedding), rope, masks=masks, is_batch=is_batch)
            num_drawn = len(text)
        else:
            order = torch.argsort(reads.int(), stable=True)  # what is drawn comes first
            num_drawn = len(reads) - int(reads.sum())
            order = order.to(ids.device, non_blocking=True)
            text, ids, inputs = text[order], ids[order], inputs[order]
            drawn, read = slice(num_drawn), slice(num_drawn, None)
            own = (None if values is None else values[order[drawn]] for values in (view, embedding))
            x = [
                self.embed(text[drawn], inputs[drawn, :-1], *own),
                self._embed_for_reading(text[read], ids[read]),
            ]
            if num_drawn < len(text):
                ropes = [rope, self._rope(self._reading_slots(text.shape[1]))]
                counts = [num_drawn, len(text) - num_drawn]
                cos, sin = (
                    torch.cat([table.expand(n, 1, -1, -1) for table, n in zip(pair, counts, strict=True)])
                    for pair in zip(*ropes, strict=True)
                )
                rope = cos, sin
            hidden = self._run(torch.cat(x), rope, is_batch=is_batch)
        targets = self.text_targets(text)
        text_logits = self.text_head(hidden[:num_drawn, start:first])
        drawing = hidden[:num_drawn, first : first + ids.shape[1]]
        image_logits = self.image_head(drawing)
        look_ahead = self.look_ahead if self.training else None
        nothing = torch.zeros((), device=ids.device)
        read_logits = self.text_head(hidden[num_drawn:, start + self.stream.num_image_tokens :])
        return [
            nll_sum(text_logits, targets[:num_drawn], ignore=PAD),
            (targets[:num_drawn] != PAD).sum(),
            nll_sum(image_logits, ids[:num_drawn]),
            torch.full((), num_drawn * ids.shape[1], device=ids.device),  # not torch.tensor, which waits for a copy
            nll_sum(read_logits, targets[num_drawn:], ignore=PAD),
            (targets[num_drawn:] != PAD).sum(),
            nothing if look_ahead is None else look_ahead(drawing, self.image_head, ids[:num_drawn]),
            nothing if likeness is None else soft_nll_sum(image_logits, likeness[ids[:num_drawn]]),
            nothing if self.training else (image_logits.argmax(dim=-1) == ids[:num_drawn]).sum(),
        ]

    def token_log_likelihoods(self, text_ids: Tensor, image_ids: Tensor, embedding: Tensor | None = None) -> Tensor:
        """log p(image id | caption, ids before it) in nats, (B, N) fp32, of captions (B, T) and whole pictures.

        embedding: (B, E), see `forward`.
        """
        result = torch.empty(image_ids.shape, device=image_ids.device)
        for rows, text in self.stream.groups(text_ids):
            own = None if embedding is None else embedding[rows]
            logits = self(text, image_ids[rows], None, own)[1].float()  # (n, N, V)
            result[rows] = -F.cross_entropy(logits.transpose(1, 2), image_ids[rows], reduction="none")
        return result

    def log_likelihood(self, text_ids: Tensor, image_ids: Tensor) -> Tensor:
        """log p(picture | caption) in nats, (B,) fp32, of captions (B, T) and whole pictures (B, N)."""
        return self.token_log_likelihoods(text_ids, image_ids).sum(dim=1)

    def read_logits(self, text_ids: Tensor, image_ids: Tensor) -> Tensor:
        """The stream the other way round: logits (B, t - 1, text_vocab) of text ids 1 … t-1, given the whole picture.

        text_ids: (B, t), captions that all take t slots. image_ids: (B, N). Raises ValueError for a model that was
        built without a reading_share.
        """
        self.stream.check_text(text_ids)
        rope = self._rope(self._reading_slots(text_ids.shape[1]))
        hidden = self._run(self._embed_for_reading(text_ids, image_ids), rope)
        logits: Tensor = self.text_head(hidden[:, self.stream.image_prefix + self.stream.num_image_tokens :])
        return logits

    def _embed_for_reading(self, text_ids: Tensor, image_ids: Tensor) -> Tensor:
        """Input vectors (B, P + N + t - 1, dim) of whole pictures (B, N) and the captions (B, t) behind them.

        A prefix says nothing here: the picture itself is there.
        """
        if self.reading is None:
            raise ValueError(
                "this DALLE doesn't read captions from pictures: train it with dalle.reading_share above 0"
            )
        cells = self._cells(0, self.stream.num_image_tokens)  # here of the cell that is read
        picture = self.image_embedding(image_ids) + cells + self.reading.weight
        return torch.cat([*self._prefix(None, len(text_ids)), picture, self._words(text_ids)[:, :-1]], dim=1)

    def _drawing_slots(self, num_slots: int) -> Tensor:
        """Where the prefix, a caption of so many slots and its picture but the last stand, (P + t + N - 1,)."""
        prompt, _, picture = self._slots(num_slots)
        return torch.cat([prompt, picture[:-1]])

    def _reading_slots(self, num_slots: int) -> Tensor:
        """The same for the picture ahead of its caption but the last, (P + N + t - 1,)."""
        prompt, prefix_length, picture = self._slots(num_slots)
        return torch.cat([prompt[:prefix_length], picture, prompt[prefix_length:-1]])

    def _slots(self, num_slots: int) -> tuple[Tensor, int, Tensor]:
        """Slots of the prefix and a caption, how many of them are the prefix's, and the slots of a whole picture."""
        text_length, device = self.stream.text_length, self.rope_cos.device
        picture = torch.arange(text_length, text_length + self.stream.num_image_tokens, device=device)
        return self.stream.prompt_slots(num_slots, device), self.stream.image_prefix, picture

    def _rope(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, (L, D/2), of the tokens in some slots (L,)."""
        return self.rope_cos[slots], self.rope_sin[slots]

    def caption_log_likelihood(self, text_ids: Tensor, image_ids: Tensor) -> Tensor:
        """log p(caption | picture) in nats, (B,) fp32, of captions (B, T) and whole pictures (B, N)."""
        result = torch.empty(len(image_ids), device=image_ids.device)
        for rows, text in self.stream.groups(text_ids):
            logits = self.read_logits(text, image_ids[rows]).float()
            nll = F.cross_entropy(
                logits.transpose(1, 2), self.text_targets(text), ignore_index=PAD, reduction="none"
            )  # (n, t - 1), 0 at padding
            result[rows] = -nll.sum(dim=1)
        return result

    def prefill(
        self,
        text_ids: Tensor,
        view: Tensor | None = None,
        dtype: torch.dtype | None = None,
        embedding: Tensor | None = None,
    ) -> tuple[Tensor, KVCache]:
        """Reads captions (B, t) of t slots once; returns logits (B, image_vocab) of image id 0 and the filled cache.

        embedding: (B, E), see `forward`.
        """
        self.stream.check_text(text_ids)
        (batch, num_slots), device = text_ids.shape, text_ids.device
        cache = KVCache.allocate(
            len(self.blocks),
            batch,
            self.config.heads,
            self.stream.image_prefix + num_slots + self.stream.num_image_tokens - 1,
            self.config.dim // self.config.heads,
            device=device,
            dtype=dtype or self.image_head.weight.dtype,
        )
        x = self.embed(text_ids, text_ids[:, :0], view, embedding)
        rope = self._rope(self._drawing_slots(num_slots)[: x.shape[1]])
        hidden = self._run(x, rope, cache, self.drawing_masks(num_slots, 0))
        cache.prompt_length = x.shape[1]
        logits: Tensor = self.image_head(hidden[:, -1])
        return logits, cache

    def extend(self, image_ids: Tensor, cache: KVCache, view: Tensor | None = None) -> Tensor:
        """Reads the n image ids (B, n) that follow those in the cache; logits (B, n, image_vocab) of the id after each.

        Raises ValueError where they would go beyond the last id but one, which predicts the last.
        """
        start, count = self.check_extension(image_ids, cache), image_ids.shape[1]
        x = self.image_embedding(image_ids) + self.place_embedding(start + 1, start + count + 1)  # (B, n, dim)
        if self.neighbours is not None:
            x = x + self.neighbours(self.read(image_ids, start, cache), start + 1, start + count + 1)
        hidden = self._trunk(self.with_view(x, view), self.stream.text_length + start, cache)
        logits: Tensor = self.image_head(hidden)
        return logits

    @staticmethod
    def read(image_ids: Tensor, start: int, cache: KVCache) -> Tensor:
        """All ids so far (B, start + n): what the cache remembers and image ids (B, n), which it does from now on.

        start: the cell of the first new one.
        """
        end = start + image_ids.shape[1]
        cache.ids[:, start:end] = image_ids
        return cache.ids[:, :end]

    def check_extension(self, image_ids: Tensor, cache: KVCache) -> int:
        """The cell of the first of image ids (B, n) that follow a cache; ValueError where they go beyond the grid."""
        start, count = cache.length - cache.prompt_length, image_ids.shape[1]
        if start < 0 or not 1 <= count < self.stream.num_image_tokens - start:
            raise ValueError(
                f"image tokens {start} to {start + count - 1} can't be read behind a cache of {cache.length} tokens: "
                f"the last to read is token {self.stream.num_image_tokens - 2}"
            )
        return start

    def decode_step(self, previous_ids: Tensor, index: int, cache: KVCache, view: Tensor | None = None) -> Tensor:
        """Logits (B, image_vocab) of image id `index` ≥ 1, given image id index - 1 as previous_ids (B,)."""
        if not 1 <= index < self.stream.num_image_tokens:
            raise ValueError(f"image token {index} can't be decoded: pick 1 to {self.stream.num_image_tokens - 1}")
        if cache.length != cache.prompt_length + index - 1:
            raise ValueError(
                f"image token {index} needs a cache of {cache.prompt_length + index - 1} tokens; "
                f"this one has {cache.length}"
            )
        return self.extend(previous_ids[:, None], cache, view)[:, 0]

    @torch.no_grad()
    def generate(
        self,
        text_ids: Tensor,
        choose: Callable[[Tensor, int], Tensor],
        guidance: Callable[[int], float] | None = None,
        view: Tensor | None = None,
        embedding: Tensor | None = None,
    ) -> Tensor:
        """Samples pictures token by token without any cache: the reference for every fast path.

        text_ids: (B, t), of t slots. choose: takes logits (B, image_vocab) and the token's index, returns ids (B,).
        guidance: the guidance scale at an index; logits become null + scale × (conditional - null). embedding: (B, E),
        see `forward`; the null pass knows neither caption nor embedding.
        Returns image ids (B, N). Inputs are never written to.
        """
        null_ids = torch.full_like(text_ids, NULL)
        image_ids = text_ids[:, :0]
        for index in range(self.stream.num_image_tokens):
            logits = self(text_ids, image_ids, view, embedding)[1][:, -1].float()
            scale = 1.0 if guidance is None else guidance(index)
            if scale != 1.0:
                null_logits = self(null_ids, image_ids, view)[1][:, -1].float()
                logits = null_logits + scale * (logits - null_logits)
            image_ids = torch.cat([image_ids, choose(logits, index)[:, None]], dim=1)
        return image_ids

    def embed(
        self, text_ids: Tensor, image_ids: Tensor, view: Tensor | None = None, embedding: Tensor | None = None
    ) -> Tensor:
        """Input vectors (B, P + t + n, dim) of the prefix, captions of t slots and the first n < N image tokens."""
        prefix = self._prefix(embedding, len(text_ids))
        x = torch.cat([*prefix, self._words(text_ids), self.image_embedding(image_ids)], dim=1)
        num_outputs = image_ids.shape[1] + 1
        places = self.place_embedding(0, num_outputs)  # (n + 1, dim)
        if self.neighbours is not None:
            places = places + self.neighbours(image_ids, 0, num_outputs)  # (B, n + 1, dim)
        x = x + F.pad(places, (0, 0, x.shape[1] - num_outputs, 0))
        return self.with_view(x, view)

    def _prefix(self, embedding: Tensor | None, batch: int) -> list[Tensor]:
        """Input vectors (B, P, dim) of picture embeddings (B, E), None for no picture's, in a list; empty without P."""
        if self.prefix is not None:
            return [self.prefix(embedding, batch)]
        if embedding is not None:
            raise ValueError(
                "this DALLE knows no picture embeddings: train it with dalle.image_prefix above 0, for example 4"
            )
        return []

    @staticmethod
    def text_targets(text_ids: Tensor) -> Tensor:
        """Text ids 1 … t-1 of captions (B, t) that are predicted; PAD in place of those of null captions."""
        return text_ids[:, 1:].masked_fill(text_ids[:, :1] == NULL, PAD)

    def _words(self, text_ids: Tensor) -> Tensor:
        """Input vectors (B, t, dim) of captions of t slots."""
        is_pad = (text_ids == PAD).unsqueeze(-1)
        slots = slice(text_ids.shape[1])
        words = self.text_embedding(text_ids) + self.text_position.weight[slots]
        return torch.where(is_pad, self.text_pad.weight[slots], words)

    def place_embedding(self, start: int, end: int) -> Tensor:
        """What tells the tokens that predict the cells start … end - 1 where they are, (end - start, dim).

        With "rope" the row plus the column embedding of the predicted cell; with "learned" positions that of the
        token's own cell, the one before, and zeros for the last text slot.
        """
        if self.config.positions == "rope":
            return self._cells(start, end)
        own = self._cells(max(start - 1, 0), end - 1)
        return F.pad(own, (0, 0, 1, 0)) if start == 0 else own

    def _cells(self, start: int, end: int) -> Tensor:
        """Row plus column embedding, (end - start, dim), of the cells start … end - 1."""
        cell = torch.arange(start, end, device=self.target_row.weight.device)
        size = self.stream.grid_size
        embedding: Tensor = self.target_row(cell // size) + self.target_column(cell % size)
        return embedding

    def masks(self, start: int, end: int, num_before: int = 0) -> list[Tensor | None]:
        """What the tokens in the slots start … end - 1 see, by layer: (end - start, num_before + end - start) bool.

        num_before: tokens ahead of them that a cache holds. None stands for all up to a token's own.
        """
        parts = {name: getattr(self, f"{name}_mask")[start:end, start - num_before : end] for name in self._patterns}
        return [parts.get(pattern) for pattern in self.config.layer_patterns]

    def drawing_masks(self, num_slots: int, num_image_tokens: int) -> list[Tensor | None]:
        """`masks` of a caption of so many slots and the first tokens of its picture; a prefix goes with None only."""
        return self.masks(self.stream.text_length - num_slots, self.stream.text_length + num_image_tokens)

    def with_view(self, x: Tensor, view: Tensor | None) -> Tensor:
        """x (B, L, dim) plus the embeddings of view ids (B,), of the plain view unless told otherwise.

        Raises ValueError where a model that knows one view only is asked for another.
        """
        if self.view_embedding is None:
            if view is not None and bool(view.any()):
                raise ValueError(f"view {int(view.max())} of a model that has only view 0: train with more data.views")
            return x
        if view is None:
            view = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        embedding: Tensor = self.view_embedding(view)  # (B, dim)
        return x + embedding[:, None]

    def _trunk(self, x: Tensor, start: int, cache: KVCache | None = None) -> Tensor:
        """Runs the blocks over (B, L, dim), whose first token stands in slot `start`, behind those in the cache."""
        end = start + x.shape[1]
        masks = self.masks(start, end, 0 if cache is None else cache.length)
        return self._run(x, (self.rope_cos[start:end], self.rope_sin[start:end]), cache, masks)

    def _run(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: KVCache | None = None,
        masks: Sequence[Tensor | None] | None = None,
        is_batch: bool | None = None,
    ) -> Tensor:
        """Runs the blocks over (B, L, dim), whose tokens stand where rope, cos and sin (L, D/2), says; see `masks`.

        is_batch: whether the rows are a whole batch, not the part of one whose captions take t slots; None: not known.
        """
        has_few_shapes = self.num_lengths == 1 if is_batch is None else is_batch
        is_step = self.training and torch.is_grad_enabled() and cache is None and has_few_shapes
        run = self._training_block if self._training_block is not None and is_step else Block.__call__
        run = recomputed(run, self._recomputes and cache is None)
        turned = rope if self.config.positions == "rope" else None
        for layer, block in enumerate(self.blocks):
            x = run(block, x, turned, None if masks is None else masks[layer], cache, layer)
        if cache is not None:
            cache.advance(x.shape[1])
        hidden: Tensor = self.final_norm(x)
        return hidden


def nll_sum(logits: Tensor, targets: Tensor, ignore: int = -100) -> Tensor:
    """Summed negative log-likelihood, 0-d, of targets (B, L) other than `ignore` under logits (B, L, V)."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=ignore, reduction="sum")


def soft_nll_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy, 0-d, of targets (B, L, V) that are distributions under logits (B, L, V)."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(0, 1), reduction="sum")
