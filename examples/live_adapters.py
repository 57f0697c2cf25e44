"""Use everything that is live in a diffusers program of your own; it stops drawing if that cannot be established.

    python examples/live_adapters.py data/base/canvas data/release/FOLDER .fade/keys/public.pem "a cat image."

Release folder and public key are what `fade live` and the pipeline's owner name. Nothing but the library is needed.
"""

import sys
from pathlib import Path

from PIL import Image

from fade.adapters.runtime import Runtime
from fade.errors import RefusedError
from fade.models.family import load_base


def main(base: str, release: str, public_key: str, prompt: str) -> None:
    """Draw one picture with what is live now; adapters that come and go later are followed by the same object."""
    try:
        runtime = Runtime(load_base(base), Path(release), public_key=Path(public_key))
        pictures, manifest = runtime.generate([prompt], [188], steps=25, guidance=4.0)
    except RefusedError as refused:
        sys.exit(f"Nothing is drawn: {refused}")
    print(f"release {manifest.counter}: {', '.join(manifest.names) or 'the base alone'}")
    Image.fromarray(pictures[0]).save("live.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
