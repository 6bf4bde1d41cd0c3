"""Shows the form, the progress, the images and the history of a visitor, with Gradio."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import html
import json
import os
import re
import secrets
import traceback
import urllib.parse
from collections.abc import AsyncIterator, Iterator
from typing import Any

from pixart_jax.errors import OutputError, UserError, report
from pixart_jax.pipeline.image_files import read_png_settings
from pixart_jax.pipeline.page import browser
from pixart_jax.pipeline.page.clicks import Click, Clicks, Dropped
from pixart_jax.pipeline.page.form import ADAPTERS, Control
from pixart_jax.pipeline.requests import SAMPLING, START

# Seconds between two looks at a click.
_INTERVAL = 0.2
# Events that Gradio keeps. Clicks have a queue of their own.
_MAX_EVENTS = 64
# The value of the aspect ratio if the width and the height say it.
_OWN_SIZE = "own"
# What a page calls itself, so that its history survives a reload.
_VISITOR = re.compile(r"[0-9A-Za-z_-]{22}", re.ASCII)


def build_page(clicks: Clicks) -> Any:
    """Gradio's Blocks for the clicks of a page."""
    gr = import_gradio()
    form, key = clicks.form, secrets.token_bytes(32)
    with gr.Blocks(title="pixart_jax", analytics_enabled=False) as page:
        visitor = gr.BrowserState("")
        # The image whose settings are shown.
        chosen = gr.State("")
        gr.HTML(f"<h1>PixArt</h1><p>{html.escape(clicks.checkpoint)}</p>", elem_id="title")
        with gr.Row():
            with gr.Column(scale=5, min_width=380):
                made = {"prompt": _make(gr, form.controls["prompt"], lines=3, autofocus=True)}
                with gr.Row():
                    button = gr.Button("Generate", variant="primary", elem_id="generate", scale=3)
                    cancel = gr.Button(
                        "Cancel", variant="stop", elem_id="cancel", scale=1, min_width=90, interactive=False
                    )
                status = gr.HTML(_status("Ctrl+Enter generates, Escape cancels."), elem_id="status")
                with gr.Row():
                    made["count"] = _make(gr, form.controls["count"])
                    made["seed"] = _make(gr, form.controls["seed"])
                    new_seed = gr.Button("New seed", elem_id="new_seed", size="md", min_width=100)
                with gr.Row():
                    sizes = {f"{width}x{height}": ratio for ratio, (width, height) in form.ratios.items()}
                    initial = f"{form.controls['width'].value}x{form.controls['height'].value}"
                    ratio = gr.Dropdown(
                        [(ratio, size) for size, ratio in sizes.items()] + [("as given", _OWN_SIZE)],
                        value=initial if initial in sizes else _OWN_SIZE,
                        label="Aspect ratio",
                        elem_id="aspect_ratio",
                    )
                    made["width"] = _make(gr, form.controls["width"])
                    made["height"] = _make(gr, form.controls["height"])
                brush, options = _more_controls(gr, form.controls, made)
            with gr.Column(scale=7, min_width=380):
                gallery = _gallery(gr, "Images", "gallery", 480)
                with gr.Row():
                    use = gr.Button("Use these settings", elem_id="use", size="md", interactive=False)
                    download = gr.DownloadButton("Download", elem_id="download", size="md", interactive=False)
                    archive = gr.Button("Download all (ZIP)", elem_id="archive", size="md", interactive=False)
                history = _gallery(gr, "History", "history", 220, columns=6)
                with gr.Accordion("Settings stored in the image", open=True):
                    shown = gr.JSON(show_label=False, elem_id="settings", label="Settings")

        # `clicks` checks the values, and says in one line what is wrong.
        common = {"preprocess": False, "concurrency_limit": None, "show_progress": "hidden"}
        inputs = [made[name] for name in form.controls]
        of_image = {chosen, shown, use, download}

        def all_images(name: str) -> dict[Any, Any]:
            """The history of a visitor, newest first."""
            paths = clicks.history.get(name, ())
            link = f"images.zip?visitor={name}"
            return {
                history: _pictures(clicks, reversed(paths)),
                archive: gr.Button(link=link, interactive=bool(paths)),
            }

        def one_image(path: str) -> dict[Any, Any]:
            """What is shown of an image."""
            return {
                chosen: path,
                shown: read_png_settings(path),
                use: gr.Button(interactive=True),
                download: gr.DownloadButton(value=path, interactive=True),
            }

        def name_of(name: Any, request: Any) -> str:
            """The name that the browser has stored. That of a new visitor follows from the page's session."""
            if isinstance(name, str) and _VISITOR.fullmatch(name):
                return name
            digest = hmac.digest(key, request.session_hash.encode(), "sha256")
            return base64.urlsafe_b64encode(digest)[:22].decode()

        def start(name, request):
            name = name_of(name, request)
            return {visitor: name} | all_images(name)

        async def run(name, request, *values):
            with _shown_on_the_page(gr):
                name = name_of(name, request)
                named = dict(zip(form.controls, values))
                click = await asyncio.to_thread(clicks.submit, request.session_hash, name, named)
                async for update in _updates(clicks, click):
                    text, share, images, ended = update
                    changes = {status: _status(text, share), cancel: gr.Button(interactive=not ended)}
                    if images:
                        changes |= {gallery: _pictures(clicks, click.paths)} | all_images(name)
                        changes |= one_image(click.paths[0])
                    yield changes
                if click.error and not isinstance(click.error, Dropped):
                    raise click.error

        def stop(request):
            clicks.cancel(request.session_hash)

        def select(event):
            with _shown_on_the_page(gr):
                match event.value:
                    case {"image": {"path": str(path)}} if path in clicks.pictures:
                        return one_image(path)
                raise UserError("The page has no such image: click one of those that it shows.")

        def put_back(path):
            with _shown_on_the_page(gr):
                if path not in clicks.pictures:
                    raise UserError("No image is chosen: click one.")
                values = form.values(read_png_settings(path), clicks.uploads)
                values["mask"] = _brush(values["image"], values["mask"])
                size = f"{values['width']}x{values['height']}"
                return {made[name]: value for name, value in values.items()} | {
                    ratio: size if size in sizes else _OWN_SIZE
                }

        def fit(path):
            """Shows an upload under the brush, and sets the size that is closest to its proportions."""
            with _shown_on_the_page(gr):
                upload = clicks.uploads.require(path if isinstance(path, str) else "")
                size = form.size_of(clicks.pipe, f"{upload.width}:{upload.height}")
                changes = {brush: _brush(path, "")}
                if size:
                    name = f"{size[0]}x{size[1]}"
                    changes |= {made["width"]: size[0], made["height"]: size[1]}
                    changes |= {ratio: name if name in sizes else _OWN_SIZE}
                return changes

        # Gradio looks at the types, but could not resolve a name that is known only inside this function.
        for function in (start, run, stop):
            function.__annotations__["request"] = gr.Request
        select.__annotations__["event"] = gr.SelectData

        page.load(start, visitor, [visitor, history, archive], api_name="start", **common)
        gr.on(
            [button.click, made["prompt"].submit],
            run,
            [visitor, *inputs],
            {gallery, history, archive, status, cancel} | of_image,
            api_name="generate",
            trigger_mode="once",
            **common,
        )
        cancel.click(stop, None, None, api_name="cancel", **common)
        for each in (gallery, history):
            each.select(select, None, of_image, api_name=f"select_{each.elem_id}", **common)
        use.click(
            put_back, chosen, {ratio, *made.values()}, api_name="use", **(common | {"preprocess": True})
        )
        made["image"].upload(
            fit, made["image"], {brush, ratio, made["width"], made["height"]}, api_name="fit", **common
        )
        made["image"].clear(None, None, brush, js="() => ''")
        made["sampler"].change(
            lambda sampler: [gr.Row(visible=name == sampler) for name in options],
            made["sampler"],
            list(options.values()),
            api_name="sampler",
            **common,
        )
        new_seed.click(None, None, made["seed"], js=browser.NEW_SEED)
        both = [made["width"], made["height"]]
        ratio.input(
            None,
            [ratio, *both],
            both,
            js=f"(size, ...given) => size === '{_OWN_SIZE}' ? given : size.split('x').map(Number)",
        )
        for side in both:
            side.input(None, None, ratio, js=f"() => '{_OWN_SIZE}'")
    return page.queue(max_size=_MAX_EVENTS, api_open=False)


