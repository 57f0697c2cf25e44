"""Whether a loaded pipeline is what it was: all that decides a picture, compared cheaply (ours).

An adapter erases on the base it was made on, through the modules it was put on. So the runtime looks before and
after each picture at the parts, at their modules' classes, forwards, hooks and settings, at every weight's content
and at the tokenizers; once, at the start, it holds all of that against the base's files read anew.

Weights are compared by sums of their bits taken as whole numbers, along rows and along columns: torch's own
counters of versions do not see what is written through ``.data``, which is how weights are mostly edited.
All this finds what other code does to a pipeline. It is no defence against code in the same process that means to
deceive: that could as well read the weights and draw by itself.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from fade.errors import BaseModelError, RefusedError, listing
from fade.models.registry import family

_FREE = {"use_slicing", "use_tiling", "gradient_checkpointing"}
"""Settings that say how a part saves memory, not what it computes."""
_ATTENTION = {
    "AttnProcessor",
    "AttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
    "CountedJointAttention",
}
"""The same attention, computed in different ways."""
_CODE = types.FunctionType, staticmethod, classmethod, property
_CALLED = "__call__", "_wrapped_call_impl", "_call_impl", "forward", "__getattr__", "__getattribute__"
_PLAIN = bool, int, float, str, tuple, type(None)
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_COLUMNS = 1024
_SMALL = 16 * _COLUMNS
"""Bytes up to which a tensor is compared as it is."""
_LACKING = object()


class Integrity:
    """A pipeline as it is now, to be held against what it is later.

    Args:
        pipeline: a diffusers pipeline. Its scheduler may be exchanged later for another solver of the same noise.
    """

    def __init__(self, pipeline: Any) -> None:
        self._parts = _parts(pipeline)
        self._modules: list[tuple[str, nn.Module, type, dict[str, Any]]] = []
        self._tables: list[tuple[str, Any, Any, Any, tuple[int, ...]]] = []
        self._empty: list[tuple[str, Any]] = []
        self._sets: list[tuple[str, set[Any], frozenset[Any]]] = []
        self._slots: list[tuple[str, dict[str, Any], str]] = []
        seen: set[int] = set()
        for name, part in self._parts.items():
            if isinstance(part, nn.Module):
                for inner, module in part.named_modules(prefix=name):
                    self._modules.append((inner, module, type(module), vars(module)))
                    self._note(inner, vars(module), seen)
            elif not _is_tokenizer(name):
                self._note(name, _inside(part), seen)
        for label, table in vars(torch_modules).items():
            if label.startswith("_global_"):
                self._note("torch.nn", table, seen)
        kinds = {type(pipeline), *(kind for _, _, kind, _ in self._modules)}
        self._called = [(kind, name, _lookup(kind, name)) for kind in kinds for name in _CALLED]
        self._code = [
            (kind, name, one)
            for kind in {above for kind in kinds for above in kind.__mro__} - {object}
            for name, one in vars(kind).items()
            if isinstance(one, _CODE)
        ]
        self._spellings = dict(_spellings(pipeline))
        predicts, levels = _noise(pipeline)
        self._noise = predicts, None if levels is None else levels.clone()
        self._facts, tensors = self._tensors()
        self._content, self._sizes = _content(tensors)

    def check(self, pipeline: Any) -> None:
        """Raise RefusedError, which names the first differences, unless the pipeline is what it was."""
        self.check_modules(pipeline)
        _refuse(self._changed_weights())

    def check_modules(self, pipeline: Any) -> None:
        """The same without the weights' content, in a third of the time."""
        self.check_parts(pipeline)
        _refuse(self._differences(pipeline))

    def check_parts(self, pipeline: Any) -> None:
        """The same of which parts it has alone; also of a copy."""
        _refuse([f"the pipeline's {name}" for name in _unlike(_parts(pipeline), self._parts)])

    def _differences(self, pipeline: Any) -> list[str]:
        changed = [
            f"the class of {name}"
            for name, module, kind, table in self._modules
            if type(module) is not kind or vars(module) is not table
        ]
        changed += [f"{name} {listing(live)}" for name, live in self._empty if live]
        changed += [name for name, live, held in self._sets if live != held]
        # In C as far as may be: there are thousands of them.
        for name, _, live, held, _ in [row for row in self._tables if tuple(map(id, row[1])) != row[4]]:
            changed += [f"{name}.{key}" for key in _unlike(_as_dict(live), _as_dict(held))]
        changed += [f"{kind.__name__}.{name}" for kind, name, one in self._code if vars(kind).get(name) is not one]
        changed += [f"{kind.__name__}.{name}" for kind, name, one in self._called if _lookup(kind, name) is not one]
        changed += [name for name, spelling in _spellings(pipeline) if spelling != self._spellings[name]]
        if not _same_noise(_noise(pipeline), self._noise):
            changed.append("the scheduler's noise")
        return changed

    def _changed_weights(self) -> list[str]:
        facts, tensors = self._tensors()
        names = [f"{label}.{key}" for label, _, key in self._slots]
        if facts != self._facts:
            return [name for name, now, then in zip(names, facts, self._facts, strict=True) if now != then]
        content, _ = _content(tensors)
        if torch.equal(content, self._content):
            return []
        parts = {index: size for index, size in self._sizes}
        pairs = zip(parts, content.split([*parts.values()]), self._content.split([*parts.values()]), strict=True)
        return [names[index] for index, now, then in pairs if not torch.equal(now, then)]

    def _tensors(self) -> tuple[list[tuple[Any, ...]], list[Tensor]]:
        """Of every tensor that a module holds its class, type and shape; and itself."""
        tensors = [table[key] for _, table, key in self._slots]
        return [(type(tensor), tensor.dtype, tensor.shape) for tensor in tensors], tensors

    def _note(self, label: str, value: Any, seen: set[int]) -> None:
        """Keep what a container holds, and what that holds in turn; a module is kept by its part."""
        if not isinstance(value, dict | list | set) or id(value) in seen:
            return
        seen.add(id(value))
        if not value:
            self._empty.append((label, value))
            return
        if isinstance(value, set):
            self._sets.append((label, value, frozenset(value)))
            return
        # Not by `copy`: a container of a class of its own could compute something.
        held: Any = dict(value) if isinstance(value, dict) else list(value)
        view = value.values() if isinstance(value, dict) else value
        self._tables.append((label, view, value, held, tuple(map(id, view))))
        for key, one in _as_dict(value).items():
            if isinstance(one, Tensor) and isinstance(value, dict):
                self._slots.append((label, value, key))
            self._note(label if str(key).startswith("_") else f"{label}.{key}", _inside(one), seen)


