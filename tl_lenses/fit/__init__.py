"""Fitters: each is a function `(model, tokens, ...) -> Translators`."""
