"""``fade doctor --base MODEL``: what a base is, and all that keeps it from being erased from, before it is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from fade.errors import FadeError, listing
from flows.operations.findings import Finding

_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")


def examine_base(source: str) -> Iterator[Finding]:
    """What is known of a base; after a failure nothing more is looked at, since the rest depends on it."""
    from fade.models.prompts import UNSAID_LENGTH, readers
    from fade.models.registry import family
    from fade.models.source import deciding_files, find_base, identity
    from fade.models.supported import configurations, read_config
    from fade.models.tensors import check_weights

    try:
        found = find_base(source)
        index = read_config(found.config / "model_index.json")
        size, predicts = found.picture_size, family(found.pipeline).predicts(configurations(found.config))
        schedule = f"{index['scheduler'][1]}, predicts {predicts}"
        yield Finding("base", "ok", f"{found.pipeline} in {found.path}: {size} x {size}, {schedule}")
        if left_out := [name for name in _LEFT_OUT if (index.get(name) or [None])[0] is not None]:
            yield Finding("base", "ok", f"not read: {listing(left_out)}, which make no part of a picture")
        for part in found.parts:
            if part.variant is not None:
                yield Finding("base", "ok", f"{part.part}: the variant {part.variant}, as there are no main weights")
            if part.unread:
                yield Finding("base", "ok", f"{part.part}: not read beside the main weights: {listing(part.unread)}")
        check_weights(found)
        yield Finding(
            "weights", "ok", f"every tensor is there, of its shape and finite, in {len(found.weights)} file(s)"
        )
        for reader in readers(found):
            said = f"{reader.length} tokens of a prompt are read, begin and end among them"
            if reader.tokenizer.model_max_length > UNSAID_LENGTH:
                said += " (the text encoder's length: the tokenizer says none)"
            yield Finding("prompts", "ok", said)
        yield Finding("identity", "ok", f"{identity(found)}, of {len(deciding_files(found))} files")
    except FadeError as error:
        yield Finding("base", "fail", str(error))
