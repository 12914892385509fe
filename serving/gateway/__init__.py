"""The HTTP side: checks a request, resolves its model, tokenises, streams the answer."""
