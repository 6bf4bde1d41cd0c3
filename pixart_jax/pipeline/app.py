"""The web page of `sample --serve`: type, draw, look, read the settings.

Gradio (extra 'app') draws it. Nothing of it comes from elsewhere: no fonts, no scripts, no statistics.
"""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixart_jax.diffusion.samplers import SAMPLERS
from pixart_jax.errors import UserError
from pixart_jax.pipeline import Pipeline
from pixart_jax.pipeline.memory import check_memory
from pixart_jax.pipeline.pictures import file_name, read_settings, save_png
from pixart_jax.pipeline.requests import Request, draw, make_record, resolve


def serve(
    pipe: Pipeline,
    source: Mapping[str, Any],
    *,
    out: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    block: bool = True,
) -> Any:
    """Opens the page.

    Args:
      pipe: draws.
      source: what it was loaded from, for the settings of the pictures.
      out: folder for the pictures; None for one that goes with the server.
      host: address to listen on.
      port: to listen on; 0 for any that is free.
      block: serve until interrupted.

    Returns:
      Gradio's page, for `close()`; `local_url` is where it is.

    Raises:
      UserError: Gradio is not installed, or the port is taken.
    """
    gr = _gradio()
    keep = tempfile.TemporaryDirectory(prefix="pixart-") if out is None else None
    folder = Path(keep.name if keep else out)
    folder.mkdir(parents=True, exist_ok=True)
    page = build_page(pipe, source, folder)
    page.keep = keep  # lives as long as the page
    try:
        page.launch(
            server_name=host,
            server_port=port or _free_port(host),
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            allowed_paths=[str(folder)],
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            footer_links=[],
            ssr_mode=False,
        )
    except OSError as error:
        raise UserError(f"--port={port} on --host={host}: {error}") from None
    print(f"pictures in {folder}; open {page.local_url} (Ctrl-C ends)", flush=True)
    if block:
        page.block_thread()
    return page


def build_page(pipe: Pipeline, source: Mapping[str, Any], folder: Path) -> Any:
    """Gradio's Blocks; pictures are written to `folder`."""
    gr = _gradio()
    lock = threading.Lock()
    base, _ = pipe.settings()

    def generate(prompt, negative, width, height, steps, scale, sampler, seed, count):
        try:
            if None in (width, height, steps, scale, seed, count):
                raise UserError("A number is missing: fill in every field.")
            # One at a time: the pipeline is one, and so is its device.
            with lock:
                paths = _draw(
                    pipe,
                    source,
                    folder,
                    int(count),
                    prompt=prompt,
                    negative_prompt=negative,
                    width=int(width),
                    height=int(height),
                    steps=int(steps),
                    guidance_scale=float(scale),
                    sampler=sampler,
                    seed=int(seed),
                )
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None
        return [str(path) for path in paths], read_settings(paths[0])

    def show_settings(pictures, event):
        # Gradio shows copies of its own, of the same name.
        return read_settings(folder / Path(pictures[event.index][0]).name)

    # Gradio reads the type, and could not resolve a name that only this function knows.
    show_settings.__annotations__["event"] = gr.SelectData

    with gr.Blocks(title="pixart_jax", analytics_enabled=False) as page:
        gr.Markdown(f"## PixArt\n{source.get('checkpoint', '')}")
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox(label="Prompt", lines=3, elem_id="prompt", autofocus=True)
                negative = gr.Textbox(label="Negative prompt", elem_id="negative")
                with gr.Row():
                    width, height = (
                        gr.Number(side, label=f"{name} (px)", precision=0, minimum=1, elem_id=name.lower())
                        for name, side in (("Width", base.width), ("Height", base.height))
                    )
                    count = gr.Number(1, label="Images", precision=0, minimum=1, maximum=16, elem_id="count")
                    seed = gr.Number(0, label="Seed of the first", precision=0, minimum=0, elem_id="seed")
                with gr.Row():
                    steps = gr.Slider(1, 100, 20, step=1, label="Steps", elem_id="steps")
                    scale = gr.Slider(
                        1, 15, pipe.config.guidance.scale, step=0.1, label="Guidance", elem_id="guidance"
                    )
                    sampler = gr.Dropdown(list(SAMPLERS), value="dpm_solver", label="Sampler")
                button = gr.Button("Draw", variant="primary", elem_id="draw")
            with gr.Column():
                gallery = gr.Gallery(
                    label="Pictures",
                    format="png",
                    columns=2,
                    height=460,
                    object_fit="contain",
                    interactive=False,
                    elem_id="gallery",
                )
                settings = gr.JSON(label="Settings in the picture", elem_id="settings")
        inputs = [prompt, negative, width, height, steps, scale, sampler, seed, count]
        gr.on([button.click, prompt.submit], generate, inputs, [gallery, settings], api_name="draw")
        gallery.select(show_settings, gallery, settings, api_name=False)
    return page


def _draw(pipe: Pipeline, source: Mapping[str, Any], folder: Path, count: int, **fields: Any) -> list[Path]:
    """Draws the images of one click into files of their own."""
    if not fields["prompt"].strip():
        raise UserError("The prompt is empty: type one.")
    if not 1 <= count <= 16:
        raise UserError(f"{count} images: it must be 1 to 16.")
    request, size = resolve(pipe, Request(**fields))
    batch_size = pipe.drawer.per_device(count, None)
    check_memory(pipe, size, batch_size)
    requests = [Request(**{**vars(request), "seed": request.seed + k}) for k in range(count)]
    # Another number for every click, also after a restart.
    taken = (int(path.name[:5]) for path in folder.glob("[0-9]" * 5 + "-*.png"))
    number = max(taken, default=-1) + 1
    paths: dict[int, Path] = {}
    for index, pixels, _ in draw(pipe, requests, batch_size):
        each = requests[index]
        paths[index] = folder / file_name(number, each.seed, each.prompt)
        save_png(paths[index], pixels, make_record(pipe, each, source, batch_size))
    return [paths[index] for index in range(count)]


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _gradio() -> Any:
    # Before the import, which would call home.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError:
        raise UserError("--serve needs Gradio: pip install 'pixart_jax[app]'.") from None
    return gradio
