"""Tokenizers, text encoders and autoencoders of tiny bases: every word of the canvas' captions is a token."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Sequence
from typing import Any

from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from fade.concepts import caption
from fade.data.canvas import OBJECTS
from fade.data.styles import STYLES
from fade.models.families import lumina2, sana
from fade.models.training import networks as small

LENGTH, LATENT, CHANNELS, PICTURE, LANGUAGE_LENGTH = 16, 16, 4, 64, 56
"""Tokens of a prompt, side and channels of latents, side of a picture, tokens of a prompt in its template."""
QWEN_IMAGE_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
"""Of which the stock pipeline drops the first 34 tokens."""
_CAPTIONS = sorted(caption(o, s) for o in OBJECTS for s in STYLES)


def clip_tokenizer() -> CLIPTokenizer:
    """Every word of the canvas' captions is a token."""
    return small.build_tokenizer(_CAPTIONS, max_length=LENGTH)


def clip_config(tokenizer: CLIPTokenizer, *, width: int, act: str, projection: int) -> CLIPTextConfig:
    """Of a CLIP that reads."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act=act,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_tokenizer(*, length: int = LENGTH) -> T5Tokenizer:
    """The same words, and letters for others."""
    words = sorted({word.strip(".") for line in _CAPTIONS for word in line.split()})
    letters = "abcdefghijklmnopqrstuvwxyz.,"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [(f"▁{word}", -2.0) for word in words] + [(letter, -9.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)


def t5(tokenizer: T5Tokenizer, *, width: int) -> T5EncoderModel:
    """T5 1.1's encoder."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=8,
            d_ff=2 * width,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )


def language_tokenizer(template: str = "", *, length: int = LANGUAGE_LENGTH) -> Qwen2Tokenizer:
    """A byte-pair tokenizer as Qwen's and Mistral's: every word of captions and templates is a token."""
    lines = [*_CAPTIONS, QWEN_IMAGE_TEMPLATE, SYSTEM_MESSAGE, template]
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=5000, initial_alphabet=alphabet, show_progress=False)
    words.train_from_iterator(lines, trainer)
    learnt = json.loads(words.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(merge) for merge in learnt["merges"]],
        model_max_length=length,
        additional_special_tokens=["<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"],
        chat_template=template or None,
    )


def _merged(tokens: Sequence[str], pieces: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and merges by which every piece is one token, grown letter by letter."""
    vocabulary, merges = {token: number for number, token in enumerate(tokens)}, []
    for piece in pieces:
        for end in range(2, len(piece) + 1):
            if piece[:end] not in vocabulary:
                vocabulary[piece[:end]] = len(vocabulary)
                merges.append((piece[: end - 1], piece[end - 1]))
    return vocabulary, merges


def _words(*texts: str) -> list[str]:
    return sorted({word for text in texts for word in re.findall("[A-Za-z]+", text)})


def gemma_tokenizer() -> GemmaTokenizer:
    """The same words, those that pipelines write before a prompt, and letters for others."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.ascii_letters, ".", ","]
    words = _words(*_CAPTIONS, *sana.INSTRUCTION, lumina2.SYSTEM)
    vocabulary, merges = _merged(tokens, [f"▁{word}" for word in words])
    return GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)


def gemma(tokenizer: GemmaTokenizer, *, width: int) -> Gemma2Model:
    """Gemma 2's states."""
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            sliding_window=32,
        )
    )


def qwen3(tokenizer: Qwen2Tokenizer, *, width: int) -> Qwen3Model:
    """Qwen 3's states."""
    return Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )


def autoencoder(**config: float) -> Any:
    """AutoencoderKL of factor 4."""
    vae = small.make_autoencoder([16, 16, 16], size=PICTURE, latent_channels=CHANNELS)
    vae.register_to_config(**config)
    return vae
