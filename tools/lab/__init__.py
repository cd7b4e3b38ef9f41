"""What `tools/train_lab.py` is made of: the facts, the corpus, the measurements and the cards of the lab models."""
