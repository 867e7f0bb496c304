"""Texts become ids: files, downloads, vocabularies, cached corpora, and the batches that are cut from them."""
