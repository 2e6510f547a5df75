"""Collaboration across machines: a server, a client for each user, and what travels between them.

Adapters travel, with predictions or losses where the scheme of trust asks for them; data never do. The
mathematics is that of :mod:`kilobayes.collaboration`: here are files, sockets and retries.
"""

from __future__ import annotations
