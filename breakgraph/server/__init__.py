"""The HTTP server: OpenAI's endpoints, and some of our own, around one ``AsyncEngine``."""
