"""From a question to an answer: the token loop, drafts, batches of answers, sessions, and the proof that goes with
each."""
