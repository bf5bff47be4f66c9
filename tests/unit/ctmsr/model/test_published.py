"""The authors' `.pth` becomes a checkpoint and comes back byte for byte; any other file is refused."""

import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ctmsr.config import to_dict
from ctmsr.errors import CheckpointError, ConfigError
from ctmsr.model import checkpoint
from ctmsr.model.network import ConsistencyModel, NetworkConfig
from ctmsr.model.published import KEYS, read_pth, write_pth
from pipelines.config.run_config import RunConfig
from pipelines.convert.__main__ import main
from pipelines.convert.run import export_pth, import_pth
from tests.support.tiny import NETWORK

NETWORK_OPTIONS = [
    f"--set=network.{key}={getattr(NETWORK, key)}" for key in ("lq_size", "window_size", "model_channels")
]
NETWORK_OPTIONS += [
    "--set=network.channel_mult=[1,2]",
    "--set=network.num_blocks=1",
    "--set=network.embed_dim=32",
]
NETWORK_OPTIONS += ["--set=network.num_heads=2", "--set=network.dropout=0.0"]


def random_weights(config: NetworkConfig, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator).to(value.dtype)
        for name, value in ConsistencyModel(config).state_dict().items()
    }


def write(path: Path, config: NetworkConfig = NETWORK, **changes: Any) -> Path:
    """A `.pth` of random weights, in the authors' form, with some entries of `params_ema` changed."""
    weights = {key: random_weights(config, seed) for seed, key in enumerate(KEYS)}
    for name, value in changes.items():
        if value is None:
            del weights["params_ema"][name]
        else:
            weights["params_ema"][name] = value
    torch.save(weights, path)
    return path


def content_of(path: Path) -> dict[tuple[str, str], tuple[torch.dtype, bytes]]:
    """Every tensor's dtype and bytes, in order."""
    weights = torch.load(path, weights_only=True)
    return {
        (key, name): (
            value.dtype,
            value.contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else b"",
        )
        for key, state in weights.items()
        for name, value in state.items()
    }


@pytest.mark.parametrize(
    "config", [NETWORK, pytest.param(NetworkConfig(), marks=pytest.mark.slow)], ids=["small", "published"]
)
def test_there_and_back_every_byte_is_the_same(tmp_path: Path, config: NetworkConfig) -> None:
    source, target = write(tmp_path / "a.pth", config), tmp_path / "b.pth"
    import_pth(source, tmp_path / "ours", RunConfig(network=config))
    export_pth(tmp_path / "ours", target)
    before, after = content_of(source), content_of(target)
    assert before == after
    assert list(before) == list(after)
    assert len(before) == 2 * len(ConsistencyModel(config).state_dict())


def test_the_command_imports_and_what_is_released_is_the_ema(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "a.pth")
    assert main([str(source), str(tmp_path / "ours"), *NETWORK_OPTIONS]) == 0
    assert "next: python -m pipelines.evaluate" in capsys.readouterr().out
    model, manifest = checkpoint.load_model(tmp_path / "ours")
    expected = read_pth(source, model.state_dict())["params_ema"]
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert manifest.meta == {"converted_from": "a.pth"}
    assert main([str(tmp_path / "ours"), str(tmp_path / "b.pth")]) == 0
    with pytest.raises(CheckpointError, match="already exists"):
        main([str(tmp_path / "ours"), str(tmp_path / "b.pth")])


def test_a_released_checkpoint_gives_its_ema_twice(tmp_path: Path) -> None:
    weights = random_weights(NETWORK, 3)
    checkpoint.save(tmp_path / "c", model=weights, config={"network": to_dict(NETWORK)}, meta={})
    export_pth(tmp_path / "c", tmp_path / "c.pth")
    content = torch.load(tmp_path / "c.pth", weights_only=True)
    assert all(torch.equal(content[key][name], value) for key in KEYS for name, value in weights.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.conv_last.bias": None},
            r"params_ema of .* 1 entries differ: model\.conv_last\.bias is missing",
        ),
        ({"model.more": torch.zeros(1)}, r"model\.more is not in the network"),
        (
            {"model.conv_last.bias": torch.zeros(4)},
            r"model\.conv_last\.bias has shape \(4,\) instead of \(3,\)",
        ),
        (
            {"model.conv_last.bias": torch.zeros(3).half()},
            r"bias is torch\.float16 instead of torch\.float32",
        ),
    ],
)
def test_another_network_is_refused_entry_by_entry(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        import_pth(write(tmp_path / "a.pth", **changes), tmp_path / "c", RunConfig(network=NETWORK))
    assert not (tmp_path / "c").exists()


class Evil:
    """Would run a command if it were unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("/tmp/ctmsr-was-here", "w"))


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    expected = ConsistencyModel(NETWORK).state_dict()
    whole = write(tmp_path / "whole.pth").read_bytes()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("hello.txt", "hello")
    evil, other = io.BytesIO(), io.BytesIO()
    torch.save({"params": Evil(), "params_ema": {}}, evil)
    torch.save({"state_dict": {}}, other)
    cases = {
        "empty": (b"", "is not a checkpoint"),
        "text": (b"not a checkpoint", "is not a checkpoint"),
        "truncated": (whole[: len(whole) // 2], "is not a checkpoint"),
        "archive": (archive.getvalue(), "is damaged"),
        "evil": (evil.getvalue(), "more than tensors"),
        "other": (other.getvalue(), "must hold the keys params and params_ema, but holds state_dict"),
    }
    for name, (data, message) in cases.items():
        path = tmp_path / f"{name}.pth"
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            read_pth(path, expected)
    assert not Path("/tmp/ctmsr-was-here").exists()
    with pytest.raises(CheckpointError, match="there is no file"):
        read_pth(tmp_path / "absent.pth", expected)


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="pickle"):
        write_pth(tmp_path / "a.pth", {"x": lambda: None}, {})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []


def test_one_side_must_be_a_pth(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"one of source and target must be a \.pth file"):
        main([str(tmp_path / "a"), str(tmp_path / "b")])