def _refuse(changed: list[str]) -> None:
    if changed:
        raise RefusedError(
            f"The pipeline is not what it was when the runtime began: {listing(changed)} changed. Adapters erase "
            "on the base they were made on alone, so nothing is drawn. Load the base anew and make a runtime of "
            "it; merging, fusing, offloading and other adapters are not for a pipeline that has one."
        )


def check_against_files(pipeline: Any, anew: Any, *, origin: object) -> None:
    """Hold a pipeline against another one that was read from the base's files just now.

    Args:
        anew: of the same class, on the CPU; its weights may be held in another type.
        origin: the base, for error messages.

    Raises:
        BaseModelError: they differ in a part's modules, settings, hooks or weights, a tokenizer or the noise.
    """
    wrong: list[str] = []
    kind = family(type(anew).__name__)
    stock = {ours: theirs for theirs, ours in kind.exchanged.items()}
    for part in (name for name in kind.parts if getattr(anew, name) is not None):
        held = dict(getattr(pipeline, part).named_modules(prefix=part))
        read = dict(getattr(anew, part).named_modules(prefix=part))
        wrong += sorted({*held} ^ {*read})
        for name in held.keys() & read.keys():
            wrong += [f"{name}{key}" for key in _module_differences(held[name], read[name], stock)]
    spellings = dict(_spellings(pipeline))
    wrong += [name for name, spelling in _spellings(anew) if spellings.get(name) != spelling]
    if not _same_noise(_noise(pipeline), _noise(anew)):
        wrong.append("the scheduler's noise")
    if wrong:
        raise BaseModelError(
            f"The pipeline is not the base in {origin}: {listing(sorted(wrong))} differ. Give the runtime the base as "
            "it was loaded, without adapters, hooks, offloading or fused and edited weights."
        )


