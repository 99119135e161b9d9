"""A page on which to invert and edit images: `pip install '.[app]'`, then

    python experiments/app.py                                   # the demo
    python experiments/app.py --gan_weights converted/ --edits_folder directions/

Open the address that it prints. Only this machine can, unless --listen says otherwise. Settings are those of invert.py.
"""

from __future__ import annotations

import dataclasses
import importlib.util

import cli
import invert
import studio

from samjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Arguments(invert.Settings):
    port: int | None = None
    """Of the page; none: the first free one from 7860 on."""
    listen: bool = False
    """Lets other machines of the network open the page too."""
    open_browser: bool = False
    """Opens the page in this machine's browser."""


def main(args: Arguments) -> None:
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs Gradio: pip install '.[app]'")
    import page

    shared = studio.load(args)
    blocks, address = page.launch(shared, listen=args.listen, port=args.port, open_browser=args.open_browser)
    print(f"{invert.generator_name(args, shared.nets)}: open {address} (Ctrl-C ends it)", flush=True)
    blocks.block_thread()


if __name__ == "__main__":
    cli.run(Arguments, main)
