"""Erase a concept with the library alone: neither Prefect nor MLflow nor DVC need be installed.

Run it in the project's root: python examples/erase_in_20_lines.py
"""

from fade.adapters.store import activate, apply_adapter, restore_base
from fade.asking.prepare import prepare_spec
from fade.config import load_settings
from fade.models.family import load_base
from fade.models.generate import generate_batch
from fade.project import load_project
from fade.sheets import contact_sheet
from fade.steps.catalog import ensure_catalog
from fade.studies.trial import TRIALS, run_trial

project = load_project()
ensure_catalog(project)
request = prepare_spec("astronaut", "cameraman", project=project, settings=load_settings(project.params))
row = run_trial(request, say=print)
print({name: row[name] for name in ("ua", "ira", "cra", "drift", "adapter_bytes", "method_seconds")})
base = load_base(request.base)
drawing = {
    "prompts": ["a astronaut image in oil style."],
    "seeds": [188],
    "steps": 10,
    "guidance": 4.0,
    "solver": "dpm++",
}
before = generate_batch(base, **drawing)
apply_adapter(base, TRIALS / request.id / "adapter", name="erasure")
activate(base, {"erasure": 1.0})
after = generate_batch(base, **drawing)
restore_base(base)
contact_sheet([[before[0], after[0]]], zoom=4).save("erased.png")
