"""The commands' bodies: what they print, and which workflow they call."""
