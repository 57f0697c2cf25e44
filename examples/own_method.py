"""Benchmark a method of your own: any function from prompts and seeds to pictures, before the project's judges.

    python examples/own_method.py

The method here is the simplest there is: the prompt's word is replaced. It forgets the name perfectly, and nothing
else; whoever writes "an orange animal with whiskers" on a real model walks past it. That is why depth is measured too.
"""

from pathlib import Path

import numpy as np

from fade.concepts import Concept
from fade.data.canvas import OBJECTS
from fade.data.styles import STYLES
from fade.evaluation.accuracy import canvas_protocol, drift, naming_none, summary
from fade.evaluation.judges import judge_pictures, load_judge
from fade.models.family import load_base
from fade.models.generate import generate_batch
from fade.project import load_project

CONCEPT, SURROGATE, SEEDS = Concept("cat", "object"), "horse", (188,)
project = load_project()
base = load_base(project.base)
judge = load_judge(Path(project.judges), "report")


def draw(prompts, seeds):
    """The base's pictures (B, H, W, 3), uint8."""
    return generate_batch(base, list(prompts), list(seeds), steps=10, guidance=4.0, solver="dpm++", precision="fp32")


def my_method(prompts, seeds):
    """Yours instead: load your weights, steer, filter ..."""
    return draw([prompt.replace(CONCEPT.name, SURROGATE) for prompt in prompts], seeds)


samples = canvas_protocol(list(OBJECTS), list(STYLES), SEEDS)
before, after = (method(samples["prompt"], samples["seed"]) for method in (draw, my_method))
seen = judge_pictures(judge, after)
samples = samples.assign(seen_object=seen.objects, seen_style=seen.styles)
kept = naming_none(samples, [CONCEPT]).index.to_numpy()
figures = summary(samples, [(CONCEPT, SURROGATE)], [])
for name, rate in figures.rates.items():
    print(f"{name.upper():4}{rate.value:.1%}  [{rate.low:.1%}, {rate.high:.1%}]")
print(f"drift {drift(np.asarray(before)[kept], np.asarray(after)[kept]):.4f}")
