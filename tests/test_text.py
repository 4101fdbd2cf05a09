"""The caption tokenizer: what it may not lose, mix up, or leave behind."""

from __future__ import annotations

import io
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import typer
from PIL import Image

import dalle_mini_impl
from dalle_mini_impl.config import TextConfig
from dalle_mini_impl.stream import BOS, EOS, NULL, NUM_SPECIAL, PAD
from dalle_mini_impl.text import TextTokenizer, _sample, _training_lines, normalize_caption
from tokenizer.train_tokenizer import train_tokenizer

COLOURS = ("red", "green", "blue", "yellow", "purple")
SHAPES = ("circle", "square", "triangle", "star")
CAPTIONS = [f"a {a} {b} to the left of a {c} {d}" for a in COLOURS for b in SHAPES for c in COLOURS for d in SHAPES]
ODD = [
    "smiling face 😀 with 👩‍🚀 and 🇩🇪",
    "קנקן תה אדום",
    "إبريق شاي أحمر",
    "赤いリンゴ",
    "naïve café ﬁne ½",
    "<null> </s> <0x41> ▁ ▅ \ufeff",
    "a\x00b\tc\nd\u3000e",
]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(CAPTIONS, 2048)


@pytest.mark.parametrize("caption", [*ODD, "", CAPTIONS[0], "x" * 300])
def test_no_character_is_lost(tokenizer: TextTokenizer, caption: str) -> None:
    rng = np.random.default_rng(0)
    for dropout in (0.0, 0.3, 1.0):
        ids = tokenizer.encode(caption, dropout=dropout, rng=rng)
        assert tokenizer.decode(ids) == normalize_caption(caption)
        assert all(NUM_SPECIAL <= piece < tokenizer.vocab_size for piece in ids)


def test_normalising_twice_changes_nothing() -> None:
    every = [chr(code) for code in range(0, 0x30000, 7)]
    assert all(normalize_caption(once) == once for once in map(normalize_caption, every))
    assert normalize_caption("  A\u00a0RED\n\n \uff21pple \ud800") == "a red apple"


def test_frequent_words_are_single_pieces(tokenizer: TextTokenizer) -> None:
    assert [tokenizer.decode([piece]) for piece in tokenizer.encode(CAPTIONS[0])] == CAPTIONS[0].split()


def test_merging_without_dropout_is_sentencepiece(tokenizer: TextTokenizer) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.__reduce__()[1][0])
    rng = np.random.default_rng(0)
    for caption in CAPTIONS[::17] + ODD + ["reddish bluestar righttriangles"]:
        expected = processor.EncodeAsIds(normalize_caption(caption))
        assert tokenizer.encode(caption) == expected
        assert tokenizer.encode(caption, dropout=1e-12, rng=rng) == expected


