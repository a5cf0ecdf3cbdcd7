"""The HTTP server: an OpenAI-compatible API and the engine's own, over one loaded engine."""

from cag.server.app import create_app
from cag.server.settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]
