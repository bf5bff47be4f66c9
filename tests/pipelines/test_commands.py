"""What a user can get wrong is one line on stderr and status 2, within seconds and before Ray starts."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from ctmsr.config import flatten, from_dict, override, to_dict
from ctmsr.metrics import pyiqa_scores
from ctmsr.model import checkpoint
from pipelines.config.presets import PRESETS
from pipelines.config.run_config import RunConfig
from pipelines.evaluate import __main__ as evaluate
from pipelines.infra.exit_status import run
from pipelines.register import __main__ as register
from pipelines.train import __main__ as train
from pipelines.train.run import check_inputs
from pipelines.tune import __main__ as tune
from tests.conftest import S3
from tests.support.repository import ROOT
from tests.support.runs import write_checkpoint

COMMANDS = (train, tune, evaluate, register)
LIMIT_S = 15

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Runs a command with KEY=VALUE settings; it must fail as promised. Returns its message."""

    def no_cluster() -> None:
        raise AssertionError("Ray was started")

    def run_it(
        command: ModuleType, *settings: str, options: tuple[str, ...] = (), before_ray: bool = True
    ) -> str:
        if before_ray and command is not register:
            monkeypatch.setattr("pipelines.infra.cluster.ray_cluster", no_cluster)
        arguments = [part for setting in settings for part in ("--set", setting)]
        monkeypatch.setattr(sys, "argv", ["command", *arguments, *options])
        started = time.monotonic()
        with pytest.raises(SystemExit) as exit_info:
            run(command.main)
        assert time.monotonic() - started < LIMIT_S
        printed = capsys.readouterr()
        assert exit_info.value.code == 2
        assert printed.out == "" or (printed.out.startswith("reading ") and printed.out.count("\n") == 1)
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        return printed.err

    return run_it


@pytest.fixture(scope="module")
def bucket(s3: S3, photos: dict[str, bytes]) -> str:
    """Folders of pictures, each with another fault."""
    folders = {
        "good": photos,
        "broken": {"photo.jpg": b"\xff\xd8\xff not a picture"},
        "notes": {"notes.txt": b"no picture"},
        "cut": photos | {"cut.png": next(iter(photos.values()))[:999]},
    }
    files = {f"{folder}/{name}": data for folder, held in folders.items() for name, data in held.items()}
    return s3.make_bucket("commands", files)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def good(bucket: str, database: str, tmp_path: Path) -> list[str]:
    """Settings with which a run could start; a later setting of the same key replaces one of these."""
    return [
        f"storage_uri={tmp_path}/runs",
        f"tracking_uri={database}",
        *(f"data.{part}_uri={bucket}/good" for part in ("train", "val", "test")),
        "data.eval_crop_size=64",
    ]


