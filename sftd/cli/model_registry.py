"""MLflow's model registry, as `sftd export --register` and `sftd mlflow register` use it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from sftd.cli import app
from sftd.domain.errors import Problem, Refused
from sftd.settings import Settings

if TYPE_CHECKING:
    from sftd.domain.log.events import ModelExported
    from sftd.store.database.engine import Store


class Registry:
    """MLflow's model registry, for the exports of one run. Raises `Refused` if nothing can be registered as `name`."""

    def __init__(self, settings: Settings, store: Store, run_id: str, name: str) -> None:
        from sftd.projections.mirrors.mlflow import check as mlflow_check
        from sftd.projections.mirrors.mlflow.client import Tracking

        if not name.strip() or any(mark in name for mark in "/:\"'\\"):
            raise Refused(
                Problem("NAME", f"{name!r} cannot be a model's name", "use no / : \\ and no quotes")
            )
        require_mlflow(settings)
        self._store, self._run_id, self._name = store, run_id, name
        self._tracking = Tracking(settings.mlflow_tracking_uri, settings.mlflow_artifacts)
        place = mlflow_check.place(store, self._tracking, run_id)
        if place is None or place.run is None:
            fix = "start the mirror with `sftd daemon --detach`, or fill it with `sftd mlflow rebuild --prefix ''`"
            raise Refused(Problem("MLflow", f"it has no run of {run_id} yet", fix))
        self._uuid = place.run.uuid

    def register(self, exported: ModelExported) -> str:
        """Copy an export into the registry, and record the registration. Returns the model version."""
        from sftd.domain.log.events import ModelRegistered
        from sftd.operations.driving import checkpoints

        folder = Path(exported.path)
        if not folder.is_dir() or _digest(folder) != exported.digest:
            what = "differs from the export" if folder.is_dir() else "does not exist"
            raise Refused(Problem(str(folder), what, f"export it again: sftd export {self._run_id} DIR"))
        tags = {
            "sftd.run": self._run_id,
            "sftd.step": str(exported.step),
            "sftd.export_digest": exported.digest,
        }
        if (adapter := folder / "adapter_config.json").is_file():
            # A PEFT folder is loaded onto this model.
            tags["sftd.base_model"] = json.loads(adapter.read_text())["base_model_name_or_path"]
        place = f"models/step-{exported.step}"
        version = self._tracking.register(self._uuid, folder, place, self._name, tags)
        registered = ModelRegistered(
            step=exported.step,
            name=self._name,
            model_version=version,
            digest=exported.digest,
            by=app.user_name(),
        )
        checkpoints.record_registration(self._store, app.context(), self._run_id, registered)
        return version


def _digest(folder: Path) -> str:
    """The export's digest: the sha256 of the output of `sha256sum` for all files, sorted by name."""
    lines = []
    for name in sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()):
        with open(folder / name, "rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def require_mlflow(settings: Settings) -> None:
    """Raises `Refused` where the mirror is off."""
    if not settings.mlflow_tracking_uri:
        raise Refused(
            Problem(
                "MLFLOW_TRACKING_URI",
                "it is empty: the mirror is off",
                "set it to an MLflow server or database, or unset it",
            )
        )
