"""The claims of both papers on real models: the steps that measure, the claims, and the page."""