def config_of(settings: list[str]) -> RunConfig:
    return from_dict(RunConfig, override(to_dict(PRESETS["small"]()), settings))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_keys_and_dry_run_need_nothing(
    command: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    name = command.__name__.split(".")[1]
    for option, expected in (
        ("--help", [f"python -m pipelines.{name}", "examples:", *PRESETS, "--dry-run"]),
        ("--keys", [f"{key} = " for key in flatten(to_dict(RunConfig()))]),
    ):
        with pytest.raises(SystemExit) as exit_info:
            command.main([option])
        assert not exit_info.value.code
        printed = capsys.readouterr().out
        assert [text for text in expected if text not in printed] == []

    assert command.main(["--set", "seed=7", "--set", f"data.train_uri={tmp_path}/none", "--dry-run"]) == 0
    file = tmp_path / "config.json"
    file.write_text(capsys.readouterr().out)
    resolved = from_dict(RunConfig, json.loads(file.read_text()))
    assert resolved == config_of(["seed=7", f"data.train_uri={tmp_path}/none"])
    assert command.main(["--config", str(file), "--preset", "published", "--set", "seed=8", "--dry-run"]) == 0
    again = from_dict(RunConfig, json.loads(capsys.readouterr().out))
    assert (again.seed, again.network) == (8, resolved.network)


def test_a_mistake_in_a_terminal_is_one_line() -> None:
    command = [sys.executable, "-m", "pipelines.train", "--set", "netwrok.scale=4"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert ended.returncode == 2
    assert ended.stderr == "error: unknown config key netwrok.scale. Did you mean network?\n"
    assert ended.stdout == ""


def test_output_that_nobody_reads_on_is_no_error() -> None:
    command = f"{sys.executable} -m pipelines.train --keys --preset published | head -1"
    ended = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert (ended.stdout, ended.stderr) == ('name = "ctmsr"\n', "")


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_help_is_there_at_once(name: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", f"pipelines.{name}", "--help"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT)
    loaded = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert not {"torch", "ray", "mlflow", "boto3", "cv2"} & loaded
    assert ended.returncode == 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            train,
            "data.train_uri: data/train does not exist. Check the path. Set another: --set data.train_uri=",
        ),
        (
            tune,
            "data.train_uri: data/train does not exist. Check the path. Set another: --set data.train_uri=",
        ),
        (
            evaluate,
            "there is no complete checkpoint under runs/ctmsr. Train first, or name its run: --set name=",
        ),
        (
            register,
            "there is no complete checkpoint under runs/ctmsr. Train first, or name its run: --set name=",
        ),
    ],
)
def test_without_arguments_the_key_to_set_is_named(
    refused: Refused, command: ModuleType, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(command)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("schedule.sigma_mx=1", "unknown config key schedule.sigma_mx. Did you mean sigma_max?"),
        ("schedule.sigma_max=0", "schedule.sigma_max must be in (0, 10], got 0.0."),
        ("schedule.sigma_max=NaN", "schedule.sigma_max must be a finite number, got nan."),
        ("train.num_workers=5", "train.num_workers (5) must be at most train.global_batch_size (4)"),
        ("train.min_workers=3", "train.min_workers must be from 0 to train.num_workers (2), got 3."),
        ("train.min_workers=1", "train.cpus_per_worker must be a whole number with train.min_workers"),
        ("train.micro_batch_size=0", "train.micro_batch_size must be at least 1, got 0."),
        ("train.num_best_kept=1", "config key train.num_best_kept is of an earlier release."),
        ("optim.weight_decay=Infinity", "optim.weight_decay must be a finite number, got inf."),
        ("inference.tile=64", "inference.tile must exceed inference.overlap by at least"),
        ("train.use_gpu=yes", "train.use_gpu must be true or false, got 'yes'."),
        ("network=3", "network is a section, not a value."),
        ("seed", "--set takes key=value, such as schedule.noise_rho=3, got 'seed'."),
        ("name=a/b", "name may have only letters, digits"),
        ("name=..", "name may have only letters, digits"),
        ("data.eval_crop_size=66", "data.eval_crop_size (66) must be a multiple of network.scale (4)."),
        ("loss.lpips_crop=0.2", "loss.lpips_crop=0.2 leaves 26 of 128 pixels, and LPIPS needs 32."),
        ("loss.dtm_t_max=0.2 optim.dtm_steps=1", "leave no step to compare"),
    ],
)
def test_a_setting_that_is_not_allowed(
    refused: Refused, command: ModuleType, setting: str, message: str
) -> None:
    assert message in refused(command, *setting.split())


