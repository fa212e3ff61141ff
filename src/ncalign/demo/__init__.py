"""The demonstrations: a real small model, aligned and measured in a few minutes, from shipped candidates or online."""
