"""Self-distillation: the student's concept becomes the teacher's surrogate, and the rest stays."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fade.errors import ConfigError, DataError
from fade.methods.fade.adversary import Adversary
from fade.methods.fade.denial import Denial
from fade.methods.fade.examples import Examples, joined
from fade.methods.fade.processes import ALONE, Processes
from fade.methods.fade.sparse_lora import adapters_disabled
from fade.methods.fade.targeting import draw_timesteps
from fade.models.denoiser import Denoiser, autocast
from fade.models.paths import NoisePath
from fade.models.told import Told
from fade.seeding import torch_generator

HELD_OUT_POINTS = 64
CURVE = ("step", "forget_loss", "retain_loss", "gradient_norm", "held_out")
"""What is kept of each step: the columns of an erasure's ``curve.csv``."""


@dataclass(frozen=True, slots=True)
class DistillStep:
    """One step: its number (from 1), the two losses, and the gradient's norm before clipping.

    The figures lie where they were computed: reading one waits for a GPU to get there, so whoever reads none lets
    it run ahead.

    Attributes:
        held_out: share of the disagreement between concept and surrogate that is left on held-out
            pictures, 1 before training; None at steps where it was not measured.
    """

    step: int
    losses: Tensor
    norm: Tensor
    held_out: float | None = None

    @property
    def forget_loss(self) -> float:
        """L_f."""
        return float(self.losses[0])

    @property
    def retain_loss(self) -> float:
        """L_r."""
        return float(self.losses[1])

    @property
    def gradient_norm(self) -> float:
        """Of the weighted sum's gradient, before clipping."""
        return float(self.norm)

    @property
    def at_hand(self) -> bool:
        """Whether its figures can be read without waiting for a GPU."""
        return self.losses.device.type == "cpu"

    def figures(self) -> dict[str, float | int | None]:
        """A row of the curve, by ``CURVE``."""
        return {name: getattr(self, name) for name in CURVE}


@dataclass(frozen=True, slots=True)
class Sets:
    """What distillation learns from; ``held_out`` only decides when to stop."""

    forget: Examples
    surrogate: Examples
    retain: Examples
    held_out: Examples | None = None

    def check(self, *, stopping: bool) -> None:
        """Raise DataError for an empty set that is needed."""
        needed = {"forget": self.forget, "surrogate": self.surrogate, "retain": self.retain}
        if stopping:
            needed["held-out"] = self.held_out if self.held_out is not None else self.forget[:0]
        for name, examples in needed.items():
            if len(examples) == 0:
                raise DataError(f"The {name} set is empty: distillation needs at least one example of it.")