def test_gpus_that_this_machine_has_not(
    refused: Refused, good: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # the cluster of other tests may be up
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for command in (train, tune):
        message = refused(command, *good, "train.use_gpu=true")
        assert "train.use_gpu with train.num_workers=2 needs as many GPUs, and this machine has 0." in message


def test_a_preset_or_config_file_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    told = refused(train, options=("--preset", "big"))
    assert f"unknown preset 'big'. Presets: {', '.join(PRESETS)}." in told
    for content, message in (
        (None, "is not a readable JSON file: {file} does not exist. Check the path."),
        ("{'seed': 1}", "is not a readable JSON file: Expecting property name"),
        ("[1]", "config must be a table of keys, got [1]."),
        ('{"sed": 1}', "unknown config key sed. Did you mean seed?"),
    ):
        file = tmp_path / "config.json"
        if content:
            file.write_text(content)
        assert message.format(file=file) in refused(train, options=("--config", str(file)))


@pytest.mark.parametrize(
    ("part", "place", "message"),
    [
        ("train", "s3://no-such-bucket/photos", "its bucket does not exist. Check the name"),
        ("val", "s3://no-such-bucket/photos", "its bucket does not exist. Check the name"),
        ("train", "/no/such/folder", "/no/such/folder does not exist. Check the path."),
        ("train", "ftp://host/photos", "use s3://bucket/path, gs://bucket/path or a local path"),
        (
            "train",
            "{bucket}/notes",
            "no image under {bucket}/notes (1 other files). Supported suffixes: .png",
        ),
        ("train", "{bucket}/nothing", "no image under {bucket}/nothing (0 other files)"),
        (
            "train",
            "{bucket}/broken",
            "1 of 1 pictures checked under {bucket}/broken are unusable. commands/broken/photo.jpg",
        ),
        (
            "val",
            "{bucket}/cut",
            "1 of 6 pictures checked under {bucket}/cut are unusable. commands/cut/cut.png",
        ),
    ],
)
def test_pictures_that_cannot_be_used(
    refused: Refused, good: list[str], bucket: str, part: str, place: str, message: str
) -> None:
    setting = f"data.{part}_uri={place.format(bucket=bucket)}"
    assert message.format(bucket=bucket) in refused(train, *good, setting)
    assert message.format(bucket=bucket) in refused(tune, *good, setting)


def test_pictures_too_small_to_pad(refused: Refused, good: list[str], bucket: str) -> None:
    for setting in ("network.lq_size=64", "data.eval_crop_size=256"):
        message = refused(train, *good, setting)
        assert (
            f"5 of 5 pictures checked under {bucket}/good are unusable. commands/good/astronaut.png"
            in message
        )
        assert "is 128x96 pixels, too small for a crop of 256: each side must be at least 129." in message


def test_test_pictures_that_cannot_be_used(refused: Refused, good: list[str], bucket: str) -> None:
    config = config_of(good)
    write_checkpoint(config, f"{config.run_uri}/checkpoint_1")
    assert "its bucket does not exist" in refused(evaluate, *good, "data.test_uri=s3://no-such-bucket")
    assert "commands/cut/cut.png" in refused(evaluate, *good, f"data.test_uri={bucket}/cut")


def test_scores_by_a_package_that_is_not_there(
    refused: Refused, good: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyiqa_scores, "find_spec", lambda _: None)
    assert "pip install pyiqa" in refused(evaluate, *good, options=("--also", "musiq"))


def test_credentials_that_are_refused(refused: Refused, good: list[str], s3: S3) -> None:
    with s3.as_a_stranger():
        message = refused(train, *good)
    assert "access is denied. Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in message


def test_a_store_that_is_not_there(
    refused: Refused, good: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert "the store cannot be reached. Check AWS_ENDPOINT_URL" in refused(train, *good)


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_tracking_server_that_does_not_answer(
    refused: Refused, good: list[str], silent_server: str
) -> None:
    for address in ("http://127.0.0.1:1", silent_server):
        message = refused(train, *good, options=("--tracking-uri", address))
        assert f"the MLflow server {address} does not answer" in message
    assert "Check tracking_uri" in refused(register, *good, options=("--tracking-uri", "http://127.0.0.1:1"))


def test_a_place_for_runs_that_cannot_be_written(refused: Refused, good: list[str], tmp_path: Path) -> None:
    assert "its bucket does not exist" in refused(train, *good, "storage_uri=s3://no-such-bucket/runs")
    (tmp_path / "taken").touch()
    message = refused(train, *good, f"storage_uri={tmp_path}/taken")
    assert f"cannot use {tmp_path}/taken/ctmsr/config.json" in message


def test_the_config_is_in_the_folder_of_the_run(good: list[str]) -> None:
    config = config_of(good)
    inputs = check_inputs(config)
    assert [len(inputs.train), len(inputs.val)] == [5, 5]
    written = json.loads(Path(config.run_uri, "config.json").read_text())
    assert from_dict(RunConfig, written) == config


def test_a_run_does_not_continue_with_another_config(refused: Refused, good: list[str]) -> None:
    good.append("optim.lr=0.002")
    before = config_of(good)
    write_checkpoint(before, f"{before.run_uri}/checkpoint_1")
    message = refused(train, *good, "network.num_blocks=3", "optim.lr=0.5")
    assert "(network.num_blocks: 2 -> 3, optim.lr: 0.002 -> 0.5)" in message
    assert "set another name to start a new run" in message
    check_inputs(config_of([*good, "optim.lr=0.5"]), fresh=True)
    message = refused(train, *good, "train.global_batch_size=32")
    assert "(train.global_batch_size: 4 -> 32)" in message
    check_inputs(config_of([*good, "train.num_workers=4", "train.max_failures=0"]))
    write_checkpoint(before, f"{before.run_uri}/checkpoint_2", train_version="0123")
    assert "(the pictures of data.train_uri: version 0123 -> " in refused(train, *good)


@pytest.mark.parametrize("command", [evaluate, register])
def test_a_run_without_a_checkpoint(refused: Refused, good: list[str], command: ModuleType) -> None:
    assert "there is no complete checkpoint under" in refused(command, *good)


@pytest.mark.parametrize("command", [evaluate, register])
def test_a_checkpoint_that_cannot_be_used(
    refused: Refused, ray_session: None, good: list[str], command: ModuleType, tmp_path: Path
) -> None:
    config = config_of(good)
    write_checkpoint(config, f"{tmp_path}/damaged")
    Path(tmp_path, "damaged", checkpoint.MODEL_FILE).write_bytes(b"")
    write_checkpoint(config, f"{tmp_path}/shape", weights_of=config_of(["network.model_channels=64"]))
    Path(tmp_path, "model.pth").touch()
    for uri, message in (
        ("s3://commands/none", "s3://commands/none does not exist. Check the path."),
        (f"{tmp_path}/model.pth", f"{tmp_path}/model.pth is a file, not a folder"),
        (f"{tmp_path}/damaged", f"checkpoint {tmp_path}/damaged is damaged: model.safetensors has 0 bytes"),
        (f"{tmp_path}/shape", f"checkpoint {tmp_path}/shape is of another shape than its config: model."),
    ):
        assert message in refused(command, *good, options=("--checkpoint", uri), before_ray=False)


def test_held_out_crops_must_fit_the_scale_of_the_checkpoint(
    refused: Refused, ray_session: None, good: list[str], tmp_path: Path
) -> None:
    write_checkpoint(config_of([*good, "network.scale=3", "data.eval_crop_size=66"]), f"{tmp_path}/x3")
    message = refused(evaluate, *good, options=("--checkpoint", f"{tmp_path}/x3"), before_ray=False)
    assert "data.eval_crop_size (64) must be a multiple of the checkpoint's scale (3)." in message


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tune.sigma_max=[0.1, 50]", "schedule.sigma_max must be in (0, 10], got 50.0."),
        ("tune.noise_rho=[0, 1]", "schedule.noise_rho must be in (0, 20], got 0.0."),
        ("tune.s0=[2, 0]", "schedule.s0 must be in [1, 1000], got 0."),
    ],
)
def test_a_search_space_with_a_schedule_that_is_not_allowed(
    refused: Refused, setting: str, message: str
) -> None:
    printed = refused(tune, setting)
    assert "the search space contains a point that is not allowed, {'schedule.sigma_max': " in printed
    assert message in printed


def test_a_search_space_where_dtm_has_nothing_to_compare(refused: Refused) -> None:
    settings = ("schedule.s1=3", "loss.dtm_t_max=0.5", "tune.dtm_steps=2", "tune.s1=[3, 1]")
    message = refused(tune, *settings)
    assert "'schedule.s1': 1}" in message
    assert "leave no step to compare on a trajectory of 1 steps. Raise dtm_t_max to 1.00 or more." in message


def test_a_search_space_that_is_no_range(refused: Refused) -> None:
    assert "tune.sigma_max must be an increasing range" in refused(tune, "tune.sigma_max=[1, 0.5]")
    assert "tune.sigma_max must be an increasing range" in refused(tune, "tune.sigma_max=[1]")
