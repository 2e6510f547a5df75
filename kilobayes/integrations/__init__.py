"""Posteriors, and adapters with a part in training, inside other people's training loops."""

from kilobayes.integrations.adapter import AdapterCallback, parameter_groups
from kilobayes.integrations.subject import host_run
from kilobayes.integrations.trainer import PosteriorCallback

__all__ = ["AdapterCallback", "PosteriorCallback", "host_run", "parameter_groups"]
