"""Search engines over the vectors of a knowledge base, one file each."""
