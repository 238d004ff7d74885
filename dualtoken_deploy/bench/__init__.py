"""Timing that can be trusted: one process per contestant, interleaved rounds, ratios with their spread."""

from dualtoken_deploy.bench.run import bench

__all__ = ["bench"]
