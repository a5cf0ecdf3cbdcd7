"""The benchmark suite: measures the engine against RAG and against no cache. Only the command line imports it."""
