"""Mirrors of the log in trackers. A new mirror needs a module beside `mlflow`, an entry here, and a setting."""

from sftd.projections.mirrors.mlflow.mirror import Mlflow
from sftd.projections.mirrors.seam import Mirror

MIRRORS: tuple[Mirror, ...] = (Mlflow(),)
