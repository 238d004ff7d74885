"""Exporters: a model and a request in, an artifact on disk out. One file a target, named like its row in targets.py."""

from dualtoken_deploy.export.base import Artifact, Request, Samples, run_exporter

__all__ = ["Artifact", "Request", "Samples", "run_exporter"]