async def _updates(clicks: Clicks, click: Click) -> AsyncIterator[tuple[str, float | None, bool, bool]]:
    """Watches a click until it ends, and cancels it if nobody watches any longer.

    Yields:
      A line for the visitor, the share of the work that is done, whether there are new images, and whether
      the click has ended; each time that one of them changes.
    """
    last, images = None, 0
    try:
        while last is None or not last[-1]:
            ended = click.done.is_set()
            found = len(click.paths)
            now = (*_words(clicks, click, ended), ended)
            if now != last or found > images:
                yield now[0], now[1], found > images, ended
            last, images = now, found
            if not ended:
                await asyncio.sleep(_INTERVAL)
    finally:
        clicks.cancel_click(click)


def _words(clicks: Clicks, click: Click, ended: bool) -> tuple[str, float | None]:
    """A line about a click, and the share of its work that is done."""
    count, found = click.asked.count, len(click.paths)
    if ended:
        images = f"{found} of {count} images" if count > 1 else f"{found} of 1 image"
        if isinstance(click.error, Dropped):
            return f"Cancelled: {images}.", None
        return (f"Stopped by an error: {images}." if click.error else f"Done: {images}."), None
    before = clicks.before(click)
    if before is not None:
        return f"Waiting: {before} {'click' if before == 1 else 'clicks'} before yours.", 0.0
    if click.cancelled:
        return "Cancelling: the images that are being computed are not kept.", click.progress
    if click.batch is None:
        return "Starting.", 0.0
    first, last = click.batch
    which = f"Image {first}" if first == last else f"Images {first} to {last}"
    if not click.step:
        return f"{which} of {count}: preparing. A new size or sampler takes longer at first.", click.progress
    return f"{which} of {count}: step {min(click.step, click.steps)} of {click.steps}.", click.progress


