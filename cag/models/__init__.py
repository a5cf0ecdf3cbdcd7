"""Models: the catalogue, `fetch_model` (download, convert, keep) and fingerprints of a model directory."""

from cag.models.catalogue import CATALOGUE, DEFAULT_MODEL, EMBEDDING_MODEL, HubSource, ModelEntry
from cag.models.fetch import ModelFiles, fetch_model, local_directory, model_directory
from cag.models.fingerprint import ModelFingerprints, chat_template_text, model_fingerprint
from cag.models.progress import Progress
from cag.models.record import read_record, verify_record

__all__ = [
    "CATALOGUE",
    "DEFAULT_MODEL",
    "EMBEDDING_MODEL",
    "HubSource",
    "ModelEntry",
    "ModelFiles",
    "ModelFingerprints",
    "Progress",
    "chat_template_text",
    "fetch_model",
    "local_directory",
    "model_directory",
    "model_fingerprint",
    "read_record",
    "verify_record",
]
