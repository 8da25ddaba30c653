"""The commands about corpora, `endora prepare` and `endora audit`. What they need is imported when they run."""
