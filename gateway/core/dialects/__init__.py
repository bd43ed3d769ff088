"""How a log of frames reads to a client, one file a dialect."""