@dataclass(frozen=True, slots=True)
class _Batch:
    """Forget examples first, the last of them denied, then as many retain examples, with their draws.

    Attributes:
        target: the teacher's answers, where they are known already.
        towards: what the denied ones lead to, and how far.
    """

    examples: Examples
    timesteps: Tensor
    noisy: Tensor
    forget_count: int
    target: Tensor | None = None
    towards: Tensor | None = None
    denial: Denial | None = None

    def __getitem__(self, rows: Tensor) -> _Batch:
        """Some rows, as many of either half."""
        target = None if self.target is None else self.target[rows]
        return _Batch(self.examples[rows], self.timesteps[rows], self.noisy[rows], len(rows) // 2, target)

    def parts(self, at_once: int | None, processes: Processes) -> Iterator[slice]:
        """This process' rows, ``at_once`` at a time."""
        mine = processes.rows(len(self.noisy))
        size = at_once or len(self.noisy)
        for start in range(mine.start, mine.stop, size):
            yield slice(start, min(start + size, mine.stop))


class _Batches:
    """Draws a batch a step; all draws of a run come from one generator, in a fixed order."""

    def __init__(
        self,
        sets: Sets,
        *,
        empty: Told,
        path: NoisePath,
        timesteps: Tensor,
        batch: int,
        surrogate_share: float,
        empty_caption_share: float,
        denial: Denial | None,
        seed: int,
    ) -> None:
        self._sets, self._empty, self._path, self._denial = sets, empty, path, denial
        self._timesteps, self._batch, self._surrogate_share = timesteps, batch, surrogate_share
        self._empty_share = empty_caption_share
        self._generator = torch_generator(seed, "distill")
        self._pool: _Batch | None = None
        self._orders = torch.empty(2, 0, dtype=torch.long)

    def fill(self, count: int, denoiser: Denoiser, precision: str, at_once: int, processes: Processes) -> None:
        """Draw ``count`` forget and as many retain examples and ask the teacher once; batches are then of these."""
        drawn = self._drawn(count, None, denoiser.device)
        target = torch.zeros_like(drawn.noisy)
        with torch.no_grad():
            for part in drawn.parts(at_once, processes):
                target[part] = _answers_of_teacher(denoiser, drawn, part, precision)
        processes.add_up([target])  # each row is one process' answer and the others' zeros
        self._pool = replace(drawn, target=target)

    def draw(self, adversary: Adversary | None, device: torch.device) -> _Batch:
        """The next batch: of the pool, all of which is seen before any of it is seen again, or fresh."""
        if self._pool is None:
            return self._drawn(self._batch, adversary, device)
        count = self._pool.forget_count
        while self._orders.shape[1] < self._batch:
            more = torch.stack([torch.randperm(count, generator=self._generator) for _ in range(2)])
            self._orders = torch.cat([self._orders, more], dim=1)
        rows, self._orders = self._orders[:, : self._batch], self._orders[:, self._batch :]
        return self._pool[torch.cat([rows[0], rows[1] + count])]

    def _drawn(self, batch: int, adversary: Adversary | None, device: torch.device) -> _Batch:
        generator = self._generator
        named = batch - (0 if self._denial is None else round(batch * self._denial.share))
        stand_ins = round(named * self._surrogate_share)
        forget = joined(
            self._sets.forget.drawn(named - stand_ins, generator), self._sets.surrogate.drawn(stand_ins, generator)
        )
        retain = self._sets.retain.drawn(batch, generator)
        # Some retain examples carry the empty prompt, so that guidance's other half stays the teacher's too.
        drop = torch.rand(batch, generator=generator) < self._empty_share
        retain = Examples(
            retain.latents, retain.prompts.replaced(drop, self._empty), retain.targets.replaced(drop, self._empty)
        )
        if adversary is not None:
            forget, retain = adversary.disturbed(forget, retain, generator)
        times, towards = [draw_timesteps(self._timesteps, named, generator)], None
        if self._denial is not None and adversary is not None and named < batch:
            shown, seen, towards = self._denial.drawn(batch - named, adversary.known, generator)
            forget, times, towards = joined(forget, shown), [*times, seen], towards.to(device)
        examples = joined(forget, retain)
        timesteps = torch.cat([*times, torch.randint(self._path.steps, (batch,), generator=generator)])
        noise = torch.randn(examples.latents.shape, generator=generator)
        noisy = self._path.noised(examples.latents, noise, timesteps)
        return _Batch(examples.to(device), timesteps.to(device), noisy.to(device), batch, None, towards, self._denial)


def distill(
    denoiser: Denoiser,
    parameters: Sequence[Tensor],
    *,
    sets: Sets,
    empty: Told,
    timesteps: Tensor,
    steps: int,
    batch: int,
    learning_rate: float,
    weight_decay: float,
    clip_norm: float,
    forget_weight: float,
    retain_weight: float,
    surrogate_share: float,
    empty_caption_share: float,
    precision: str,
    seed: int,
    stop_at: float | None = None,
    check_every: int = 10,
    micro_batch: int | None = None,
    pool: int | None = None,
    adversary: Adversary | None = None,
    denial: Denial | None = None,
    processes: Processes = ALONE,
) -> Iterator[DistillStep]:
    """Train the adapter's tensors; yields after each step.

        L_f = || e_student(z_t, t, c) - e_teacher(z_t, t, c_surrogate) ||^2
        L_r = || e_student(z_t, t, c) - e_teacher(z_t, t, c) ||^2
        L   = forget_weight L_f + retain_weight L_r                                (FADE, stage 2)

    The teacher is the same network with its adapters off; student and teacher see the same z_t and t,
    and the true noise is never the target. z_t of forget examples is made from pictures of the concept
    and of the surrogate, mixed (ours: either must lead to the surrogate). The student runs forget and
    retain examples in one forward, the teacher likewise.

    Args:
        parameters: the trainable tensors; all others of the network stay as they are.
        empty: the empty prompt, one row; a share of retain examples carries it.
        timesteps: probabilities of the forget half's timesteps, (T,); the retain half's are uniform.
        stop_at: end early, with a short cool-down, once the held-out disagreement has fallen to this
            share of what it was (ours); ``steps`` is the most then.
        micro_batch: examples that go forward and backward at a time (all of a step's if None); changes
            memory, and the result by rounding alone.
        pool: noisy forget examples, and as many retain examples, that are drawn and answered by the teacher
            once, before training, and then seen over and over (ours): the teacher's forwards are no longer
            one a step. Fresh ones every step if None, and always with an adversary, whose captions change.
        adversary: replaces captions by text states that bring the concept back (``depth: deep``, ours).
        denial: with an adversary, what of the concept's pictures gives way whatever is said (ours).
        processes: share a batch's rows among them; each then yields the same steps.

    Raises:
        DataError: a set of examples is empty.
        ConfigError: more processes than a batch has rows.
    """
    sets.check(stopping=stop_at is not None)
    if processes.count > 2 * batch:
        raise ConfigError(f"{processes.count} processes share {2 * batch} rows of a batch: use at most so many.")
    device = denoiser.device
    batches = _Batches(
        sets,
        empty=empty,
        path=denoiser.path,
        timesteps=timesteps,
        batch=batch,
        surrogate_share=surrogate_share,
        empty_caption_share=empty_caption_share,
        denial=denial if adversary is not None else None,
        seed=seed,
    )
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
    course = _Course(steps, early=stop_at is not None)
    held_out = None
    if stop_at is not None and sets.held_out is not None:
        held_out = _HeldOut(denoiser, sets.held_out, timesteps, precision=precision, at_once=micro_batch, seed=seed)
    if pool is not None and adversary is None:
        batches.fill(pool, denoiser, precision, micro_batch or 2 * batch, processes)
    step = 0
    while step < course.end:
        step += 1
        if adversary is not None:
            adversary.advance(denoiser)
        drawn = batches.draw(adversary, device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * course.rate(step)
        optimizer.zero_grad(set_to_none=True)
        losses = torch.zeros(2, device=device)
        for part in drawn.parts(micro_batch, processes):
            forget_share, retain_share = _losses(denoiser, drawn, part, precision)
            (forget_weight * forget_share + retain_weight * retain_share).backward()
            losses += torch.stack([forget_share, retain_share]).detach()
        processes.add_up([losses, *(parameter.grad for parameter in parameters if parameter.grad is not None)])
        norm = nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        left = None
        if held_out is not None and stop_at is not None and step % check_every == 0:
            left = held_out.left(denoiser, processes)
            if left <= stop_at:
                course.cool_down(step)
        yield DistillStep(step, losses, norm.detach(), left)


def _losses(denoiser: Denoiser, drawn: _Batch, part: slice, precision: str) -> tuple[Tensor, Tensor]:
    """What some rows of a batch add to L_f and L_r: student against teacher at the same z_t and t."""
    if drawn.target is None:
        with torch.no_grad():
            target = _answers_of_teacher(denoiser, drawn, part, precision)
    else:
        target = drawn.target[part]
    target, weight = _with_denial(denoiser, drawn, part, target)
    with autocast(precision, drawn.noisy.device.type):
        predicted = denoiser.predict(drawn.noisy[part], drawn.timesteps[part], drawn.examples.prompts[part])
    error = (predicted.float() - target).square().mean(dim=(1, 2, 3)) * weight
    here = min(max(drawn.forget_count - part.start, 0), len(error))
    retain_count = len(drawn.noisy) - drawn.forget_count
    return error[:here].sum() / drawn.forget_count, error[here:].sum() / retain_count


def _with_denial(denoiser: Denoiser, drawn: _Batch, part: slice, target: Tensor) -> tuple[Tensor, Tensor]:
    """Some rows' targets, those of denied rows moved, and how much each row's error counts."""
    weight = torch.ones(len(target), device=target.device)
    if drawn.denial is None or drawn.towards is None:
        return target, weight
    first = drawn.forget_count - len(drawn.towards)
    rows = torch.arange(part.start, part.start + len(target))
    here = ((rows >= first) & (rows < drawn.forget_count)).nonzero()[:, 0].to(target.device)
    at = here + part.start
    timesteps, towards = drawn.timesteps[at], drawn.towards[at - first]
    moved = target.clone()
    moved[here] = drawn.denial.moved(drawn.noisy[at], timesteps, target[here], towards)
    weight[here] = drawn.denial.weights(timesteps)
    return moved, weight


def _answers_of_teacher(denoiser: Denoiser, drawn: _Batch, part: slice, precision: str) -> Tensor:
    """e_teacher(z_t, t, c_target) of some rows, float32."""
    with autocast(precision, drawn.noisy.device.type), adapters_disabled(denoiser.network):
        return denoiser.predict(drawn.noisy[part], drawn.timesteps[part], drawn.examples.targets[part]).float()


class _Course:
    """Learning rate over the steps: a cosine to zero, or constant until a cool-down of a fifth begins."""

    def __init__(self, steps: int, *, early: bool) -> None:
        self.end = steps
        self._early = early
        self._cooling = max(1, steps // 5)
        self._from = steps - self._cooling

    def cool_down(self, step: int) -> None:
        if step < self._from:
            self._from, self.end = step, step + self._cooling

    def rate(self, step: int) -> float:
        """Share of the peak; ``step`` counts from 1."""
        if not self._early:
            return 0.5 * (1 + math.cos(math.pi * (step - 1) / self.end))
        return min(1.0, (self.end - step + 1) / (self._cooling + 1)) if step > self._from else 1.0


class _HeldOut:
    """Disagreement left on pictures not trained on, at fixed draws:

    || e_student(c) - e_teacher(c_surrogate) ||^2 / || e_teacher(c) - e_teacher(c_surrogate) ||^2   (ours)
    """

    def __init__(
        self,
        denoiser: Denoiser,
        examples: Examples,
        timesteps: Tensor,
        *,
        precision: str,
        at_once: int | None,
        seed: int,
    ) -> None:
        generator = torch_generator(seed, "held out")
        device = denoiser.device
        self._precision, self._at_once = precision, at_once or HELD_OUT_POINTS
        chosen = examples.drawn(HELD_OUT_POINTS, generator)
        drawn = draw_timesteps(timesteps, HELD_OUT_POINTS, generator)
        noise = torch.randn(chosen.latents.shape, generator=generator)
        self._noisy = denoiser.path.noised(chosen.latents, noise, drawn).to(device)
        self._timesteps, self._prompts = drawn.to(device), chosen.prompts.to(device)
        with adapters_disabled(denoiser.network):
            self._target = self._answers(denoiser, chosen.targets.to(device))
            self._before = self._apart(denoiser)
        if self._before == 0:
            raise DataError(
                "The base answers the held-out captions of concept and surrogate alike: nothing is left to overwrite."
            )

    @torch.no_grad()
    def _answers(self, denoiser: Denoiser, told: Told) -> Tensor:
        parts = (slice(start, start + self._at_once) for start in range(0, HELD_OUT_POINTS, self._at_once))
        with autocast(self._precision, self._noisy.device.type):
            return torch.cat([denoiser.predict(self._noisy[p], self._timesteps[p], told[p]).float() for p in parts])

    def _apart(self, denoiser: Denoiser) -> float:
        return float((self._answers(denoiser, self._prompts) - self._target).square().mean())

    def left(self, denoiser: Denoiser, processes: Processes) -> float:
        """What is left, as a share of what there was: the mean over the processes, so that all stop as one."""
        return processes.mean(self._apart(denoiser) / self._before, self._noisy.device)
