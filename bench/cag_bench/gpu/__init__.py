"""`cag bench gpu`: first tokens, many sessions, codes and decoding at the size of a real model, with random numbers."""
