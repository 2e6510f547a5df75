"""Runs as a service: classifiers and language models of one base answered together, over HTTP."""