def _status(text: str, share: float | None = None) -> str:
    bar = "" if share is None else f'<progress aria-label="Progress" max="1" value="{share:.4f}"></progress>'
    return f'<p role="status" aria-live="polite">{html.escape(text)}</p>{bar}'


def _pictures(clicks: Clicks, paths: Any) -> list[tuple[str, str]]:
    """Images with their prompts, which Gradio shows as alternative texts."""
    return [(path, clicks.pictures[path]) for path in paths]


def _brush(image: str | None, mask: str) -> str:
    """The value of the brush; see `browser`."""
    if not image:
        return ""
    return json.dumps({"image": f"gradio_api/file={urllib.parse.quote(image)}", "mask": mask})


@contextlib.contextmanager
def _shown_on_the_page(gr: Any) -> Iterator[None]:
    """Turns errors of a function into messages on the page, without a traceback."""
    try:
        yield
    except UserError as error:
        message = str(error)
    except OutputError as error:
        message = "The image cannot be written: see the messages of the server."
        report(f"error: {error}")
    except Exception:
        message = "Something went wrong on the server: see its messages."
        traceback.print_exc()
    else:
        return
    # The page shows messages as HTML.
    raise gr.Error(html.escape(message), print_exception=False)


def _gallery(gr: Any, label: str, name: str, height: int, columns: int = 3) -> Any:
    return gr.Gallery(
        label=label,
        format="png",
        columns=columns,
        height=height,
        object_fit="contain",
        fit_columns=False,
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id=name,
    )