def _module_differences(held: nn.Module, read: nn.Module, stock: Mapping[type, type]) -> Iterator[str]:
    """Names of what two modules differ in, each with a dot before it; empty for the class.

    Args:
        stock: classes that ``load_base`` gives, to those they are given for.
    """
    if stock.get(type(held), type(held)) is not type(read):
        yield ""
        return
    ours, theirs = vars(held), vars(read)
    for key in ours.keys() | theirs.keys():
        mine, other = ours.get(key, _LACKING), theirs.get(key, _LACKING)
        if key in ("_parameters", "_buffers"):
            yield from (f".{name}" for name in mine.keys() | other.keys() if not _same_weight(mine, other, name))
        elif key in {"_internal_dict", "config"}:
            settings = _settings(mine), _settings(other)
            yield from (
                f".config.{n}" for n in {*settings[0], *settings[1]} if settings[0].get(n) != settings[1].get(n)
            )
        elif "hooks" in key:
            yield from [f".{key}"] if mine != other else []
        elif key == "processor" and type(mine).__name__ in _ATTENTION:
            continue
        elif not key.startswith("_") and key not in _FREE and not _alike(mine, other):
            yield f".{key}"


def _alike(mine: object, other: object) -> bool:
    """Whether two modules' attributes say the same."""
    if isinstance(mine, Tensor) and isinstance(other, Tensor):
        return torch.equal(mine.cpu(), other.cpu().to(mine.dtype))
    if type(mine) is not type(other):
        return False
    if isinstance(mine, list | tuple | dict) and isinstance(other, list | tuple | dict):
        ours, theirs = _as_dict(mine), _as_dict(other)
        return ours.keys() == theirs.keys() and all(_alike(one, theirs[key]) for key, one in ours.items())
    return mine == other if isinstance(mine, (*_PLAIN, *_CODE, set)) else True


def _same_weight(held: Mapping[str, Tensor | None], read: Mapping[str, Tensor | None], name: str) -> bool:
    mine, other = held.get(name), read.get(name)
    if mine is None or other is None:
        return mine is other and name in held and name in read
    if type(mine) is not type(other) or mine.shape != other.shape or mine.is_meta:
        return False
    return torch.equal(mine.detach().cpu(), other.detach().to(mine.dtype))


def _settings(config: Any) -> dict[str, Any]:
    """A part's configuration without what says how and by which version it was read."""
    values = dict(config if isinstance(config, dict) else vars(config))
    size = values.get("sample_size")
    if isinstance(size, list | tuple) and len({*size}) == 1:
        values["sample_size"] = size[0]  # as `load_base` holds a pair of equal ones
    return {k: v for k, v in values.items() if not k.startswith("_") and k not in ("dtype", "transformers_version")}


def _parts(pipeline: Any) -> dict[str, Any]:
    """What a pipeline draws with, its scheduler apart, and its settings."""
    parts = {name: part for name, part in vars(pipeline).items() if name[0] != "_" and name != "scheduler"}
    return parts | {name: value for name, value in pipeline.config.items() if isinstance(value, bool | int | float)}


def _is_tokenizer(name: str) -> bool:
    return name.rstrip("_0123456789") == "tokenizer"  # and not a length of it, which some pipelines keep


def _spellings(pipeline: Any) -> Iterator[tuple[str, object]]:
    """Each tokenizer's name and all it knows; padding and cutting, which each call sets, apart."""
    for name, part in vars(pipeline).items():
        if not _is_tokenizer(name) or part is None:
            continue
        yield f"{name}.chat_template", getattr(part, "chat_template", None)
        tokenizer = getattr(part, "tokenizer", part)  # of a processor, which reads pictures too
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            yield name, (tokenizer.model_max_length, sorted(tokenizer.get_vocab().items()))
        else:
            text = backend.to_str()
            yield name, (tokenizer.model_max_length, text[text.index('"added_tokens"') :])


