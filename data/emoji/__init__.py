"""Emoji: the pictures of a font and their names in more than a hundred languages."""
