"""A base and judges of one's own: trained on any catalog as the built-in ones are on the canvas.

Networks, losses and settings are those of the stages ``base`` and ``judges``; the captions are the catalog's.
What is under way is kept beside the new folder, so that a training that was cut off goes on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPTokenizer

from fade.concepts import CAPTION_TEMPLATE, PLAIN_PARAPHRASES, PLAIN_STYLE, STYLE_ONLY, Concept, caption
from fade.data.catalog import load_catalog, load_concepts, load_pictures, load_templates
from fade.errors import DataError
from fade.evaluation.accuracy import canvas_protocol, rate, scrambled_rate
from fade.evaluation.judges import judge_pictures, load_judge, new_judge, save_judge, train_judge
from fade.files import write_json, writing
from fade.models import base, training
from fade.models.family import load_base
from fade.models.generate import generate
from fade.models.latents import encode_pictures
from fade.models.training import Checkpoint
from fade.sheets import labelled_sheet
from fade.steps.judges import _figures

JUDGES = ("development", "report")
CHECKPOINT_EVERY = 250
MOST_TOKENS = 77
Progress = tuple[str, int, int, float | None]
"""What is under way, how much of it is done, of how much, and a loss."""


def train_base(catalog: Path, out: Path, *, params: dict[str, Any]) -> Iterator[Progress]:
    """Train autoencoder, text encoder and UNet on a catalog's training pictures; write the folder ``out``.

    Deterministic for one machine and number of threads, cut off or not.

    Args:
        params: as the section ``base`` of params.yaml; how many pictures there are, the catalog says.

    Raises:
        DataError: no pictures, of several sizes, or of one that the networks cannot halve.
        ConfigError: what is kept of an earlier training was made of other pictures or settings.
    """
    torch.set_num_threads(params["threads"])
    table = _rows(catalog, "train")
    pixels = load_pictures(catalog, table)
    factor = 2 ** (len(params["autoencoder"]["channels"]) + len(params["denoiser"]["channels"]) - 2)
    if pixels.shape[1] != pixels.shape[2] or pixels.shape[1] % factor:
        raise DataError(
            f"The pictures of {catalog} are {pixels.shape[2]} x {pixels.shape[1]}: a base of this shape draws squares "
            f"whose side is a multiple of {factor}. Build the catalog with such a --size."
        )
    captions = captions_of(table, load_concepts(catalog), load_templates(catalog))
    kept = out.with_name(f".{out.name}.training.partial")
    made_of = _made_of(table, captions, params)
    vae = base_autoencoder(params, size=pixels.shape[1])
    yield from _autoencoder(
        vae, pixels, params, Checkpoint(kept / "autoencoder.safetensors", CHECKPOINT_EVERY, made_of)
    )
    # The saved base has fp16 weights: the UNet learns the latents that those give.
    vae.to(torch.float16).to(torch.float32)
    checkpoint = Checkpoint(kept / "denoiser.safetensors", CHECKPOINT_EVERY, made_of)
    unet, text_encoder, tokenizer = yield from _denoiser(encode_pictures(vae, pixels), captions, params, checkpoint)
    with writing(out) as temporary:
        base.save_pipeline(temporary, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet)
    shutil.rmtree(kept)


def captions_of(
    table: pd.DataFrame, concepts: dict[str, Concept], templates: Sequence[str] | None
) -> list[tuple[str, ...]]:
    """All captions each picture may carry in training, its canonical one first.

    By the catalog's sentences these are every name in every sentence, and the style alone; of the canvas
    exactly those its base learnt. A picture with a caption of its own also learns the sentence that judging uses.
    """
    if templates is None:
        rows = zip(table["caption"], table["object"], table["style"], strict=True)
        return [(own, caption(one, style, CAPTION_TEMPLATE)) for own, one, style in rows]
    found = {}
    for one, style in set(zip(table["object"], table["style"], strict=True)):
        styled = "{style}" in templates[0]
        sentences = [*templates, *(PLAIN_PARAPHRASES if styled and style == PLAIN_STYLE else ())]
        named = [caption(name, style, s) for name in (one, *concepts[one].aliases) for s in sentences]
        found[one, style] = (*named, *([STYLE_ONLY.format(style=style)] if styled else []))
    return [found[pair] for pair in zip(table["object"], table["style"], strict=True)]


def base_autoencoder(params: dict[str, Any], *, size: int) -> AutoencoderKL:
    """The untrained autoencoder, its weights drawn from the seed."""
    settings = params["autoencoder"]
    base.seed_weights(params["seed"], "autoencoder")
    return base.make_autoencoder(settings["channels"], size=size, latent_channels=settings["latent_channels"])


def _autoencoder(
    vae: AutoencoderKL, pixels: NDArray[np.uint8], params: dict[str, Any], checkpoint: Checkpoint
) -> Iterator[Progress]:
    settings = {name: params["autoencoder"][name] for name in ("steps", "batch", "learning_rate")}
    for step in training.train_autoencoder(vae, pixels, seed=params["seed"], checkpoint=checkpoint, **settings):
        yield "autoencoder", step.step, step.steps, step.loss


def _denoiser(
    latents: Tensor, captions: Sequence[tuple[str, ...]], params: dict[str, Any], checkpoint: Checkpoint
) -> Any:
    settings = params["denoiser"]
    tokenizer = _tokenizer(captions, settings["max_tokens"])
    base.seed_weights(params["seed"], "denoiser")
    width = settings["text_width"]
    text_encoder = base.make_text_encoder(tokenizer, width=width, layers=settings["text_layers"])
    unet = base.make_unet(
        settings["channels"], latent_size=latents.shape[-1], text_width=width, latent_channels=latents.shape[1]
    )
    chosen = {name: settings[name] for name in ("steps", "batch", "learning_rate", "ema_decay")}
    for step in training.train_denoiser(
        unet, text_encoder, tokenizer, latents, captions, seed=params["seed"], checkpoint=checkpoint, **chosen
    ):
        yield "denoiser", step.step, step.steps, step.loss
    return unet, text_encoder, tokenizer


def _tokenizer(captions: Sequence[tuple[str, ...]], least: int) -> CLIPTokenizer:
    """Long enough for the longest caption: one cut short would lose its last words."""
    sentences = sorted({sentence for variants in captions for sentence in variants})
    longest = max(map(len, base.build_tokenizer(sentences, max_length=MOST_TOKENS)(sentences).input_ids))
    return base.build_tokenizer(sentences, max_length=min(MOST_TOKENS, max(least, longest)))


def _rows(catalog: Path, split: str) -> pd.DataFrame:
    """Rows of a split in order of their ids.

    Raises:
        DataError: there are none.
    """
    table = load_catalog(catalog)
    rows = table[table["split"] == split].sort_values("image_id", ignore_index=True)
    if rows.empty:
        raise DataError(f"{catalog} holds no {split} pictures. Add some with `fade catalog add`.")
    return rows


def _made_of(table: pd.DataFrame, captions: Sequence[tuple[str, ...]], params: dict[str, Any]) -> str:
    content = [table["sha256"].tolist(), list(captions), {n: v for n, v in params.items() if n != "pictures_per_pair"}]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def report_on(
    catalog: Path, built: Path, judges: Path | None, out: Path, *, params: dict[str, Any]
) -> Iterator[Progress]:
    """Draw every pair of the catalog; write ``sheet.png``, and with judges ``metrics.json``, into ``out``.

    Args:
        params: as the section ``base_report`` of params.yaml.
    """
    torch.set_num_threads(params["threads"])
    table = load_catalog(catalog)
    names = {kind: [c.name for c in load_concepts(catalog).values() if c.kind == kind] for kind in ("object", "style")}
    shown = set(zip(table["object"], table["style"], strict=True))
    template = (load_templates(catalog) or (CAPTION_TEMPLATE,))[0]
    samples = canvas_protocol(names["object"], names["style"], params["seeds"], template=template)
    samples = samples[[pair in shown for pair in zip(samples["object"], samples["style"], strict=True)]]
    drawn = {name: params[name] for name in ("batch", "steps", "guidance", "solver", "precision")}
    batches = generate(load_base(built), samples["prompt"].tolist(), samples["seed"].tolist(), **drawn)
    parts: list[NDArray[np.uint8]] = []
    for batch in batches:
        parts.append(batch)
        yield "pictures", sum(map(len, parts)), len(samples), None
    pictures = np.concatenate(parts)
    metrics: dict[str, Any] = {"samples": len(samples), "settings": params}
    for name in JUDGES if judges is not None else ():
        verdict = judge_pictures(load_judge(judges or Path(), name), pictures)
        seen = samples.assign(seen_object=verdict.objects, seen_style=verdict.styles)
        hits = {kind: int((seen[f"seen_{kind}"] == seen[kind]).sum()) for kind in ("object", "style")}
        metrics[name] = {kind: asdict(rate(count, len(seen))) for kind, count in hits.items()}
        metrics[name]["scrambled"] = asdict(scrambled_rate(seen))
    at = {(row["object"], row["style"], row["seed"]): i for i, row in enumerate(samples.to_dict("records"))}
    first, blank = params["seeds"][0], np.full_like(pictures[0], 255)
    rows = [
        (one, [pictures[at[one, s, first]] if (one, s, first) in at else blank for s in names["style"]])
        for one in names["object"]
    ]
    with writing(out) as temporary:
        temporary.mkdir(parents=True)
        write_json(temporary / "metrics.json", metrics)
        labelled_sheet(rows, names["style"], title=f"Seed {first}").save(temporary / "sheet.png")


def judges_identity(catalog: Path, params: dict[str, Any]) -> str:
    """Hash of what judges learn from: pictures, labels and settings.

    Raises:
        DataError: the catalog holds no training pictures.
    """
    train = _rows(catalog, "train")
    labels = list(zip(train["object"], train["style"], strict=True))
    return hashlib.sha256(json.dumps([train["sha256"].tolist(), labels, params]).encode()).hexdigest()[:16]


def train_judges(catalog: Path, out: Path, *, params: dict[str, Any]) -> Iterator[Progress]:
    """Train the judges ``development`` and ``report`` on a catalog; write them and ``metrics.json`` into ``out``.

    A judge that is done is kept beside ``out`` until both are.

    Args:
        params: as the section ``judges`` of params.yaml.

    Raises:
        DataError: the catalog holds no training or no holdout pictures, or they differ in size.
    """
    torch.set_num_threads(params["threads"])
    train, holdout = _rows(catalog, "train"), _rows(catalog, "holdout")
    pixels, unseen = load_pictures(catalog, train), load_pictures(catalog, holdout)
    names = {kind: [c.name for c in load_concepts(catalog).values() if c.kind == kind] for kind in ("object", "style")}
    kept = out.with_name(f".{out.name}.{judges_identity(catalog, params)}.partial")
    metrics: dict[str, Any] = {}
    for name in JUDGES:
        settings = params[name]
        if not (kept / f"{name}.json").is_file():
            judge = new_judge(settings["architecture"], names["object"], names["style"], seed=settings["seed"])
            chosen = {n: settings[n] for n in ("steps", "batch", "learning_rate", "scrambled_share", "seed")}
            for step, loss in train_judge(judge, pixels, train["object"].tolist(), train["style"].tolist(), **chosen):
                yield f"judge {name}", step, settings["steps"], loss
            save_judge(kept, name, judge)
        shown = list(holdout.itertuples())
        metrics[name] = _figures(load_judge(kept, name), unseen, shown, seed=settings["seed"])
    with writing(out) as temporary:
        shutil.copytree(kept, temporary)
        write_json(temporary / "metrics.json", metrics)
    shutil.rmtree(kept)
