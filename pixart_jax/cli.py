"""The console scripts: `pixart-train …` and `pixart train …` do what `python -m pixart_jax.train …` does."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from pixart_jax import __version__, end_on_interrupt
from pixart_jax.errors import EXIT_USAGE, did_you_mean, report

COMMANDS = {
    "caption": "writes captions for images",
    "precompute": "turns images and captions into features",
    "train": "trains a stage, or resumes it",
    "sample": "generates images for prompts, or serves a web page",
    "evaluate": "measures FID, CLIP score, validation loss and more",
    "convert": "converts weights from and to PyTorch",
    "benchmark": "measures speed, and whether a stage fits hardware",
}


def main() -> None:
    """Runs the command that the name of the script or the first argument names."""
    end_on_interrupt()
    script, *arguments = sys.argv
    name = Path(script).stem.removeprefix("pixart-")
    if name not in COMMANDS:
        name, arguments = (arguments or ["--help"])[0], arguments[1:]
    if name in ("--version", "-V"):
        print(f"pixart_jax {__version__}")
    elif name in ("--help", "-h", "help"):
        print("pixart COMMAND [FLAGS]; `pixart COMMAND --help` lists the flags of a command.\n")
        for command, what in COMMANDS.items():
            print(f"  {command:<12}{what}")
        print("\nEach command is also a script (pixart-train) and a module (python -m pixart_jax.train).")
    elif name in COMMANDS:
        sys.argv = [script, *arguments]
        # As `python -m` does, so that messages and the list of flags are the same.
        runpy.run_module(f"pixart_jax.{name}", run_name="__main__", alter_sys=True)
    else:
        report(f"error: command '{name}': choose one of {', '.join(COMMANDS)}.{did_you_mean(name, COMMANDS)}")
        sys.exit(EXIT_USAGE)
