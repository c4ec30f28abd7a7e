"""The page as an ASGI application that needs nothing from the internet."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files

import gradio as gr
from fastapi import FastAPI
from gradio.themes.utils import colors, sizes
from gradio.themes.utils.fonts import LocalFont

from protocol.client import ControllerClient
from webui.page import Page

_THEME = gr.themes.Base(
    primary_hue=colors.indigo,
    neutral_hue=colors.slate,
    radius_size=sizes.radius_md,
    font=[LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"],  # gradio's 600 lacks most letters
)


def create_app(controller_url: str) -> FastAPI:
    """The page for one controller, which need not run yet; ``/health`` says that the page itself does."""
    client = ControllerClient(controller_url)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with client:
            yield

    app = FastAPI(lifespan=lifespan, openapi_url=None)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    blocks = Page(client).build()
    css = (files("webui") / "page.css").read_text("utf-8")
    return gr.mount_gradio_app(
        app, blocks, path="/", theme=_THEME, css=css, footer_links=[], ssr_mode=False, show_error=True
    )
