"""Posteriors inside other people's training loops."""

from kilobayes.integrations.subject import host_run
from kilobayes.integrations.trainer import PosteriorCallback

__all__ = ["PosteriorCallback", "host_run"]
