"""One objective a file. Every module here is imported by the registry and registers itself."""
