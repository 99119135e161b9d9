"""A page on which to invert and edit images: `pip install '.[app]'`, then

    python experiments/app/app.py                                   # the demo
    python experiments/app/app.py --gan_weights converted/ --edits_folder directions/

Open the address that it prints; unless --listen is given, it works on this machine only. Flags are those of invert.py.
"""

from __future__ import annotations

import dataclasses
import importlib.util

from ckpt_convert import get
from samjax import Pipeline, UserError, cli
from samjax.config import Options


@dataclasses.dataclass(frozen=True)
class Arguments(Options):
    port: int | None = None
    """Port of the page. Default: the first free port starting at 7860."""
    listen: bool = False
    """Lets other machines of the network open the page too."""
    open_browser: bool = False
    """Opens the page in this machine's browser."""


def main(args: Arguments) -> None:
    if args.port is not None and not 0 < args.port < 2**16:
        raise UserError(f"--port must lie between 1 and 65535, not {args.port}")
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs Gradio: pip install '.[app]'")
    import page

    pipeline = Pipeline.from_options(
        get.prepare(args),
        name=args.gan_weights.name if args.gan_weights else None,
    )
    blocks, address = page.launch(pipeline, listen=args.listen, port=args.port, open_browser=args.open_browser)
    print(f"{pipeline.name}: open {address} (Ctrl-C ends it)", flush=True)
    blocks.block_thread()


if __name__ == "__main__":
    cli.run(Arguments, main)
