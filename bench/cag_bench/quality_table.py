"""Rows of `cag bench quality` as tables: every codec, and the smallest one within each limit of the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

PROBES = ("corpus", "following")
HEADER = (
    "corpus",
    "tokens",
    "codec",
    "MB",
    "raw / stored",
    "basis apart",
    "mean KL",
    "p95 KL",
    "top-1",
    "NLL change",
    "probes",
    "following text: mean KL",
    "p95 KL",
    "top-1",
    "probes",
    "encode / prefill, s",
)
FRONT_HEADER = ("corpus", "probes", "mean KL at most", "codec", "basis apart", "with the basis", "mean KL")
MISSING = "-"


def corpus_names(corpora: Sequence[Sequence[str]]) -> list[str]:
    """What tells the corpora of a run apart, given their paths: the last two parts of each one's first path, or as many
    more as it takes, and how many more paths there are."""
    most = max(len(PurePath(paths[0]).parts) for paths in corpora)
    for num_parts in range(2, max(2, most) + 1):
        names = [_name(paths, num_parts) for paths in corpora]
        if len(set(names)) == len(names):
            break
    return names


def _name(paths: Sequence[str], num_parts: int) -> str:
    name = "/".join(PurePath(paths[0]).parts[-num_parts:])
    return name if len(paths) == 1 else f"{name} and {len(paths) - 1} more"


def fronts(rows: Sequence[Mapping[str, Any]], limits: Sequence[float]) -> list[dict[str, Any]]:
    """For each corpus, kind of probes and limit the measured codec of the fewest bytes, the basis apart, within it."""
    found = []
    for corpus in dict.fromkeys(row["corpus"]["name"] for row in rows):
        measured = [row for row in rows if row["corpus"]["name"] == corpus and row["outcome"] == "measured"]
        for probes in PROBES:
            judged = [row for row in measured if row["fidelity"][probes] is not None]
            for limit in limits if judged else ():
                within = [row for row in judged if row["fidelity"][probes]["mean_kl"] <= limit]
                best = max(within, key=lambda row: float(row["raw_over_stored"]["without_basis"]), default=None)
                found.append(_front(judged[0], probes, limit, best))
    return found


def _front(corpus: Mapping[str, Any], probes: str, limit: float, best: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "corpus": corpus["corpus"]["name"],
        "probes": probes,
        "max_kl": limit,
        "label": best and best["label"],
        "raw_over_stored": best and best["raw_over_stored"],
        "mean_kl": best and best["fidelity"][probes]["mean_kl"],
    }


def notes(rows: Sequence[Mapping[str, Any]], basis_s: float) -> list[str]:
    """What a reader must know beside the figures."""
    found = [
        "Bytes are those of all files of a cache: chunks, states of recurrent layers, texts, manifest, ref, and the "
        "basis where there is one.",
        "Probes run in float32 over what was read back from the store.",
        "Probes of the corpus: excerpts read again and sentences asked for behind the whole prefix, as `cag build` "
        "measures. Following text: the corpus read on behind the cut, as perplexity is measured, without the prompt's "
        "closing text.",
        "Encoding holds what a codec prepares at its first chunk, writing and syncing; prefilling is all of it.",
    ]
    if basis_s:
        found.append(f"The model's basis was made, or found made, in {basis_s:.1f} s; no encoding time has it.")
    measured = [row for row in rows if row["outcome"] == "measured"]
    ended = dict.fromkeys(row["corpus"]["name"] for row in measured if row["fidelity"]["following"] is None)
    if ended:
        found.append(f"Not cut, or too near to its end, so that nothing follows: {', '.join(ended)}.")
    return found


def table_rows(summary: Mapping[str, Any]) -> Iterator[list[str]]:
    """A row a corpus and codec."""
    for row in summary["rows"]:
        start = [row["corpus"]["name"], str(row["corpus"]["num_tokens"]), row["label"]]
        times = f"{row['encode_s']:.1f} / {row['prefill_s']:.1f}"
        if row["outcome"] != "measured":
            yield [*start, *[MISSING] * (len(HEADER) - 4), row["outcome"]]
            continue
        ratios, found = row["raw_over_stored"], row["fidelity"]
        sizes = [f"{row['stored_bytes']['total'] / 1e6:.1f}", f"{ratios['with_basis']:.2f}"]
        apart = f"{ratios['without_basis']:.2f}"
        corpus, behind = _loss(found["corpus"]), _loss(found["following"])
        change = f"{found['corpus']['nll_change']:+.4f}"
        yield [*start, *sizes, apart, *corpus[:3], change, corpus[3], *behind, times]


def _loss(fidelity: Mapping[str, Any] | None) -> list[str]:
    if fidelity is None:
        return [MISSING] * 4
    kl = [f"{fidelity[name]:.2g}" for name in ("mean_kl", "p95_kl")]
    return [*kl, f"{fidelity['top1']:.1%}", str(fidelity["num_probes"])]


def front_rows(summary: Mapping[str, Any]) -> Iterator[list[str]]:
    """A row a corpus, kind of probes and limit."""
    for front in summary["fronts"]:
        start = [front["corpus"], front["probes"], f"{front['max_kl']:g}"]
        if front["label"] is None:
            yield [*start, "none of those measured", *[MISSING] * 3]
        else:
            ratios = front["raw_over_stored"]
            sizes = [f"{ratios[name]:.2f}" for name in ("without_basis", "with_basis")]
            yield [*start, front["label"], *sizes, f"{front['mean_kl']:.2g}"]


def markdown(summary: Mapping[str, Any]) -> str:
    """Both tables with what they were measured on above and the notes below."""
    lines = ["# Quality of codecs", "", *(f"- {line}" for line in _origin(summary)), ""]
    lines += _table(HEADER, table_rows(summary))
    lines += ["", "The smallest within a limit, of those measured:", ""]
    lines += _table(FRONT_HEADER, front_rows(summary))
    return "\n".join([*lines, "", *(f"- {note}" for note in summary["notes"])]) + "\n"


def _table(header: Sequence[str], rows: Iterator[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _origin(summary: Mapping[str, Any]) -> list[str]:
    machine, model = summary["machine"], summary["model"]
    return [
        f"machine: {machine['gpu'] or machine['processor']}, {machine['cores']} cores, {machine['compute_dtype']}",
        f"code: {summary['commit']}",
        f"model: {model['id']} ({model['fingerprint'][:12]}), {model['kv_bytes_per_token']} bytes a token",
    ]
