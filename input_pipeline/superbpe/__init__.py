"""SuperBPE (arXiv 2503.13423): byte-level BPE whose tokens grow over spaces in a second stage."""
