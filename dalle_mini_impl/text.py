"""The caption tokenizer: SentencePiece BPE with byte fallback, trained on the captions that were given.

BPE rather than a unigram model: its frequent words end up as single pieces, it needs no pruning parameters on small
caption sets, and its sampling (BPE-dropout) is a few lines that can be made a pure function of a generator.
SentencePiece's own sampling draws from a generator that belongs to the thread and can't be seeded per call.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import sentencepiece
import torch
from torch import Tensor

from dalle_mini_impl.config import TextConfig
from dalle_mini_impl.stream import BOS, EOS, NULL, NUM_SPECIAL, PAD, UNK, Stream

MIN_VOCAB_SIZE = 300
"""Special ids, 256 byte pieces and a first few characters."""

_NULL_PIECE = "<null>"
_SPACE = "▁"  # SentencePiece's mark at the start of a word; as a character of a caption it counts as white space
_NUM_BYTES = 256
_FIRST_BYTE = NUM_SPECIAL  # SentencePiece puts its byte pieces right after the special ones
_NOT_TEXT = re.compile(rf"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff{_SPACE}]+")
_MAX_TRAINING_CAPTIONS = 1_000_000
_MIN_CHARACTER_SHARE = 1e-5
_LINE_CHARACTERS = 1000  # SentencePiece drops training lines of more than about 4 kB, so long captions are cut up
_MAX_CACHED_WORDS = 65_536
_BLOCK_CHARACTERS = 32  # merging is quadratic in the characters of a word: longer ones are merged block by block


def normalize_caption(caption: str) -> str:
    """The one spelling that training and sampling see: NFKC, lower case, single spaces, no control characters.

    Lone surrogates, which are no text, count as white space, and so does U+2581. Applying it twice changes nothing.
    """
    lowered = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", caption).lower())
    return _NOT_TEXT.sub(" ", lowered).strip()


class TextTokenizer:
    """Captions to ids and back; the special ids are those of `stream`.

    Made by `train` or `load`. Pickles as its model, so that data-loader workers can have it.
    """

    def __init__(self, model: bytes) -> None:
        """Takes a serialised SentencePiece model; ValueError unless it is one that `train` could have made."""
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(f"{len(model)} bytes are no SentencePiece model: {error}") from None
        _check_special_ids(self._processor)
        self._scores = _merge_scores(self._processor)
        self._ids = {piece: self._processor.PieceToId(piece) for piece in self._scores}
        self._cache: dict[str, tuple[int, ...]] = {}

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, *, seed: int = 0) -> Self:
        """Trains on captions; vocab_size is an upper bound, small caption sets give fewer pieces.

        Of more than a million captions a uniform sample of a million is used, drawn with `seed`. The same captions
        in the same order give the same model. ValueError where there is no caption with text in it.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(f"vocab_size is {vocab_size}; special ids and bytes need at least {MIN_VOCAB_SIZE}")
        texts = [text for text in map(normalize_caption, _sample(captions, _MAX_TRAINING_CAPTIONS, seed)) if text]
        if not texts:
            raise ValueError("there are no captions to train a tokenizer on: give captioned pictures")
        known = _frequent_characters(texts, limit=(vocab_size - NUM_SPECIAL - _NUM_BYTES) // 2)
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=_training_lines(texts, known),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            control_symbols=[_NULL_PIECE],
            num_threads=1,
            minloglevel=2,
        )
        return cls(model.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a ``tokenizer.model``; ValueError where there is none or it is not of this project's kind."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"no tokenizer at {path}; `TextTokenizer.train(...).save(path)` writes one")
        return cls(path.read_bytes())

    def save(self, path: str | Path) -> None:
        """Writes the model to a file, conventionally ``tokenizer.model``."""
        Path(path).write_bytes(self._model)

    def __reduce__(self) -> tuple[type[Self], tuple[bytes]]:
        return type(self), (self._model,)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special and byte pieces included."""
        return int(self._processor.GetPieceSize())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model as 64 hexadecimal digits."""
        return hashlib.sha256(self._model).hexdigest()

    def encode(self, caption: str, *, dropout: float = 0.0, rng: np.random.Generator | None = None) -> list[int]:
        """Ids of a caption without BOS and EOS.

        dropout: probability in [0, 1] that a merge is left out (BPE-dropout, Provilkov et al. 2020); 0 gives the best
        segmentation, 1 single characters. The result depends on the caption, dropout and rng alone; rng is advanced.
        ValueError for a dropout outside of [0, 1], or above 0 without rng.
        """
        words = normalize_caption(caption).split()
        if dropout == 0.0:
            return [piece for word in words for piece in self._plain(word)]
        if not 0.0 < dropout <= 1.0:
            raise ValueError(f"dropout is {dropout}; it is a probability, so give 0 to 1")
        if rng is None:
            raise ValueError(f"dropout {dropout} draws at random: give rng, a numpy.random.Generator")
        num_merges = 3 * sum(len(word) + 1 for word in words)  # at most: a pair a character, two more a merge
        dropped = iter((rng.random(num_merges) < dropout).tolist())
        return [piece for word in words for piece in self._sampled(word, dropped)]

    def decode(self, ids: Iterable[int]) -> str:
        """The normalised caption that ids spell; special ids say nothing. ValueError for an id out of range."""
        pieces = [int(piece) for piece in ids]
        wrong = next((piece for piece in pieces if not 0 <= piece < self.vocab_size), None)
        if wrong is not None:
            raise ValueError(f"text id {wrong} is not below the tokenizer's vocab_size {self.vocab_size}")
        return str(self._processor.DecodeIds([piece for piece in pieces if piece >= NUM_SPECIAL]))

    def batch(
        self,
        captions: Sequence[str | None],
        text_length: int,
        *,
        dropout: float = 0.0,
        rng: np.random.Generator | None = None,
    ) -> tuple[Tensor, int]:
        """Framed ids (B, text_length) int64 and the number of captions that were cut; None is the null caption.

        A caption that fits without dropout is never cut because of it: it is then segmented without.
        """
        stream = Stream(text_length=text_length, grid_size=1, text_vocab=self.vocab_size, image_vocab=2)
        rows, num_cut = [], 0
        for caption in captions:
            if caption is None:
                rows.append(stream.null_caption().tolist())
                continue
            row, cut = stream.fit_caption(self.encode(caption, dropout=dropout, rng=rng))
            if cut and dropout > 0.0:
                row, cut = stream.fit_caption(self.encode(caption))
            rows.append(row)
            num_cut += cut
        return torch.tensor(rows, dtype=torch.long).reshape(len(rows), text_length), num_cut  # (B, T)

    def lengths(self, captions: Iterable[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Text slots that each caption needs without dropout, BOS and EOS included: (n,) int64."""
        return np.fromiter((len(self.encode(caption)) + 2 for caption in captions), dtype=np.int64)

    def num_cut(self, captions: Iterable[str], text_length: int) -> int:
        """Number of captions that text_length slots are too few for."""
        return int((self.lengths(captions) > text_length).sum())

    def suggest_text_length(self, captions: Iterable[str], config: TextConfig) -> int:
        """Text slots for a model of these captions: config.max_length, or less where config.fit_length allows it.

        Fitted, it is what 99.5 % of the captions need, rounded up to an even number: at least 8, at most max_length.
        """
        lengths = self.lengths(captions) if config.fit_length else np.empty(0, dtype=np.int64)
        if not config.fit_length or not lengths.size:
            return config.max_length
        needed = float(np.quantile(lengths, 0.995, method="higher"))
        return min(max(8, 2 * math.ceil(needed / 2)), config.max_length)

    def _plain(self, word: str) -> tuple[int, ...]:
        """Best segmentation of a word, remembered; no piece reaches over white space, so words don't interact."""
        ids = self._cache.get(word)
        if ids is None:
            ids = tuple(self._processor.EncodeAsIds(word))
            if len(self._cache) < _MAX_CACHED_WORDS and len(word) <= _BLOCK_CHARACTERS:
                self._cache[word] = ids
        return ids

    def _sampled(self, word: str, dropped: Iterator[bool]) -> Iterator[int]:
        """Segmentation of a word; `dropped` says of each possible merge, as it comes up, whether it is left out."""
        marked = _SPACE + word
        for start in range(0, len(marked), _BLOCK_CHARACTERS):
            for piece in self._merge(list(marked[start : start + _BLOCK_CHARACTERS]), dropped):
                known = self._ids.get(piece)
                if known is not None:
                    yield known
                else:
                    yield from (_FIRST_BYTE + byte for byte in piece.encode())

    def _merge(self, pieces: list[str], dropped: Iterator[bool]) -> list[str]:
        """Merges neighbours in place, the best-scored pair first and the leftmost of equals, until none is left."""

        def score(left: int) -> float:
            merged = self._scores.get(pieces[left] + pieces[left + 1], -math.inf)
            return -math.inf if next(dropped) else merged

        scores = [score(left) for left in range(len(pieces) - 1)]
        while scores and (best := max(scores)) > -math.inf:
            left = scores.index(best)
            pieces[left : left + 2] = [pieces[left] + pieces[left + 1]]
            del scores[left]
            if left > 0:
                scores[left - 1] = score(left - 1)
            if left < len(scores):
                scores[left] = score(left)
        return pieces


def _check_special_ids(processor: sentencepiece.SentencePieceProcessor) -> None:
    """Raises ValueError unless the special ids are those of `stream` and every byte has its piece."""
    found = (processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id())
    expected = (PAD, BOS, EOS, UNK)
    if found != expected or processor.PieceToId(_NULL_PIECE) != NULL or not processor.IsControl(NULL):
        raise ValueError(
            f"the tokenizer's pad, bos, eos and unk ids are {found} and {_NULL_PIECE} is "
            f"{processor.PieceToId(_NULL_PIECE)}; expected {expected} and {NULL}: train it with TextTokenizer.train"
        )
    if not all(processor.PieceToId(f"<0x{byte:02X}>") == _FIRST_BYTE + byte for byte in range(_NUM_BYTES)):
        raise ValueError(f"the tokenizer lacks byte pieces from id {_FIRST_BYTE} on: train it with TextTokenizer.train")


def _merge_scores(processor: sentencepiece.SentencePieceProcessor) -> dict[str, float]:
    """Score of each ordinary piece: the higher, the earlier it is merged."""
    ordinary = range(_FIRST_BYTE + _NUM_BYTES, processor.GetPieceSize())
    return {processor.IdToPiece(piece): processor.GetScore(piece) for piece in ordinary}


def _sample(captions: Iterable[str], limit: int, seed: int) -> list[str]:
    """All captions, or a uniform sample of `limit` of them (reservoir sampling), in one pass."""
    iterator = iter(captions)
    kept = list(itertools.islice(iterator, limit))
    rng = np.random.default_rng(seed)
    for index, caption in enumerate(iterator, start=limit):
        slot = int(rng.integers(index + 1))
        if slot < limit:
            kept[slot] = caption
    return kept


def _frequent_characters(texts: Iterable[str], limit: int) -> frozenset[str]:
    """At most `limit` characters that make up at least 1e-5 of the texts each; bytes spell the others."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    del counts[" "]
    least = _MIN_CHARACTER_SHARE * counts.total()
    ordered = sorted((-count, character) for character, count in counts.items() if count >= least)
    return frozenset(character for _, character in ordered[:limit])


def _training_lines(texts: Iterable[str], known: frozenset[str]) -> Iterator[str]:
    """Texts with unknown characters as spaces, cut at words (and within endless ones) into lines of bounded length."""
    foreign = re.compile(f"[^ {re.escape(''.join(sorted(known)))}]+")
    for text in texts:
        line = foreign.sub(" ", text)
        while line:
            end = len(line) if len(line) <= _LINE_CHARACTERS else line.rfind(" ", 1, _LINE_CHARACTERS)
            end = end if end > 0 else _LINE_CHARACTERS
            if part := line[:end].strip():
                yield part
            line = line[end:]
