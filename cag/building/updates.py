"""What an update takes over from the cache that it builds again: texts, template, codec and bound."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cag.building.options import AUTO, BuildOptions
from cag.model import LanguageModel
from cag.prompt import PromptTemplate, template_from_json
from cag_store import Manifest


def update_options(manifest: Manifest, model: LanguageModel, *, force: bool) -> BuildOptions:
    """How `model` builds the cache of `manifest` again. What was fitted to the keys and values of another model is not
    kept. Raises: CacheMismatch: no prompt layout that this version knows."""
    template, max_kl = _template(manifest, model), manifest.build.get("max_kl")
    built = manifest.model.fingerprint, manifest.model.adapter_fingerprint
    same_model = built == (model.fingerprints.weights, model.fingerprints.adapter)
    return BuildOptions(
        codec=_asked_codec(manifest),
        system_text=manifest.layout["system_text"],
        closing_text=manifest.layout["closing_text"],
        max_kl=max_kl if isinstance(max_kl, (int, float)) else None,
        force=force,
        keep=dict(manifest.codec) if same_model else None,
        template=template,
    )


def _template(manifest: Manifest, model: LanguageModel) -> PromptTemplate:
    rendered = template_from_json(manifest.layout)
    if manifest.model.template_fingerprint != model.fingerprints.template:
        return model.template
    return replace(model.template, before=rendered.before, middle=rendered.middle)


def _asked_codec(manifest: Manifest) -> str | dict[str, Any]:
    """What the build was asked for; the codec written out where that is not known."""
    if manifest.build.get("codec_choice") is not None:
        return AUTO
    codec, name = dict(manifest.codec), manifest.build.get("named_codec")
    return name if isinstance(name, str) and name == codec.get("id") else codec