def _more_controls(gr: Any, controls: dict[str, Control], made: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Makes the controls that are not always shown, and adds them to `made`.

    Returns:
      The brush, and the row of the options of each sampler.
    """
    groups: dict[str, list[Control]] = {SAMPLING: []}
    for control in controls.values():
        if control.name not in made:
            groups.setdefault(control.group, []).append(control)
    options: dict[str, Any] = {}
    brush = None
    with gr.Accordion(START, open=False, elem_id="start"):
        for control in groups.pop(START):
            if control.name == "mask":
                brush = made["mask"] = gr.HTML(
                    "",
                    label=control.label,
                    html_template=browser.BRUSH_HTML,
                    css_template=browser.BRUSH_STYLE,
                    js_on_load=browser.BRUSH_SCRIPT,
                    elem_id="mask",
                )
            else:
                made[control.name] = _make(gr, control)
    if ADAPTERS in groups:
        with gr.Accordion(ADAPTERS, open=True):
            for control in groups.pop(ADAPTERS):
                made[control.name] = _make(gr, control)
    with gr.Accordion("Advanced", open=False, elem_id="advanced"):
        for group, members in groups.items():
            gr.Markdown(f"### {group}")
            for sampler in dict.fromkeys(control.sampler for control in members):
                # The options of other samplers than the chosen one are hidden.
                chosen = sampler in (None, controls["sampler"].value)
                with gr.Row(visible=chosen) as row:
                    for control in members:
                        if control.sampler == sampler:
                            made[control.name] = _make(gr, control)
                if sampler:
                    options[sampler] = row
    return brush, options


def _make(gr: Any, control: Control, **more: Any) -> Any:
    """The control of Gradio."""
    common = {
        "value": control.value,
        "label": control.label,
        "elem_id": control.name.replace(".", "-"),
        **more,
    }
    if control.group and control.help:
        # The rest of the explanation is in the documentation.
        common["info"] = re.split("[;:(]", control.help)[0].strip().removesuffix(".") + "."
    low, high = control.bounds
    if control.is_file:
        del common["value"]
        common.pop("info", None)
        return _upload(gr, height=180, **common)
    if control.choices:
        return gr.Dropdown(list(control.choices), min_width=200, **common)
    if control.kind is bool:
        return gr.Checkbox(min_width=260, **common)
    hint = control.hint or ("automatic" if control.value is None else None)
    # A number field of Gradio cannot be empty at first.
    if control.kind is str or control.value is None:
        # A text of several words gets a row of its own.
        wide = {"min_width": 140 if control.value is None else 10_000}
        return gr.Textbox(placeholder=hint, **wide, **common)
    # On a longer slider, a value cannot be set exactly.
    if high is not None and high <= 100 and control.name != "count":
        return gr.Slider(low, high, step=1 if control.kind is int else 0.05, min_width=260, **common)
    return gr.Number(
        precision=0 if control.kind is int else None,
        minimum=low,
        maximum=high,
        min_width=110,
        **common,
    )


def _upload(gr: Any, **arguments: Any) -> Any:
    """A control for an image; in a call, a path, which the guard puts in place of an object of Gradio."""
    image = gr.Image(type="filepath", sources=["upload", "clipboard"], buttons=[], **arguments)
    # Gradio writes a file beside this one for a class of its own.
    image.data_model, image.api_info = None, lambda: {"type": "string"}
    return image


def theme() -> Any:
    """Colours with enough contrast, and fonts that every browser has."""
    gr = import_gradio()
    return gr.themes.Default(
        primary_hue="indigo",
        secondary_hue="indigo",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["monospace"],
    ).set(
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_700",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )


def import_gradio() -> Any:
    """The module, without its connections to its makers.

    Raises:
      UserError: it is not installed.
    """
    # Gradio reads the first when it is imported. It would also keep all prompts and images in the browser.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = os.environ["GRADIO_RUN_HISTORY"] = "False"
    try:
        import gradio
    except ImportError:
        raise UserError("--serve needs Gradio: pip install 'pixart_jax[app]'.") from None
    return gradio
