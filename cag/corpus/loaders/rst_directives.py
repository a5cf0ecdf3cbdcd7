"""Reads the source of a directive that docutils refused (Sphinx, extensions): what of it is text, and of which kind."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

_HEAD = re.compile(r"\.\. +(?P<name>[\w:+.-]+) ?::(?: +(?P<argument>.*))?")
_OPTION = re.compile(r":(?P<name>[\w -]+):(?: +(?P<value>.*))?")
_KINDS = {
    "left out": """
        toctree index highlight currentmodule py:currentmodule module py:module contents sectnum role default-role
        include raw literalinclude image meta tabularcolumns autosummary default-domain testsetup testcleanup""",
    "code": """
        code code-block sourcecode parsed-literal prompt console doctest testcode testoutput ipython productionlist math
        graphviz mermaid digraph graph uml plantuml jupyter-execute terminal""",
    "signature": "function class method attribute data exception option envvar program object describe",
}
_KIND_OF_NAME = {name: kind for kind, names in _KINDS.items() for name in names.split()}
_LANGUAGE_IN_ARGUMENT = ("code", "code-block", "sourcecode")
_LABELS = {
    "versionadded": "Added in version",
    "versionchanged": "Changed in version",
    "versionremoved": "Removed in version",
    "deprecated": "Deprecated since version",
    "seealso": "See also:",
}


@dataclass(frozen=True, slots=True)
class Directive:
    """One directive. `argument` may span lines; `body` is dedented; `options` are those before the body."""

    name: str
    argument: str
    options: dict[str, str]
    body: str

    @property
    def is_code(self) -> bool:
        """Whether the body is shown as it stands."""
        return _KIND_OF_NAME.get(self.name) == "code"

    @property
    def language(self) -> str:
        """The language of code, where the directive tells."""
        return self.argument.strip() if self.name in _LANGUAGE_IN_ARGUMENT else ""

    @property
    def label(self) -> str:
        """Words that a reader sees in place of the name of the directive."""
        return _LABELS.get(self.name, "")

    @property
    def is_signature(self) -> bool:
        """Whether the argument is a name or signature of code, in which stars and bars are no markup."""
        is_known = _KIND_OF_NAME.get(self.name) == "signature"
        return is_known or ":" in self.name or self.name.startswith("auto")

    @property
    def inline_lead(self) -> str:
        """The argument, where it is running text."""
        return "" if self.is_code or self.is_signature else self.argument

    def lead_blocks(self) -> Iterator[str]:
        """Literal text before the body: a signature, a caption."""
        if self.is_signature or (self.is_code and not self.language):
            yield self.argument
        yield self.options.get("caption", "")


def read_directive(source: str) -> Directive | None:
    """The directive in `source`; None for other source, and for directives that only steer navigation or layout."""
    first, *rest = source.split("\n")
    found = _HEAD.fullmatch(first.rstrip())
    if found is None or _KIND_OF_NAME.get(found.group("name").lower()) == "left out":
        return None
    lines = textwrap.dedent("\n".join(rest)).split("\n")
    argument = [found.group("argument") or ""]
    while lines and lines[0].strip() and not _OPTION.fullmatch(lines[0]):
        argument.append(lines.pop(0).strip())
    options: dict[str, str] = {}
    while lines and (option := _OPTION.fullmatch(lines[0])):
        options[option.group("name")] = (option.group("value") or "").strip()
        lines.pop(0)
    body = "\n".join(lines).strip("\n")
    return Directive(found.group("name").lower(), "\n".join(filter(None, argument)), options, body)