def _noise(pipeline: Any) -> tuple[object, Tensor | None]:
    return family(type(pipeline).__name__).noise_schedule(pipeline.scheduler)


def _same_noise(one: tuple[object, Tensor | None], other: tuple[object, Tensor | None]) -> bool:
    mine, theirs = one[1], other[1]
    if mine is None or theirs is None or one[0] != other[0] or mine.shape != theirs.shape:
        return False
    return bool(torch.allclose(mine.cpu(), theirs.cpu(), rtol=1e-5))


def _inside(value: object) -> object:
    """A container as it is; the attributes of another object, unless it is code, a module or a tensor."""
    if isinstance(value, (*_PLAIN, *_CODE, dict, list, set, type, nn.Module, Tensor, types.ModuleType)):
        return value
    return getattr(value, "__dict__", None)


def _ids(table: Any) -> tuple[int, ...]:
    return tuple(map(id, table.values() if isinstance(table, dict) else table))


def _as_dict(table: Any) -> Mapping[Any, Any]:
    return table if isinstance(table, dict) else dict(enumerate(table))


def _unlike(live: Mapping[Any, Any], kept: Mapping[Any, Any]) -> list[str]:
    """Keys of what is not the same; of two tensors the content is compared elsewhere."""
    found = []
    for key in kept.keys() | live.keys():
        now, then = live.get(key, _LACKING), kept.get(key, _LACKING)
        same = now is then or (type(now) is type(then) and isinstance(now, (*_PLAIN, Tensor)))
        if key not in _FREE and not (same and (isinstance(now, Tensor) or now is then or now == then)):
            found.append(str(key))
    return sorted(found)


def _lookup(kind: type, name: str) -> object:
    """What instances of a class find under a name."""
    return next((vars(above)[name] for above in kind.__mro__ if name in vars(above)), None)


@torch.no_grad()
def _content(tensors: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Whole numbers, (K,) int64 on the CPU, that change with the tensors' bits; of which tensor how many, in order.

    They are sums along rows and along columns; of a small tensor its bits themselves.
    """
    small: dict[torch.dtype, list[int]] = {}
    found: list[tuple[int, Tensor]] = []
    for index, tensor in enumerate(tensors):
        if tensor.numel() * tensor.element_size() <= _SMALL:
            small.setdefault(tensor.dtype, []).append(index)
        else:
            found.append((index, _sums(tensor)))
    sizes = [(index, len(sums)) for index, sums in found]
    pieces = [sums for _, sums in found]
    for dtype, indices in small.items():
        sizes += [(index, tensors[index].numel()) for index in indices]
        flat = _joined([tensors[index].reshape(-1) for index in indices])
        pieces.append(flat.view(_WORDS[dtype.itemsize]).to(torch.int64))
    return _joined(pieces).cpu(), sizes


def _sums(tensor: Tensor) -> Tensor:
    flat = tensor.detach()
    if flat.dim() == 4 and flat.is_contiguous(memory_format=torch.channels_last):
        flat = flat.permute(0, 2, 3, 1)
    flat = flat.contiguous().view(-1)
    # Eight bytes at a time where they come out even: no number is as fast to add up as this machine's own.
    whole = flat.numel() * flat.element_size() % 8 == 0 and flat.storage_offset() * flat.element_size() % 8 == 0
    words = flat.view(torch.int64) if whole else flat.view(_WORDS[flat.element_size()]).to(torch.int64)
    rows = len(words) // _COLUMNS
    table, rest = words[: rows * _COLUMNS].view(rows, _COLUMNS), words[rows * _COLUMNS :]
    return torch.cat([table.sum(0), table.sum(1), rest])


def _joined(tensors: list[Tensor]) -> Tensor:
    """One tensor of several, where the first lies; parts of a pipeline may lie apart."""
    if len({one.device for one in tensors}) > 1:
        tensors = [one.to(tensors[0].device) for one in tensors]
    return torch.cat(tensors) if tensors else torch.empty(0, dtype=torch.int64)
