"""Arguments to documents: find, read, normalise, drop duplicates, name. The last stage of the corpus package."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path

from cag.corpus.discovery import FoundFile, find_files
from cag.corpus.document import CorpusReport, Document, text_sha256
from cag.corpus.folders import portable_name
from cag.corpus.loaders import CorpusLimits, Extract, Source, format_of, load_source, unreadable
from cag.corpus.loaders.base import NOT_DOCUMENTS
from cag.corpus.normalization import normalize_text
from cag.corpus.titles import chosen_title, title_line, title_of_name
from cag.errors import EmptyCorpus, UnreadableDocument

Progress = Callable[[int, int, str], None]


def load_corpus(
    paths: Sequence[str | Path] | str | Path,
    *,
    skip_errors: bool = False,
    progress: Progress | None = None,
    limits: CorpusLimits | None = None,
    known: Collection[tuple[str, str]] = (),
) -> CorpusReport:
    """Read files, folders (recursively), globs (strings) and JSONL files of documents into one corpus.

    Order and ids are those of `cag.corpus.discovery`. An id that is taken gets the name of its folder in front, then a
    number behind, so that a document never changes its id because another one was added after it.

    known: (path, id) of documents of an earlier load, which keep their ids and, among equal texts, their places, so
    that neither changes because another document was added before them.
    progress: called after each file with (files done, files in all, path).

    Raises: UnreadableDocument for a path that does not exist and for a file that cannot be read as what it claims to be
    (with `skip_errors` these are listed in `skipped` instead); EmptyCorpus when no document with text is left.
    """
    collector = _Collector(skip_errors, limits or CorpusLimits(), frozenset(known))
    arguments = [paths] if isinstance(paths, str | Path) else paths
    files = find_files(arguments, collector.refuse, collector.skip)
    for done, file in enumerate(files, start=1):
        collector.add_file(file)
        if progress is not None:
            progress(done, len(files), portable_name(file.path))
    return collector.report()


def load_documents(
    paths: Sequence[str | Path] | str | Path,
    *,
    skip_errors: bool = False,
    progress: Progress | None = None,
    limits: CorpusLimits | None = None,
) -> list[Document]:
    """The documents of `load_corpus`, without the report."""
    return list(load_corpus(paths, skip_errors=skip_errors, progress=progress, limits=limits).documents)


@dataclass(frozen=True)
class _Found:
    """One text of a file. `place`: how a report names it; `ids`: those that it may have, in the order of preference."""

    path: str
    place: str
    ids: tuple[str, str]
    title: str
    text: str


@dataclass
class _Collector:
    skip_errors: bool
    limits: CorpusLimits
    known: frozenset[tuple[str, str]]
    found: list[_Found] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def refuse(self, error: UnreadableDocument) -> None:
        """Raise `error`, or list it when errors are to be skipped."""
        if not self.skip_errors:
            raise error
        self.skipped.append((str(error.facts["path"]), str(error.facts["reason"])))

    def skip(self, path: Path, reason: str) -> None:
        self.skipped.append((portable_name(path), reason))

    def add_file(self, file: FoundFile) -> None:
        format_name = format_of(file.path) or ("text" if file.is_explicit else None)
        if format_name is None:
            return self.skip(file.path, "unknown type")
        try:
            extracts = load_source(_read(file.path, self.limits), format_name)
        except UnreadableDocument as error:
            # Folders hold JSONL files of other things; one that was named by itself is meant.
            if error.facts.get("reason") == NOT_DOCUMENTS and not file.is_explicit:
                return self.skip(file.path, NOT_DOCUMENTS)
            return self.refuse(error)
        if not extracts:
            self.empty.append(portable_name(file.path))
        for extract in extracts:
            self._add(file, extract)
        return None

    def _add(self, file: FoundFile, extract: Extract) -> None:
        path = portable_name(file.path)
        place = f"{path}#{extract.doc_id or extract.fragment}" if extract.fragment else path
        text = normalize_text(extract.text)
        if not text.strip():
            self.empty.append(place)
            return
        wanted_id = extract.doc_id or "#".join(filter(None, (file.relative, extract.fragment)))
        # a line of JSON has the title that somebody gave it
        title = (title_line if extract.fragment else chosen_title)(extract.title)
        title = title or title_of_name(extract.doc_id or file.relative)
        self.found.append(_Found(path, place, (wanted_id, f"{file.root_name}/{wanted_id}"), title, text))

    def report(self) -> CorpusReport:
        """The report. Raises: EmptyCorpus."""
        if not self.found:
            found = f"{len(self.empty)} empty, {len(self.skipped)} skipped"
            first = f", for instance {self.skipped[0][0]}: {self.skipped[0][1]}" if self.skipped else ""
            hint = (
                "Name files or folders with text: .txt .md .rst .html .pdf .docx, source code, or JSONL of documents."
            )
            raise EmptyCorpus(f"no document with text was found ({found}{first}).", hint=hint)
        documents, duplicates = _settle(self.found, self.known)
        return CorpusReport(documents, duplicates, tuple(self.empty), tuple(self.skipped))


def _settle(
    found: Sequence[_Found], known: Collection[tuple[str, str]]
) -> tuple[tuple[Document, ...], tuple[tuple[str, str], ...]]:
    """Documents in the order of `found` and (place, place of the same text): known ones choose before all others."""
    places: dict[str, str] = {}
    documents: dict[int, Document] = {}
    duplicates: dict[int, tuple[str, str]] = {}
    taken: set[str] = set()
    kept_ids = [next((doc_id for doc_id in one.ids if (one.path, doc_id) in known), None) for one in found]
    for index in sorted(range(len(found)), key=lambda index: kept_ids[index] is None):
        one, sha256 = found[index], text_sha256(found[index].text)
        if sha256 in places:
            duplicates[index] = (one.place, places[sha256])
            continue
        places[sha256] = one.place
        doc_id = kept_ids[index] if kept_ids[index] not in taken else None
        doc_id = doc_id or _free_id(one.ids, taken)
        taken.add(doc_id)
        documents[index] = Document(doc_id, one.title, one.path, one.text, sha256)
    order = range(len(found))
    return tuple(documents[i] for i in order if i in documents), tuple(duplicates[i] for i in order if i in duplicates)


def _free_id(wanted: tuple[str, str], taken: Collection[str]) -> str:
    """The first id of `wanted` that nobody has, or the last with a number behind it."""
    numbered = (f"{wanted[-1]}~{number}" for number in count(2))
    return next(doc_id for doc_id in chain(wanted, numbered) if doc_id not in taken)


def _read(path: Path, limits: CorpusLimits) -> Source:
    """All bytes of a file. Raises: UnreadableDocument."""
    name = portable_name(path)
    try:
        with path.open("rb") as stream:
            content = stream.read(limits.max_file_bytes + 1)
    except OSError as error:
        raise unreadable(name, f"the system refuses it ({error.strerror})", "Check its permissions.") from error
    if len(content) > limits.max_file_bytes:
        raise unreadable(name, f"the file has more than {limits.max_file_bytes} bytes", "Split it, or leave it out.")
    return Source(name, content, limits)
