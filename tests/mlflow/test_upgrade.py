"""An MLflow database is backed up, upgraded and restored as cluster/README.md says; `make test-mlflow`."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.script import ScriptDirectory
from mlflow.store.db.utils import _get_alembic_config, create_sqlalchemy_engine
from mlflow.store.tracking.dbmodels.initial_models import Base as InitialBase
from sqlalchemy import text

from pipelines.tracking.runs import connect
from tests.support.servers.postgres import postgres, postgres_tools

pytestmark = pytest.mark.tier

REVISIONS_AGO = 8


@pytest.fixture
def database() -> Iterator[str]:
    with postgres() as uri:
        yield uri


def make_older(uri: str) -> str:
    """Creates the tables as an older MLflow did, with an experiment in them; returns their revision."""
    config, engine = _get_alembic_config(uri), create_sqlalchemy_engine(uri)
    revisions = [one.revision for one in ScriptDirectory.from_config(config).walk_revisions()]  # newest first
    older = revisions[REVISIONS_AGO]
    InitialBase.metadata.create_all(engine)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, older)
        insert = "INSERT INTO experiments (experiment_id, name, artifact_location, lifecycle_stage) VALUES "
        connection.execute(text(f"{insert} (7, 'kept', 'mlflow-artifacts:/7', 'active')"))
    engine.dispose()
    return older


def revision(uri: str) -> str:
    engine = create_sqlalchemy_engine(uri)
    with engine.connect() as connection:
        found = str(connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one())
    engine.dispose()
    return found


def upgrade(uri: str) -> None:
    command = [sys.executable, "-m", "mlflow", "db", "upgrade", uri]
    subprocess.run(command, check=True, timeout=300)


def back_up(uri: str, backup: Path) -> None:
    with backup.open("wb") as file:
        command: list[str | Path] = [postgres_tools() / "pg_dump", "--format=custom", "--dbname", uri]
        subprocess.run(command, stdout=file, check=True)


def restore(uri: str, backup: Path) -> None:
    """Into an empty database: one that was upgraded has tables that the backup knows nothing of."""
    server, _, name = uri.rpartition("/")
    tools = postgres_tools()
    subprocess.run([tools / "dropdb", f"--maintenance-db={server}/postgres", "--force", name], check=True)
    subprocess.run([tools / "createdb", f"--maintenance-db={server}/postgres", name], check=True)
    subprocess.run([tools / "pg_restore", "--dbname", uri, "--no-owner", backup], check=True)


def test_an_older_database_is_upgraded_and_a_backup_brings_it_back(database: str, tmp_path: Path) -> None:
    older, backup = make_older(database), tmp_path / "mlflow.dump"
    back_up(database, backup)
    upgrade(database)
    newer = revision(database)
    assert newer != older
    client = connect(database)
    assert client.get_experiment("7").name == "kept"
    client.create_run("7", run_name="new")
    assert len(client.search_runs(["7"])) == 1

    restore(database, backup)
    assert revision(database) == older
    # MLflow upgrades, unasked, what lacks a table of the new release: so the backup comes before the start.
    command = [sys.executable, "-c", f"import mlflow; mlflow.MlflowClient({database!r}).search_experiments()"]
    subprocess.run(command, check=True, timeout=300)
    assert revision(database) == newer
    assert client.get_experiment("7").name == "kept"
    assert client.search_runs(["7"]) == []  # that was after the backup
