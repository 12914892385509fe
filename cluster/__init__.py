"""What training and serving share: errors, specs, storage, the registry, Ray. Imports neither."""
