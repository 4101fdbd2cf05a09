"""Tiny CLIP and SigLIP models with random weights, made and saved as `transformers` saves the real ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

WORDS = ["a", "red", "green", "blue", "heart", "apple", "circle", "square"]


def save_tiny_clip(folder: Path, family: str = "clip", seed: int = 0) -> Path:
    """A model of a family ("clip", "siglip") of 16 px pictures with tokenizer and processor, or a skip."""
    transformers = pytest.importorskip("transformers", reason="pretrained CLIPs need transformers: the extra `clip`")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    pieces = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    ids = {piece: index for index, piece in enumerate(pieces)}
    text = {"vocab_size": len(pieces), "max_position_embeddings": 9, "bos_token_id": 1, "eos_token_id": 2}
    text |= {"pad_token_id": 0}
    config_class, model_class, processor_class = {
        "clip": (transformers.CLIPConfig, transformers.CLIPModel, transformers.CLIPImageProcessorPil),
        "siglip": (transformers.SiglipConfig, transformers.SiglipModel, transformers.SiglipImageProcessorPil),
    }[family]
    projection = {"projection_dim": 12} if family == "clip" else {"projection_size": 16}
    config = config_class(
        text_config={**tower, **text, **projection},
        vision_config={**tower, "image_size": 16, "patch_size": 8, **projection},
        **({"projection_dim": 12} if family == "clip" else {}),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    rules = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    start = "<s> " if family == "clip" else ""
    rules.post_processor = processors.TemplateProcessing(
        single=f"{start}$A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=rules, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 16} if family == "clip" else {"height": 16, "width": 16}
    crop = {"crop_size": {"height": 16, "width": 16}} if family == "clip" else {}
    processor_class(size=size, **crop).save_pretrained(folder)
    return folder
