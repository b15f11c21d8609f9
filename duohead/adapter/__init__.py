"""Adapter repositories: a pattern, its settings and the name of a base model, loaded by transformers' Auto classes."""
