"""Serving: requests in, tokens out, any number of adapters on one base model."""