def test_dropout_depends_on_its_generator_alone(tokenizer: TextTokenizer) -> None:
    np.random.seed(1)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    first = [tokenizer.encode(c, dropout=0.2, rng=np.random.default_rng(3)) for c in CAPTIONS[:20]]
    tokenizer.batch(CAPTIONS, 32, dropout=0.5, rng=np.random.default_rng(4))
    again = [tokenizer.encode(c, dropout=0.2, rng=np.random.default_rng(3)) for c in CAPTIONS[:20]]
    assert first == again
    assert tokenizer.encode(CAPTIONS[0]) == TextTokenizer.train(CAPTIONS, 2048).encode(CAPTIONS[0])
    assert before == (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[index]


def test_dropout_drops_about_as_often_as_it_says(tokenizer: TextTokenizer) -> None:
    rng = np.random.default_rng(0)
    word = TextTokenizer.train(["ab"], 300)
    assert word.vocab_size == 261 + len(["▁", "a", "b", "ab", "▁a", "▁ab"])
    kept = sum(len(word.encode("ab", dropout=0.1, rng=rng)) == 1 for _ in range(4000)) / 4000
    assert kept == pytest.approx(0.9**2 + 0.1 * 0.9**2, abs=0.02)  # by way of "ab", or without it by way of "▁a"
    assert len(tokenizer.encode("red", dropout=1.0, rng=rng)) == len("▁red")


def test_dropout_never_cuts_a_caption_that_fits(tokenizer: TextTokenizer) -> None:
    caption = CAPTIONS[0]
    length = len(tokenizer.encode(caption)) + 2
    ids, num_cut = tokenizer.batch([caption] * 50, length, dropout=0.5, rng=np.random.default_rng(0))
    assert num_cut == 0
    assert {tokenizer.decode(row) for row in ids.tolist()} == {caption}


def test_batch_frames_cuts_and_counts(tokenizer: TextTokenizer) -> None:
    ids, num_cut = tokenizer.batch(["red", None, CAPTIONS[0], ""], 6)
    assert (ids.shape, ids.dtype, num_cut) == ((4, 6), torch.int64, 1)
    assert ids[0].tolist() == [BOS, *tokenizer.encode("red"), EOS, PAD, PAD, PAD]
    assert ids[1].tolist() == [NULL] * 6
    assert ids[2].tolist() == [BOS, *tokenizer.encode(CAPTIONS[0])[:4], EOS]
    assert ids[3].tolist() == [BOS, EOS, PAD, PAD, PAD, PAD]
    assert tokenizer.batch([], 6)[0].shape == (0, 6)


def test_a_batch_of_64_captions_is_fast(tokenizer: TextTokenizer) -> None:
    times = []
    for _ in range(20):
        start = time.perf_counter()
        tokenizer.batch(CAPTIONS[:64], 32)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.002


def test_endless_captions_are_trained_on_whole() -> None:
    words = " ".join(f"zebra{'abcdefghij'[i % 10]}" for i in range(1500))
    tokenizer = TextTokenizer.train(["a red circle", words + " quokka quokka", "x" * 10_000], 512)
    assert len(tokenizer.encode("quokka")) <= 2
    known = frozenset(words) - {" "}
    lines = list(_training_lines([words], known))
    assert max(map(len, lines)) <= 1000
    assert " ".join(lines) == words


def test_more_characters_than_room_fall_back_to_bytes() -> None:
    every = "".join(map(chr, range(0x4E00, 0x5E00)))
    tokenizer = TextTokenizer.train([every, "a red circle"], 400)
    assert tokenizer.vocab_size <= 400
    assert tokenizer.decode(tokenizer.encode(every)) == every


def test_vocabulary_shrinks_to_the_captions() -> None:
    tokenizer = TextTokenizer.train(["a red circle"], 2048)
    assert 261 < tokenizer.vocab_size < 300
    assert tokenizer.decode(tokenizer.encode("a blue 🦊")) == "a blue 🦊"


def test_same_captions_same_model(tokenizer: TextTokenizer) -> None:
    assert TextTokenizer.train(iter(CAPTIONS), 2048).fingerprint == tokenizer.fingerprint
    assert TextTokenizer.train(CAPTIONS[:50], 2048).fingerprint != tokenizer.fingerprint


def test_reservoir_is_uniform_and_keeps_few_as_they_are() -> None:
    letters = [str(i) for i in range(50)]
    assert _sample(letters, 50, seed=0) == letters
    drawn = [int(kept) for seed in range(200) for kept in _sample(iter(letters), 10, seed)]
    assert len(drawn) == 2000
    assert abs(np.mean(drawn) - 24.5) < 1.5
    assert _sample(letters, 10, seed=1) == _sample(letters, 10, seed=1)


def test_saved_and_pickled_tokenizers_are_the_same(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.model")
    for copy in (TextTokenizer.load(tmp_path / "tokenizer.model"), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.fingerprint == tokenizer.fingerprint
        assert copy.encode(CAPTIONS[5]) == tokenizer.encode(CAPTIONS[5])


def test_text_length_fits_the_captions(tokenizer: TextTokenizer) -> None:
    captions = [*CAPTIONS[:399], " ".join(CAPTIONS[:10])]
    assert tokenizer.suggest_text_length(captions, TextConfig()) == 12
    assert tokenizer.num_cut(captions, 12) == 1
    assert tokenizer.suggest_text_length(captions, TextConfig(max_length=10)) == 10
    assert tokenizer.suggest_text_length(captions, TextConfig(fit_length=False)) == 64
    assert tokenizer.suggest_text_length(["red"], TextConfig()) == 8
    assert tokenizer.suggest_text_length([], TextConfig()) == 64


def test_foreign_models_and_wrong_values_are_refused(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(CAPTIONS), model_writer=model, vocab_size=300, hard_vocab_limit=False, minloglevel=2
    )
    with pytest.raises(ValueError, match=r"expected \(0, 1, 2, 3\)"):
        TextTokenizer(model.getvalue())
    with pytest.raises(ValueError, match="no SentencePiece model"):
        TextTokenizer(b"nonsense")
    with pytest.raises(ValueError, match="no tokenizer at"):
        TextTokenizer.load(tmp_path / "missing.model")
    with pytest.raises(ValueError, match="no captions"):
        TextTokenizer.train(["", "  "], 512)
    with pytest.raises(ValueError, match="at least 300"):
        TextTokenizer.train(CAPTIONS, 299)
    with pytest.raises(ValueError, match="give rng"):
        tokenizer.encode("red", dropout=0.1)
    with pytest.raises(ValueError, match="0 to 1"):
        tokenizer.encode("red", dropout=1.5, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="vocab_size"):
        tokenizer.decode([tokenizer.vocab_size])


def test_tokenizer_script_trains_on_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS), encoding="utf-8")
    out = tmp_path / "new" / "tokenizer.model"
    train_tokenizer(str(tmp_path / "captions.txt"), out, None, ["text.vocab_size=400"])
    assert TextTokenizer.load(out).fingerprint == TextTokenizer.train(CAPTIONS, 400).fingerprint
    assert "400 captions" in capsys.readouterr().out


def test_tokenizer_script_takes_a_table_for_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(20):
        Image.new("RGB", (16, 16), (9 * number, 0, 0)).save(tmp_path / f"{number}.png")
    lines = [f"{number}.png,a shape of colour {number}" for number in range(20)]
    (tmp_path / "captions.txt").write_text("\n".join(["image,caption", *lines]), encoding="utf-8")
    out, changes = tmp_path / "tokenizer.model", ["text.vocab_size=300", "data.image_size=16"]
    train_tokenizer(str(tmp_path / "captions.txt"), out, None, changes, tmp_path / "prepared")
    said = capsys.readouterr().out
    assert "captions" in said and "20 captions" not in said, "those of the held-out pictures are left out"
    with pytest.raises(typer.Exit):
        train_tokenizer(str(tmp_path / "captions.txt"), tmp_path / "0.png" / "x", None, changes, tmp_path / "prepared")
    assert "0.png" in capsys.readouterr().err


def test_the_shipped_tokenizer_is_the_checkpoints_own() -> None:
    alone = Path(__file__).parents[1] / "tokenizer" / "emoji.model"
    assert alone.is_file()
    inside = Path(dalle_mini_impl.__file__).parent / "checkpoints" / "emoji" / "tokenizer.model"
    assert TextTokenizer.load(alone).fingerprint == TextTokenizer.load(inside).fingerprint
