"""What a cache is, as users see it: `cag show --json`, `GET /v1/caches/{name}` and the rows of their lists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cag.building.probes import warnings_about
from cag_store import Manifest, Ref


def describe_cache(ref: Ref, manifest: Manifest) -> dict[str, Any]:
    """Everything about one cache: the object of `cag show --json`. `ref` must refer to `manifest`."""
    return {
        "name": ref.name,
        "digest": manifest.digest,
        "created_at": manifest.created_at,
        "model": {"id": manifest.model.id, "fingerprint": manifest.model.fingerprint},
        "num_tokens": manifest.num_tokens,
        "num_documents": len(manifest.documents),
        "codec": dict(manifest.codec),
        "raw_bytes": manifest.raw_bytes,
        "stored_bytes": manifest.stored_bytes,
        "raw_over_stored": manifest.raw_bytes / manifest.stored_bytes,
        "state_bytes": manifest.states.snapshots[-1].raw_bytes if manifest.states is not None else 0,
        "codec_choice": codec_choice(manifest),
        "fidelity": dict(manifest.fidelity) if manifest.fidelity is not None else None,
        "warnings": _warnings(manifest),
        "expires_at": ref.expires_at,
        "pinned": ref.pinned,
        "documents": [asdict(document) for document in manifest.documents],
    }


def codec_choice(manifest: Manifest) -> dict[str, Any] | None:
    """How "auto" chose the codec; None when it was named, or when another version noted it in another way."""
    found = manifest.build.get("codec_choice")
    return dict(found) if isinstance(found, Mapping) and isinstance(found.get("reason"), str) else None


def summarize_cache(ref: Ref, manifest: Manifest) -> dict[str, Any]:
    """One row of a list of caches: as `describe_cache`, without the documents and how the codec was chosen."""
    whole = describe_cache(ref, manifest)
    return {field: value for field, value in whole.items() if field not in ("documents", "codec_choice")}


def _warnings(manifest: Manifest) -> list[str]:
    """As a build has said them; none where nothing was measured, or another version noted it in another way."""
    found = manifest.fidelity or {}
    num_probes = found.get("num_probes")
    return list(warnings_about(str(found.get("method")), num_probes)) if isinstance(num_probes, int) else []
