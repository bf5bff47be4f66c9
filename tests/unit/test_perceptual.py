"""LPIPS: the known answers, its gradients, and what it refuses to load."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ctmsr.errors import UserError
from ctmsr.perceptual import Lpips, backbone_path, load_lpips


@pytest.fixture(scope="module")
def vgg() -> Lpips:
    return load_lpips("vgg")


def random_pair(*, num_images: int = 1, size: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, num_images, 3, size, size, generator=generator) * 2 - 1
    return a, b


def test_vgg_gives_the_known_answers(vgg: Lpips) -> None:
    draws = np.random.RandomState(123).rand(2, 10, 3, 100, 100).astype(np.float32)
    a, b = torch.from_numpy(draws * 2 - 1)
    known = [0.3497, 0.3494, 0.3473, 0.3558, 0.3437, 0.3366, 0.3716, 0.3516, 0.3472, 0.3413]
    with torch.no_grad():
        torch.testing.assert_close(vgg(a, b), torch.tensor(known), atol=5e-5, rtol=0)


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_equal_images_are_at_distance_zero_and_others_are_not(net: str) -> None:
    lpips = load_lpips(net)  # type: ignore[arg-type]
    a, b = random_pair(num_images=2)
    b[0] = a[0]
    distance = lpips(a, b)
    assert distance[0] == 0
    assert distance[1] > 0.01


def test_the_gradient_reaches_the_image_and_no_weight(vgg: Lpips) -> None:
    a, b = random_pair()
    a.requires_grad_()
    vgg(a, b).sum().backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()
    assert a.grad.abs().sum() > 0
    assert not any(weight.requires_grad for weight in vgg.parameters())


def test_a_step_against_the_gradient_brings_the_images_closer(vgg: Lpips) -> None:
    a, b = random_pair()
    a.requires_grad_()
    before = vgg(a, b)
    (gradient,) = torch.autograd.grad(before, a)
    assert vgg(a.detach() - 0.1 * gradient / gradient.norm(), b) < before


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_it_is_the_package_s_distance_to_the_bit_and_anchored_too(net: str) -> None:
    lpips = load_lpips(net)  # type: ignore[arg-type]
    a, b = random_pair(num_images=2, size=64)
    a.requires_grad_()
    expected = lpips.distance(a, b).flatten()
    (gradient,) = torch.autograd.grad(2 * expected.sum(), a)
    assert torch.equal(lpips(a, b), expected)
    anchored = lpips.anchored(a)
    first, second = anchored(a, b), anchored(a, b)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    torch.testing.assert_close(torch.autograd.grad(first.sum() + second.sum(), a)[0], gradient)


def test_train_mode_and_autocast_change_nothing(vgg: Lpips) -> None:
    a, b = random_pair()
    expected = vgg(a, b)
    parent = torch.nn.ModuleList([vgg]).train()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(parent[0](a, b), expected)


def test_loading_is_quiet_and_leaves_the_random_state(capfd: pytest.CaptureFixture[str]) -> None:
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_lpips("alex")
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")


def test_a_missing_backbone_names_its_path_and_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CTMSR_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"lpips/vgg.safetensors is missing.*python -m pipelines.backbones"):
        load_lpips("vgg")


def test_a_backbone_with_one_wrong_byte_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = backbone_path("alex")
    monkeypatch.setenv("CTMSR_CACHE", str(tmp_path))
    damaged = backbone_path("alex")
    damaged.parent.mkdir()
    shutil.copy(original, damaged)
    with damaged.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(UserError, match=r"alex.safetensors is damaged: sha256 .*pipelines.backbones"):
        load_lpips("alex")


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CTMSR_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert backbone_path("vgg") == tmp_path / ".cache/ctmsr/lpips/vgg.safetensors"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert backbone_path("vgg") == tmp_path / "xdg/ctmsr/lpips/vgg.safetensors"
    monkeypatch.setenv("CTMSR_CACHE", str(tmp_path / "own"))
    assert backbone_path("vgg") == tmp_path / "own/lpips/vgg.safetensors"
