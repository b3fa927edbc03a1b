"""A captured forward as a picture: gathered first, drawn from what was gathered alone.

Nothing is imported here: ``command`` is part of the command line, which must be read, and refused,
without the seconds that torch takes.
"""
