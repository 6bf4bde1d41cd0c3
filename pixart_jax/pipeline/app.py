"""The web page of `sample --serve`: type a prompt, generate images, see them and their settings.

The page is made with Gradio (extra 'app'). It loads nothing from other servers: no fonts, no scripts, no
analytics.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixart_jax.errors import OutputError, UserError
from pixart_jax.files import make_folder
from pixart_jax.flags import field_kinds
from pixart_jax.pipeline.batching import generate
from pixart_jax.pipeline.image_files import file_name, make_record, read_png_settings, save_png
from pixart_jax.pipeline.memory import Work, check_memory
from pixart_jax.pipeline.pipeline import Pipeline
from pixart_jax.pipeline.requests import Request, with_consecutive_seeds

# Maximum number of images for one click.
MAX_IMAGES = 16


def serve(
    pipe: Pipeline,
    source: Mapping[str, Any],
    *,
    out: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    block: bool = True,
) -> Any:
    """Serves the page.

    Args:
      pipe: the pipeline.
      source: arguments of `load_pipeline`, for the settings in the images.
      out: folder for the images; None for a temporary one, which is deleted when the server ends.
      host: address to listen on.
      port: port to listen on; 0 for any free one.
      block: serve until interrupted.

    Returns:
      Gradio's page, with `close()` and `local_url`.

    Raises:
      UserError: Gradio is not installed, or the port is in use.
      OutputError: the folder cannot be made.
    """
    gr = _gradio()
    temporary = tempfile.TemporaryDirectory(prefix="pixart-") if out is None else None
    folder = make_folder(temporary.name if temporary else out)
    page = build_page(pipe, source, folder)
    page.temporary = temporary  # deleted together with the page
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
    print(f"images in {folder}; open {page.local_url} (Ctrl-C to end)", flush=True)
    if block:
        page.block_thread()
    return page


def build_page(pipe: Pipeline, source: Mapping[str, Any], folder: Path) -> Any:
    """Gradio's Blocks, which write the images to `folder`."""
    gr = _gradio()
    lock = threading.Lock()
    defaults, _ = pipe.resolve(Request(""))
    kinds = field_kinds(Request)

    def run(count, *values):
        try:
            if None in (count, *values):
                raise UserError("A number is missing: fill in every field.")
            # Gradio may send 3.0 where the setting is 3.
            fields = {name: kinds[name](value) for name, value in zip(controls, values)}
            # There is only one pipeline, so clicks are processed one at a time.
            with lock:
                paths = _generate(pipe, source, folder, int(count), Request(**fields))
        except (UserError, OutputError) as error:
            raise gr.Error(str(error), print_exception=False) from None
        return [str(path) for path in paths], read_png_settings(paths[0])

    def show_settings(images, event):
        # Gradio shows its own copies, under the same names.
        return read_png_settings(folder / Path(images[event.index][0]).name)

    # Gradio looks at the type, but could not resolve a name that is known only inside this function.
    show_settings.__annotations__["event"] = gr.SelectData

    with gr.Blocks(title="pixart_jax", analytics_enabled=False) as page:
        gr.Markdown(f"## PixArt\n{source.get('checkpoint', '')}")
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox(label="Prompt", lines=3, elem_id="prompt", autofocus=True)
                controls = {"prompt": prompt}
                with gr.Row():
                    for field in dataclasses.fields(Request):
                        if field.metadata.get("label") and field.name not in controls:
                            value = getattr(defaults, field.name)
                            controls[field.name] = _control(gr, field, kinds[field.name], value)
                    count = gr.Number(
                        1, label="Images", precision=0, minimum=1, maximum=MAX_IMAGES, elem_id="count"
                    )
                button = gr.Button("Generate", variant="primary", elem_id="generate")
            with gr.Column():
                gallery = gr.Gallery(
                    label="Images",
                    format="png",
                    columns=2,
                    height=460,
                    object_fit="contain",
                    interactive=False,
                    elem_id="gallery",
                )
                shown = gr.JSON(label="Settings stored in the image", elem_id="settings")
        inputs = [count, *controls.values()]
        gr.on([button.click, prompt.submit], run, inputs, [gallery, shown], api_name="generate")
        gallery.select(show_settings, gallery, shown, api_name=False)
    return page


def _control(gr: Any, field: dataclasses.Field, kind: type, value: Any) -> Any:
    """The control of a setting, by the type of its field."""
    common = {"value": value, "label": field.metadata["label"], "elem_id": field.name}
    if field.metadata["choices"]:
        return gr.Dropdown(list(field.metadata["choices"]), **common)
    if kind is str:
        # A row of its own.
        return gr.Textbox(**common, min_width=10_000)
    low, high = field.metadata["bounds"]
    if high is not None:
        return gr.Slider(low, high, step=1 if kind is int else 0.1, **common)
    return gr.Number(precision=0 if kind is int else None, minimum=low, **common)


def _generate(
    pipe: Pipeline, source: Mapping[str, Any], folder: Path, count: int, request: Request
) -> list[Path]:
    """Generates the images of one click and returns their files."""
    if not request.prompt.strip():
        raise UserError("The prompt is empty: type one.")
    if not 1 <= count <= MAX_IMAGES:
        raise UserError(f"{count} images: choose 1 to {MAX_IMAGES}.")
    request, size = pipe.resolve(request)
    batch_size = pipe.generator.per_device(count, None)
    check_memory(pipe, size, batch_size, Work(total=count))
    requests = with_consecutive_seeds(request, count)
    # Every click gets a new number, even after a restart.
    taken = (int(path.name[:5]) for path in folder.glob("[0-9]" * 5 + "-*.png"))
    number = max(taken, default=-1) + 1
    paths: dict[int, Path] = {}
    for index, pixels, _ in generate(pipe, requests, batch_size):
        each = requests[index]
        paths[index] = folder / file_name(number, each.seed, each.prompt)
        save_png(paths[index], pixels, make_record(pipe, each, source, batch_size))
    return [paths[index] for index in range(count)]


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _gradio() -> Any:
    # Gradio reads this when it is imported, and would otherwise contact its makers.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError:
        raise UserError("--serve needs Gradio: pip install 'pixart_jax[app]'.") from None
    return gradio
