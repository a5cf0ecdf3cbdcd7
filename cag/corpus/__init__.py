"""Files, folders, globs and JSONL in; a stable list of text documents and a report out. Knows nothing of models."""

from cag.corpus.document import CorpusReport, Document
from cag.corpus.loaders import CorpusLimits
from cag.corpus.loading import load_corpus, load_documents

__all__ = ["CorpusLimits", "CorpusReport", "Document", "load_corpus", "load_documents"]
