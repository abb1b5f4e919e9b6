"""Copies of the log in trackers. A new one is a module beside `mlflow`, its entry here, and its setting."""

from sftd.projections.mirrors.mlflow.mirror import Mlflow
from sftd.projections.mirrors.seam import Mirror

MIRRORS: tuple[Mirror, ...] = (Mlflow(),)
